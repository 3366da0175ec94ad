"""Names and shapes of a checkpoint's tensors, in the released layout and in those that models have in memory.

Every tensor has its released name, whatever the layout. A layout says which of them lie in which tensor of a file, one
behind the other: `experts.gate_up_proj` of a layer holds `experts.0.w1`, `experts.0.w3`, `experts.1.w1` and so on.

In shapes, E is the number of experts.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig
from configuration_minimax_m3.layer_types import LAYER_TYPES

from ..mxfp8 import GROUP_SIZE

# released: as the model is published, and as `save_pretrained` writes a whole model.
# modules: names of the modules, experts fused, as `save_pretrained(..., save_original_format=False)` writes it.
# text: the language model alone with the names of its modules, as its own `save_pretrained` writes it.
LAYOUTS = ("released", "modules", "text")
SCALE_SUFFIX = "_scale_inv"

TEXT_PREFIX = "language_model."
_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.")
_FLOAT32_ENDINGS = (
    ".block_sparse_moe.gate.weight",
    ".block_sparse_moe.e_score_correction_bias",
    ".patch_embedding.weight",
)

_MODULE_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.proj."),
    (r"^vision_tower\.vision_model\.encoder\.layers\.", "model.vision_tower.layers."),
    (r"^vision_tower\.vision_model\.pre_layrnorm\.", "model.vision_tower.pre_layrnorm."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^patch_merge_mlp\.", "model.multi_modal_projector.merge_"),
    (r"\.block_sparse_moe\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.self_attn\.index_([qk])_(proj|norm)\.", r".self_attn.indexer.\1_\2."),
    (r"\.experts\.\d+\.w[13]\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.w2\.weight$", ".experts.down_proj"),
    (r"^(model\.language_model\..*\.)(?:gate|up)_proj\.weight$", r"\1gate_up_proj.weight"),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Args:
        name (str): Name in the file.
        shape (tuple[int, ...]): Shape in the file.
        parts (tuple[str, ...]): Released names of what it holds, in order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]


def released_shapes(config: MiniMaxM3VLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in the released layout, without scales: head and embedding, layers, vision."""
    text = config.text_config
    hidden = text.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if not text.tie_word_embeddings:
        shapes["language_model.lm_head.weight"] = (text.vocab_size, hidden)
    shapes["language_model.model.embed_tokens.weight"] = (text.vocab_size, hidden)
    for layer in range(text.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer}."
        for name, shape in (*_attention_shapes(text, layer), *_mlp_shapes(text, layer)):
            shapes[prefix + name] = shape
    shapes["language_model.model.norm.weight"] = (hidden,)
    return shapes | dict(_vision_shapes(config))


Shapes = Iterable[tuple[str, tuple[int, ...]]]


def _attention_shapes(text, layer: int) -> Shapes:
    hidden, head_dim = text.hidden_size, text.head_dim
    query, key = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (query, hidden)
    yield "self_attn.k_proj.weight", (key, hidden)
    yield "self_attn.v_proj.weight", (key, hidden)
    yield "self_attn.o_proj.weight", (hidden, query)
    yield "self_attn.q_norm.weight", (head_dim,)
    yield "self_attn.k_norm.weight", (head_dim,)
    if LAYER_TYPES[text.layer_types[layer]].has_indexer:
        yield "self_attn.index_q_proj.weight", (text.index_n_heads * text.index_head_dim, hidden)
        yield "self_attn.index_k_proj.weight", (text.index_head_dim, hidden)
        yield "self_attn.index_q_norm.weight", (text.index_head_dim,)
        yield "self_attn.index_k_norm.weight", (text.index_head_dim,)


def _gated_mlp_shapes(prefix: str, width: int, hidden: int) -> Shapes:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def _mlp_shapes(text, layer: int) -> Shapes:
    hidden, width = text.hidden_size, text.intermediate_size
    yield "post_attention_layernorm.weight", (hidden,)
    if text.mlp_layer_types[layer] == "dense":
        yield from _gated_mlp_shapes("mlp.", text.dense_intermediate_size, hidden)
        return
    moe = "block_sparse_moe."
    yield f"{moe}gate.weight", (text.num_local_experts, hidden)
    yield f"{moe}e_score_correction_bias", (text.num_local_experts,)
    yield from _gated_mlp_shapes(f"{moe}shared_experts.", text.shared_intermediate_size, hidden)
    for expert in range(text.num_local_experts):
        yield f"{moe}experts.{expert}.w1.weight", (width, hidden)
        yield f"{moe}experts.{expert}.w2.weight", (hidden, width)
        yield f"{moe}experts.{expert}.w3.weight", (width, hidden)


