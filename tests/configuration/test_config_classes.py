"""The config classes against stock Transformers, on released-style files and on files of either side."""

import copy
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock

import configuration_minimax_m3 as ours
from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig
from configuration_minimax_m3.serving import text_serving_keys, vision_serving_keys

pytestmark = pytest.mark.compatibility

CLASS_NAMES = ["MiniMaxM3VLTextConfig", "MiniMaxM3VLVisionConfig", "MiniMaxM3VLConfig"]
FIRST_THREE_OFF = [0, 0, 0] + [1] * 57


def released_file() -> dict:
    """A file with the values and the keys of the released model."""
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "image_token_index": 200025,
        "video_token_index": 200026,
        "projector_hidden_size": 6144,
        "multimodal_projector_bias": True,
        "img_token_compression_config": {
            "image_token_compression_method": "patch_merge",
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "text_config": {
            "model_type": "minimax_m3",
            "vocab_size": 200064,
            "hidden_size": 6144,
            "intermediate_size": 3072,
            "dense_intermediate_size": 12288,
            "shared_intermediate_size": 3072,
            "num_hidden_layers": 60,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-06,
            "use_gemma_norm": True,
            "attention_output_gate": False,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "rope_theta": 5000000,
            "rotary_dim": 64,
            "partial_rotary_factor": 0.5,
            "hidden_act": "swigluoai",
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.0,
            "moe_layer_freq": FIRST_THREE_OFF,
            "num_mtp_modules": 7,
            "tie_word_embeddings": False,
            "bos_token_id": 200019,
            "eos_token_id": 200020,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_index_dim": 128,
                "sparse_num_index_heads": 4,
                "sparse_topk_blocks": 16,
                "sparse_block_size": 128,
                "sparse_disable_index_value": FIRST_THREE_OFF,
                "sparse_score_type": "max",
                "sparse_init_block": 0,
                "sparse_local_block": 1,
                "sparse_attention_freq": FIRST_THREE_OFF,
            },
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_channels": 3,
            "image_size": 2016,
            "patch_size": 14,
            "position_embedding_type": "rope",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            "layer_norm_eps": 1e-05,
            "hidden_act": "gelu",
            "projection_dim": 6144,
            "img_token_compression_config": {
                "image_token_compression_method": "patch_merge",
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
    }


def legacy_text(num_layers: int = 4, **sparse_attention) -> dict:
    """A small text file in the released keys whose last layer is sparse; `sparse_attention` changes that part."""
    frequency = [0] * (num_layers - 1) + [1]
    return {
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": frequency,
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 24,
            "sparse_block_size": 32,
            "sparse_topk_blocks": 6,
            "sparse_local_block": 2,
        }
        | sparse_attention,
    }


def write(directory, config_dict: dict) -> str:
    (directory / "config.json").write_text(json.dumps(config_dict))
    return str(directory)


def class_of(module, name: str) -> type[PreTrainedConfig]:
    return getattr(module, name)


# ---- against stock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_bare_config_means_what_stock_means(name):
    assert class_of(ours, name)().to_dict() == class_of(stock, name)().to_dict()
    assert class_of(ours, name)().to_diff_dict() == class_of(stock, name)().to_diff_dict()


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize(
    "attribute",
    [
        "model_type",
        "base_config_key",
        "attribute_map",
        "default_theta",
        "default_rope_type",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
    ],
)
def test_class_attributes_are_those_of_stock(name, attribute):
    missing = object()
    assert getattr(class_of(ours, name), attribute, missing) == getattr(class_of(stock, name), attribute, missing)


def test_fsdp_units_are_those_of_stock_in_the_language_model_alone():
    """Stock's rules for the whole model fit no module, and those for the tower make all processes run it."""
    assert MiniMaxM3VLTextConfig.base_model_fsdp_plan == stock.MiniMaxM3VLTextConfig.base_model_fsdp_plan
    assert ours.MiniMaxM3VLConfig.base_model_fsdp_plan == ours.MiniMaxM3VLVisionConfig.base_model_fsdp_plan == {}


