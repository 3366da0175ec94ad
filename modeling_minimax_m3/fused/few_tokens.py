"""Linear layers and MLPs of a few tokens, at the rate at which a GPU reads their weights. No gradients.

Decoding reads every weight that a token uses once, so that nothing else costs time. Layers that read the same input run
as one kernel, without a copy of their weights. The chosen experts and the shared expert run as two.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .support import HALF_DTYPES, kernels_take, runs_as_written

MAX_TOKENS = 16
MAX_TOKENS_OF_ONE_LAYER = 8  # beyond, cuBLAS is as fast (benchmarks/results/few_tokens.txt)
_MAX_WEIGHTS = 5
_MAX_CHOICES = 256  # of all tokens
_MULTIPLE = 32  # of the channels that a kernel takes at a time


def takes_linear(x: torch.Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether `linear` runs these layers, which read `x` (..., channels), as one kernel."""
    return (
        _are_few(x, MAX_TOKENS if len(layers) > 1 else MAX_TOKENS_OF_ONE_LAYER)
        and len(layers) <= _MAX_WEIGHTS
        and all(runs_as_written(layer, nn.Linear) and layer.bias is None for layer in layers)
        and takes_weights(x, _weights(layers))
    )


def takes_weights(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels read these weights, whose last dimension is that of `x` (..., channels) or their own."""
    return (
        _are_few(x)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)))
        and kernels_take(x, *weights)
        and all(
            weight.dtype == x.dtype
            and weight.is_contiguous()
            and weight.shape[-1] % _MULTIPLE == 0
            and weight.numel() > 0
            and weight.data_ptr() % 16 == 0
            for weight in weights
        )
    )


def linear(x: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """Outputs of linear layers side by side: (..., outputs of all layers), for (..., channels) that they all read."""
    if not takes_linear(x, layers):
        return torch.cat([layer(x) for layer in layers], dim=-1) if len(layers) > 1 else layers[0](x)
    return _product(x, _weights(layers))


def _weights(layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [layer.weight for layer in layers if isinstance(layer.weight, torch.Tensor)]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear` of (..., channels) and (outputs, channels)."""
    if not (_are_few(x, MAX_TOKENS_OF_ONE_LAYER) and takes_weights(x, [weight])):
        return nn.functional.linear(x, weight)
    return _product(x, [weight])


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    padded = [*weights, *[None] * (_MAX_WEIGHTS - len(weights))]
    return torch.ops.minimax_m3_msa_cuda.few_token_linear(flat, *padded).view(*x.shape[:-1], -1)


def takes_mlp(x: torch.Tensor, weights: Sequence[torch.Tensor], expert_ids: torch.Tensor | None = None) -> bool:
    """Whether `mlp` takes `x` (..., hidden) and these weights of projections."""
    return takes_weights(x, weights) and (expert_ids is None or expert_ids.numel() <= _MAX_CHOICES)


def mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor | None,
    down: torch.Tensor | None,
    alpha: float,
    limit: float,
    expert_gate_up: torch.Tensor | None = None,
    expert_down: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    expert_weights: torch.Tensor | None = None,
    expert_scale: float = 1.0,
) -> torch.Tensor:
    """One MLP for every token plus the weighted sum of each token's experts, which SwiGLU-OAI gates.

    The caller has asked `takes_mlp`.

    Args:
        x (..., hidden): Inputs.
        gate_up ((2 * F, hidden) or None), down ((hidden, F) or None): The MLP of every token.
        alpha, limit (float): Constants of the activation.
        expert_gate_up ((E, 2 * F, hidden) or None), expert_down ((E, hidden, F) or None): The experts.
        expert_ids ((tokens, K) or None): int64, distinct within a token. Ids outside of 0 to E - 1 add nothing.
        expert_weights ((tokens, K) or None): float32.
        expert_scale (float): Factor of the weights.

    Returns:
        (..., hidden).
    """
    if expert_ids is not None and expert_weights is not None:
        expert_ids, expert_weights = expert_ids.contiguous(), expert_weights.float().contiguous()
    return torch.ops.minimax_m3_msa_cuda.few_token_mlp(
        x.reshape(-1, x.shape[-1]).contiguous(), gate_up, down, expert_gate_up, expert_down, expert_ids,
        expert_weights, expert_scale, alpha, limit,
    ).view_as(x)  # fmt: skip


def _are_few(x: torch.Tensor, most: int = MAX_TOKENS) -> bool:
    return x.is_cuda and x.dtype in HALF_DTYPES and 0 < x.numel() <= most * x.shape[-1]
