"""Derivatives that the operators' own gradients do not give: forward mode, `torch.func`, and those of a gradient.

The backends have one derivative: the gradient by reverse mode. In forward mode, PyTorch would take their results for
constants. So a call that is differentiated in any other way runs `reference`, which consists of differentiable
operations, at quadratic memory. The derivative of a gradient runs `reference` as well.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.autograd import forward_ad

from . import checks
from .backends import Operator
from .reference import BlockSparseAttentionArgs, IndexerKLLossArgs

Args = TypeVar("Args", BlockSparseAttentionArgs, IndexerKLLossArgs)
Result = TypeVar("Result")

_DIFFERENTIATING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def are_beyond_backward(*tensors: torch.Tensor) -> bool:
    """Whether derivatives by anything but plain reverse mode pass through these tensors."""
    if _transform_differentiates():
        return True
    # `torch.compile` guards a graph on the level where it is read here.
    is_forward_mode = forward_ad._current_level >= 0
    return is_forward_mode and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@torch.compiler.assume_constant_result  # a graph is guarded on the transforms that it was traced in
def _transform_differentiates() -> bool:
    """Whether a transform of `torch.func` that differentiates is active; `vmap` alone does not."""
    interpreters = torch._C._functorch.get_interpreter_stack()
    return interpreters is not None and any(one.key() in _DIFFERENTIATING for one in interpreters)


def by_definition(operator: Operator[Args, Result], backend: str, args: Args) -> Result:
    """Runs a call on `reference`, so that it can be differentiated in every way.

    Raises:
        NotImplementedError: The backend is "cuda", or `torch.func.vmap` runs over the lengths of sequences.
    """
    check_has_definition(operator.name, backend)
    for name, cu_seqlens in (("cu_seqlens_q", args.cu_seqlens_q), ("cu_seqlens_k", args.cu_seqlens_k)):
        if _is_batched(cu_seqlens):
            raise NotImplementedError(
                f"`{name}` must be the same for all examples of `torch.func.vmap` where `{operator.name}` is "
                "differentiated inside it: sequence lengths are read on the host"
            )
    checks.check_cu_seqlens_values(args.cu_seqlens_q, args.cu_seqlens_k, args.query.shape[0], args.key.shape[0])
    if args.block_indices is not None and not _is_batched(args.block_indices):
        checks.check_block_indices_values(args.block_indices)
    with torch.autocast(args.query.device.type, enabled=False):
        return operator.reference(args)


def check_has_definition(name: str, backend: str) -> None:
    """Refuses derivatives beyond the gradient where a call of the operator `name` names the kernels.

    Raises:
        NotImplementedError: The backend is "cuda", which has the gradient only.
    """
    if backend == "cuda":
        raise NotImplementedError(
            f"`backend`='cuda' supports only first-order reverse-mode gradients of `{name}`. Use `backend`='auto', "
            "'torch' or 'reference' for forward mode, `torch.func` and gradients of gradients"
        )


def gradient_of_gradient(
    function: Callable[..., torch.Tensor],
    upstream: torch.Tensor,
    states: Sequence[torch.Tensor],
    grad_grads: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, ...]:
    """Gradients with respect to `upstream` and `states`, for the gradient of a gradient.

    The result is differentiable where gradients are being recorded, so that any order works.

    Args:
        function (callable): Computes the output from `states`.
        upstream (tensor): The upstream gradient of the output.
        states (sequence of tensors): What the output was differentiated with respect to.
        grad_grads (sequence of tensors or None): Gradients of the loss with respect to the first-order gradients.
    """
    is_recorded = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(upstream.device.type, enabled=False):
        # Not the tensors themselves: one may have been computed from another.
        inputs = [
            tensor.view_as(tensor) if is_recorded and tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in (upstream, *states)
        ]
        out = function(*inputs[1:])
        if not out.requires_grad:  # there is no sequence
            return tuple(map(torch.zeros_like, inputs))
        grads = torch.autograd.grad(out, inputs[1:], inputs[0], create_graph=True)
        known = [(grad, of_grad) for grad, of_grad in zip(grads, grad_grads) if of_grad is not None]
        grads, of_grads = zip(*known)
        return torch.autograd.grad(
            grads, inputs, of_grads, create_graph=is_recorded, allow_unused=True, materialize_grads=True
        )


def _is_batched(tensor: torch.Tensor) -> bool:
    """Whether the elements differ between the examples of an active `torch.func.vmap`."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
