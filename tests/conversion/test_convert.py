"""Conversions: there and back, cut, and loaded by models."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

from configuration_minimax_m3 import MiniMaxM3VLConfig, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.conversion.convert import Conversion, serving_report
from modeling_minimax_m3.conversion.layouts import module_name
from modeling_minimax_m3.conversion.source import open_checkpoint
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8

pytestmark = pytest.mark.compatibility

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
TEXT = "language_model."


def load(folder, model_class=AutoModelForImageTextToText, **options):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert info == NOTHING
    return model.eval()


def weights_of(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in contents.items() if "safetensors" in name or name == "config.json"}


def test_layout_there_and_back_gives_the_same_bytes(synthetic, converted, contents, tmp_path):
    source = synthetic["bf16"]
    modules = converted(source, tmp_path / "modules", layout="modules")
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in open_names(modules))
    back = converted(modules, tmp_path / "back", layout="released")
    assert weights_of(contents(back)) == weights_of(contents(source))
    assert (back / "README.md").read_bytes() == (source / "README.md").read_bytes()


@pytest.mark.parametrize("layout", ["modules", "text"])
def test_fused_mxfp8_means_the_same_to_our_models(synthetic, converted, contents, layout, tmp_path):
    """Kept in MXFP8 and dequantized. Stock would not find the scales of fused experts."""
    fused = converted(synthetic["mxfp8"], tmp_path / "fused", layout=layout)
    plain = converted(synthetic["mxfp8"], tmp_path / "plain", layout=layout, precision="bf16")
    auto_class = AutoModelForCausalLM if layout == "text" else AutoModelForImageTextToText
    ids = torch.randint(2, 400, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(plain, auto_class)(input_ids=ids).logits
        assert torch.equal(load(fused, auto_class)(input_ids=ids).logits, expected)
        options = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
        assert torch.equal(load(fused, auto_class, **options)(input_ids=ids).logits, expected)
    back = {"layout": "released", "vision_from": synthetic["mxfp8"] if layout == "text" else None}
    shards = {name: content for name, content in contents(synthetic["mxfp8"]).items() if "safetensors" in name}
    back = contents(converted(fused, tmp_path / "back", **back))
    assert shards == {name: content for name, content in back.items() if "safetensors" in name}


def open_names(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_modules_layout_is_what_the_model_saves(synthetic, converted, read, tmp_path):
    model = load(synthetic["bf16"])
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    saved, ours = read(tmp_path / "saved"), read(converted(synthetic["bf16"], tmp_path / "ours", layout="modules"))
    assert set(saved) == set(ours)
    for name, tensor in ours.items():  # a loaded model has its routers in the dtype of the rest
        assert torch.equal(tensor.to(saved[name].dtype), saved[name]), name
    reloaded = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def test_fused_mxfp8_files_that_were_stacked_by_hand_are_read(synthetic, converted, read, tmp_path):
    stored, fused = read(synthetic["mxfp8"]), {}
    for name, tensor in stored.items():
        weight = name.removesuffix("_scale_inv")
        fused[module_name(weight) + name[len(weight) :]] = tensor
    for layer in range(1, 4):
        for scale in ("", "_scale_inv"):
            w1, w2, w3 = (
                [
                    stored[f"{TEXT}model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight{scale}"]
                    for e in range(4)
                ]
                for w in ("w1", "w2", "w3")
            )
            experts = f"model.language_model.layers.{layer}.mlp.experts."
            fused[f"{experts}gate_up_proj{scale}"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3)])
            fused[f"{experts}down_proj{scale}"] = torch.stack(w2)
    for layer in range(4):
        mlp = ("mlp.", "mlp.") if layer == 0 else ("block_sparse_moe.shared_experts.", "mlp.shared_experts.")
        for scale in ("", "_scale_inv"):
            parts = [stored[f"{TEXT}model.layers.{layer}.{mlp[0]}{p}_proj.weight{scale}"] for p in ("gate", "up")]
            fused[f"model.language_model.layers.{layer}.{mlp[1]}gate_up_proj.weight{scale}"] = torch.cat(parts)
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_bytes((synthetic["mxfp8"] / "config.json").read_bytes())
    back = read(converted(tmp_path / "fused", tmp_path / "back", layout="released"))
    assert set(back) == set(stored)
    assert all(torch.equal(back[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)


def test_text_layout_and_back(synthetic, converted, contents, tmp_path):
    source = synthetic["bf16"]
    text = converted(source, tmp_path / "text", layout="text")
    alone, whole = load(text, AutoModelForCausalLM), load(source)
    assert alone.config.model_type == "minimax_m3_vl_text"
    of_whole = {name.replace("model.language_model.", "model."): v for name, v in whole.state_dict().items()}
    assert all(torch.equal(tensor, of_whole[name]) for name, tensor in alone.state_dict().items())
    with pytest.raises(ValueError, match="without a vision tower.*--vision_from"):
        converted(text, tmp_path / "back", layout="released")
    back = converted(text, tmp_path / "back", layout="released", vision_from=source)
    shards = {name: content for name, content in contents(source).items() if "safetensors" in name}
    assert shards == {name: content for name, content in contents(back).items() if "safetensors" in name}
    config, expected = (MiniMaxM3VLConfig.from_pretrained(folder).text_config for folder in (back, source))
    assert (config.layer_types, config.num_local_experts) == (expected.layer_types, expected.num_local_experts)


def test_vision_from_must_fit(synthetic, converted, tmp_path):
    text = converted(synthetic["bf16"], tmp_path / "text", layout="text")
    other = tmp_path / "other"
    MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"hidden_size": 96})).save_pretrained(other)
    with pytest.raises(ValueError, match="`vision_from` must have the language model's hidden_size, 64, got 96"):
        converted(text, tmp_path / "back", layout="released", vision_from=other)
    with pytest.raises(ValueError, match="`vision_from` must be a whole model's checkpoint"):
        converted(synthetic["bf16"], tmp_path / "back", vision_from=synthetic["bf16"])


def test_mxfp8_to_bf16_and_back_keeps_every_number(synthetic, converted, read, tmp_path):
    stored = read(synthetic["mxfp8"])
    plain = converted(synthetic["mxfp8"], tmp_path / "plain", precision="bf16")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    again = read(converted(plain, tmp_path / "again", precision="mxfp8"))
    assert set(again) == set(stored)
    numbers = read(plain)
    for name, tensor in numbers.items():
        scale = f"{name}_scale_inv"
        if scale in stored:
            for form in (stored, again):
                meant = dequantize_mxfp8(form[name], form[scale], torch.bfloat16)
                assert torch.equal(meant, tensor) and tensor.dtype == torch.bfloat16, name
        else:
            assert torch.equal(stored[name], tensor) and torch.equal(again[name], tensor), name


def test_bf16_to_mxfp8_is_what_the_generator_writes(synthetic, converted, contents, tmp_path):
    made = converted(synthetic["bf16"], tmp_path / "made", precision="mxfp8")
    assert weights_of(contents(made)) == weights_of(contents(synthetic["mxfp8"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_of_a_saved_model(converted, read, dtype, tmp_path):
    torch.manual_seed(0)
    MiniMaxM3SparseForConditionalGeneration(tiny_config()).to(dtype).save_pretrained(tmp_path / "saved")
    same = read(converted(tmp_path / "saved", tmp_path / "modules", layout="modules"))
    assert {tensor.dtype for tensor in same.values()} == {dtype}
    back = converted(tmp_path / "modules", tmp_path / "back", layout="released", max_shard_size=10**9)
    saved, back = load_file(tmp_path / "saved" / "model.safetensors"), load_file(back / "model.safetensors")
    assert set(saved) == set(back) and all(torch.equal(tensor, back[name]) for name, tensor in saved.items())
    quantized = read(converted(tmp_path / "saved", tmp_path / "mxfp8", precision="mxfp8"))
    name = f"{TEXT}model.layers.1.block_sparse_moe.experts.0.w2.weight"
    error = dequantize_mxfp8(quantized[name], quantized[f"{name}_scale_inv"], torch.float32) - saved[name].float()
    assert error.abs().max() <= saved[name].float().abs().max() * 2**-4


@pytest.mark.parametrize(
    ("precision", "layout"), [("bf16", "released"), ("bf16", "modules"), ("bf16", "text"), ("mxfp8", "released")]
)
def test_first_layers_and_experts(synthetic, converted, read, precision, layout, tmp_path):
    """The result is the first layers of the source, and each is cut the same from any layout."""
    source = converted(synthetic[precision], tmp_path / "source", layout=layout)
    few = converted(source, tmp_path / "few", layers=3, experts=2)
    if layout != "released":
        back = {"layout": "released", "vision_from": synthetic[precision] if layout == "text" else None}
        few = converted(few, tmp_path / "back", **back)
    whole, cut = read(synthetic[precision]), read(few)
    expected = {}
    for name, tensor in whole.items():
        if f"{TEXT}model.layers.3." in name or ".experts.2." in name or ".experts.3." in name:
            continue
        is_router = name.endswith((".block_sparse_moe.gate.weight", ".e_score_correction_bias"))
        expected[name] = tensor[:2] if is_router else tensor
    assert set(cut) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(cut[name].view(torch.uint8), tensor.view(torch.uint8)), name

    content = json.loads((few / "config.json").read_text())
    text = content["text_config"]
    assert text["moe_layer_freq"] == [0, 1, 1] and text["num_experts_per_tok"] == 2
    assert text["sparse_attention_config"]["sparse_attention_freq"] == [0, 0, 1]
    assert text["sparse_attention_config"]["sparse_disable_index_value"] == [0, 0, 1]
    if precision == "mxfp8":
        ignored = content["quantization_config"]["ignored_layers"]
        assert f"{TEXT}model.layers.2.block_sparse_moe.gate" in ignored
        assert f"{TEXT}model.layers.3.block_sparse_moe.gate" not in ignored
        load(few, quantization_config=FineGrainedFP8Config(dequantize=True))
    else:
        load(few)


def test_one_expert_and_one_layer(synthetic, converted, tmp_path):
    few = converted(synthetic["bf16"], tmp_path / "few", layers=2, experts=1)
    model = load(few)
    assert model.config.text_config.num_experts_per_tok == 1
    out = model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 7)
    assert load(converted(synthetic["bf16"], tmp_path / "one", layers=1)).config.text_config.num_hidden_layers == 1


def test_shards_are_filled_in_order(synthetic, converted, tmp_path):
    folder = converted(synthetic["bf16"], tmp_path / "small", max_shard_size=50_000)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000 or len(tensors) == 1
    whole = converted(synthetic["bf16"], tmp_path / "whole", max_shard_size=10**9)
    assert [file.name for file in whole.glob("*.safetensors*")] == ["model.safetensors"]
    load(folder)
    load(whole)


def test_values_that_mxfp8_cannot_hold_are_named(converted, tmp_path):
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config())
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.o_proj.weight[3, 3] = math.inf
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"layers.2.self_attn.o_proj.weight cannot be stored in MXFP8.*finite"):
        converted(tmp_path / "saved", tmp_path / "out", precision="mxfp8")
    assert not (tmp_path / "out").exists()


def test_bad_conversions_are_named(synthetic, converted, tmp_path):
    for options, message in (
        ({"layout": "fused"}, "`layout` must be one of released, modules, text or None, got 'fused'"),
        ({"precision": "int4"}, "`precision` must be one of bf16, mxfp8 or None, got 'int4'"),
        ({"max_shard_size": 0}, "`max_shard_size` must be a positive number of bytes, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Conversion(**options)
    with pytest.raises(ValueError, match="`layers` must be from 1 to 4, the number in the source, got 9"):
        converted(synthetic["bf16"], tmp_path / "out", layers=9)
    with pytest.raises(ValueError, match="`target` must be another folder"):
        converted(synthetic["bf16"], synthetic["bf16"], overwrite=True)


def test_columns_that_mxfp8_cannot_group_are_named(converted, tmp_path):
    config = tiny_config(text={"hidden_size": 72, "num_hidden_layers": 1})
    MiniMaxM3SparseForConditionalGeneration(config).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight has 72 columns.*multiple of 32"):
        converted(tmp_path / "saved", tmp_path / "out", precision="mxfp8")
    assert not list(tmp_path.glob("out*"))


def test_serving_report(synthetic, converted, tmp_path):
    assert serving_report(open_checkpoint(synthetic["mxfp8"])) == []
    modules = converted(synthetic["bf16"], tmp_path / "modules", layout="modules")
    assert "'modules'" in serving_report(open_checkpoint(modules))[0]