@pytest.mark.parametrize("name", ["MiniMaxM3VLConfig", "MiniMaxM3VLTextConfig"])
def test_trainer_takes_the_indexer_loss_and_caches_for_no_prediction(name):
    ignored = set(class_of(ours, name).keys_to_ignore_at_inference)
    assert ignored >= {"indexer_loss", "cache", "past_key_values"}
    assert ignored >= set(getattr(class_of(stock, name), "keys_to_ignore_at_inference", ()))


def test_text_fields_are_those_of_stock_and_the_declared_ones():
    expected = set(stock.MiniMaxM3VLTextConfig.__dataclass_fields__) | set(MiniMaxM3VLTextConfig.fields_beyond_stock)
    assert set(MiniMaxM3VLTextConfig.__dataclass_fields__) == expected


def test_parts_of_the_composite_are_ours():
    assert MiniMaxM3VLConfig.sub_configs == {
        "text_config": MiniMaxM3VLTextConfig,
        "vision_config": MiniMaxM3VLVisionConfig,
    }
    config = MiniMaxM3VLConfig(text_config={"num_hidden_layers": 2})
    assert isinstance(config.text_config, MiniMaxM3VLTextConfig)
    assert isinstance(config.vision_config, MiniMaxM3VLVisionConfig)


def test_released_style_file_reads_as_stock_reads_it(tmp_path):
    path = write(tmp_path, released_file())
    assert MiniMaxM3VLConfig.from_pretrained(path).to_dict() == stock.MiniMaxM3VLConfig.from_pretrained(path).to_dict()


def test_text_and_vision_classes_read_their_part_of_a_composite_file(tmp_path):
    path = write(tmp_path, released_file())
    for name in ("MiniMaxM3VLTextConfig", "MiniMaxM3VLVisionConfig"):
        assert (
            class_of(ours, name).from_pretrained(path).to_dict()
            == class_of(stock, name).from_pretrained(path).to_dict()
        )


ROPE_VARIANTS = {
    "nothing": {},
    "theta": {"rope_theta": 10000.0},
    "theta-and-factor": {"rope_theta": 5000000, "partial_rotary_factor": 0.5, "rotary_dim": 64},
    "rotary-dim-alone": {"rotary_dim": 32},
    "new-keys": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
    "both-kinds": {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 65536},
}


@pytest.mark.parametrize("keys", ROPE_VARIANTS.values(), ids=ROPE_VARIANTS)
def test_rotary_keys_read_as_stock_reads_them(keys):
    config = MiniMaxM3VLTextConfig(**copy.deepcopy(keys))
    assert config.to_dict() == stock.MiniMaxM3VLTextConfig(**copy.deepcopy(keys)).to_dict()


@pytest.mark.parametrize(
    ("factor", "width"), [(None, 128), (0.5, 64), (0.3, 38), (0.305, 40)], ids=["absent", "half", "even", "rounded-up"]
)
def test_rotary_width_comes_from_the_factor_only(factor, width):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if factor is not None:
        rope["partial_rotary_factor"] = factor
    assert MiniMaxM3VLTextConfig(rope_parameters=rope, rotary_dim=8).rotary_width == width


# ---- files from one side to the other ------------------------------------------------------------------------------


def configs_of_both(module) -> dict[str, PreTrainedConfig]:
    tiny = ours.tiny_config().to_dict()
    released = released_file()
    return {
        "bare": module.MiniMaxM3VLConfig(),
        "released": module.MiniMaxM3VLConfig(**copy.deepcopy(released)),
        "tiny": module.MiniMaxM3VLConfig(**copy.deepcopy(tiny)),
        "text": module.MiniMaxM3VLTextConfig(**copy.deepcopy(tiny["text_config"])),
        "vision": module.MiniMaxM3VLVisionConfig(**copy.deepcopy(tiny["vision_config"])),
        "tied": module.MiniMaxM3VLConfig(text_config={"tie_word_embeddings": True}),
    }