def _linear_shapes(prefix: str, outputs: int, inputs: int) -> Shapes:
    yield f"{prefix}.weight", (outputs, inputs)
    yield f"{prefix}.bias", (outputs,)


def _vision_shapes(config: MiniMaxM3VLConfig) -> Shapes:
    vision, hidden, projector = config.vision_config, config.text_config.hidden_size, config.projector_hidden_size
    width, patch = vision.hidden_size, vision.patch_size
    tower = "vision_tower.vision_model."
    patch_shape = (vision.num_channels, vision.temporal_patch_size, patch, patch)
    yield f"{tower}embeddings.patch_embedding.weight", (width, *patch_shape)
    yield f"{tower}pre_layrnorm.weight", (width,)
    yield f"{tower}pre_layrnorm.bias", (width,)
    for layer in range(vision.num_hidden_layers):
        prefix = f"{tower}encoder.layers.{layer}."
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}{name}.weight", (width,)
            yield f"{prefix}{name}.bias", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear_shapes(f"{prefix}self_attn.{name}", width, width)
        yield from _linear_shapes(f"{prefix}mlp.fc1", vision.intermediate_size, width)
        yield from _linear_shapes(f"{prefix}mlp.fc2", width, vision.intermediate_size)
    yield from _linear_shapes("multi_modal_projector.linear_1", projector, width)
    yield from _linear_shapes("multi_modal_projector.linear_2", hidden, projector)
    yield from _linear_shapes("patch_merge_mlp.linear_1", projector, hidden * vision.spatial_merge_size**2)
    yield from _linear_shapes("patch_merge_mlp.linear_2", hidden, projector)


def released_dtype(name: str) -> torch.dtype:
    """The dtype of a weight in the released bfloat16 files: routers and patch embedding are in float32."""
    return torch.float32 if name.endswith(_FLOAT32_ENDINGS) else torch.bfloat16


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the released MXFP8 files hold a weight in E4M3: the matrices of the decoder layers except routers."""
    matrix = _LAYER.match(name) is not None and len(shape) == 2
    return matrix and not name.endswith(".block_sparse_moe.gate.weight")


def layer_of(name: str) -> int | None:
    """The decoder layer of a released name."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def module_name(name: str, layout: str = "modules") -> str:
    """The name that the tensor with a weight has in the layout "modules" or "text"."""
    for pattern, replacement in _MODULE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace("model.language_model.", "model.", 1) if layout == "text" else name


def stored_tensors(config: MiniMaxM3VLConfig, layout: str) -> list[StoredTensor]:
    """The tensors of a checkpoint without scales, in the order of `released_shapes`.

    Args:
        config (MiniMaxM3VLConfig): Config of the whole model, for the layout "text" too.
        layout (str): One of `LAYOUTS`.
    """
    shapes = released_shapes(config)
    if layout == "released":
        return [StoredTensor(name, shape, (name,)) for name, shape in shapes.items()]
    groups: dict[str, list[str]] = {}
    for name in shapes:
        if layout == "modules" or name.startswith(TEXT_PREFIX):
            groups.setdefault(module_name(name, layout), []).append(name)
    return [
        StoredTensor(name, _fused_shape([shapes[part] for part in parts], name), tuple(parts))
        for name, parts in groups.items()
    ]


def _fused_shape(shapes: list[tuple[int, ...]], name: str) -> tuple[int, ...]:
    first = shapes[0]
    if name.endswith(".experts.gate_up_proj"):
        return (len(shapes) // 2, 2 * first[0], first[1])
    if name.endswith(".experts.down_proj"):
        return (len(shapes), *first)
    return (sum(shape[0] for shape in shapes), *first[1:])


def scale_of(tensor: StoredTensor, quantized: Callable[[str], bool]) -> StoredTensor | None:
    """The tensor of scales that lies beside a tensor in MXFP8 files, or None.

    Args:
        tensor (StoredTensor): The tensor of values.
        quantized (Callable): Says for a released name whether it is quantized.
    """
    if not quantized(tensor.parts[0]):
        return None
    shape = (*tensor.shape[:-1], math.ceil(tensor.shape[-1] / GROUP_SIZE))
    return StoredTensor(tensor.name + SCALE_SUFFIX, shape, tuple(part + SCALE_SUFFIX for part in tensor.parts))
