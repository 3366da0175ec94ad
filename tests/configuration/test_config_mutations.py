"""For any value of a field, either an error names the field, or a model of the config has finite outputs."""

import copy
import functools
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from configuration_minimax_m3 import (
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
    MiniMaxM3VLVisionConfig,
    tiny_config,
)
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

MISSING = object()
VALUES = {
    "none": None,
    "text": "x",
    "true": True,
    "zero": 0,
    "minus one": -1,
    "half": 0.5,
    "2**31": 2**31,
    "10**400": 10**400,
    "1e300": 1e300,
    "1e-300": 1e-300,
    "nan": math.nan,
    "list": [1.0],
    "dict": {},
}
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "proportional": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64}
    | dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": {
        "factor": None,
        "attention_factor": None,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# What the released file calls its fields, and what a value of each that fits the tiny model looks like.
LEGACY = {
    "use_sparse_attention": ("sparse_attention_freq", True),
    "sparse_attention_freq": ("sparse_attention_freq", [0, 1, 1]),
    "sparse_num_index_heads": ("index_n_heads", 2),
    "sparse_index_dim": ("index_head_dim", 32),
    "sparse_block_size": ("index_block_size", 16),
    "sparse_topk_blocks": ("index_topk_blocks", 4),
    "sparse_init_block": ("index_init_blocks", 0),
    "sparse_local_block": ("index_local_blocks", 1),
    "sparse_score_type": ("sparse_score_type", "max"),
    "sparse_disable_index_value": ("sparse_disable_index_value", [0, 1, 1]),
}
TEXT_KEYS = ("num_experts", "moe_layer_freq", "per_layer_config", "sparse_attention_config")
OTHER_NAMES = {
    "num_experts": "num_local_experts",
    "image_token_id": "image_token_index",
    "rope_scaling": "rope_parameters",
}


@functools.cache
def base() -> dict[str, Any]:
    """The content of a config file, with every kind of layer."""
    layer_types = ["full_attention", "minimax_m3_sparse", "minimax_m3_structured"]
    text = {"num_hidden_layers": 3, "layer_types": layer_types}
    return tiny_config(text=text, vision={"num_hidden_layers": 1}).to_dict()


def own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in inherited]


def places() -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """The place of each value and the other changes of the file: `(path, changes)`."""
    found = {}
    of_transformers = ["dtype", "torch_dtype", "id2label", "num_labels"]
    for part, config_class, more in (
        ("text_config", MiniMaxM3VLTextConfig, [*TEXT_KEYS, "rope_theta", "rope_scaling"]),
        ("vision_config", MiniMaxM3VLVisionConfig, ["img_token_compression_config", "rope_theta", "rope_scaling"]),
        ("", MiniMaxM3VLConfig, ["image_token_id"]),
    ):
        for name in (*own_fields(config_class), *of_transformers, *more):
            if name not in ("text_config", "vision_config"):  # without them, the model has the released size
                found[f"{part}.{name}"] = ((part, name) if part else (name,), {})
    for rope_type, keys in ROPE_TYPES.items():
        rope = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": 0.5} | keys
        for key in rope:
            path = ("text_config", "rope_parameters", key)
            found[f"{rope_type}.{key}"] = (path, {"text_config": {"rope_parameters": rope}})
    for key in ("rope_type", "rope_theta"):
        found[f"vision.{key}"] = (("vision_config", "rope_parameters", key), {})
    for key in LEGACY:
        legacy = {name: value for name, (_, value) in LEGACY.items()}
        if key == "sparse_attention_freq":  # which layers the other one asks for depends on it
            del legacy["sparse_disable_index_value"]
        found[f"legacy.{key}"] = (
            ("text_config", "sparse_attention_config", key),
            {"text_config": {"layer_types": None, "sparse_attention_config": legacy}},
        )
    return found


PLACES = places()


def mutate(path: tuple[str, ...], changes: dict[str, Any], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(base())
    for part, fields_of_part in changes.items():
        content[part] |= copy.deepcopy(fields_of_part)
    holder = content
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    holder.pop({"num_experts": "num_local_experts", "image_token_id": "image_token_index"}.get(path[-1]), None)
    if path[-1] in ("rope_theta", "rope_scaling") and len(path) == 2:
        del holder["rope_parameters"]
    if path[-1] == "moe_layer_freq":
        del holder["mlp_layer_types"]
    if value is MISSING:
        holder.pop(path[-1], None)
    else:
        holder[path[-1]] = copy.deepcopy(value)
    return content


SEEN: dict[str, bool] = {}


def output_is_finite(config: MiniMaxM3VLConfig) -> bool:
    """Whether a fresh model has a finite loss and finite logits for text with one image; once per config."""
    key = config.to_json_string()
    if key not in SEEN:
        SEEN[key] = forward_is_finite(config)
    return SEEN[key]


def forward_is_finite(config: MiniMaxM3VLConfig) -> bool:
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(config).train()
    vision = config.vision_config
    side = vision.spatial_merge_size
    patches = torch.randn(side**2, vision.num_channels * vision.temporal_patch_size * vision.patch_size**2)
    tokens = torch.full((1, 24), next(i for i in range(3) if i not in (config.image_token_id, config.video_token_id)))
    tokens[0, 5] = config.image_token_id
    with torch.no_grad():
        output = model(
            tokens,
            labels=tokens,
            skip_logits=False,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, side, side]]),
            output_router_logits="sparse" in config.text_config.mlp_layer_types,
        )
    return bool(output.loss.isfinite() and output.logits.isfinite().all())


@pytest.mark.parametrize("place", PLACES)
def test_refused_by_name_or_finite(place):
    path, changes = PLACES[place]
    name = path[-1]
    names = {name, OTHER_NAMES.get(name, name), LEGACY.get(name, (name,))[0]}
    nested = {"absent": MISSING} if len(path) == 3 else {}
    for case, value in (VALUES | nested).items():
        try:
            config = MiniMaxM3VLConfig.from_dict(mutate(path, changes, value))
        except (StrictDataclassError, TypeError, ValueError) as error:
            assert any(name in str(error) for name in names), f"{case}: {error}"
            continue
        assert output_is_finite(config), case
