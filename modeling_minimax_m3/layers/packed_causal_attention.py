"""Causal attention within each of several packed sequences, as one operator for compiled graphs.

The plain form is a loop over sequences, which reads their lengths on the host. A compiled graph cannot, so the
operator hides the loop from it.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

# Elements of the largest tile of scores that exists at a time.
_TILE = 2**24


def packed_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Each token attends to those before it, and to itself, in its own sequence.

    Args:
        query (`torch.Tensor`): (total_q, H_q, D).
        key (`torch.Tensor`): (total_q, H_kv, D).
        value (`torch.Tensor`): (total_q, H_kv, D_v).
        cu_seqlens (`torch.Tensor`): int32 (sequences + 1,), offsets of the sequences.
        scaling (`float`): Factor of the scores.

    Returns:
        (total_q, H_q, D_v), in the dtype of `query`.
    """
    return torch.ops.minimax_m3.packed_causal_attention(query, key, value, cu_seqlens, scaling)[0]


@torch.library.custom_op("minimax_m3::packed_causal_attention", mutates_args=())
def _packed_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `packed_causal_attention`, and lse (H_kv, q_heads_per_kv, total_q) in float32 or float64."""
    output_dtype = query.dtype
    query, key, value, dtype = _grouped(query, key, value)
    out = torch.zeros((*query.shape[:3], value.shape[-1]), dtype=dtype, device=query.device)
    lse = torch.zeros(query.shape[:3], dtype=dtype, device=query.device)
    for rows, keys in _causal_tiles(cu_seqlens, query.shape[0] * query.shape[1]):
        scores = _causal_scores(query, key, rows, keys, scaling)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = scores.softmax(-1) @ value[:, None, keys]
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(output_dtype).contiguous(), lse


@_packed_causal_attention.register_fake
def _(query, key, value, cu_seqlens, scaling):
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse_shape = (key.shape[1], query.shape[1] // key.shape[1], query.shape[0])
    out = query.new_empty((*query.shape[:2], value.shape[-1]))
    return out, query.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.custom_op("minimax_m3::packed_causal_attention_backward", mutates_args=())
def _packed_causal_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (query, key, value)
    query, key, value, dtype = _grouped(query, key, value)
    grad_out, out = (states.to(dtype).unflatten(1, query.shape[:2]).permute(1, 2, 0, 3) for states in (grad_out, out))
    grad_query, grad_key, grad_value = (torch.zeros_like(states, dtype=dtype) for states in (query, key, value))
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows, keys in _causal_tiles(cu_seqlens, query.shape[0] * query.shape[1]):
        probs = (_causal_scores(query, key, rows, keys, scaling) - lse[:, :, rows, None]).exp()
        grad_rows = grad_out[:, :, rows]
        grad_scores = probs * (grad_rows @ value[:, None, keys].mT - delta[:, :, rows]) * scaling
        grad_query[:, :, rows] = grad_scores @ key[:, None, keys]
        grad_key[:, keys] += (grad_scores.mT @ query[:, :, rows]).sum(1)
        grad_value[:, keys] += (probs.mT @ grad_rows).sum(1)
    grads = (grad_query.permute(2, 0, 1, 3).flatten(1, 2), grad_key.transpose(0, 1), grad_value.transpose(0, 1))
    return tuple(grad.to(tensor.dtype).contiguous() for grad, tensor in zip(grads, inputs))


@_packed_causal_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, cu_seqlens, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, cu_seqlens, out, lse = ctx.saved_tensors
    grads = torch.ops.minimax_m3.packed_causal_attention_backward(
        grad_out, query, key, value, out, lse, cu_seqlens, ctx.scaling
    )
    return *grads, None, None


_packed_causal_attention.register_autograd(_backward, setup_context=_setup_context)


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]:
    """Queries (H_kv, q_heads_per_kv, total_q, D), keys and values (H_kv, total_q, D), and their dtype, that of sums."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped_query = query.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
    return grouped_query.to(dtype), key.transpose(0, 1).to(dtype), value.transpose(0, 1).to(dtype), dtype


def _causal_tiles(cu_seqlens: torch.Tensor, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of queries, and of the keys up to the last of them, that keep a tile of scores bounded."""
    bounds = cu_seqlens.tolist()
    for first, end in pairwise(bounds):
        start = first
        while start < end:
            stop = min(end, start + max(1, _TILE // (num_heads * (end - first))))
            yield slice(start, stop), slice(first, stop)
            start = stop


def _causal_scores(query: torch.Tensor, key: torch.Tensor, rows: slice, keys: slice, scaling: float) -> torch.Tensor:
    scores = (query[:, :, rows] * scaling) @ key[:, None, keys].mT
    row = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
    return scores.masked_fill_(torch.arange(keys.start, keys.stop, device=query.device) > row, float("-inf"))
