"""The RMS norm of each head, then the rotary embedding of its first channels."""

from typing import Any

import torch

from ..msa import derivatives
from .rms_norm import rms_norm_reference
from .support import KERNEL_DTYPES, as_vectors, is_vector_block, kernels_take, starts_vectors

MAX_HEAD_DIM = 256


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R channels of `states` (B, T, heads, D) by `cos` and `sin` (B, T, R), keeping the dtype.

    Under autocast `cos` and `sin` are float32 while `states` come from a projection in half precision.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    width = cos.shape[-1]
    rotated, passed = states[..., :width], states[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(states.dtype), passed), dim=-1)


def norm_rotary_reference(
    states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """The definition of `norm_rotary`."""
    return apply_rotary(rms_norm_reference(states, weight, eps), cos, sin)


def norm_rotary(
    states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """`apply_rotary` of the RMS norm of each head, in the dtype of `states`.

    The kernel rounds once, at the end; the definition also rounds between the two steps.

    Args:
        states (B, T, heads, D): What is normalized over its last dimension.
        weight (D,): The weight of the norm, in the dtype of `states` or in float32.
        cos (B or 1, T, R): Cosines of the first R channels.
        sin (B or 1, T, R): Their sines.
        eps (float): Added to the mean square.

    Returns:
        (B, T, heads, D); contiguous where the kernel runs.
    """
    if not (kernels_take(states, weight, cos, sin) and _are_supported(states, weight, cos, sin)):
        return norm_rotary_reference(states, weight, cos, sin, eps)
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            return norm_rotary_reference(states, weight, cos, sin, eps)
        if states.requires_grad or weight.requires_grad:
            return torch.ops.minimax_m3_fused.norm_rotary(states, weight, cos, sin, eps)
    return torch.ops.minimax_m3_msa_cuda.norm_rotary(states, weight, cos, sin, eps)


def _are_supported(states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    shape, angle_shape = states.shape, cos.shape
    if len(shape) != 4 or len(angle_shape) != 3 or sin.shape != angle_shape:
        return False
    dtype, weight_dtype, angle_dtype = states.dtype, weight.dtype, cos.dtype
    batch, num_new, heads, head_dim = shape
    angle_batch, angle_num_new, channels = angle_shape
    return (
        dtype in KERNEL_DTYPES
        and (weight_dtype == dtype or weight_dtype == torch.float32)
        and (angle_dtype == dtype or angle_dtype == torch.float32)
        and sin.dtype == angle_dtype
        and weight.shape == (head_dim,)
        and (angle_batch == batch or angle_batch == 1)
        and angle_num_new == num_new
        and head_dim % 8 == 0
        and channels % 16 == 0
        and 0 < channels <= head_dim <= MAX_HEAD_DIM
        and batch * num_new * heads < 2**31
        and starts_vectors(states)
        and is_vector_block(weight)
        and is_vector_block(cos)
        and is_vector_block(sin)
    )


@torch.library.custom_op("minimax_m3_fused::norm_rotary", mutates_args=())
def _norm_rotary(
    states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.norm_rotary(states, weight, cos, sin, eps)


@_norm_rotary.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    return states.new_empty(states.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_states, needs_weight, *_ = ctx.needs_input_grad
    grad_states, grad_weight = torch.ops.minimax_m3_fused.norm_rotary_backward(
        grad_out, *ctx.saved_tensors, ctx.eps, needs_states, needs_weight
    )
    return grad_states if needs_states else None, grad_weight if needs_weight else None, None, None, None


_norm_rotary.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("minimax_m3_fused::norm_rotary_backward", mutates_args=())
def _norm_rotary_backward(
    grad_out: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    needs_states: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `states` and `weight`; one without elements where it is not needed."""
    return torch.ops.minimax_m3_msa_cuda.norm_rotary_backward(
        as_vectors(grad_out), states, weight, cos, sin, eps, needs_states, needs_weight
    )


@_norm_rotary_backward.register_fake
def _(
    grad_out: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    needs_states: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_states = states.new_empty(states.shape if needs_states else (0,))
    return grad_states, weight.new_empty(weight.shape if needs_weight else (0,))


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.needs_states, ctx.needs_weight = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_backward(
    ctx: Any, grad_grad_states: torch.Tensor, grad_grad_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_out, states, weight, cos, sin = ctx.saved_tensors
    of_states = grad_grad_states if ctx.needs_states else None
    of_weight = grad_grad_weight if ctx.needs_weight else None

    def out_of(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm_rotary_reference(states, weight, cos, sin, ctx.eps)

    grads = derivatives.gradient_of_gradient(out_of, grad_out, (states, weight), (of_states, of_weight))
    return *grads, None, None, None, None, None


_norm_rotary_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
