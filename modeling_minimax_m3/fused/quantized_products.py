"""Products with weights that are stored in fewer bits. They dequantize what they multiply by, never all experts.

The products are differentiable with respect to the states. Their gradients are products of the same kind, with the
transposed weights, so nothing but the stored bytes is kept for the backward.

E is the number of experts. A weight is a `StoredWeight`, whose format says how it is dequantized.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts import product_of_groups
from .weight_formats import StoredWeight, format_named

# Of dequantized experts that exist at a time. The released gate_up_proj has 72 MiB an expert in bfloat16.
DEQUANTIZED_BYTES = 2**30


def linear(x: torch.Tensor, weight: StoredWeight) -> torch.Tensor:
    """`torch.nn.functional.linear` in the dtype of `x`.

    Args:
        x (..., channels): Inputs.
        weight (outputs, channels): The weight.

    Returns:
        (..., outputs).
    """
    return torch.ops.minimax_m3_quantized.linear(x, weight.tensors, weight.format.name, False)


def grouped_product(states: torch.Tensor, weight: StoredWeight, ends: torch.Tensor) -> torch.Tensor:
    """Rows times the weights of their experts.

    Args:
        states (rows, channels): Sorted by expert.
        weight (E, outputs, channels): The weights.
        ends (E,): int32, where the rows of each expert end. On the host, since the host has to know which experts have
            rows: several products then wait for a GPU once.

    Returns:
        (rows, outputs) in the dtype of `states`; rows of no expert are 0.
    """
    return torch.ops.minimax_m3_quantized.grouped_product(states, weight.tensors, weight.format.name, ends, False)


def paired_product(states: torch.Tensor, weight: StoredWeight, expert_ids: torch.Tensor) -> torch.Tensor:
    """Each row times the weight of its own expert. It never waits for a GPU, and reads a weight once for each row.

    Args:
        states (rows, channels): In any order.
        weight (E, outputs, channels): The weights.
        expert_ids (rows,): int64, from 0 to E - 1.

    Returns:
        (rows, outputs) in the dtype of `states`.
    """
    return torch.ops.minimax_m3_quantized.paired_product(states, weight.tensors, weight.format.name, expert_ids, False)


@torch.library.custom_op("minimax_m3_quantized::linear", mutates_args=())
def _linear(x: torch.Tensor, tensors: list[torch.Tensor], weight_format: str, transposed: bool) -> torch.Tensor:
    weight = _stored(tensors, weight_format).dequantize(x.dtype)
    return x.matmul(weight) if transposed else nn.functional.linear(x, weight)


@torch.library.custom_op("minimax_m3_quantized::grouped_product", mutates_args=())
def _grouped_product(
    states: torch.Tensor, tensors: list[torch.Tensor], weight_format: str, ends: torch.Tensor, transposed: bool
) -> torch.Tensor:
    stored = _stored(tensors, weight_format)
    out = states.new_zeros((len(states), _outputs(stored, transposed)))
    for group in _groups_with_rows(ends.tolist(), _most_experts(stored, states.dtype)):
        weight = _experts_of(stored, group).dequantize(states.dtype)
        start = group[0].start
        rows, result = states[start : group[-1].end], out[start : group[-1].end]
        ends_here = [expert.end - start for expert in group]
        if states.is_cuda:
            offsets = _on_device(ends_here, torch.int32, states.device)
            if transposed:
                result.copy_(nn.functional.grouped_mm(rows, weight, offs=offsets))
            else:
                result.copy_(product_of_groups(rows, weight, offsets))
        else:
            for matrix, begin, end in zip(
                weight if transposed else weight.mT, [0, *ends_here], ends_here, strict=False
            ):
                torch.mm(rows[begin:end], matrix, out=result[begin:end])
        del weight  # before the next one is made
    return out


@torch.library.custom_op("minimax_m3_quantized::paired_product", mutates_args=())
def _paired_product(
    states: torch.Tensor, tensors: list[torch.Tensor], weight_format: str, expert_ids: torch.Tensor, transposed: bool
) -> torch.Tensor:
    stored = _stored(tensors, weight_format)
    out = states.new_empty((len(states), _outputs(stored, transposed)))
    most = _most_experts(stored, states.dtype)
    for rows, ids, result in zip(states.split(most), expert_ids.split(most), out.split(most), strict=True):
        weight = stored.of_experts(ids).dequantize(states.dtype)
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


def _experts_of(stored: StoredWeight, group: list[_RowsOfExpert]) -> StoredWeight:
    first, last = group[0].expert, group[-1].expert
    if last - first + 1 == len(group):
        return stored.of_experts(slice(first, last + 1))
    return stored.of_experts(_on_device([rows.expert for rows in group], torch.int64, stored.tensors[0].device))


def _on_device(numbers: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the numbers. A copy from pinned memory does not wait for the GPU."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _stored(tensors: list[torch.Tensor], weight_format: str) -> StoredWeight:
    return StoredWeight(format_named(weight_format), tuple(tensors))


def _outputs(stored: StoredWeight, transposed: bool) -> int:
    return stored.shape[-1 if transposed else -2]


def _most_experts(stored: StoredWeight, dtype: torch.dtype) -> int:
    return max(1, DEQUANTIZED_BYTES // max(1, stored.shape[1:].numel() * dtype.itemsize))


@_linear.register_fake
def _(x: torch.Tensor, tensors: list[torch.Tensor], weight_format: str, transposed: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _outputs(_stored(tensors, weight_format), transposed)))


@_grouped_product.register_fake
@_paired_product.register_fake
def _(
    states: torch.Tensor, tensors: list[torch.Tensor], weight_format: str, places: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return states.new_empty((states.shape[0], _outputs(_stored(tensors, weight_format), transposed)))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, tensors, ctx.weight_format, *places, ctx.transposed = inputs
    ctx.num_tensors = len(tensors)
    ctx.save_for_backward(*tensors, *places)


def _backward_of(operator: Any) -> Any:
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once, as activation checkpointing demands
        tensors, places = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        grad = None
        if ctx.needs_input_grad[0]:
            grad = operator(grad_out.contiguous(), tensors, ctx.weight_format, *places, not ctx.transposed)
        return grad, [None] * len(tensors), None, *[None] * len(places), None

    return backward


for _operator in (_linear, _grouped_product, _paired_product):
    _operator.register_autograd(_backward_of(_operator), setup_context=_keep_weight)