def without_serving_keys(config: dict) -> dict:
    """The content of a config without the keys that follow from its fields, which only whole models' files hold."""
    if "text_config" not in config:
        return config
    config = copy.deepcopy(config)
    config["text_config"]["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # what a missing one means
    parts = {"text_config": text_serving_keys, "vision_config": vision_serving_keys}
    return config | {
        part: {
            name: value for name, value in config[part].items() if name not in keys(getattr(ours.tiny_config(), part))
        }
        for part, keys in parts.items()
    }


@pytest.mark.parametrize("kind", ["bare", "released", "tiny", "text", "vision", "tied"])
@pytest.mark.parametrize("direction", ["ours-to-stock", "stock-to-ours", "ours-to-ours"])
def test_saved_file_loads_equal(kind, direction, tmp_path):
    source, target = {
        "ours-to-stock": (ours, stock),
        "stock-to-ours": (stock, ours),
        "ours-to-ours": (ours, ours),
    }[direction]
    config = configs_of_both(source)[kind]
    config.save_pretrained(tmp_path)

    loaded = class_of(target, type(config).__name__).from_pretrained(tmp_path)

    assert without_serving_keys(loaded.to_dict()) == without_serving_keys(config.to_dict())


@pytest.mark.parametrize("kind", ["bare", "released", "tiny", "text", "vision", "tied"])
def test_saved_content_is_what_stock_writes_and_keys_of_serving_engines(kind, tmp_path):
    for side, module in (("ours", ours), ("stock", stock)):
        configs_of_both(module)[kind].save_pretrained(tmp_path / side)
    saved = {side: json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "stock")}
    if "text_config" in saved["ours"] and kind != "tied":
        assert saved["ours"]["text_config"]["hidden_act"] == "swigluoai"
        saved = {side: without_serving_keys(content) for side, content in saved.items()}
    assert json.dumps(saved["ours"]) == json.dumps(saved["stock"])


def test_fields_of_ours_are_written_only_when_changed(tmp_path):
    changed = {"index_init_blocks": 1, "indexer_loss_coef": 0.5, "indexer_warmup": True, "msa_backend": "reference"}
    ours.tiny_config(text=changed).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert {name: saved.get(name) for name in changed} == changed

    loaded = MiniMaxM3VLConfig.from_pretrained(tmp_path).text_config
    assert {name: getattr(loaded, name) for name in changed} == changed
    # stock keeps keys that it does not know
    assert stock.MiniMaxM3VLConfig.from_pretrained(tmp_path).text_config.index_init_blocks == 1

    unchanged = ours.tiny_config().to_dict()["text_config"]
    assert not set(unchanged) & set(MiniMaxM3VLTextConfig.fields_beyond_stock)


def test_parts_built_with_stock_classes_become_ours():
    tiny = ours.tiny_config()
    config = MiniMaxM3VLConfig(
        text_config=stock.MiniMaxM3VLTextConfig(**tiny.text_config.to_dict()),
        vision_config=stock.MiniMaxM3VLVisionConfig(**tiny.vision_config.to_dict()),
        image_token_index=tiny.image_token_index,
        video_token_index=tiny.video_token_index,
        projector_hidden_size=tiny.projector_hidden_size,
    )
    assert isinstance(config.text_config, MiniMaxM3VLTextConfig)
    assert isinstance(config.vision_config, MiniMaxM3VLVisionConfig)
    assert config.to_dict() == tiny.to_dict()


def test_part_of_another_model_is_refused():
    with pytest.raises(TypeError, match="`text_config` must be .*minimax_m3_vl_text.*got a MiniMaxM3VLVisionConfig"):
        MiniMaxM3VLConfig(text_config=MiniMaxM3VLVisionConfig())


