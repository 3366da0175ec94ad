"""`select_blocks` in PyTorch: chunks of queries, so that only a bounded tile of scores exists at a time."""

import math

import torch
from torch.nn.functional import pad

from ..forced_blocks import is_forced
from ..reference import SelectBlocksArgs, SelectBlocksWithKVCacheArgs
from ..sequences import bounded_block_size, cached_sequences, compute_dtype, cu_seqlens_of_one, packed_sequences
from .caches import MAX_DECODE_TOKENS, existing_pages, new_positions

# Elements of the largest temporary tile of scores. These are 16 MiB in float32, because matmuls want many keys.
SELECTION_TILE = 2**22


def select_blocks(args: SelectBlocksArgs) -> torch.Tensor:
    """As `reference.select_blocks`."""
    index_query, topk, local_blocks, init_blocks = args.index_query, args.topk, args.local_blocks, args.init_blocks
    total_q, num_heads, _ = index_query.shape
    device, dtype = index_query.device, compute_dtype(index_query)
    selected = torch.full((total_q, num_heads, topk), -1, dtype=torch.int32, device=device)
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        len_k = keys.stop - keys.start
        past = len_k - (queries.stop - queries.start)
        block_size = bounded_block_size(args.block_size, len_k)
        # Zero keys complete the last block. They lie in every query's future, so the causal mask removes them.
        padded_keys = pad(args.index_key[keys].to(dtype), (0, 0, 0, -len_k % block_size))
        start = queries.start
        while start < queries.stop:
            first = past + start - queries.start  # position of the chunk's first query
            stop = min(start + _chunk_length(first + block_size, num_heads), queries.stop)
            last = past + stop - 1 - queries.start
            seen = (last // block_size + 1) * block_size  # keys of the blocks that the chunk can see
            scores = index_query[start:stop].to(dtype).flatten(0, 1) @ padded_keys[:seen].T
            scores = scores.view(stop - start, num_heads, seen)
            position = torch.arange(first, last + 1, device=device)[:, None, None]
            # Keys before `first` are in no query's future.
            scores[..., first:].masked_fill_(torch.arange(first, seen, device=device) > position, float("-inf"))
            block_scores = scores.unflatten(-1, (-1, block_size)).amax(-1)
            selected[start:stop] = _top_blocks(block_scores, position, block_size, topk, local_blocks, init_blocks)
            start = stop
    return selected


def select_blocks_with_kvcache(args: SelectBlocksWithKVCacheArgs) -> torch.Tensor:
    """As `reference.select_blocks_with_kvcache`."""
    index_query, cache_seqlens, cache_leftpad = args.index_query, args.cache_seqlens, args.cache_leftpad
    batch, num_new, num_heads, _ = index_query.shape
    device, dtype = index_query.device, compute_dtype(index_query)
    if num_new > MAX_DECODE_TOKENS:
        selected = torch.full((batch, num_new, num_heads, args.topk), -1, dtype=torch.int32, device=device)
        rows = cached_sequences((args.index_key_cache,), num_new, cache_seqlens, cache_leftpad, args.block_table)
        for row, padding, (index_key,) in rows:
            offsets = cu_seqlens_of_one(num_new - padding, len(index_key), device)
            selected[row, padding:] = select_blocks(args.packed(index_query[row, padding:], index_key, *offsets))
        return selected

    keys = args.index_key_cache
    if args.block_table is not None:
        keys = keys[existing_pages(args.block_table, keys)].flatten(1, 2)
    if device.type == "cpu":  # elsewhere this would wait for the device, so unused slots are scored too
        keys = keys[:, : max(cache_seqlens.tolist(), default=0)]
    slots = keys.shape[1]
    scores = (index_query.to(dtype).flatten(1, 2) @ keys.to(dtype).mT).unflatten(1, (num_new, num_heads))
    block_size = bounded_block_size(args.block_size, slots)
    position, leftpad = new_positions(num_new, cache_seqlens, cache_leftpad)
    rank = torch.arange(slots, device=device)
    if cache_leftpad is not None and slots > 0:  # shift each row, so that its first real token has rank 0
        scores = scores.gather(-1, (rank + leftpad).clamp_(max=slots - 1).expand_as(scores))
    scores.masked_fill_(rank > position, float("-inf"))
    scores = pad(scores, (0, -slots % block_size), value=float("-inf"))
    block_scores = scores.unflatten(-1, (-1, block_size)).amax(-1)
    if block_scores.shape[-1] == 0:
        return torch.full((batch, num_new, num_heads, args.topk), -1, dtype=torch.int32, device=device)
    return _top_blocks(block_scores, position, block_size, args.topk, args.local_blocks, args.init_blocks)


def _chunk_length(keys: int, num_heads: int) -> int:
    """How many queries fit a tile of scores: at least 1, else the largest n with H_idx * n * (keys + n) <= tile.

    The chunk's first query sees `keys` keys, and each further query sees one more.
    """
    return max(1, (math.isqrt(keys * keys + 4 * SELECTION_TILE // num_heads) - keys) // 2)


def _top_blocks(
    block_scores: torch.Tensor, position: torch.Tensor, block_size: int, topk: int, local_blocks: int, init_blocks: int
) -> torch.Tensor:
    """Ids of the `topk` best blocks of each row, ascending, -1 after them: int32 (..., topk).

    Forced blocks come before all others, whatever any score is. Blocks after the query's own are not listed.

    Args:
        block_scores (..., N): Scores of the blocks.
        position (..., 1): Position of each row's query, negative for padding.
        block_size, topk, local_blocks, init_blocks (int): As in `SelectBlocksArgs`.
    """
    num_blocks = block_scores.shape[-1]
    own_block = torch.div(position, block_size, rounding_mode="floor")
    block = torch.arange(num_blocks, dtype=torch.int32, device=block_scores.device)
    ranks = _ordered_bits(block_scores)
    limits = torch.iinfo(ranks.dtype)
    ranks.masked_fill_(is_forced(block, own_block, local_blocks, init_blocks), limits.max)
    ranks.masked_fill_(block > own_block, limits.min)

    # `torch.topk` leaves open which of several equal ranks it returns, so only its threshold is used.
    width = min(topk, num_blocks)
    threshold = ranks.topk(width, dim=-1).values[..., -1:]
    above = ranks > threshold
    tied = (ranks == threshold) & (threshold > limits.min)
    open_places = width - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= open_places))
    ids = torch.where(chosen, block, num_blocks).topk(width, dim=-1, largest=False, sorted=True).values
    return pad(ids.masked_fill(ids == num_blocks, -1), (0, topk - width), value=-1)


def _ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats, NaN above inf; never the least or the greatest of their dtype."""
    values = values.masked_fill(values.isnan(), float("nan")) + 0.0  # NaN of one sign, zero of one sign
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
