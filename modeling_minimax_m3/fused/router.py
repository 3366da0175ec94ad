"""`route`: which experts a token takes, and with what weights."""

from typing import Any

import torch

from ..msa import derivatives
from .support import KERNEL_DTYPES, kernels_take

MAX_EXPERTS = 512
MAX_EXPERTS_PER_TOKEN = 16


def route(router_logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the highest `sigmoid(router_logits) + bias`, weighted by their sigmoids alone.

    Args:
        router_logits (`torch.Tensor`): (tokens, E).
        bias (`torch.Tensor`): (E,), takes part in choosing only. It gets no gradient.
        top_k (`int`): K, the number of experts of a token.

    Returns:
        Weights (tokens, K) in float32 that sum to one, and int64 ids (tokens, K) in no particular order. The kernel
        takes the lowest ids of equal scores; the definition leaves the choice to `torch.topk`. NaN counts as the
        highest score and makes all weights of its token NaN.
    """
    if not kernels_take(router_logits, bias) or not _has_kernel(router_logits, bias, top_k):
        return route_reference(router_logits, bias, top_k)
    if router_logits.requires_grad and torch.is_grad_enabled():
        return torch.ops.minimax_m3_fused.route(router_logits, bias, top_k)
    return torch.ops.minimax_m3_msa_cuda.route(router_logits, bias, top_k)


def route_reference(router_logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `route`."""
    scores = router_logits.float().sigmoid()
    top_k_index = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
    return _weights_of(scores, top_k_index), top_k_index


def _weights_of(scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    top_k_weights = scores.gather(-1, top_k_index)
    return top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)


def _has_kernel(router_logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> bool:
    return (
        router_logits.dim() == 2
        and router_logits.dtype in KERNEL_DTYPES
        and bias.dtype in (router_logits.dtype, torch.float32)
        and bias.shape == router_logits.shape[1:]
        and 1 <= top_k <= min(router_logits.shape[1], MAX_EXPERTS_PER_TOKEN)
        and router_logits.shape[1] <= MAX_EXPERTS
        and router_logits.stride(1) == 1
        and bias.is_contiguous()
    )


@torch.library.custom_op("minimax_m3_fused::route", mutates_args=())
def _route(router_logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.minimax_m3_msa_cuda.route(router_logits, bias, top_k)


@_route.register_fake
def _(router_logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("minimax_m3_fused::route_backward", mutates_args=())
def _route_backward(
    grad_weights: torch.Tensor, router_logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.route_backward(grad_weights.contiguous(), router_logits, weights, indices)


@_route_backward.register_fake
def _(
    grad_weights: torch.Tensor, router_logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    return router_logits.new_empty(router_logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, grad_weights: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.minimax_m3_fused.route_backward(grad_weights, *ctx.saved_tensors), None, None


_route.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad_weights, router_logits, _, indices = inputs
    ctx.save_for_backward(grad_weights, router_logits, indices)


def _backward_of_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_weights, router_logits, indices = ctx.saved_tensors

    def weights_of(router_logits: torch.Tensor) -> torch.Tensor:
        return _weights_of(router_logits.float().sigmoid(), indices)

    grads = derivatives.gradient_of_gradient(weights_of, grad_weights, (router_logits,), (grad_grad,))
    return *grads, None, None


_route_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
