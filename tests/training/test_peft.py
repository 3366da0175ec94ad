"""Adapters of PEFT on every part of the models, kept, reloaded, merged, and loaded on a stock model."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock_configuration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock_modeling

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention
from modeling_minimax_m3.layers.indexer import MiniMaxM3VLIndexer
from modeling_minimax_m3.layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

pytestmark = pytest.mark.compatibility

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def read_snippet() -> str:
    """The Python snippet of docs/training.md that names the parts."""
    (snippet,) = re.findall(
        r"^```python\n(parts = .*?)^```$", DOCUMENTATION.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return snippet


def documented_parts() -> dict[str, dict]:
    """The snippet's arguments of LoraConfig for each part."""
    namespace = {"model": None, "LoraConfig": LoraConfig, "get_peft_model": lambda model, config: model}
    exec(compile(read_snippet(), str(DOCUMENTATION), "exec"), namespace)
    return namespace["parts"]


DOCUMENTED = documented_parts()
PARTS = {
    **DOCUMENTED,
    "attention and experts": {**DOCUMENTED["routed experts"], **DOCUMENTED["attention"]},
    "attention and head": {**DOCUMENTED["attention"], "modules_to_save": ["lm_head"]},
}
# What a part is, without its pattern: kinds of linear layers' parents, and kinds of modules with bare parameters.
IS_IN_PART = {
    "attention": lambda parent, module: isinstance(parent, MiniMaxM3VLAttention),
    "indexers": lambda parent, module: isinstance(parent, MiniMaxM3VLIndexer),
    "dense and shared MLPs": lambda parent, module: isinstance(parent, MiniMaxM3VLDenseMLP),
    "routed experts": lambda parent, module: isinstance(module, MiniMaxM3VLExperts),
    "all linear layers of the language model but the head": lambda parent, module: isinstance(
        parent, (MiniMaxM3VLAttention, MiniMaxM3VLIndexer, MiniMaxM3VLDenseMLP)
    ),
}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


# Each model with its stock twin, as functions of the configuration.
MODELS = {
    "text": (
        lambda config: MiniMaxM3VLForCausalLM(config.text_config),
        lambda config: stock_modeling.MiniMaxM3VLForCausalLM(
            stock_configuration.MiniMaxM3VLTextConfig(**config.text_config.to_dict())
        ),
    ),
    "composite": (
        MiniMaxM3SparseForConditionalGeneration,
        lambda config: stock_modeling.MiniMaxM3SparseForConditionalGeneration(
            stock_configuration.MiniMaxM3VLConfig(**config.to_dict())
        ),
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def name_of_base(request):
    return request.param


@pytest.fixture(scope="module")
def base(name_of_base):
    torch.manual_seed(0)
    return MODELS[name_of_base][0](tiny_config()).eval()


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


def adapted_modules(model):
    """Names of the modules of the base model that have an adapter."""
    names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names}


def test_documented_snippet_runs(base):
    namespace = {"model": copy.deepcopy(base), "LoraConfig": LoraConfig, "get_peft_model": get_peft_model}
    exec(compile(read_snippet(), str(DOCUMENTATION), "exec"), namespace)
    assert isinstance(namespace["model"], PeftModel)


def test_every_documented_part_is_tested():
    assert IS_IN_PART.keys() == DOCUMENTED.keys()


@pytest.mark.parametrize("part", DOCUMENTED)
def test_parts_are_what_their_name_says(base, part):
    """On the composite model as well, whose vision tower has modules of the same names."""
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, MiniMaxM3VLExperts))
        and IS_IN_PART[part](base.get_submodule(name.rpartition(".")[0]), module)
    }
    assert expected
    assert adapted_modules(adapted(base, part)) == expected


def test_all_linear_of_peft_takes_the_tower(base, name_of_base):
    """That is the default, as the documentation says."""
    (excluded,) = re.findall(r'`exclude_modules=r"(.*?)"`', DOCUMENTATION.read_text("utf-8"))
    language = adapted_modules(adapted(base, "all linear layers of the language model but the head"))

    def taken(**options):
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        return adapted_modules(get_peft_model(copy.deepcopy(base), config))

    assert any("vision_tower" in name for name in taken()) == (name_of_base == "composite")
    assert taken(exclude_modules=excluded) == language


@pytest.mark.parametrize(
    "name_of_base, part, kind",
    [("text", part, kind) for part in PARTS for kind in kinds_of(part)]
    + [("composite", part, "lora") for part in PARTS],
    indirect=["name_of_base"],
)
def test_gradients_merging_and_reloading(base, batch, part, kind, tmp_path):
    model = adapted(base, part, kind)
    expected = logits_of(model, batch)
    if part != "indexers":  # an indexer changes only which blocks are taken
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
def test_adapters_load_on_a_stock_model(base, name_of_base, batch, part, tmp_path):
    """Parameters have stock's names, so an adapter trained here serves there."""
    adapted(base, part).save_pretrained(tmp_path)
    stock = MODELS[name_of_base][1](tiny_config())
    stock.load_state_dict(base.state_dict())
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    theirs = PeftModel.from_pretrained(stock, tmp_path).eval()
    torch.testing.assert_close(logits_of(ours, batch), logits_of(theirs, batch), rtol=1e-4, atol=1e-4)


def test_dora_takes_no_bare_parameters(base):
    """If this fails, PEFT supports it now, and `kinds_of` should try it."""
    with pytest.raises(ValueError, match="use_dora"):
        adapted(base, "routed experts", "dora")
