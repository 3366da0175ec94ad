"""The way of many tokens to their experts and back, around grouped products: PyTorch's, or ours on Hopper.

Each pair of a token and one of its experts has a row. Rows are sorted by expert, so the rows of an expert are adjacent.
Pairs of no expert, whose ids expert parallelism sets outside of 0 to E - 1, have the last rows: products leave these
rows unwritten, and no result depends on them.

E is the number of experts, K of experts per token.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..msa import derivatives, extension, kernel_build
from .router import MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN
from .support import HALF_DTYPES, KERNEL_DTYPES, as_vector_block, is_vector_block, kernels_take, starts_vectors
from .swiglu import swiglu_oai

_MOST_PAIRS = 2**31 - 1
# Average rows per expert up to which our product runs. A thread block reads a weight once for 192 rows. At 128 rows our
# product takes 0.6 times as long as PyTorch's, at 256 up to 1.2 times (benchmarks/results/grouped_product.txt).
_ROWS_OF_OWN_PRODUCT = 192
_MULTIPLE = 8  # of the channels that a kernel reads at a time


class ExpertOrder(NamedTuple):
    """Where the rows of pairs are.

    Attributes:
        rows (tokens, K): int32, the row of each pair.
        offsets (E,): int32, where the rows of each expert end.
    """

    rows: torch.Tensor
    offsets: torch.Tensor


def takes_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
) -> bool:
    """Whether kernels do all that lies around the products, which take bfloat16 at full speed.

    Args:
        x (tokens, hidden): Inputs.
        gate_up (E, 2 * F, hidden), down (E, hidden, F): The experts.
        expert_ids, expert_weights (tokens, K): The choice.
    """
    return (
        x.dtype == torch.bfloat16
        and kernels_take(x, gate_up, down, expert_ids, expert_weights)
        and expert_weights.dtype == torch.float32
        and starts_vectors(x)
        and _has_plan(expert_ids, gate_up.shape[0])
        and all(
            weight.dtype == x.dtype and weight.shape[-1] % _MULTIPLE == 0 and is_vector_block(weight)
            for weight in (gate_up, down)
        )
    )


def plan(expert_ids: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sorts pairs by expert; those of one expert keep their order.

    Args:
        expert_ids (tokens, K): int64. Ids outside of 0 to `num_experts` - 1 stand for no expert.
        num_experts (int): E.
    """
    if not (kernels_take(expert_ids) and _has_plan(expert_ids, num_experts)):
        return plan_reference(expert_ids, num_experts)
    return ExpertOrder(*torch.ops.minimax_m3_msa_cuda.expert_order(expert_ids.contiguous(), num_experts))


def plan_reference(expert_ids: torch.Tensor, num_experts: int) -> ExpertOrder:
    """The definition of `plan`."""
    ids = expert_ids.flatten()
    groups = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    rows = groups.argsort(stable=True).argsort()
    offsets = groups.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0)
    return ExpertOrder(rows.view(expert_ids.shape).int(), offsets.int())


