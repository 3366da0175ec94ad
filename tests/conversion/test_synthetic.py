"""Synthetic checkpoints have the released layout, say that they are synthetic, and load everywhere."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock

from configuration_minimax_m3 import MiniMaxM3VLConfig, released_config, tiny_config
from modeling_minimax_m3.conversion.layouts import released_dtype, released_shapes
from modeling_minimax_m3.conversion.synthetic import make_synthetic_checkpoint, released_content
from modeling_minimax_m3.mxfp8 import quantize_mxfp8

pytestmark = pytest.mark.compatibility

# The keys of the published config.json. Those of `text_config` without token ids, which it does not have.
RELEASED_TEXT_KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_gemma_norm",
    "attention_output_gate",
    "rope_theta",
    "rotary_dim",
    "partial_rotary_factor",
    "hidden_act",
    "use_qk_norm",
    "tie_word_embeddings",
    "dense_intermediate_size",
    "shared_intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "scoring_func",
    "use_routing_bias",
    "moe_layer_freq",
    "qk_norm_type",
    "swiglu_alpha",
    "swiglu_limit",
    "routed_scaling_factor",
    "sparse_attention_config",
]
RELEASED_SPARSE_KEYS = [
    "use_sparse_attention",
    "sparse_index_dim",
    "sparse_num_index_heads",
    "sparse_topk_blocks",
    "sparse_block_size",
    "sparse_disable_index_value",
    "sparse_score_type",
    "sparse_init_block",
    "sparse_local_block",
    "sparse_attention_freq",
]
RELEASED_VISION_KEYS = [
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "patch_size",
    "image_size",
    "position_embedding_type",
    "rope_mode",
    "rope_theta",
    "attention_dropout",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "img_token_compression_config",
    "vision_segment_max_frames",
]
NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def make(folder: Path, config=None, **options) -> Path:
    make_synthetic_checkpoint(folder, config or tiny_config(), show_progress=False, **options)
    return folder


def logits_of(model) -> torch.Tensor:
    ids = torch.randint(2, 400, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.float().eval()(input_ids=ids).logits


def test_bf16_files(synthetic, read):
    tensors = read(synthetic["bf16"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == released_shapes(tiny_config())
    assert all(tensor.dtype == released_dtype(name) for name, tensor in tensors.items())
    index = json.loads((synthetic["bf16"] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    sizes = {file.name: file.stat().st_size for file in synthetic["bf16"].glob("*.safetensors")}
    assert sorted(sizes) == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]
    assert len(sizes) > 1


def test_mxfp8_values_are_those_of_the_bf16_weights(synthetic, read):
    plain, stored = read(synthetic["bf16"]), read(synthetic["mxfp8"])
    quantized = {name for name in stored if stored[name].dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in quantized} | set(plain) == set(stored)
    layers = {
        name for name, tensor in plain.items() if ".layers." in name and "vision" not in name and tensor.ndim > 1
    }
    assert quantized == {name for name in layers if not name.endswith(".gate.weight")}
    for name, tensor in plain.items():
        if name in quantized:
            values, scales = quantize_mxfp8(tensor)
            assert torch.equal(stored[name].float(), values.float()), name
            assert torch.equal(stored[f"{name}_scale_inv"], scales), name
        else:
            assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype, name


def test_config_has_the_released_keys():
    content = released_content(released_config())
    own = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "attention_dropout", "initializer_range"}
    own |= {"router_jitter_noise", "router_aux_loss_coef", "output_router_logits", "dtype"}
    assert set(content["text_config"]) - own == set(RELEASED_TEXT_KEYS)
    assert set(content["text_config"]["sparse_attention_config"]) == set(RELEASED_SPARSE_KEYS)
    assert set(content["vision_config"]) - {"spatial_merge_size", "temporal_patch_size"} == set(RELEASED_VISION_KEYS)
    assert "layer_types" not in content["text_config"] and content["text_config"]["hidden_act"] == "swigluoai"
    text = MiniMaxM3VLConfig.from_dict(content).text_config
    expected = released_config().text_config
    assert (text.layer_types, text.mlp_layer_types) == (expected.layer_types, expected.mlp_layer_types)
    assert text.rope_parameters == expected.rope_parameters


def test_it_says_that_it_is_synthetic(synthetic, capsys):
    for folder in synthetic.values():
        assert "synthetic" in json.loads((folder / "config.json").read_text())["synthetic"]
        assert "random numbers" in (folder / "README.md").read_text()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as weights:
                assert weights.metadata()["format"] == "pt" and "synthetic" in weights.metadata()["synthetic"]


def test_ours_and_stock_load_it_with_equal_logits(synthetic):
    ours, info = AutoModelForImageTextToText.from_pretrained(synthetic["bf16"], output_loading_info=True)
    assert info == NOTHING and type(ours).__module__.startswith("modeling_minimax_m3")
    theirs, info = stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        synthetic["bf16"], output_loading_info=True
    )
    assert info == NOTHING
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-5, atol=1e-5)


def test_mxfp8_loads_as_what_it_means(synthetic, converted, tmp_path):
    """Transformers dequantizes it to the weights that our own conversion writes."""
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "output_loading_info": True}
    loaded, info = AutoModelForImageTextToText.from_pretrained(synthetic["mxfp8"], **options)
    assert info == NOTHING
    plain = converted(synthetic["mxfp8"], tmp_path / "plain", precision="bf16")
    expected = AutoModelForImageTextToText.from_pretrained(plain)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_fewer_layers_and_experts_are_the_first_ones(synthetic, read, tmp_path):
    few = read(make(tmp_path / "few", layers=3, experts=2))
    whole = read(synthetic["bf16"])
    gates = {name for name in few if name.endswith((".gate.weight", "e_score_correction_bias"))}
    assert len(gates) == 4 and not any(".layers.3." in name and "vision" not in name for name in few)
    for name in set(few) - gates:
        assert torch.equal(few[name], whole[name]), name
    config = MiniMaxM3VLConfig.from_pretrained(tmp_path / "few").text_config
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (3, 2, 2)
    assert set(few) == set(released_shapes(MiniMaxM3VLConfig.from_pretrained(tmp_path / "few")))


def test_seeds(synthetic, contents, read, tmp_path):
    same = contents(make(tmp_path / "same", max_shard_size=200_000))
    assert same == contents(synthetic["bf16"])
    other = read(make(tmp_path / "other", seed=1))
    name = "language_model.model.embed_tokens.weight"
    assert not torch.equal(other[name], read(synthetic["bf16"])[name])


def test_bad_arguments_are_named(tmp_path, synthetic):
    with pytest.raises(ValueError, match="`layers` must be from 1 to 4, .*got 5"):
        make(tmp_path / "x", layers=5)
    with pytest.raises(ValueError, match="`experts` must be from 1 to 4, .*got 0"):
        make(tmp_path / "x", experts=0)
    with pytest.raises(ValueError, match="`precision` must be bf16 or mxfp8, got 'int4'"):
        make(tmp_path / "x", precision="int4")
    with pytest.raises(ValueError, match="minimax_m3_structured"):
        make(tmp_path / "x", tiny_config(text={"layer_types": ["minimax_m3_structured"] * 4}))
    with pytest.raises(FileExistsError, match="exists"):
        make(synthetic["bf16"])
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.unfinished"))
