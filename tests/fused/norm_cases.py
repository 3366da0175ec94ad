"""Shared by the tests of the fused norms: exact formulas, and the kernels' formulas as operators of the CPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from modeling_minimax_m3.fused import norm_rotary, rms_norm

EPS = 1e-6
SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor x, Tensor weight, float eps, bool needs_x, "
    "bool needs_weight) -> (Tensor, Tensor)",
    "norm_rotary(Tensor states, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
    "norm_rotary_backward(Tensor grad_out, Tensor states, Tensor weight, Tensor cos, Tensor sin, float eps, "
    "bool needs_states, bool needs_weight) -> (Tensor, Tensor)",
)


def exact_rms_norm(x, weight, eps=EPS):
    """The norm in the dtype of its arguments, float64 in the tests."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def exact_norm_rotary(states, weight, cos, sin, eps=EPS):
    normed = exact_rms_norm(states, weight, eps)
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = normed[..., :half], normed[..., half : 2 * half]
    return torch.cat(
        (
            first * cos[..., :half] - second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
            normed[..., 2 * half :],
        ),
        dim=-1,
    )


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def results_and_gradients(
    function: Callable, inputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor], exactly: bool = False
) -> list[torch.Tensor]:
    """What `function` returns, and the gradients of all `inputs`; in float64 where `exactly`."""
    prepare = torch.Tensor.double if exactly else torch.Tensor.clone
    leaves = [prepare(tensor.detach()).requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [prepare(grad) for grad in upstream])
    return [*(output.detach() for output in outputs), *grads]


def poison(like: torch.Tensor, count: int = 12) -> None:
    """Leaves NaN in the memory that the next tensors of this size get."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(count)]
    del blocks


def gradient_formula(grad, grad_sum, x, weight, eps, needs_x, needs_weight):
    """The gradient of the norm as the kernel computes it."""
    wide, gain = x.float(), 1 + weight.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    mean_product = (wide * (grad * gain)).sum(-1, keepdim=True) * inverse_rms / x.shape[-1]
    grad_x = inverse_rms * (grad * gain - wide * inverse_rms * mean_product)
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    grad_weight = (grad * wide * inverse_rms).flatten(0, -2).sum(0)
    return (
        grad_x.to(x.dtype) if needs_x else x.new_empty(0),
        grad_weight.to(weight.dtype) if needs_weight else weight.new_empty(0),
    )


def _norm_rotary_backward(grad, states, weight, cos, sin, eps, needs_states, needs_weight):
    width, half = cos.shape[-1], cos.shape[-1] // 2
    product = grad[..., :width] * sin.unsqueeze(2)
    turned = torch.cat((product[..., half:], -product[..., :half]), dim=-1)
    grad = torch.cat((grad[..., :width] * cos.unsqueeze(2) + turned, grad[..., width:]), dim=-1)
    return gradient_formula(grad, None, states, weight, eps, needs_states, needs_weight)


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """While it lasts, the operators of the compiled extension run their formulas on tensors of the CPU."""
    implementations = {
        "rms_norm": rms_norm.rms_norm_reference,
        "add_rms_norm": rms_norm.add_rms_norm_reference,
        "rms_norm_backward": gradient_formula,
        "norm_rotary": norm_rotary.norm_rotary_reference,
        "norm_rotary_backward": _norm_rotary_backward,
    }
    library = torch.library.Library("minimax_m3_msa_cuda", "FRAGMENT")
    try:
        for schema in SCHEMAS:
            name = schema.partition("(")[0]
            if not hasattr(torch.ops.minimax_m3_msa_cuda, name):  # the extension is not loaded
                library.define(schema)
            library.impl(name, implementations[name], "CPU")
        yield
    finally:
        library._destroy()