def _has_plan(expert_ids: torch.Tensor, num_experts: int) -> bool:
    return (
        expert_ids.dtype == torch.int64
        and expert_ids.dim() == 2
        and expert_ids.shape[1] <= MAX_EXPERTS_PER_TOKEN
        and 0 < expert_ids.numel() <= _MOST_PAIRS
        and 0 < num_experts <= MAX_EXPERTS
    )


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Tokens (tokens, hidden) at the rows of their pairs, (tokens * K, hidden)."""
    can_gather = kernels_take(x, *order) and _can_gather(x, x, order)
    return _Permutation.apply(x, *order) if can_gather else permute_reference(x, order)


class _Permutation(torch.autograd.Function):
    """The gradient of a token is the sum of the gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, offsets)
        return torch.ops.minimax_m3_msa_cuda.gather_tokens(x, rows, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = torch.ops.minimax_m3_msa_cuda.sum_expert_rows(
            as_vector_block(grad_out), None, 1.0, *ctx.saved_tensors, None
        )
        return grad_x, None, None


def permute_reference(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Tokens (tokens, hidden) at the rows of their pairs, (tokens * K, hidden); rows of no expert are 0."""
    token = order.rows.flatten().argsort() // order.rows.shape[1]
    has_no_expert = torch.arange(len(token), device=x.device) >= order.offsets[-1]
    return x[token].masked_fill(has_no_expert[:, None], 0)


def grouped_product(states: torch.Tensor, weight: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Rows (tokens * K, channels) times the weights (E, outputs, channels) of their experts."""
    return product_of_groups(states, weight, order.offsets)


def product_of_groups(states: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same, with the ends (E,) of the experts' rows."""
    if _has_own_product(states, weight, len(states)):
        return torch.ops.minimax_m3_msa_cuda.grouped_product(states, weight, offsets, False, 0.0, 0.0)
    return nn.functional.grouped_mm(states, weight.transpose(-2, -1), offs=offsets)


def gated_product(
    x: torch.Tensor, gate_up: torch.Tensor, order: ExpertOrder, alpha: float, limit: float
) -> torch.Tensor:
    """SwiGLU-OAI of the product of tokens with each of their experts.

    Args:
        x (tokens, channels): Inputs.
        gate_up (E, 2 * F, channels): A weight of each expert, in the dtype of `x`.
        order (ExpertOrder): The rows of the result.
        alpha, limit (float): Constants of the activation.

    Returns:
        (tokens * K, F).
    """
    if _has_own_product(x, gate_up, order.rows.numel()) and kernels_take(*order) and _can_gather(x, gate_up, order):
        states = torch.ops.minimax_m3_msa_cuda.gather_tokens(x, *order)
        return torch.ops.minimax_m3_msa_cuda.grouped_product(states, gate_up, order.offsets, True, alpha, limit)
    return swiglu_oai(gathered_product(x, gate_up, order), alpha, limit)


def _has_own_product(x: torch.Tensor, weight: torch.Tensor, num_rows: int) -> bool:
    """Whether our product of groups runs: on Hopper, for few rows an expert, where no gradient is recorded."""
    return (
        num_rows <= _ROWS_OF_OWN_PRODUCT * len(weight)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and x.is_cuda
        and kernels_take(x, weight)
        and x.dtype == weight.dtype
        and x.dtype in HALF_DTYPES
        and x.shape[1] % _MULTIPLE == 0
        and weight.shape[1] % 4 == 0
        and is_vector_block(x)
        and is_vector_block(weight)
        and extension.kernel_family(x.device, ("grouped_product",)) != kernel_build.PORTABLE_FAMILY
    )


def gathered_product(x: torch.Tensor, weight: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """The product of tokens with each of their experts.

    The backward copies the tokens to the rows once more, so that nothing but `x` is kept for it.

    Args:
        x (tokens, channels): Inputs.
        weight (E, outputs, channels): A weight of each expert, in the dtype of `x`.
        order (ExpertOrder): The rows of the result.

    Returns:
        (tokens * K, outputs).
    """
    if not (kernels_take(x, weight, *order) and _can_gather(x, weight, order)):
        return gathered_product_reference(x, weight, order)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.ops.minimax_m3_fused.gathered_product(x, weight, *order)
    return _product_of_copies(x, weight, order)


def gathered_product_reference(x: torch.Tensor, weight: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """The definition of `gathered_product`."""
    return grouped_product(permute_reference(x, order), weight, order)


def _can_gather(x: torch.Tensor, weight: torch.Tensor, order: ExpertOrder) -> bool:
    return (
        x.dtype in KERNEL_DTYPES
        and x.dim() == 2
        and x.shape[1] % _MULTIPLE == 0
        and x.numel() > 0
        and starts_vectors(x)
        and weight.dtype == x.dtype
        and order.rows.shape[1] <= MAX_EXPERTS_PER_TOKEN
    )


def _product_of_copies(x: torch.Tensor, weight: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    return grouped_product(torch.ops.minimax_m3_msa_cuda.gather_tokens(x, *order), weight, order)


def unpermute(
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    order: ExpertOrder,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """`base` plus `scale` times the weighted sum of each token's rows.

    The kernel sums in float32 and rounds once; the definition also rounds the weighted sum and the scaled one.

    Args:
        expert_out (tokens * K, width): Rows of all pairs.
        weights (tokens, K): float32.
        scale (float): Factor of the weights.
        order (ExpertOrder): The rows of pairs.
        base ((tokens, width) or None): What is added, in the dtype of `expert_out`.

    Returns:
        (tokens, width).
    """
    added = () if base is None else (base,)
    if not (kernels_take(expert_out, weights, *order, *added) and _can_unpermute(expert_out, weights, order, base)):
        return unpermute_reference(expert_out, weights, scale, order, base)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (expert_out, weights, *added))
    operators = torch.ops.minimax_m3_fused if needs_grad else torch.ops.minimax_m3_msa_cuda
    return operators.sum_expert_rows(expert_out, weights.contiguous(), scale, *order, base)


def unpermute_reference(
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    order: ExpertOrder,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `unpermute`."""
    has_no_expert = (order.rows >= order.offsets[-1]).unsqueeze(-1)
    # Not a product with 0: rows of no expert may hold NaN.
    rows_of_tokens = expert_out[order.rows].masked_fill(has_no_expert, 0)
    out = (rows_of_tokens * weights.unsqueeze(-1)).sum(1).to(expert_out.dtype) * scale
    return out if base is None else out + base


def _can_unpermute(
    expert_out: torch.Tensor, weights: torch.Tensor, order: ExpertOrder, base: torch.Tensor | None
) -> bool:
    return (
        expert_out.dtype in KERNEL_DTYPES
        and expert_out.dim() == 2
        and expert_out.shape[1] % _MULTIPLE == 0
        and expert_out.numel() > 0
        and is_vector_block(expert_out)
        and weights.dtype == torch.float32
        and weights.shape == order.rows.shape
        and order.rows.shape[1] <= MAX_EXPERTS_PER_TOKEN
        and (
            base is None
            or (
                base.dtype == expert_out.dtype
                and base.shape == (len(weights), expert_out.shape[1])
                and is_vector_block(base)
            )
        )
    )


@torch.library.custom_op("minimax_m3_fused::gathered_product", mutates_args=())
def _gathered_product(
    x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    return _product_of_copies(x, weight, ExpertOrder(rows, offsets))


@_gathered_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((rows.numel(), weight.shape[1]))


@torch.library.custom_op("minimax_m3_fused::gathered_product_backward", mutates_args=())
def _gathered_product_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `x` and of `weight`; one without elements where it is not needed."""
    kernels = torch.ops.minimax_m3_msa_cuda
    grouped_mm = nn.functional.grouped_mm
    grad_out = as_vector_block(grad_out)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if needs_weight:
        grad_weight = grouped_mm(grad_out.t(), kernels.gather_tokens(x, rows, offsets), offs=offsets)
    if needs_x:
        grad_rows = grouped_mm(grad_out, weight, offs=offsets)
        grad_x = kernels.sum_expert_rows(grad_rows, None, 1.0, rows, offsets, None)
    return grad_x, grad_weight


@_gathered_product_backward.register_fake
def _(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs_x else (0,)), weight.new_empty(weight.shape if needs_weight else (0,))


def _setup_context_of_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_product(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.minimax_m3_fused.gathered_product_backward(
        grad_out, *ctx.saved_tensors, needs_x, needs_weight
    )
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None


_gathered_product.register_autograd(_backward_of_product, setup_context=_setup_context_of_product)


def _setup_context_of_product_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.needs_x, ctx.needs_weight = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_product_backward(
    ctx: Any, grad_grad_x: torch.Tensor, grad_grad_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_out, x, weight, *order = ctx.saved_tensors
    # The grouped product takes no expanded tensors.
    grad_grads = (
        grad_grad_x.contiguous() if ctx.needs_x else None,
        grad_grad_weight.contiguous() if ctx.needs_weight else None,
    )

    def product_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gathered_product_reference(x, weight, ExpertOrder(*order))

    grads = derivatives.gradient_of_gradient(product_of, grad_out.contiguous(), (x, weight), grad_grads)
    return *grads, None, None, None, None


_gathered_product_backward.register_autograd(
    _backward_of_product_backward, setup_context=_setup_context_of_product_backward
)


@torch.library.custom_op("minimax_m3_fused::sum_expert_rows", mutates_args=())
def _sum_expert_rows(
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor | None,
) -> torch.Tensor:
    return torch.ops.minimax_m3_msa_cuda.sum_expert_rows(expert_out, weights, scale, rows, offsets, base)


@_sum_expert_rows.register_fake
def _(
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor | None,
) -> torch.Tensor:
    return expert_out.new_empty((rows.shape[0], expert_out.shape[1]))


@torch.library.custom_op("minimax_m3_fused::sum_expert_rows_backward", mutates_args=())
def _sum_expert_rows_backward(
    grad_out: torch.Tensor,
    expert_out: torch.Tensor | None,
    weights: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    needs_rows: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `expert_out` and of `weights`; one without elements where it is not needed."""
    return torch.ops.minimax_m3_msa_cuda.sum_expert_rows_backward(
        as_vector_block(grad_out), expert_out, weights, scale, rows, offsets, needs_rows, needs_weights
    )


@_sum_expert_rows_backward.register_fake
def _(
    grad_out: torch.Tensor,
    expert_out: torch.Tensor | None,
    weights: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    needs_rows: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_rows = grad_out.new_empty((rows.numel() if needs_rows else 0, grad_out.shape[1]))
    return grad_rows, weights.new_empty((rows.shape[0] if needs_weights else 0, rows.shape[1]))


def _setup_context_of_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    expert_out, weights, ctx.scale, *order, _ = inputs
    # Only the gradient of the weights reads the rows: with a frozen router they are freed.
    ctx.save_for_backward(expert_out if ctx.needs_input_grad[1] else None, weights, *order)


def _backward_of_sum(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_rows, needs_weights, _, _, _, needs_base = ctx.needs_input_grad
    grad_rows = grad_weights = None
    if needs_rows or needs_weights:
        expert_out, weights, *order = ctx.saved_tensors
        grad_rows, grad_weights = torch.ops.minimax_m3_fused.sum_expert_rows_backward(
            grad_out, expert_out, weights, ctx.scale, *order, needs_rows, needs_weights
        )
    return (
        grad_rows if needs_rows else None,
        grad_weights if needs_weights else None,
        None,
        None,
        None,
        grad_out if needs_base else None,
    )


_sum_expert_rows.register_autograd(_backward_of_sum, setup_context=_setup_context_of_sum)


def _setup_context_of_sum_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    grad_out, expert_out, weights, ctx.scale, *order, ctx.needs_rows, ctx.needs_weights = inputs
    ctx.save_for_backward(grad_out, expert_out, weights, *order)


def _backward_of_sum_backward(
    ctx: Any, grad_grad_rows: torch.Tensor, grad_grad_weights: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_out, expert_out, weights, *order = ctx.saved_tensors
    grad_grads = (grad_grad_rows if ctx.needs_rows else None, grad_grad_weights if ctx.needs_weights else None)
    # Without the weights' gradient, nothing depends on the rows.
    states = torch.zeros_like(grad_grad_rows) if expert_out is None else expert_out

    def sum_of(expert_out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return unpermute_reference(expert_out, weights, ctx.scale, ExpertOrder(*order))

    of_grad_out, of_rows, of_weights = derivatives.gradient_of_gradient(
        sum_of, grad_out, (states, weights), grad_grads
    )
    return of_grad_out, None if expert_out is None else of_rows, of_weights, None, None, None, None, None


_sum_expert_rows_backward.register_autograd(_backward_of_sum_backward, setup_context=_setup_context_of_sum_backward)
