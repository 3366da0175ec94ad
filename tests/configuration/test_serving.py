"""Saved configs have the keys that vLLM and SGLang read, and stock Transformers reads the same model from them.

`serving_engines.json` lists what the loaders of the engines read, with the version of each.
"""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, released_config, tiny_config
from configuration_minimax_m3.serving import obstacles_to_serving
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

pytestmark = pytest.mark.compatibility

READ = json.loads((Path(__file__).parent / "serving_engines.json").read_text())
CONFIGS = {
    "tiny": tiny_config(),
    "released": released_config(),
    "all dense": tiny_config(text={"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["dense"] * 4}),
    "all sparse": tiny_config(text={"layer_types": ["minimax_m3_sparse"] * 4, "mlp_layer_types": ["sparse"] * 4}),
    "other numbers": tiny_config(
        text={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "index_init_blocks": 1,
            "index_local_blocks": 2,
        }
    ),
    "another tower": tiny_config(vision={"temporal_patch_size": 1, "spatial_merge_size": 3}),
}


def saved(config, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("engine", READ["engines"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_config_has_all_that_an_engine_reads(config, engine, tmp_path):
    content, read = saved(config, tmp_path), READ["engines"][engine]
    assert not set(read["top"]) - set(content) - {"architectures"}  # the model adds its class
    for part in ("text", "vision"):
        keys = content[f"{part}_config"]
        assert not set(read[part]) - set(keys), "the engine would take a default of its own"
        for name, rule in read[part].items():
            assert keys[name] in rule.get("accepted", [keys[name]]), name
    assert not set(read["sparse_attention_config"]) - set(content["text_config"]["sparse_attention_config"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_keys_say_what_the_fields_say(config, tmp_path):
    content = saved(config, tmp_path)
    text, vision, sparse = (
        content["text_config"],
        content["vision_config"],
        content["text_config"]["sparse_attention_config"],
    )
    fields = config.text_config
    assert [bool(flag) for flag in text["moe_layer_freq"]] == [kind == "sparse" for kind in fields.mlp_layer_types]
    is_sparse = [kind == "minimax_m3_sparse" for kind in fields.layer_types]
    assert [bool(flag) for flag in sparse["sparse_attention_freq"]] == is_sparse
    assert [bool(flag) for flag in sparse["sparse_disable_index_value"]] == is_sparse
    assert sparse["use_sparse_attention"] == any(is_sparse) and sparse["sparse_score_type"] == "max"
    for key, field in {
        "sparse_num_index_heads": fields.index_n_heads,
        "sparse_index_dim": fields.index_head_dim,
        "sparse_block_size": fields.index_block_size,
        "sparse_topk_blocks": fields.index_topk_blocks,
        "sparse_init_block": fields.index_init_blocks,
        "sparse_local_block": fields.index_local_blocks,
    }.items():
        assert sparse[key] == field, key
    assert text["rope_theta"] == fields.rope_parameters["rope_theta"]
    assert text["partial_rotary_factor"] == fields.rope_parameters["partial_rotary_factor"]
    assert text["rotary_dim"] == fields.head_dim * text["partial_rotary_factor"]
    assert text["scoring_func"] == "sigmoid" and text["qk_norm_type"] == "per_head" and text["n_shared_experts"] == 1
    assert text["use_qk_norm"] is text["use_gemma_norm"] is text["use_routing_bias"] is True
    compression = vision["img_token_compression_config"]
    assert compression["temporal_patch_size"] == config.vision_config.temporal_patch_size
    assert compression["spatial_merge_size"] == config.vision_config.spatial_merge_size


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "released"])
def test_saved_tensors_have_the_names_and_shapes_that_the_engines_read(name, tmp_path):
    config = CONFIGS[name]
    MiniMaxM3SparseForConditionalGeneration(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["MiniMaxM3SparseForConditionalGeneration"]
    tensors = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert tensors == expected_tensors(content)


def expected_tensors(content: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes by the data file, from the keys of config.json that the engines read."""
    text, vision = content["text_config"], content["vision_config"]
    sparse = text["sparse_attention_config"]
    values = {**text, **{f"vision.{key}": value for key, value in vision.items()}}
    values |= {f"index.{key}": value for key, value in sparse.items()}
    values |= {f"top.{key}": value for key, value in content.items()}
    values |= {f"compression.{key}": value for key, value in vision["img_token_compression_config"].items()}

    def add(group: str, **numbers: int) -> None:
        for key, factors in READ[group].items():
            for letter, number in numbers.items():
                key = key.replace(f".{letter}.", f".{number}.")
            expected[key] = tuple(math.prod(values[name] for name in factor.split("*")) for factor in factors)

    expected: dict[str, tuple[int, ...]] = {}
    add("tensors of vision")
    for layer in range(vision["num_hidden_layers"]):
        add("tensors of vision layers", N=layer)
    for layer, (is_sparse, has_experts) in enumerate(zip(sparse["sparse_attention_freq"], text["moe_layer_freq"])):
        add("tensors", N=layer)
        if is_sparse:
            add("tensors of sparse attention", N=layer)
        if not has_experts:
            add("tensors of dense MLPs", N=layer)
        for expert in range(text["num_local_experts"] if has_experts else 0):
            add("tensors of experts", N=layer, E=expert)
    return expected


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "released"])
def test_stock_loads_it_with_equal_logits(name, tmp_path):
    config = copy.deepcopy(CONFIGS[name])
    config.text_config.index_init_blocks = 0  # stock has no such blocks
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    theirs, info = stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(2, 400, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits
        again = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)


def test_a_loaded_config_does_not_repeat_its_fields(tmp_path):
    config = tiny_config()
    saved(config, tmp_path)
    for loaded in (MiniMaxM3VLConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert MiniMaxM3VLConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    text = MiniMaxM3VLTextConfig.from_pretrained(tmp_path)
    assert text.to_dict() | {"_name_or_path": ""} == config.text_config.to_dict()
    # so a changed field counts
    changed = MiniMaxM3VLConfig.from_pretrained(tmp_path).to_dict()
    changed["text_config"]["index_topk_blocks"] = 3
    changed["vision_config"]["spatial_merge_size"] = 1
    changed = MiniMaxM3VLConfig.from_dict(changed)
    assert (changed.text_config.index_topk_blocks, changed.vision_config.spatial_merge_size) == (3, 1)


def test_other_values_of_the_video_processor_stay(tmp_path):
    content = saved(tiny_config(), tmp_path)
    content["vision_config"]["vision_segment_max_frames"] = 7
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = saved(MiniMaxM3VLConfig.from_pretrained(tmp_path), tmp_path / "again")
    assert again["vision_config"]["vision_segment_max_frames"] == 7


def change_blocks(text: dict) -> None:
    text["index_topk_blocks"] = 3


def change_theta(text: dict) -> None:
    text["rope_parameters"]["rope_theta"] = 1e4


def change_older_factor(text: dict) -> None:
    text["partial_rotary_factor"] = 0.25


@pytest.mark.parametrize("config_class", [MiniMaxM3VLConfig, MiniMaxM3VLTextConfig])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_blocks, r"`index_topk_blocks` and .*'sparse_topk_blocks'.* must be equal.*got 3 and 4"),
        (change_theta, r"'rope_theta'.* and its older name `rope_theta` must be equal.*got 10000.0 and 5000000.0"),
        (change_older_factor, r"`partial_rotary_factor` must be equal.*got 0.5 and 0.25"),
    ],
)
def test_a_file_in_which_one_of_two_names_was_changed_is_refused(config_class, change, message, tmp_path):
    content = saved(tiny_config(), tmp_path)
    change(content["text_config"])
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(tmp_path)


OBSTACLES = {
    "`layer_types` holds minimax_m3_structured": {"layer_types": ["minimax_m3_structured"] * 4},
    "`tie_word_embeddings` is true": {"tie_word_embeddings": True},
    "`shared_intermediate_size` is 64": {"shared_intermediate_size": 64},
    r"`rope_parameters\['rope_type'\]` is 'linear'": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    },
    "`per_layer_config` gives layers": {"per_layer_config": {"1": {"intermediate_size": 16}}},
}


@pytest.mark.parametrize(("message", "fields"), OBSTACLES.items(), ids=[next(iter(f)) for f in OBSTACLES.values()])
def test_models_that_the_engines_do_not_have_are_saved_as_before(message, fields, tmp_path):
    """VLLM refuses the activation "silu", and SGLang misses `scoring_func`. Neither loads it as another model."""
    config = tiny_config(text=fields)
    (obstacle,) = obstacles_to_serving(config)
    assert re.match(message, obstacle)
    text = saved(config, tmp_path)["text_config"]
    assert text["hidden_act"] == "silu" and not {"scoring_func", "sparse_attention_config", "moe_layer_freq"} & set(
        text
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_no_obstacles(name):
    assert obstacles_to_serving(CONFIGS[name]) == []
