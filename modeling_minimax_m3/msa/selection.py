"""`select_blocks`: which key blocks each query attends to. Checks, operators, shapes under tracing."""

import torch

from . import checks, cuda, portable, reference
from .backends import Operator, check_backend, run_on_backend
from .reference import SelectBlocksArgs, SelectBlocksWithKVCacheArgs

SELECT_BLOCKS = Operator(
    name="select_blocks",
    reference=reference.select_blocks,
    portable=portable.select_blocks,
    cuda=cuda.select_blocks,
    unsupported=cuda.select_blocks_unsupported,
    kernels=("selection",),
)
SELECT_BLOCKS_WITH_KVCACHE = Operator(
    name="select_blocks_with_kvcache",
    reference=reference.select_blocks_with_kvcache,
    portable=portable.select_blocks_with_kvcache,
    cuda=cuda.select_blocks_with_kvcache,
    unsupported=cuda.select_blocks_with_kvcache_unsupported,
    kernels=("selection",),
)


def select_blocks(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_size: int = 128,
    topk: int = 16,
    local_blocks: int = 1,
    init_blocks: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Selects, for every query and index head, the key blocks to attend to (MSA paper, arXiv 2606.13392).

    Block j of a sequence holds its keys j * block_size to (j + 1) * block_size - 1. A block's score is the largest
    dot product of the query with those of its keys that are not in the query's future. The first `init_blocks` blocks
    and the last `local_blocks` blocks up to the query's own are always selected. The best-scoring others fill up to
    `topk`, ties going to the lower id. Query i of a sequence sits at position len_k - len_q + i.

    Args:
        index_query (total_q, H_idx, D_idx): Queries of the indexer, of all sequences one after the other.
        index_key (total_k, D_idx): Keys of the indexer, one head shared by all query heads; same dtype.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): int32 offsets of the sequences, starting at 0. A sequence may have
            no queries, but never more queries than keys.
        max_seqlen_q, max_seqlen_k (int or None): At least the length of the longest sequence, in tokens. No backend
            needs them; they are checked against offsets on the CPU, outside of `torch.compile`.
        block_size (int): Keys per block.
        topk (int): Blocks per query, forced ones included.
        local_blocks (int): Blocks always selected at the query's end: its own and those before it.
        init_blocks (int): Blocks always selected at the sequence's start.
        backend (str): "auto", "cuda", "torch" or "reference".

    Returns:
        int32 (total_q, H_idx, topk): block ids, left-packed, in no particular order, -1 where fewer are visible. No
        gradient flows through the selection.

    Raises:
        ValueError, TypeError: An argument's shape, dtype, device or value is not as above.
        NotImplementedError: The named backend cannot run the call.
    """
    args = select_blocks_args(
        index_query, index_key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, topk,
        local_blocks, init_blocks, backend,
    )  # fmt: skip
    return torch.ops.minimax_m3_msa.select_blocks(*args.values(), backend)


def select_blocks_args(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> SelectBlocksArgs:
    """Checks the arguments of a call of `select_blocks`."""
    checks.check_selection_options(block_size, topk, local_blocks, init_blocks)
    checks.check_tensor("index_query", index_query, ("total_q", "H_idx", "D_idx"), checks.FLOATING_DTYPES)
    checks.check_unit_stride("index_query", index_query)
    checks.check_tensor(
        "index_key", index_key, ("total_k", index_query.shape[-1]), (index_query.dtype,), index_query.device
    )
    checks.check_unit_stride("index_key", index_key)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, index_query.device)
    checks.check_max_seqlens(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    check_backend(backend)
    return SelectBlocksArgs(
        index_query.detach(), index_key.detach(), cu_seqlens_q, cu_seqlens_k, block_size, topk, local_blocks,
        init_blocks,
    )  # fmt: skip


@torch.library.custom_op("minimax_m3_msa::select_blocks", mutates_args=())
def _select_blocks(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> torch.Tensor:
    args = SelectBlocksArgs(
        index_query, index_key, cu_seqlens_q, cu_seqlens_k, block_size, topk, local_blocks, init_blocks
    )
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, index_query.shape[0], index_key.shape[0])
    return run_on_backend(backend, SELECT_BLOCKS, args)


@_select_blocks.register_fake
def _(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> torch.Tensor:
    return index_query.new_empty((*index_query.shape[:2], topk), dtype=torch.int32)


def select_blocks_with_kvcache(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    block_size: int = 128,
    topk: int = 16,
    local_blocks: int = 1,
    init_blocks: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """`select_blocks` for the newest T tokens of each row, reading index keys straight from a cache.

    The new tokens' keys are already in the cache. Query i of a row sits at position
    `cache_seqlens - cache_leftpad - T + i`; where that is negative the query is padding and selects nothing.

    Args:
        index_query (B, T, H_idx, D_idx): Queries of the T newest tokens of each row.
        index_key_cache ((B, S, D_idx), or (pages, page_size, D_idx) with `block_table`): Keys of the indexer.
        cache_seqlens (B,): int32, slots in use in each row, including the new tokens and the left padding.
        cache_leftpad ((B,) or None): int32, slots of padding at the start of each row. Not with `block_table`.
        block_table ((B, pages of a row) or None): int32, the pages of each row, in order.
        block_size, topk, local_blocks, init_blocks, backend: As in `select_blocks`.

    Returns:
        int32 (B, T, H_idx, topk), as `select_blocks` returns it. Block 0 starts at the first token after the padding.

    Raises:
        ValueError, TypeError, NotImplementedError: As `select_blocks`.
    """
    args = select_blocks_with_kvcache_args(
        index_query, index_key_cache, cache_seqlens, cache_leftpad, block_table, block_size, topk, local_blocks,
        init_blocks, backend,
    )  # fmt: skip
    return torch.ops.minimax_m3_msa.select_blocks_with_kvcache(*args.values(), backend)


def select_blocks_with_kvcache_args(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> SelectBlocksWithKVCacheArgs:
    """Checks the arguments of a call of `select_blocks_with_kvcache`."""
    checks.check_selection_options(block_size, topk, local_blocks, init_blocks)
    checks.check_tensor("index_query", index_query, ("B", "T", "H_idx", "D_idx"), checks.FLOATING_DTYPES)
    checks.check_unit_stride("index_query", index_query)
    caches: checks.Caches = {"index_key_cache": (index_key_cache, (index_query.shape[-1],))}
    checks.check_cache(caches, index_query, cache_seqlens, cache_leftpad, block_table)
    check_backend(backend)
    return SelectBlocksWithKVCacheArgs(
        index_query.detach(), index_key_cache.detach(), cache_seqlens, cache_leftpad, block_table, block_size, topk,
        local_blocks, init_blocks,
    )  # fmt: skip


@torch.library.custom_op("minimax_m3_msa::select_blocks_with_kvcache", mutates_args=())
def _select_blocks_with_kvcache(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> torch.Tensor:
    args = SelectBlocksWithKVCacheArgs(
        index_query, index_key_cache, cache_seqlens, cache_leftpad, block_table, block_size, topk, local_blocks,
        init_blocks,
    )  # fmt: skip
    checks.check_cache_values(index_key_cache, cache_seqlens, cache_leftpad, block_table)
    return run_on_backend(backend, SELECT_BLOCKS_WITH_KVCACHE, args)


@_select_blocks_with_kvcache.register_fake
def _(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
    backend: str,
) -> torch.Tensor:
    return index_query.new_empty((*index_query.shape[:3], topk), dtype=torch.int32)
