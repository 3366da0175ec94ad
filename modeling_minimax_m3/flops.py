"""Floating-point operations of the language model's forward pass, counted from its configuration.

The count covers the matrix products, with two operations for a multiply-add, over the keys that each token attends to
or scores. A kernel may compute more than that. Norms, rotary, softmax and gates are left out.
"""

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .layers.layer_types import attention_type

PARTS = ("attention projections", "attention", "indexer projections", "index scores", "mlp", "output head")


def attended_keys(config: MiniMaxM3VLTextConfig, layer_type: str, tokens: int) -> int:
    """How many pairs of query and attended key a sequence of `tokens` has in one layer, for each query head.

    A sparse layer whose `index_local_blocks` is 0 may attend to fewer: its queries need not keep their own block.

    Raises:
        ValueError: There is no such layer type.
    """
    selector = attention_type(layer_type).selector
    if selector is None:
        return _all_keys(tokens)
    width = selector.blocks_per_query(config)
    # A query attends to its own block up to itself and to at most width - 1 whole ones before it.
    size = config.index_block_size
    blocks, rest = divmod(tokens, size)
    growing = min(blocks, width)  # block j, while j < width, attends to all j blocks before it
    before = growing * (growing - 1) // 2 + (blocks - growing) * (width - 1)
    own = blocks * size * (size + 1) // 2 + rest * (rest + 1) // 2
    return own + size * (size * before + rest * min(blocks, width - 1))


def _all_keys(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def forward_flops(config: MiniMaxM3VLTextConfig, tokens: int) -> dict[str, int]:
    """Operations of a forward pass over one sequence of `tokens`, by part (`PARTS`).

    The difference from the count for `tokens - 1` is the cost of the last token, with the others in a cache.
    """
    weights = matrix_weights(config)
    products = dict.fromkeys(PARTS, 0)  # multiply-adds between tokens
    for layer_type in config.layer_types:
        products["attention"] += products_per_key(config) * attended_keys(config, layer_type, tokens)
        if attention_type(layer_type).layer_type.has_indexer:
            products["index scores"] += products_per_scored_key(config) * _all_keys(tokens)
    return {part: 2 * (tokens * weights[part] + products[part]) for part in PARTS}


def matrix_weights(config: MiniMaxM3VLTextConfig) -> dict[str, int]:
    """The weights of the matrices that a token passes through, by part (`PARTS`)."""
    hidden = config.hidden_size
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    index_width = config.index_n_heads * config.index_head_dim
    experts = config.num_experts_per_tok * config.intermediate_size + config.shared_intermediate_size
    weights = dict.fromkeys(PARTS, 0)
    for layer_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True):
        weights["attention projections"] += 2 * hidden * (query_width + key_width)
        if attention_type(layer_type).layer_type.has_indexer:
            weights["indexer projections"] += hidden * (index_width + config.index_head_dim)
        if mlp_type == "sparse":
            weights["mlp"] += hidden * (config.num_local_experts + 3 * experts)
        else:
            weights["mlp"] += 3 * hidden * config.dense_intermediate_size
    weights["output head"] = hidden * config.vocab_size
    return weights


def products_per_key(config: MiniMaxM3VLTextConfig) -> int:
    """Multiply-adds of one layer between a token and a key that it attends to, scores and values together."""
    return 2 * config.num_attention_heads * config.head_dim


def products_per_scored_key(config: MiniMaxM3VLTextConfig) -> int:
    """Multiply-adds of one layer's indexer between a token and a key."""
    return config.index_n_heads * config.index_head_dim
