"""A part takes its weights from a whole model's checkpoint, and a checkpoint without weights for it is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from configuration_minimax_m3 import MiniMaxM3VLConfig, tiny_config
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLModel,
    MiniMaxM3VLTextModel,
    MiniMaxM3VLVisionModel,
)

pytestmark = pytest.mark.compatibility

PARTS = {"text": MiniMaxM3VLTextModel, "text with head": MiniMaxM3VLForCausalLM, "vision": MiniMaxM3VLVisionModel}
WHOLE = MiniMaxM3SparseForConditionalGeneration


@pytest.fixture(scope="module")
def pair(make_pair):
    """A whole model of stock and one of ours with the same weights, each larger than a fresh one's."""
    return make_pair(WHOLE, tiny_config())


@pytest.fixture(scope="module")
def whole(pair):
    return pair[1]


def weights_of(whole, part: str) -> dict[str, torch.Tensor]:
    if part == "vision":
        return whole.model.vision_tower.state_dict()
    body = whole.model.language_model.state_dict()
    if part == "text":
        return body
    return {f"model.{name}": tensor for name, tensor in body.items()} | {"lm_head.weight": whole.lm_head.weight}


def assert_holds(model, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def part_config(part: str):
    config = tiny_config()
    return config.vision_config if part == "vision" else config.text_config


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("saved_by", ["ours", "ours in shards", "stock"])
@pytest.mark.parametrize("with_config", [False, True], ids=["config of the folder", "config of its own"])
def test_part_of_a_whole_checkpoint(pair, part, saved_by, with_config, tmp_path):
    options = {"max_shard_size": "100KB"} if "shards" in saved_by else {}
    pair[0 if saved_by == "stock" else 1].save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not options
    given = {"config": part_config(part)} if with_config else {}
    loaded, info = PARTS[part].from_pretrained(tmp_path, output_loading_info=True, **given)
    assert_holds(loaded, weights_of(pair[1], part))
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == (
        {"lm_head.weight"} if part == "text" else set()
    )  # as from a text checkpoint


@pytest.mark.parametrize("part", ["text", "vision"])
def test_part_of_a_whole_model_without_a_head(whole, part, tmp_path):
    whole.model.save_pretrained(tmp_path / "in memory")
    MiniMaxM3VLModel.from_pretrained(tmp_path / "in memory").save_pretrained(tmp_path / "loaded")
    for folder in ("in memory", "loaded"):
        assert_holds(PARTS[part].from_pretrained(tmp_path / folder), weights_of(whole, part))


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_state_dict(whole, part, tmp_path):
    """By the names in memory and by those on disk."""
    whole.save_pretrained(tmp_path)
    for tensors in (whole.state_dict(), load_file(tmp_path / "model.safetensors")):
        loaded = PARTS[part].from_pretrained(None, config=part_config(part), state_dict=tensors)
        assert_holds(loaded, weights_of(whole, part))


def test_auto_classes_take_the_config_of_a_part(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    config = MiniMaxM3VLConfig.from_pretrained(tmp_path)
    for auto_class, config_of_part, part in (
        (AutoModelForCausalLM, config.text_config, "text with head"),
        (AutoModel, config.text_config, "text"),
        (AutoModel, config.vision_config, "vision"),
    ):
        loaded = auto_class.from_pretrained(tmp_path, config=config_of_part)
        assert type(loaded) is PARTS[part]
        assert_holds(loaded, weights_of(whole, part))


@pytest.mark.parametrize("part", PARTS)
def test_part_is_saved_by_the_names_of_its_modules(stock, whole, part, tmp_path):
    """Stock, which knows only those names for a part, reads a part that was taken from a whole model."""
    whole.save_pretrained(tmp_path / "whole")
    PARTS[part].from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "part")
    with safe_open(tmp_path / "part" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == weights_of(whole, part).keys()
    assert_holds(PARTS[part].from_pretrained(tmp_path / "part"), weights_of(whole, part))
    of_stock = getattr(stock, PARTS[part].__name__).from_pretrained(tmp_path / "part")
    assert_holds(of_stock, weights_of(whole, part))


def test_same_logits_as_the_whole_model(whole, make_tokens, tmp_path):
    whole.save_pretrained(tmp_path)
    part = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path)
    tokens = make_tokens(part.config, 1, 50)
    with torch.no_grad():
        assert torch.equal(part(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("with_config", [False, True], ids=["config of the folder", "config of its own"])
def test_embeddings_tied_at_the_top_of_the_file(with_config, tmp_path):
    WHOLE(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["tie_word_embeddings"] = False  # as stock writes it
    path.write_text(json.dumps(content))
    given = {"config": MiniMaxM3VLConfig.from_pretrained(tmp_path).text_config} if with_config else {}
    loaded = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, **given)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("whole_class", [WHOLE, MiniMaxM3VLModel])
@pytest.mark.parametrize("part", PARTS)
def test_part_is_no_whole_model(whole_class, part, tmp_path):
    PARTS[part](part_config(part)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`model_type` must be 'minimax_m3_vl' for a MiniMaxM3VLConfig, got 'minimax_m3"
    ):
        whole_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no weight of the .*no checkpoint of a {whole_class.__name__}"):
        whole_class.from_pretrained(tmp_path, config=tiny_config())


def test_whole_model_without_one_of_its_parts(whole, tmp_path):
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if "vision_tower" not in name}
    with pytest.raises(ValueError, match="no weight of the MiniMaxM3VLVisionModel at `model.vision_tower`"):
        WHOLE.from_pretrained(None, config=tiny_config(), state_dict=tensors)


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_quantized_checkpoint_is_refused(whole, part, tmp_path):
    """The weights have the expected shapes, so without their scales they would be wrong, and no error would say so."""
    whole.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    scales = {
        f"{name}_scale_inv": torch.ones(1)
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and ("_proj" in name or "fc1" in name)
    }
    save_file(tensors | scales, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="quantized.*cannot take a part of, got .*weight_scale_inv"):
        PARTS[part].from_pretrained(tmp_path)


def test_some_missing_weights_are_random_as_in_stock(whole):
    """A warning names them. An empty state dict means random weights."""
    tensors = whole.state_dict()
    missing = "model.language_model.layers.1.mlp.gate.weight"
    del tensors[missing]
    _, info = WHOLE.from_pretrained(None, config=tiny_config(), state_dict=tensors, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    empty, info = WHOLE.from_pretrained(None, config=tiny_config(), state_dict={}, output_loading_info=True)
    assert set(info["missing_keys"]) == empty.state_dict().keys()


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="too old for Transformers' adapters")
def test_adapters_are_no_part(tmp_path: Path):
    model = MiniMaxM3VLForCausalLM(part_config("text"))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.save_pretrained(tmp_path)
    fresh = MiniMaxM3VLForCausalLM(part_config("text"))
    fresh.load_adapter(str(tmp_path))
    expected = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    actual = {name: tensor for name, tensor in fresh.state_dict().items() if "lora_" in name}
    assert expected and actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
