"""An indexers' loss that can train nothing warns, and the pass runs: training adapters alone is legal."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.models import text as text_module

TOKENS = torch.arange(1, 41)[None]


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """All warnings of the text model, repeated ones included."""
    messages = []
    monkeypatch.setattr(text_module.logger, "warning_once", messages.append)
    return messages


def make(model_class: type) -> torch.nn.Module:
    config = tiny_config()
    return model_class(config.text_config if model_class is MiniMaxM3VLForCausalLM else config).train()


def index_gradients(model: torch.nn.Module) -> int:
    model(TOKENS, labels=TOKENS).loss.backward()
    return sum(p.grad is not None for name, p in model.named_parameters() if ".indexer." in name)


@pytest.mark.parametrize("model_class", [MiniMaxM3VLForCausalLM, MiniMaxM3SparseForConditionalGeneration])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_coefficient_set_on_the_config_alone_is_named(model_class, checkpointing, warned):
    model = make(model_class)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.config.get_text_config().indexer_loss_coef = 1.0
    assert index_gradients(model) == 0
    assert len(warned) == 1
    assert "`indexer_loss_coef` is 1.0" in warned[0] and "`model.set_indexer_training(1.0)`" in warned[0]

    warned.clear()
    model.set_indexer_training(1.0)
    assert index_gradients(model) > 0
    assert not warned


def test_silent_where_nothing_is_trained(warned):
    model = make(MiniMaxM3VLForCausalLM)
    model(TOKENS, labels=TOKENS, output_indexer_loss=True)  # requested, and not added
    model.config.indexer_loss_coef = 1.0
    with torch.no_grad():
        model(TOKENS, labels=TOKENS)
    model.eval()(TOKENS, labels=TOKENS)
    assert not warned


@pytest.mark.parametrize(("targets", "warnings"), [(r".*self_attn\.q_proj", 1), (r".*indexer\.q_proj", 0)])
def test_adapters(targets, warnings, warned):
    """Adapters freeze the indexers, whatever the coefficient, unless the adapters sit in them."""
    model = make(MiniMaxM3VLForCausalLM)
    model.set_indexer_training(1.0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert loss.isfinite()
    assert len(warned) == warnings


@pytest.mark.parametrize(("coef", "warmup"), [(-1.0, False), (float("nan"), False), (0.5, "yes")])
def test_a_refused_switch_changes_nothing(coef, warmup):
    model = make(MiniMaxM3VLForCausalLM)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(StrictDataclassError):
        model.set_indexer_training(coef, warmup=warmup)
    assert model.config.to_dict() == before
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".indexer." in name)