# ---- released keys -------------------------------------------------------------------------------------------------


def test_released_keys_set_our_fields():
    config = MiniMaxM3VLTextConfig(**legacy_text(sparse_init_block=3), moe_layer_freq=[0, 1, 0, 1])
    assert config.layer_types == ["full_attention"] * 3 + ["minimax_m3_sparse"]
    assert config.mlp_layer_types == ["dense", "sparse", "dense", "sparse"]
    assert config.index_n_heads == 2
    assert config.index_head_dim == 24
    assert config.index_block_size == 32
    assert config.index_topk_blocks == 6
    assert config.index_local_blocks == 2
    assert config.index_init_blocks == 3
    assert config.hidden_act == "silu"
    assert not hasattr(config, "sparse_attention_config")


def test_released_switch_turns_sparse_attention_off():
    config = MiniMaxM3VLTextConfig(**legacy_text(use_sparse_attention=False))
    assert config.layer_types == ["full_attention"] * 4


def test_current_keys_win_over_the_released_layer_lists():
    layer_types = ["minimax_m3_sparse"] * 4
    mlp_layer_types = ["dense"] * 4
    config = MiniMaxM3VLTextConfig(
        **legacy_text(), layer_types=layer_types, mlp_layer_types=mlp_layer_types, moe_layer_freq=[1, 1, 1, 1]
    )
    assert (config.layer_types, config.mlp_layer_types) == (layer_types, mlp_layer_types)


def test_image_token_compression_sets_the_merge():
    compression = {"spatial_merge_size": 4, "temporal_patch_size": 1}
    config = MiniMaxM3VLConfig(vision_config={"img_token_compression_config": compression})
    assert (config.vision_config.spatial_merge_size, config.vision_config.temporal_patch_size) == (4, 1)
    assert config.merged_hidden_size == config.text_config.hidden_size * 16


@pytest.mark.parametrize("disabled", [1, True, [0, 0, 0, 1], [1, 1, 1, 1]], ids=str)
def test_disabled_index_value_is_accepted(disabled):
    config = MiniMaxM3VLTextConfig(**legacy_text(sparse_disable_index_value=disabled))
    assert config.layer_types[-1] == "minimax_m3_sparse"


@pytest.mark.parametrize("disabled", [0, False, [1, 1, 1, 0], [0, 0, 0, 0]], ids=str)
def test_enabled_index_value_is_refused(disabled):
    with pytest.raises(ValueError, match=r"sparse_disable_index_value.*must be 1 on every sparse layer.*layers \[3\]"):
        MiniMaxM3VLTextConfig(**legacy_text(sparse_disable_index_value=disabled))


def test_other_score_type_is_refused():
    with pytest.raises(ValueError, match="sparse_score_type.*must be 'max', got 'mean'"):
        MiniMaxM3VLTextConfig(**legacy_text(sparse_score_type="mean"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_qk_norm", False),
        ("qk_norm_type", "per_layer"),
        ("use_gemma_norm", False),
        ("attention_output_gate", True),
        ("scoring_func", "softmax"),
        ("norm_topk_prob", False),
        ("n_shared_experts", 2),
        ("hidden_act", "gelu"),
    ],
)
def test_features_of_another_architecture_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}"):
        MiniMaxM3VLTextConfig(**{name: value})


# ---- validation ----------------------------------------------------------------------------------------------------

