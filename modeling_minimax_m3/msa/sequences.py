"""Where sequences lie in packed tensors and in caches, read on the host: shared by the PyTorch backends."""

from collections.abc import Iterator

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of scores, softmax and sums: float64 stays, everything else is float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sequence_of(token: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The sequence in which each token of a pack lies, int64; past the last one: the number of sequences."""
    # Not in `cu_seqlens[1:]`: PyTorch 2.11's compiler cannot search a slice on a GPU.
    return torch.searchsorted(cu_seqlens, token, right=True) - 1


def bounded_block_size(block_size: int, longest: int) -> int:
    """`block_size`, but no more than `longest`, the keys of the longest sequence: they are one block either way, and
    tiles of whole blocks then need no more memory than there are keys."""
    return min(block_size, max(longest, 1))


def packed_sequences(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The token ranges (queries, keys) of each sequence that has queries."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        if q[i + 1] > q[i]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def cached_sequences(
    caches: tuple[torch.Tensor, ...],
    num_new: int,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """For each row: its index, how many of its `num_new` queries are padding (the first ones), its tokens per cache.

    Caches are contiguous (B, S_max, ...) or, with `block_table`, paged (pages, page_size, ...). A contiguous row's
    tokens are a view; those of a paged row are gathered, which copies them.
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
