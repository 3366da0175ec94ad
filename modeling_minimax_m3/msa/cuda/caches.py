"""The rows of caches as packed sequences, for calls with more new tokens per row than the decoding kernels take."""

import torch

from ..sequences import flat_rows

# Up to this many new tokens per row the cached forms have kernels of their own; above, rows run as packed sequences.
MAX_DECODE_TOKENS = 16


def rows_as_sequences(
    caches: tuple[torch.Tensor, ...],
    num_new: int,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The rows of caches as packed sequences.

    Nothing is read on the host, so that CUDA graphs can capture it. A contiguous cache is not copied: the slots
    between two rows' tokens become sequences of their own without queries, and queries that are padding become a
    sequence without keys. A paged cache is gathered into a contiguous one first, which copies it.

    Args:
        caches (each (B, S, ...), or (pages, page_size, ...) with `block_table`): The caches.
        num_new (int): New tokens per row.
        cache_seqlens, cache_leftpad, block_table: As in `reference.SelectBlocksWithKVCacheArgs`.

    Returns:
        Each cache as (tokens, ...), cu_seqlens_q and cu_seqlens_k.
    """
    if block_table is not None:
        pages = block_table.long().clamp(0, caches[0].shape[0] - 1)  # unused entries may hold anything
        caches = tuple(cache[pages].flatten(1, 2) for cache in caches)
    batch, slots = caches[0].shape[:2]
    tokens, distance = flat_rows(caches)

    used = cache_seqlens.clamp(0, slots)
    leftpad = torch.zeros_like(used) if cache_leftpad is None else torch.minimum(cache_leftpad.clamp(min=0), used)
    padding = (num_new - (used - leftpad)).clamp(0, num_new)
    row = torch.arange(batch, dtype=torch.int32, device=used.device)
    # For each row, the ends of four sequences: padding queries, left padding, its own tokens, unused slots.
    all_new = torch.full_like(padding, num_new)
    ends_q = row[:, None] * num_new + torch.stack((padding, padding, all_new, all_new), dim=1)
    all_slots = torch.full_like(used, distance)
    ends_k = row[:, None] * distance + torch.stack((torch.zeros_like(used), leftpad, used, all_slots), dim=1)
    cu_seqlens_q, cu_seqlens_k = (
        torch.nn.functional.pad(ends.flatten(), (1, 0)) for ends in (ends_q, ends_k.clamp(max=len(tokens[0])))
    )
    return tokens, cu_seqlens_q, cu_seqlens_k