TEXT_ERRORS = {
    "zero-block": ({"index_block_size": 0}, "'index_block_size':\n.* must be an integer from 1 to .*, got 0"),
    "zero-topk": ({"index_topk_blocks": 0}, "'index_topk_blocks':\n.* must be an integer from 1 to .*, got 0"),
    "negative-local": (
        {"index_local_blocks": -1},
        "'index_local_blocks':\n.* must be an integer from 0 to .*, got -1",
    ),
    "negative-init": ({"index_init_blocks": -1}, "'index_init_blocks':\n.* must be an integer from 0 to .*, got -1"),
    "zero-layers": ({"num_hidden_layers": 0}, "'num_hidden_layers':\n.* must be an integer from 1 to .*, got 0"),
    "zero-experts": ({"num_experts_per_tok": 0}, "'num_experts_per_tok':\n.* must be an integer from 1 to .*, got 0"),
    "heads": ({"num_key_value_heads": 3}, "`num_attention_heads` must be a multiple of `num_key_value_heads`"),
    "index-heads": ({"index_n_heads": 4}, "`index_n_heads` must equal `num_key_value_heads`.*4 and.*=2"),
    "forced-blocks": (
        {"index_local_blocks": 3, "index_init_blocks": 2},
        r"`index_init_blocks` \+ `index_local_blocks` must not exceed `index_topk_blocks`, got 2 \+ 3 > 4",
    ),
    "index-width": ({"index_head_dim": 8}, "`index_head_dim` must be at least the rotary width 16.*got 8"),
    "experts": ({"num_experts_per_tok": 5}, "`num_experts_per_tok` must not exceed `num_local_experts`.*5.*4"),
    "backend": ({"msa_backend": "triton"}, "`msa_backend` must be 'auto' or 'reference' or .*got 'triton'"),
    "swiglu-limit": ({"swiglu_limit": 0.0}, "'swiglu_limit':\n.* must be a number from 1e-30 to 1e\\+30, got 0.0"),
    "pad-token": ({"pad_token_id": 512}, "`pad_token_id` must be below `vocab_size`.*512.*512"),
    "norm-epsilon": ({"rms_norm_eps": -1.0}, "'rms_norm_eps':\n.* must be a number from 1e-30 to .*, got -1.0"),
    "scaling-factor": (
        {"routed_scaling_factor": float("nan")},
        "'routed_scaling_factor':\n.* must be a number from .*, got nan",
    ),
    "dropout": ({"attention_dropout": 2.0}, "'attention_dropout':\n.* must be a number from 0 to 0.99, got 2.0"),
    "indexer-loss": ({"indexer_loss_coef": -0.1}, "'indexer_loss_coef':\n.* must be a number from 0 to .*, got -0.1"),
    "initializer": ({"initializer_range": -1.0}, "'initializer_range':\n.* must be a number from 0 to .*, got -1.0"),
    "negative-pad-token": ({"pad_token_id": -1}, "'pad_token_id':\n.* must be an integer from 0 to .*, got -1"),
    "layer-count": ({"layer_types": ["full_attention"]}, "`layer_types` must have one entry per layer, got 1"),
    "layer-name": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]},
        r"`layer_types\[1\]` must be 'full_attention'.*'minimax_m3_structured', got 'sliding_attention'",
    ),
    "mlp-count": ({"mlp_layer_types": ["dense"] * 5}, "`mlp_layer_types` must have one entry per layer, got 5"),
    "mlp-name": ({"mlp_layer_types": ["moe"] * 4}, r"`mlp_layer_types\[0\]` must be 'dense' or 'sparse', got 'moe'"),
    "rotary-factor": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}},
        r"`rope_parameters\['partial_rotary_factor'\]` must be a number from 0 to 1, got 1.5",
    ),
    "rope-type": (
        {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
        r"`rope_parameters\['rope_type'\]` must be 'default' or .*'yarn' .*got 'axial'",
    ),
    "type": ({"head_dim": "32"}, "'head_dim' expected int, got str"),
}


@pytest.mark.parametrize(("fields", "message"), TEXT_ERRORS.values(), ids=TEXT_ERRORS)
def test_text_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ours.tiny_config(text=fields)


