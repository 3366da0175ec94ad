"""Where sequences lie in packed tensors and in caches. All backends share this, and the layers too."""

from collections.abc import Iterator

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of scores, softmax and sums: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sequence_of(token: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The sequence that each token of a pack lies in, int64; the number of sequences for tokens past the last one."""
    # Not in `cu_seqlens[1:]`: PyTorch 2.11's compiler cannot search a slice on a GPU.
    return torch.searchsorted(cu_seqlens, token, right=True) - 1


def bounded_block_size(block_size: int, longest: int) -> int:
    """`block_size`, but no more than `longest`, the number of keys of the longest sequence.

    A longer block holds the same keys. The bound keeps tiles of whole blocks from needing more memory than the keys.
    """
    return min(block_size, max(longest, 1))


def packed_sequences(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The token ranges (queries, keys) of each sequence that has queries."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        if q[i + 1] > q[i]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def cu_seqlens_of_one(len_q: int, len_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`cu_seqlens_q` and `cu_seqlens_k` of a batch of one sequence."""
    q, k = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (len_q, len_k))
    return q, k


def flat_rows(caches: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], int]:
    """The rows of caches one after the other, without a copy where their strides allow it.

    Args:
        caches (each (B, S, ...)): The caches. They may be views of longer buffers: the slots between two rows are then
            part of the result.

    Returns:
        Each cache as (slots, ...), and how many slots lie between the starts of two rows.
    """
    batch, slots = caches[0].shape[:2]
    distance, *others = (_row_distance(cache) for cache in caches)
    if distance is None or any(other != distance for other in others):
        return [cache.flatten(0, 1) for cache in caches], slots
    total = (batch - 1) * distance + slots
    return [cache.as_strided((total, *cache.shape[2:]), cache.stride()[1:]) for cache in caches], distance


def _row_distance(cache: torch.Tensor) -> int | None:
    """How many slots lie between the starts of two rows of a cache (B, S, ...); None if that is no whole number."""
    if cache.shape[0] <= 1:
        return cache.shape[1]
    row, slot = cache.stride()[:2]
    return row // slot if slot > 0 and row % slot == 0 and row // slot >= cache.shape[1] else None


def cached_sequences(
    caches: tuple[torch.Tensor, ...],
    num_new: int,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """For each row: its index, how many of its new tokens are padding (the first ones), and its tokens in each cache.

    The tokens of a contiguous row are a view. Those of a paged row are gathered, which copies them.

    Args:
        caches (each (B, S, ...), or (pages, page_size, ...) with `block_table`): The caches.
        num_new (int): New tokens per row.
        cache_seqlens, cache_leftpad, block_table: As in `reference.SelectBlocksWithKVCacheArgs`.
    """
    leftpads = [0] * len(cache_seqlens) if cache_leftpad is None else cache_leftpad.tolist()
    for row, (used, leftpad) in enumerate(zip(cache_seqlens.tolist(), leftpads)):
        if block_table is None:
            tokens = [cache[row, leftpad:used] for cache in caches]
        else:
            tokens = [
                cache[block_table[row, : -(-used // cache.shape[1])].long()].flatten(0, 1)[:used] for cache in caches
            ]
        yield row, min(num_new, max(0, num_new - (used - leftpad))), tokens
