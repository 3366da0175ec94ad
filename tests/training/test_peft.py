"""Adapters of PEFT on every part of the model, kept, reloaded, merged, and loaded on a stock model."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock_configuration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock_modeling

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.text import MiniMaxM3VLForCausalLM

PARTS = {
    "attention": {"target_modules": r".*self_attn\.[qkvo]_proj"},
    "indexer": {"target_modules": r".*indexer\.[qk]_proj"},
    "dense and shared MLPs": {"target_modules": r".*(mlp|shared_experts)\.(gate_up_proj|down_proj)"},
    "routed experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "all linear": {"target_modules": "all-linear"},
    "attention and experts": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "attention and head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config().text_config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(2, 400, (2, 70), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def adapted(base, part, kind="lora", **options):
    """A copy of the model with adapters whose random weights change its output."""
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **PARTS[part], **KINDS[kind], **options)
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def kinds_of(part):
    # DoRA of PEFT takes no bare parameters, which the routed experts are.
    return [kind for kind in KINDS if kind != "dora" or "target_parameters" not in PARTS[part]]


@pytest.mark.parametrize("part, kind", [(part, kind) for part in PARTS for kind in kinds_of(part)])
def test_gradients_merging_and_reloading(base, batch, part, kind, tmp_path):
    model = adapted(base, part, kind)
    expected = logits_of(model, batch)
    if part != "indexer":  # an indexer changes only which blocks are taken
        assert not torch.allclose(expected, logits_of(base, batch), atol=1e-3)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded, batch), expected, rtol=0, atol=0)

    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_trained(base, batch, part, coef):
    """Every trainable weight gets a gradient, as data parallelism demands, and nothing else does."""
    model = copy.deepcopy(base)
    model.set_indexer_training(coef)
    model = adapted(model, part).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    model(**batch).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable
    if coef:
        touched = [name for name in trainable if "indexer" in name]
        assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in touched if "lora_A" not in name)


@pytest.mark.parametrize("part", PARTS)
def test_adapters_load_on_a_stock_model(base, batch, part, tmp_path):
    """Parameters have stock's names, so an adapter trained here serves there."""
    adapted(base, part).save_pretrained(tmp_path)
    stock_config = stock_configuration.MiniMaxM3VLTextConfig(**base.config.to_dict())
    stock = stock_modeling.MiniMaxM3VLForCausalLM(stock_config)
    stock.load_state_dict(base.state_dict())
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    theirs = PeftModel.from_pretrained(stock, tmp_path).eval()
    torch.testing.assert_close(logits_of(ours, batch), logits_of(theirs, batch), rtol=1e-4, atol=1e-4)


def test_dora_takes_no_bare_parameters(base):
    """Where this fails PEFT has learned it, and `kinds_of` should try it."""
    with pytest.raises(ValueError, match="use_dora"):
        adapted(base, "routed experts", "dora")
