"""Sparse attention with its weights in memory, for `output_attentions` and for a caller's own 4-D mask.

Memory is quadratic in tokens, as it is for eager dense attention and nowhere else.
"""

import torch
from torch.nn.functional import pad

from ..msa.forced_blocks import is_forced
from ..runtime.sequence_layout import SequenceLayout


def select_blocks_under_mask(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    layout: SequenceLayout,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """Block selection where a caller's mask says which keys count.

    Blocks are counted from the first slot, because a mask does not say where a sequence starts. A block without an
    allowed key is never selected. Where the mask has one head per query head, a key counts for an index head if any of
    that head's query heads may see it.

    Args:
        index_query (`torch.Tensor`): (B, T, H_idx, D_idx).
        index_key (`torch.Tensor`): (B, S, D_idx).
        layout (`SequenceLayout`): A layout with `allowed`.
        block_size, topk, local_blocks, init_blocks (`int`): As in `msa.select_blocks`.

    Returns:
        int32 (B, T, H_idx, topk), -1 where fewer blocks have allowed keys.
    """
    num_heads, num_keys = index_query.shape[2], index_key.shape[1]
    allowed = layout.allowed
    if allowed.shape[1] > 1:
        allowed = allowed.unflatten(1, (num_heads, -1)).any(2)
    scores = torch.einsum("bthd,bsd->bhts", index_query.float(), index_key.float()).masked_fill(~allowed, -torch.inf)
    block_scores = pad(scores, (0, -num_keys % block_size), value=-torch.inf).unflatten(-1, (-1, block_size)).amax(-1)
    block = torch.arange(block_scores.shape[-1], device=scores.device)
    own_block = (layout.positions() // block_size)[:, None, :, None]
    forced = is_forced(block, own_block, local_blocks, init_blocks)
    block_scores = block_scores.masked_fill(forced & (block_scores > -torch.inf), torch.inf)
    ranked = block_scores.sort(dim=-1, descending=True, stable=True)
    selected = ranked.indices.masked_fill(ranked.values == -torch.inf, -1)[..., :topk]
    return pad(selected, (0, topk - selected.shape[-1]), value=-1).transpose(1, 2).to(torch.int32)


def materialized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    layout: SequenceLayout,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to selected blocks, computed from its weights, so that gradients flow through them.

    Args:
        query (`torch.Tensor`): (B, T, H_q, D), in the caller's order.
        key (`torch.Tensor`): (B, S, H_kv, D), in the caller's order.
        value (`torch.Tensor`): (B, S, H_kv, D_v), in the caller's order.
        block_indices (`torch.Tensor`): (B, T, H_kv, topk), in the layout's working order.
        layout (`SequenceLayout`): Where the sequences lie.
        block_size (`int`): Keys in a block.
        softmax_scale (`float`): Factor of the scores.

    Returns:
        The output (B, T, H_q, D_v) and the weights (B, H_q, T, S), in the caller's order.
    """
    query, key = layout.order_queries(query), layout.order_keys(key)
    weights = sparse_attention_weights(query, key, block_indices, layout, block_size, softmax_scale)
    weights = layout.restore_weights(weights)
    value = value.repeat_interleave(query.shape[2] // value.shape[2], dim=2)
    return torch.einsum("bhts,bshd->bthd", weights, value), weights


def sparse_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor,
    layout: SequenceLayout,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention weights (B, H_q, T, S) in the dtype of `query`. A row without any key is 0.

    Arguments are those of `materialized_attention`, all in the layout's working order.
    """
    num_keys, num_kv_heads = key.shape[1:3]
    visible, rank = layout.visibility(num_keys)
    num_blocks = -(-num_keys // block_size)
    # Ids that name no block go to an extra column. Keys of negative rank are padding, which `visible` excludes.
    block = block_indices.long().masked_fill((block_indices < 0) | (block_indices >= num_blocks), num_blocks)
    chosen = torch.zeros((*block.shape[:3], num_blocks + 1), dtype=torch.bool, device=block.device)
    chosen = chosen.scatter_(-1, block, True)[..., :num_blocks]
    block_of_key = (rank.clamp(min=0) // block_size)[:, None, None].expand(*block.shape[:3], -1)
    attended = chosen.gather(-1, block_of_key).transpose(1, 2)  # (B, H_kv, T, S)
    q_heads_per_kv = query.shape[2] // num_kv_heads
    attended = attended.repeat_interleave(q_heads_per_kv, dim=1) & visible
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bthd,bshd->bhts", query.to(dtype), key.repeat_interleave(q_heads_per_kv, dim=2).to(dtype))
    weights = (scores * softmax_scale).masked_fill(~attended, torch.finfo(scores.dtype).min).softmax(-1) * attended
    return weights.to(query.dtype)
