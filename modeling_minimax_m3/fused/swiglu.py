"""`swiglu_oai`: the gated activation of the MLPs and experts."""

from typing import Any

import torch

from ..msa import derivatives
from .support import KERNEL_DTYPES, as_vector_block, kernels_take


def swiglu_oai(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Gated activation `gate * sigmoid(alpha * gate) * (up + 1)` with both halves clamped to `limit`.

    Args:
        gate_up (`torch.Tensor`): (..., 2F), the gate half first. The gate is bounded from above only.
        alpha (`float`): Gain inside the sigmoid.
        limit (`float`): Clamp bound.

    Returns:
        (..., F), in the dtype of `gate_up`.
    """
    if not kernels_take(gate_up) or not _has_kernel(gate_up):
        return swiglu_oai_reference(gate_up, alpha, limit)
    if gate_up.requires_grad and torch.is_grad_enabled():
        return torch.ops.minimax_m3_fused.swiglu_oai(gate_up, alpha, limit)
    return torch.ops.minimax_m3_msa_cuda.swiglu_oai(gate_up, alpha, limit)


def swiglu_oai_reference(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """The definition of `swiglu_oai`, which rounds to the dtype after every operation."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1.0) * (gate * torch.sigmoid(alpha * gate))


def _has_kernel(gate_up: torch.Tensor) -> bool:
    """Whether the kernel, which reads eight elements at a time, can read the tensor."""
    if gate_up.dtype not in KERNEL_DTYPES:
        return False
    if gate_up.numel() == 0 or gate_up.shape[-1] % 16 or gate_up.data_ptr() % 16:
        return False
    if gate_up.is_contiguous():
        return True
    return gate_up.dim() == 2 and gate_up.stride(1) == 1 and gate_up.stride(0) * gate_up.element_size() % 16 == 0


@torch.library.custom_op("minimax_m3_fused::swiglu_oai", mutates_args=())
def _swiglu_oai(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.swiglu_oai(gate_up, alpha, limit)


@_swiglu_oai.register_fake
def _(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("minimax_m3_fused::swiglu_oai_backward", mutates_args=())
def _swiglu_oai_backward(grad_out: torch.Tensor, gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.swiglu_oai_backward(as_vector_block(grad_out), gate_up, alpha, limit)


@_swiglu_oai_backward.register_fake
def _(grad_out: torch.Tensor, gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate_up, *ctx.options = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.minimax_m3_fused.swiglu_oai_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None


_swiglu_oai.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad_out, gate_up, *ctx.options = inputs
    ctx.save_for_backward(grad_out, gate_up)


def _backward_of_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_out, gate_up = ctx.saved_tensors

    def out_of(gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu_oai_reference(gate_up, *ctx.options)

    return *derivatives.gradient_of_gradient(out_of, grad_out, (gate_up,), (grad_grad,)), None, None


_swiglu_oai_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
