"""Where sequences lie in packed tensors and in caches, read on the host: shared by the PyTorch backends."""

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
