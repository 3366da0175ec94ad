"""`config.json` of a converted checkpoint: fewer layers and experts, another precision, another layout."""

import copy
from typing import Any

from configuration_minimax_m3 import MiniMaxM3VLConfig
from configuration_minimax_m3.serving import add_serving_keys

from ..mxfp8 import GROUP_SIZE
from .layouts import is_quantized, layer_of, released_shapes

_LAYER_LISTS = ("layer_types", "mlp_layer_types", "moe_layer_freq")
_SPARSE_LAYER_LISTS = ("sparse_attention_freq", "sparse_disable_index_value")
_CLASSES = {"text": "MiniMaxM3VLForCausalLM"}


def cut_config(content: dict[str, Any], layers: int | None, experts: int | None) -> dict[str, Any]:
    """`content` of a `config.json` with the first `layers` layers and the first `experts` routed experts.

    Args:
        content (dict): It is not changed.
        layers (int, optional): Number of layers to keep.
        experts (int, optional): Number of experts to keep. A token uses at most so many.

    Raises:
        ValueError: The model has fewer, or the number is below 1.
    """
    content = copy.deepcopy(content)
    text = content.get("text_config", content)
    for name, key, kept in (("layers", "num_hidden_layers", layers), ("experts", "num_local_experts", experts)):
        if kept is not None and not 1 <= kept <= text[key]:
            raise ValueError(f"`{name}` must be from 1 to {text[key]}, the number in the source, got {kept}.")
    if layers is not None:
        text["num_hidden_layers"] = layers
        for part, names in ((text, _LAYER_LISTS), (text.get("sparse_attention_config") or {}, _SPARSE_LAYER_LISTS)):
            for name in names:
                if isinstance(part.get(name), list):
                    part[name] = part[name][:layers]
        if text.get("per_layer_config"):
            kept_layers = {key: fields for key, fields in text["per_layer_config"].items() if int(key) < layers}
            text["per_layer_config"] = kept_layers
    if experts is not None:
        text["num_local_experts"] = experts
        text["num_experts_per_tok"] = min(experts, text["num_experts_per_tok"])
    return content


def quantization_config(config: MiniMaxM3VLConfig) -> dict[str, Any]:
    """The `quantization_config` of MXFP8 files, as released."""
    shapes = released_shapes(config)
    plain = [name for name, shape in shapes.items() if layer_of(name) is not None and not is_quantized(name, shape)]
    gates = sorted(name.removesuffix(".weight") for name in plain if name.endswith(".block_sparse_moe.gate.weight"))
    ignored = ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp", *gates]
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "ignored_layers": ignored,
    }


def converted_config(
    content: dict[str, Any], config: MiniMaxM3VLConfig, layout: str, precision: str
) -> dict[str, Any]:
    """The content of the new `config.json`.

    Args:
        content (dict): The cut content of the earlier one. Keys that nobody here knows stay.
        config (MiniMaxM3VLConfig): Config of the whole model that it describes.
        layout (str): Of the new checkpoint.
        precision (str): Of the new checkpoint.
    """
    content = copy.deepcopy(content)
    content.pop("quantization_config", None)
    if layout == "text":
        kept = {key: content[key] for key in ("synthetic",) if key in content}
        dtype = content.get("dtype", content.get("torch_dtype"))
        if "text_config" in content:
            content = config.text_config.to_diff_dict()
        content |= {"architectures": [_CLASSES["text"]]} | kept
        if dtype is not None:
            content["dtype"] = dtype
    else:
        add_serving_keys(content, config)
    if precision == "mxfp8":
        content["quantization_config"] = quantization_config(config)
    return content
