"""The keys of a saved config that serving engines read, in the form of the released file.

vLLM and SGLang read the released file's own keys, such as `sparse_attention_config`. Where a key is missing they take
the released value or another architecture, mostly without an error. So a saved config of a whole model has these keys beside
the fields. They follow from the fields, so a config in memory does not hold them.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from .layer_types import FULL_ATTENTION, LEARNED_SPARSE

if TYPE_CHECKING:
    from .multimodal import MiniMaxM3VLConfig
    from .text import MiniMaxM3VLTextConfig
    from .vision import MiniMaxM3VLVisionConfig

# Keys of the released file's `sparse_attention_config` that are older names of our fields.
LEGACY_SPARSE_FIELDS = {
    "sparse_num_index_heads": "index_n_heads",
    "sparse_index_dim": "index_head_dim",
    "sparse_block_size": "index_block_size",
    "sparse_topk_blocks": "index_topk_blocks",
    "sparse_init_block": "index_init_blocks",
    "sparse_local_block": "index_local_blocks",
}

# Keys of the released file that describe fixed features of the architecture. A different value would describe a
# different model.
FIXED_FEATURES = {
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
}
# Those that the released file has, and a switch of the routers' selection bias, which this model always has.
_WRITTEN_FEATURES = {name: value for name, value in FIXED_FEATURES.items() if name != "norm_topk_prob"}
_WRITTEN_FEATURES["use_routing_bias"] = True
_OF_THE_VIDEO_PROCESSOR = {"vision_segment_max_frames": 4}


def obstacles_to_serving(config: "MiniMaxM3VLConfig") -> list[str]:
    """What keeps vLLM and SGLang from computing what the config describes. Empty where nothing does.

    Args:
        config (`MiniMaxM3VLConfig`): Config of a whole model.

    Returns:
        Sentences that name the field.
    """
    text = config.text_config
    if text.is_heterogeneous:
        return ["`per_layer_config` gives layers fields of their own, which the engines do not have."]
    obstacles = []
    others = sorted(set(text.layer_types) - {FULL_ATTENTION.name, LEARNED_SPARSE.name})
    if others:
        obstacles.append(f"`layer_types` holds {', '.join(others)}, which the engines do not have.")
    if text.tie_word_embeddings:
        obstacles.append(
            "`tie_word_embeddings` is true. The engines load a head of its own, which the files then lack."
        )
    if text.shared_intermediate_size != text.intermediate_size:
        obstacles.append(
            f"`shared_intermediate_size` is {text.shared_intermediate_size}. The engines take `intermediate_size`, "
            f"{text.intermediate_size}, for the shared expert too."
        )
    if text.rope_parameters["rope_type"] != "default":
        obstacles.append(
            f"`rope_parameters['rope_type']` is {text.rope_parameters['rope_type']!r}. vLLM computes 'default'."
        )
    return obstacles


def text_serving_keys(text: "MiniMaxM3VLTextConfig") -> dict[str, Any]:
    """The keys of `text_config` that follow from its fields, as the released file has them."""
    is_sparse = [int(name == LEARNED_SPARSE.name) for name in text.layer_types]
    return {
        **_WRITTEN_FEATURES,
        "hidden_act": "swigluoai",
        "moe_layer_freq": [int(name == "sparse") for name in text.mlp_layer_types],
        "sparse_attention_config": {
            "use_sparse_attention": any(is_sparse),
            "sparse_attention_freq": is_sparse,
            "sparse_disable_index_value": is_sparse,
            "sparse_score_type": "max",
            **{key: getattr(text, name) for key, name in LEGACY_SPARSE_FIELDS.items()},
        },
        "rope_theta": text.rope_parameters["rope_theta"],
        "partial_rotary_factor": text.rope_parameters.get("partial_rotary_factor", 1.0),
        "rotary_dim": text.rotary_width,
    }


def vision_serving_keys(vision: "MiniMaxM3VLVisionConfig") -> dict[str, Any]:
    """The keys of `vision_config` that follow from its fields, as the released file has them."""
    return {
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": vision.rope_parameters["rope_theta"],
        "img_token_compression_config": {
            "image_token_compression_method": "patch_merge",
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
        # The video processor cuts videos into segments of so many temporal patches. A file may hold another value.
        **{name: getattr(vision, name, value) for name, value in _OF_THE_VIDEO_PROCESSOR.items()},
    }


def add_serving_keys(saved: dict[str, Any], config: "MiniMaxM3VLConfig") -> None:
    """Add to `saved`, the content of a whole model's file, the keys that engines read, unless they cannot serve it.

    Without the keys vLLM refuses the activation, and SGLang misses `scoring_func`.
    """
    if not obstacles_to_serving(config):
        saved["text_config"].update(text_serving_keys(config.text_config))
        saved["vision_config"].update(vision_serving_keys(config.vision_config))


def checked_text_keys(text: dict[str, Any]) -> dict[str, Any]:
    """The content of a `text_config` without what only repeats `rope_parameters`.

    Raises:
        ValueError: A field was changed and its older name was not, or the other way round.
    """
    pairs = []
    legacy = text.get("sparse_attention_config")
    if isinstance(legacy, dict):
        for key, name in LEGACY_SPARSE_FIELDS.items():
            if key in legacy and name in text:
                pairs.append((f"`{name}`", text[name], f"`sparse_attention_config[{key!r}]`", legacy[key]))
    repeated = []
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "layer_types" in text:
        for name, default in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
            if name in text and (name in rope or default is not None):
                pairs.append((f"`rope_parameters[{name!r}]`", rope.get(name, default), f"`{name}`", text[name]))
                repeated.append(name)
    for name, value, older_name, older_value in pairs:
        if value != older_value:
            raise ValueError(
                f"{name} and its older name {older_name} must be equal where a file has both, got {value} and "
                f"{older_value}."
            )
    return {key: value for key, value in text.items() if key not in repeated}


def forget_serving_keys(part: PreTrainedConfig, keys: dict[str, Any]) -> None:
    """Remove the attributes of `part` that repeat its fields. They came from a saved file, and saving adds them again.

    Args:
        part (`PreTrainedConfig`): Config of the language model or of the vision tower.
        keys (`dict`): What `text_serving_keys` or `vision_serving_keys` returns for it.
    """
    fields = type(part).__dataclass_fields__
    for name, value in keys.items():
        if name not in fields and vars(part).get(name) == _OF_THE_VIDEO_PROCESSOR.get(name, value):
            delattr(part, name)
