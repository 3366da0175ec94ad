"""Makes a cache that Transformers built fit the model: our cache layers in place of Transformers' own."""

from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from ..layers.layer_types import attention_type
from ..runtime.cache import MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer


def adopt_cache(cache: Cache, layer_types: list[str], batch: int) -> None:
    """Put our layers in place of the empty ones of a cache that Transformers built, and check that the cache fits.

    `DynamicCache(config=...)` and `StaticCache(config=...)` look their layer classes up in a table that stock
    Transformers' own M3 module writes to as well. Dense layers get Transformers' general class, which copies all keys
    for each new token. Layers that already hold tokens, or that are of other classes (such as quantized ones), stay.

    Args:
        cache (`Cache`): The cache to use.
        layer_types (`list[str]`): The type of each of the model's layers.
        batch (`int`): B, the rows of the input.

    Raises:
        TypeError: `cache` is no cache of a decoder.
        ValueError: The cache has another number of layers or rows; or a layer with an indexer gets a cache layer that
            keeps no index keys and cannot be replaced.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"`cache` must be a `Cache` of a decoder, such as `DynamicCache(config=model.config)`, "
            f"got {type(cache).__name__}"
        )
    if cache.layers and len(cache.layers) != len(layer_types):
        raise ValueError(
            f"`cache` must have one layer for each of the model's {len(layer_types)} layers, got {len(cache.layers)}"
        )
    rows = {len(layer.keys) for layer in cache.layers if layer.is_initialized and layer.keys.numel() > 0}
    if rows - {batch}:
        raise ValueError(f"`cache` must hold the input's {batch} rows, got {max(rows)}")
    if cache.layer_class_to_replicate is DynamicLayer and not cache.layers:
        cache.layers = [DynamicLayer() for _ in layer_types]  # a cache made without a config
    for index, (layer, layer_type) in enumerate(zip(cache.layers, layer_types)):
        kind = attention_type(layer_type)
        needs_index = kind.layer_type.has_indexer
        is_replaceable = type(layer) in (DynamicLayer, StaticLayer) or (
            needs_index and isinstance(layer, (DynamicLayer, StaticLayer)) and hasattr(layer, "update_index")
        )
        ours = (MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer)
        if is_replaceable and not isinstance(layer, ours) and not layer.is_initialized:
            if isinstance(layer, StaticLayer):
                layer = kind.static_cache_layer(max_cache_len=layer.max_cache_len)
            else:
                layer = kind.dynamic_cache_layer()
            cache.layers[index] = layer
        if needs_index and not hasattr(layer, "update_index"):
            raise ValueError(
                f"`cache` has a {type(layer).__name__} for layer {index}, which keeps no index keys, but "
                f"that layer's type is {layer_type!r}. Make the cache with `DynamicCache(config=model.config)` or "
                "`StaticCache(config=model.config, ...)`. Prefix tuning learns no index keys: models with such layers "
                "need another method, such as prompt tuning."
            )
