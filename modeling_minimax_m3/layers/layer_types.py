"""The kinds of attention layers: how each selects key blocks, and what it keeps in a cache.

`configuration/layer_types.py` holds what the configuration knows about a kind. The attention layer, the caches, the
count of operations and the scripts read both tables. `register_attention_type` adds a kind to both.
"""

from dataclasses import dataclass

from transformers.cache_utils import DynamicLayer, StaticLayer

from configuration_minimax_m3.layer_types import FULL_ATTENTION, LAYER_TYPES, LEARNED_SPARSE, STRUCTURED, LayerType

from ..runtime.cache import (
    MiniMaxM3VLDynamicLayer,
    MiniMaxM3VLSparseDynamicLayer,
    MiniMaxM3VLSparseStaticLayer,
    MiniMaxM3VLStaticLayer,
    MiniMaxM3VLStructuredDynamicLayer,
    MiniMaxM3VLStructuredStaticLayer,
)
from .block_selection import BlockSelector, LearnedSelector, StructuredSelector


@dataclass(frozen=True)
class AttentionType:
    """One kind of attention layer.

    Args:
        layer_type (`LayerType`): What the configuration knows about it, such as its name and its fields.
        selector (`type[BlockSelector]`, *optional*): Selects the key blocks. None: the layer attends to all keys.
        dynamic_cache_layer (`type[DynamicLayer]`): Cache layer that grows.
        static_cache_layer (`type[StaticLayer]`): Cache layer of a fixed size.
    """

    layer_type: LayerType
    selector: type[BlockSelector] | None
    dynamic_cache_layer: type[DynamicLayer]
    static_cache_layer: type[StaticLayer]

    @property
    def is_dense(self) -> bool:
        """Whether a query attends to all keys before it."""
        return self.selector is None


ATTENTION_TYPES: dict[str, AttentionType] = {
    kind.layer_type.name: kind
    for kind in (
        AttentionType(FULL_ATTENTION, None, MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer),
        AttentionType(LEARNED_SPARSE, LearnedSelector, MiniMaxM3VLSparseDynamicLayer, MiniMaxM3VLSparseStaticLayer),
        AttentionType(
            STRUCTURED, StructuredSelector, MiniMaxM3VLStructuredDynamicLayer, MiniMaxM3VLStructuredStaticLayer
        ),
    )
}


def attention_type(name: str) -> AttentionType:
    """The kind of attention layer of that name.

    Raises:
        ValueError: There is no such kind.
    """
    if name not in ATTENTION_TYPES:
        raise ValueError(f"the layer type must be {' or '.join(map(repr, ATTENTION_TYPES))}, got {name!r}")
    return ATTENTION_TYPES[name]


def register_attention_type(kind: AttentionType) -> None:
    """Add a kind of attention layer, which configs, models, caches and the count of operations then know.

    Args:
        kind (`AttentionType`): Its cache layers must be classes of its own whose `_layer_type` is its name: by that
            Transformers finds them for `DynamicCache(config=...)` and `StaticCache(config=...)`.

    Raises:
        ValueError: The name is taken, or a cache layer has another `_layer_type`.
    """
    name = kind.layer_type.name
    if name in LAYER_TYPES:
        raise ValueError(f"the layer type {name!r} is registered already")
    for cache_layer in (kind.dynamic_cache_layer, kind.static_cache_layer):
        if cache_layer._layer_type != name:
            raise ValueError(f"`{cache_layer.__name__}._layer_type` must be {name!r}, got {cache_layer._layer_type!r}")
    LAYER_TYPES[name] = kind.layer_type
    ATTENTION_TYPES[name] = kind
