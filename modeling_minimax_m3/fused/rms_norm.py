"""RMS norm as Gemma defines it, `x / rms(x) * (1 + weight)`, alone and behind a residual addition."""

from typing import Any

import torch
from torch import nn

from ..msa import derivatives
from .support import KERNEL_DTYPES, as_vectors, is_vector_block, kernels_take, starts_vectors

MAX_WIDTH = 16384


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition of `rms_norm`."""
    normalized = nn.functional.rms_norm(x.float(), weight.shape, eps=eps)
    # The product is rounded once, after the weight: (x * w).to(dtype), not x.to(dtype) * w.
    return (normalized * (1.0 + weight.float())).type_as(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * (1 + weight)` over the last dimension, in float32, rounded once to the dtype of `x`.

    Args:
        x (..., width): What is normalized.
        weight (width,): The weight, in the dtype of `x` or in float32.
        eps (float): Added to the mean square.
    """
    if not (kernels_take(x, weight) and _are_supported(x, weight)):
        return rms_norm_reference(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.ops.minimax_m3_fused.rms_norm(x, weight, eps)
    return torch.ops.minimax_m3_msa_cuda.rms_norm(x, weight, eps)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `add_rms_norm`."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of a sum, and the sum: `rms_norm(x + residual, weight, eps), x + residual`.

    The sum is rounded to its dtype before it is normalized.

    Args:
        x (..., width): One summand.
        residual (..., width): The other one.
        weight (width,): The weight, in the dtype of the sum or in float32.
        eps (float): Added to the mean square.
    """
    if not (
        x.dtype == residual.dtype
        and x.shape == residual.shape
        and kernels_take(x, residual, weight)
        and _are_supported(x, weight)
        and starts_vectors(residual)
    ):
        total = x + residual
        return rms_norm(total, weight, eps), total
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return torch.ops.minimax_m3_fused.add_rms_norm(x, residual, weight, eps)
    return torch.ops.minimax_m3_msa_cuda.add_rms_norm(x, residual, weight, eps)


def _are_supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    dtype, weight_dtype, width = x.dtype, weight.dtype, x.shape[-1]
    return (
        dtype in KERNEL_DTYPES
        and (weight_dtype == dtype or weight_dtype == torch.float32)
        and weight.shape == (width,)
        and 0 < width <= MAX_WIDTH
        and width % 8 == 0
        and starts_vectors(x)
        and is_vector_block(weight)
    )


@torch.library.custom_op("minimax_m3_fused::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.rms_norm(x, weight, eps)


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.minimax_m3_fused.rms_norm_backward(
        grad_normed, None, *ctx.saved_tensors, ctx.eps, needs_x, needs_weight
    )
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("minimax_m3_fused::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.minimax_m3_msa_cuda.add_rms_norm(x, residual, weight, eps)


@_add_rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context_of_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_of_sum(ctx: Any, grad_normed: torch.Tensor, grad_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
    grad, grad_weight = torch.ops.minimax_m3_fused.rms_norm_backward(
        grad_normed, grad_sum, *ctx.saved_tensors, ctx.eps, needs_x or needs_residual, needs_weight
    )
    return grad if needs_x else None, grad if needs_residual else None, grad_weight if needs_weight else None, None


_add_rms_norm.register_autograd(_backward_of_sum, setup_context=_setup_context_of_sum)


@torch.library.custom_op("minimax_m3_fused::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad_normed: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `x` (with `grad_sum` added) and of `weight`; one without elements where it is not needed."""
    return torch.ops.minimax_m3_msa_cuda.rms_norm_backward(
        as_vectors(grad_normed),
        None if grad_sum is None else as_vectors(grad_sum),
        x,
        weight,
        eps,
        needs_x,
        needs_weight,
    )


@_rms_norm_backward.register_fake
def _(
    grad_normed: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs_x else (0,)), weight.new_empty(weight.shape if needs_weight else (0,))


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    grad_normed, grad_sum, x, weight, ctx.eps, ctx.needs_x, ctx.needs_weight = inputs
    ctx.has_sum = grad_sum is not None
    ctx.save_for_backward(grad_normed, x, weight)


def _backward_of_backward(
    ctx: Any, grad_grad_x: torch.Tensor, grad_grad_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_normed, x, weight = ctx.saved_tensors
    of_x = grad_grad_x if ctx.needs_x else None
    of_weight = grad_grad_weight if ctx.needs_weight else None

    def normed_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x, weight, ctx.eps)

    grads = derivatives.gradient_of_gradient(normed_of, grad_normed, (x, weight), (of_x, of_weight))
    return grads[0], of_x if ctx.has_sum else None, *grads[1:], None, None, None


_rms_norm_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
