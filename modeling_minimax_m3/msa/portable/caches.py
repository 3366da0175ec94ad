"""Where the newest tokens of cached rows stand, without reading a value on the host."""

import torch

# Up to this many new tokens per row the cached forms gather; above, they run as one variable-length call per row.
MAX_DECODE_TOKENS = 16


def new_positions(
    num_new: int, cache_seqlens: torch.Tensor, cache_leftpad: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T, 1, 1) of the new tokens, negative for padding, and left paddings (B, 1, 1, 1)."""
    leftpad = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    first = (cache_seqlens - leftpad - num_new).long()
    position = first[:, None] + torch.arange(num_new, device=cache_seqlens.device)
    return position[:, :, None, None], leftpad.long()[:, None, None, None]


def existing_pages(block_table: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """The table with its unused entries, which may hold anything, turned into pages that exist."""
    return block_table.long().clamp(0, len(cache) - 1)
