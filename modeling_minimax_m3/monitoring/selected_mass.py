"""The share of the attention to all keys that the selected blocks hold."""

import torch

from ..runtime.sequence_layout import SequenceLayout

# Queries of a sample, and how many query-key pairs they may have together.
MOST_QUERIES, MOST_PAIRS = 8, 2**18


def selected_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor,
    layout: SequenceLayout,
    real: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
    chosen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends from a few queries to all of their keys, and sums over the selected blocks.

    Queries whose blocks are all selected say nothing and do not count.

    Args:
        query (B, T, H_q, D), key (B, T, H_kv, D), block_indices (B, T, H_kv, W): In working order, without a cache.
        layout (SequenceLayout): Where the documents lie.
        real (bool (B, T), optional): False at padding, in working order.
        block_size (int): Keys of a block.
        softmax_scale (float): Factor of the scores.
        chosen (int64 (N,), optional): The queries, as places among the B * T. By default those few that see the most
            keys.

    Returns:
        The sum of the shares, each the mean over heads from 0 to 1; the sum of the shares that the best choice of as
        many blocks would hold; and the number of queries that count: float32 scalars on the device.
    """
    num_tokens, (heads, width) = query.shape[0] * query.shape[1], block_indices.shape[2:]
    positions = layout.working_positions()
    if real is not None:
        positions = positions.masked_fill(~real, -1)
    positions = positions.flatten()
    if chosen is None:
        count = max(1, min(MOST_QUERIES, MOST_PAIRS // num_tokens, num_tokens))
        position, chosen = positions.topk(count)
    else:
        count, position = len(chosen), positions[chosen]
    # documents are consecutive, so the positions say where each starts
    start = (chosen - position)[:, None]

    token = torch.arange(num_tokens, device=query.device)
    visible = (token >= start) & (token <= chosen[:, None])  # (queries, keys)
    grouped = query.flatten(0, 1)[chosen].unflatten(1, (heads, -1))
    scores = torch.einsum("nhgd,shd->nhgs", grouped, key.flatten(0, 1)).float() * softmax_scale
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)

    num_blocks = -(-num_tokens // block_size)
    blocks = block_indices.flatten(0, 1)[chosen].long()  # (queries, heads, W); -1 is no block
    block_of_key = ((token - start).clamp(min=0) // block_size)[:, None].expand(-1, heads, -1)
    # All query heads of a key/value head attend to the same blocks. The last column is that of no block.
    shares = torch.zeros(count, heads, num_blocks + 1, device=query.device)
    shares.scatter_add_(2, block_of_key, weights.mean(2))
    is_selected = torch.zeros_like(shares, dtype=torch.bool)
    is_selected.scatter_(2, blocks.masked_fill(blocks < 0, num_blocks), True)
    held = shares.masked_fill(~is_selected, 0.0).sum(-1).mean(1)
    best = shares.topk(min(width, num_blocks)).values.sum(-1).mean(1)
    counts = (position >= width * block_size).float()
    return (held * counts).sum(), (best * counts).sum(), counts.sum()