VISION_ERRORS = {
    "heads": ({"num_attention_heads": 5}, "`hidden_size` must be a multiple of `num_attention_heads`.*48.*5"),
    "three-axes": ({"num_attention_heads": 12}, "must be >= 6.*got 48 / 12 = 4"),
    "patch": ({"patch_size": 0}, "'patch_size':\n.* must be an integer from 1 to .*, got 0"),
    "temporal-patch": (
        {"temporal_patch_size": 0},
        "'temporal_patch_size':\n.* must be an integer from 1 to .*, got 0",
    ),
    "activation": ({"hidden_act": "bogus"}, "`hidden_act` must be 'gelu' or .*got 'bogus'"),
    "merge": ({"spatial_merge_size": -2}, "'spatial_merge_size':\n.* must be an integer from 1 to .*, got -2"),
    "rope-type": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        r"`rope_parameters\['rope_type'\]` must be 'axial', got 'linear'",
    ),
}


@pytest.mark.parametrize(("fields", "message"), VISION_ERRORS.values(), ids=VISION_ERRORS)
def test_vision_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ours.tiny_config(vision=fields)


COMPOSITE_ERRORS = {
    "image-token": ({"image_token_index": 512}, "`image_token_index` must be between 0 and .* = 511, got 512"),
    "video-token": ({"video_token_index": -1}, "'video_token_index':\n.* must be an integer from 0 to .*, got -1"),
    "same-token": ({"image_token_index": 7, "video_token_index": 7}, "must differ, got 7 for both"),
    "projector": ({"projector_hidden_size": 0}, "'projector_hidden_size':\n.* must be an integer from 1 to .*, got 0"),
}


@pytest.mark.parametrize(("fields", "message"), COMPOSITE_ERRORS.values(), ids=COMPOSITE_ERRORS)
def test_composite_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ours.tiny_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"index_local_blocks": 0},
        {"index_local_blocks": 4},
        {"index_local_blocks": 0, "index_init_blocks": 4},
        {"index_head_dim": 16},
        {"pad_token_id": None},
        {"layer_types": ["full_attention"] * 4, "index_n_heads": 7, "index_head_dim": 1, "index_local_blocks": 99},
        {"mlp_layer_types": ["dense"] * 4, "num_experts_per_tok": 9},
    ],
    ids=["no-local", "all-local", "all-init", "index-width", "no-pad", "index-unused", "experts-unused"],
)
def test_unusual_text_config_that_can_work_is_accepted(fields):
    config = ours.tiny_config(text=fields)
    assert {name: getattr(config.text_config, name) for name in fields} == fields


def test_saving_checks_again(tmp_path):
    config = ours.tiny_config()
    config.text_config.index_local_blocks = 5
    with pytest.raises(StrictDataclassError, match="`index_local_blocks` must not exceed `index_topk_blocks`"):
        config.text_config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="'index_topk_blocks'"):
        config.text_config.index_topk_blocks = 0


def test_layers_that_differ_are_checked_one_by_one():
    overrides = {3: {"num_key_value_heads": 4, "index_n_heads": 4}}
    config = ours.tiny_config(text={"per_layer_config": overrides}).text_config
    assert config.per_layer_config[3].num_key_value_heads == 4

    with pytest.raises(StrictDataclassError, match="`index_n_heads` must equal `num_key_value_heads`"):
        ours.tiny_config(text={"per_layer_config": {3: {"num_key_value_heads": 4}}})


def test_one_legacy_flag_stands_for_all_layers():
    config = ours.MiniMaxM3VLTextConfig(
        num_hidden_layers=3, moe_layer_freq=0, sparse_attention_config={"sparse_attention_freq": 1}
    )
    assert config.layer_types == ["minimax_m3_sparse"] * 3 and config.mlp_layer_types == ["dense"] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse_attention_config": {"use_sparse_attention": True}}, "must say which layers are sparse"),
        ({"sparse_attention_config": [1]}, "`sparse_attention_config` must be a dict, got list"),
        ({"moe_layer_freq": 2}, "`moe_layer_freq`"),
    ],
    ids=["no-frequency", "list", "frequency"],
)
def test_legacy_keys_that_say_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ours.MiniMaxM3VLTextConfig(**fields)
