"""Inputs of the experts' tests, and formulas that stand for the kernels on a CPU."""

import math

import pytest
import torch

from modeling_minimax_m3.fused.experts import ExpertOrder, permute_reference, plan_reference, unpermute_reference

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def random_states(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def random_ids(tokens, top_k, num_experts, seed=0, elsewhere=0.0, device="cpu"):
    """Expert ids; the share `elsewhere` of them belongs to no expert."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, top_k), generator=generator)
    foreign = torch.tensor([-1, num_experts, num_experts + 7, 2**40])
    foreign = foreign[torch.randint(4, ids.shape, generator=generator)]
    return ids.where(torch.rand(ids.shape, generator=generator) >= elsewhere, foreign).to(device)


def real_rows(order):
    return int(order.offsets[-1])


def with_poison(states, order):
    """Rows of no expert hold NaN: whoever reads them is found out."""
    states[real_rows(order) :] = math.nan
    return states


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def order_formula(expert_ids, num_experts):
    return tuple(plan_reference(expert_ids, num_experts))


def gather_formula(x, rows, offsets):
    order = ExpertOrder(rows, offsets)
    return with_poison(permute_reference(x, order), order)


def sum_formula(expert_rows, weights, scale, rows, offsets, base):
    weights = torch.ones(rows.shape) if weights is None else weights
    out = unpermute_reference(expert_rows.float(), weights, scale, ExpertOrder(rows, offsets))
    return (out if base is None else out + base.float()).to(expert_rows.dtype)


def sum_backward_formula(grad_out, expert_rows, weights, scale, rows, offsets, needs_rows, needs_weights):
    order = ExpertOrder(rows, offsets)
    grad_rows, grad_weights = grad_out.new_empty(0, grad_out.shape[1]), weights.new_empty(0, rows.shape[1])
    if needs_rows:
        factors = (scale * weights).flatten()[rows.flatten().argsort()]
        grad_rows = with_poison((permute_reference(grad_out.float(), order) * factors[:, None]), order)
    if needs_weights:
        picked = expert_rows[rows].masked_fill((rows >= offsets[-1]).unsqueeze(-1), 0)
        grad_weights = scale * (picked.float() * grad_out.float().unsqueeze(1)).sum(-1)
    return grad_rows.to(grad_out.dtype), grad_weights


KERNELS = {
    "expert_order": order_formula,
    "gather_tokens": gather_formula,
    "sum_expert_rows": sum_formula,
    "sum_expert_rows_backward": sum_backward_formula,
}
