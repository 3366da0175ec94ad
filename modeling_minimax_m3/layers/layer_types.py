"""The kinds of attention layers: how each selects key blocks, and what it keeps in a cache.

`configuration/layer_types.py` holds what the configuration knows about a kind. The attention layer, the caches, the
count of operations and the scripts read both tables. `register_attention_type` adds a kind to both.
"""

from dataclasses import dataclass

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    StaticLayer,
)

from configuration_minimax_m3.layer_types import FULL_ATTENTION, LAYER_TYPES, LEARNED_SPARSE, STRUCTURED, LayerType

from ..runtime.cache import (
    MiniMaxM3VLDynamicLayer,
    MiniMaxM3VLSparseDynamicLayer,
    MiniMaxM3VLSparseStaticLayer,
    MiniMaxM3VLStaticLayer,
)
from .block_selection import BlockSelector, LearnedSelector, StructuredSelector


@dataclass(frozen=True)
class AttentionType:
    """One kind of attention layer.

    Args:
        layer_type (`LayerType`): What the configuration knows about it, such as its name and its fields.
        selector (`type[BlockSelector]`, *optional*): Selects the key blocks. None: the layer attends to all keys.
        dynamic_cache_layer (`type[DynamicLayer]`): Cache layer that grows. Default: one that keeps keys and values.
        static_cache_layer (`type[StaticLayer]`): Cache layer of a fixed size. Default: one that keeps keys and values.
    """

    layer_type: LayerType
    selector: type[BlockSelector] | None = None
    dynamic_cache_layer: type[DynamicLayer] = MiniMaxM3VLDynamicLayer
    static_cache_layer: type[StaticLayer] = MiniMaxM3VLStaticLayer

    @property
    def is_dense(self) -> bool:
        """Whether a query attends to all keys before it."""
        return self.selector is None


ATTENTION_TYPES: dict[str, AttentionType] = {}


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

    Raises:
        ValueError: The name is taken, here or in Transformers' caches.
    """
    name = kind.layer_type.name
    if name in LAYER_TYPES or name in DYNAMIC_LAYER_TYPE_MAPPING:
        raise ValueError(f"the layer type {name!r} is registered already")
    LAYER_TYPES[name] = kind.layer_type
    _add(kind)


def _add(kind: AttentionType) -> None:
    name = kind.layer_type.name
    ATTENTION_TYPES[name] = kind
    # `DynamicCache(config=...)` and `StaticCache(config=...)` read these tables. The name of dense attention is common to
    # all models of Transformers, so its entry stays.
    if name != FULL_ATTENTION.name:
        DYNAMIC_LAYER_TYPE_MAPPING[name] = kind.dynamic_cache_layer
        STATIC_LAYER_TYPE_MAPPING[name] = kind.static_cache_layer


_add(AttentionType(FULL_ATTENTION))
_add(AttentionType(LEARNED_SPARSE, LearnedSelector, MiniMaxM3VLSparseDynamicLayer, MiniMaxM3VLSparseStaticLayer))
_add(AttentionType(STRUCTURED, StructuredSelector))
