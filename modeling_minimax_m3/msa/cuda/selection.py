"""`select_blocks` on the compiled kernels."""

import torch

from ..reference import SelectBlocksArgs, SelectBlocksWithKVCacheArgs
from . import support
from .caches import MAX_DECODE_TOKENS, rows_as_sequences
from .layout import contiguous


def select_blocks(args: SelectBlocksArgs) -> torch.Tensor:
    """As `reference.select_blocks`."""
    args = contiguous(args, "cu_seqlens_q", "cu_seqlens_k")
    return torch.ops.minimax_m3_msa_cuda.select_blocks(*args.values())


def select_blocks_unsupported(args: SelectBlocksArgs) -> str | None:
    """Why the kernels cannot run a call of `select_blocks`; None where they can."""
    states = {"index_query": args.index_query, "index_key": args.index_key}
    return (
        _heads_unsupported(args.index_query)
        or support.sizes_unsupported(states, args.block_size, args.topk)
        or support.rows_unsupported(states)
    )


def select_blocks_with_kvcache(args: SelectBlocksWithKVCacheArgs) -> torch.Tensor:
    """As `reference.select_blocks_with_kvcache`."""
    batch, num_new = args.index_query.shape[:2]
    if num_new > MAX_DECODE_TOKENS:
        (index_key,), *offsets = rows_as_sequences(
            (args.index_key_cache,), num_new, args.cache_seqlens, args.cache_leftpad, args.block_table
        )
        selected = select_blocks(args.packed(args.index_query.flatten(0, 1), index_key, *offsets))
        return selected.unflatten(0, (batch, num_new))
    args = contiguous(args, "cache_seqlens", "cache_leftpad", "block_table")
    return torch.ops.minimax_m3_msa_cuda.select_blocks_with_kvcache(*args.values())


def select_blocks_with_kvcache_unsupported(args: SelectBlocksWithKVCacheArgs) -> str | None:
    """Why the kernels cannot run a call of `select_blocks_with_kvcache`; None where they can."""
    states = {"index_query": args.index_query, "index_key": args.index_key_cache}
    decodes = args.index_query.shape[1] <= MAX_DECODE_TOKENS
    return (
        _heads_unsupported(args.index_query)
        or support.sizes_unsupported(states, args.block_size, args.topk)
        or (support.pages_unsupported(args.index_key_cache, args.block_table) if decodes else None)
        or support.rows_unsupported(states)
    )


def _heads_unsupported(index_query: torch.Tensor) -> str | None:
    num_heads = index_query.shape[-2]
    if num_heads > support.MAX_INDEX_HEADS:
        return f"there must be at most {support.MAX_INDEX_HEADS} index heads, there are {num_heads}"
    return None
