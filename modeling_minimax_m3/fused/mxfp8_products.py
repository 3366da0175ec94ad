"""Products with weights that are stored in MXFP8. They dequantize what they multiply by, never a whole layer's experts.

The products are differentiable with respect to the states. Their gradients are products of the same kind, with the
transposed weights, so nothing but the stored bytes is kept for the backward.

E is the number of experts. `values` and `scales` are those of `modeling_minimax_m3.mxfp8`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..mxfp8 import dequantize_mxfp8
from .experts import product_of_groups
from .support import is_vector_block, kernels_take

# Of dequantized experts that exist at a time. The released gate_up_proj has 72 MiB an expert in bfloat16.
DEQUANTIZED_BYTES = 2**30


def linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear` in the dtype of `x`.

    Args:
        x (..., channels): Inputs.
        values (outputs, channels), scales (outputs, channels / 32): The weight.

    Returns:
        (..., outputs).
    """
    return torch.ops.minimax_m3_mxfp8.linear(x, values, scales, False)


def grouped_product(
    states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Rows times the weights of their experts. It waits for a GPU once, to learn which experts have rows.

    Args:
        states (rows, channels): Sorted by expert.
        values (E, outputs, channels), scales (E, outputs, channels / 32): The weights.
        offsets (E,): int32, where the rows of each expert end.

    Returns:
        (rows, outputs) in the dtype of `states`; rows of no expert are 0.
    """
    return torch.ops.minimax_m3_mxfp8.grouped_product(states, values, scales, offsets, False)


def paired_product(
    states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """Each row times the weight of its own expert. It never waits for a GPU, and reads a weight once for each row.

    Args:
        states (rows, channels): In any order.
        values (E, outputs, channels), scales (E, outputs, channels / 32): The weights.
        expert_ids (rows,): int64, from 0 to E - 1.

    Returns:
        (rows, outputs) in the dtype of `states`.
    """
    return torch.ops.minimax_m3_mxfp8.paired_product(states, values, scales, expert_ids, False)


def dequantized(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_mxfp8`, by one kernel where there is one."""
    is_ours = dtype == torch.bfloat16 and kernels_take(values, scales) and values.numel() > 0
    if is_ours and is_vector_block(values) and scales.is_contiguous() and scales.dtype == torch.uint8:
        return torch.ops.minimax_m3_msa_cuda.dequantize_mxfp8(values, scales)
    return dequantize_mxfp8(values, scales, dtype)


@torch.library.custom_op("minimax_m3_mxfp8::linear", mutates_args=())
def _linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    weight = dequantized(values, scales, x.dtype)
    return x.matmul(weight) if transposed else nn.functional.linear(x, weight)


@torch.library.custom_op("minimax_m3_mxfp8::grouped_product", mutates_args=())
def _grouped_product(
    states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, transposed: bool
) -> torch.Tensor:
    out = states.new_zeros((len(states), values.shape[2 if transposed else 1]))
    for group in _groups_with_rows(offsets.tolist(), _most_experts(values, states.dtype)):
        weight = dequantized(*_experts_of(values, scales, group), states.dtype)
        start = group[0].start
        rows, result = states[start : group[-1].end], out[start : group[-1].end]
        ends = [expert.end - start for expert in group]
        if states.is_cuda:
            offsets_here = torch.tensor(ends, dtype=torch.int32, device=states.device)
            if transposed:
                result.copy_(nn.functional.grouped_mm(rows, weight, offs=offsets_here))
            else:
                result.copy_(product_of_groups(rows, weight, offsets_here))
        else:
            for matrix, begin, end in zip(weight if transposed else weight.mT, [0, *ends], ends, strict=False):
                torch.mm(rows[begin:end], matrix, out=result[begin:end])
        del weight  # before the next one is made
    return out


@torch.library.custom_op("minimax_m3_mxfp8::paired_product", mutates_args=())
def _paired_product(
    states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, expert_ids: torch.Tensor, transposed: bool
) -> torch.Tensor:
    out = states.new_empty((len(states), values.shape[2 if transposed else 1]))
    most = _most_experts(values, states.dtype)
    for rows, ids, result in zip(states.split(most), expert_ids.split(most), out.split(most), strict=True):
        weight = dequantized(_select(values, ids), scales[ids], states.dtype)
        result.copy_((torch.bmm(weight.mT if transposed else weight, rows.unsqueeze(-1))).squeeze(-1))
        del weight  # before the next one is made
    return out


class _RowsOfExpert(NamedTuple):
    expert: int
    start: int
    end: int


def _groups_with_rows(ends: list[int], most: int) -> Iterator[list[_RowsOfExpert]]:
    """The experts that have rows, at most `most` at a time. Their rows are adjacent."""
    starts = [0, *ends[:-1]]
    chosen = [
        _RowsOfExpert(expert, start, end)
        for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
        if end > start
    ]
    for first in range(0, len(chosen), most):
        yield chosen[first : first + most]


def _experts_of(
    values: torch.Tensor, scales: torch.Tensor, group: list[_RowsOfExpert]
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = group[0].expert, group[-1].expert
    if last - first + 1 == len(group):
        return values[first : last + 1], scales[first : last + 1]
    ids = torch.tensor([rows.expert for rows in group], device=values.device)
    return _select(values, ids), scales[ids]


def _select(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8)[ids].view(values.dtype)  # not every device selects from 8-bit floats


def _most_experts(values: torch.Tensor, dtype: torch.dtype) -> int:
    return max(1, DEQUANTIZED_BYTES // max(1, values[0].numel() * dtype.itemsize))


@_linear.register_fake
def _(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[1 if transposed else 0]))


@_grouped_product.register_fake
@_paired_product.register_fake
def _(
    states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, places: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return states.new_empty((states.shape[0], values.shape[2 if transposed else 1]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(operator: Any) -> Any:
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grad = operator(grad_out.contiguous(), *tensors, not ctx.transposed) if ctx.needs_input_grad[0] else None
        return grad, *[None] * (len(tensors) + 1)

    return backward


for _operator in (_linear, _grouped_product, _paired_product):
    _operator.register_autograd(_backward_of(_operator), setup_context=_keep_weight)
