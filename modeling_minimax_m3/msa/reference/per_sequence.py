"""What the loops over sequences share: positions, which keys are attended to, joining the results."""

from collections.abc import Sequence

import torch

from ..sequences import bounded_block_size


def positions(queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
    """Positions of a sequence's queries, which are its last tokens: (len_q,)."""
    len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
    return torch.arange(len_k - len_q, len_k, device=device)


def attended_keys(
    block_indices: torch.Tensor, queries: slice, keys: slice, block_size: int, q_heads_per_kv: int
) -> torch.Tensor:
    """Which keys of its sequence each query head attends to: bool (len_q, H_q, len_k)."""
    len_k = keys.stop - keys.start
    block_size = bounded_block_size(block_size, len_k)
    num_blocks = -(-len_k // block_size)
    position = positions(queries, keys, block_indices.device)[:, None, None]
    # Ids that name no block of this sequence go to an extra column that is dropped.
    block = block_indices[queries].long()
    block = block.masked_fill((block < 0) | (block >= num_blocks), num_blocks)
    chosen = torch.zeros((*block.shape[:2], num_blocks + 1), dtype=torch.bool, device=block.device)
    chosen = chosen.scatter(-1, block, True)
    attended = chosen[..., :num_blocks].repeat_interleave(block_size, dim=-1)[..., :len_k]
    attended = attended & (torch.arange(len_k, device=block.device) <= position)
    return attended.repeat_interleave(q_heads_per_kv, dim=1)


def joined(parts: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """The rows of the sequences, one after the other; the rows after the last sequence come from `empty`."""
    return torch.cat([*parts, empty[sum(map(len, parts)) :]])
