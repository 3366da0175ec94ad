"""Gemma-style RMS normalisation, shared by the decoder layers, the per-head QK-norm and the indexer."""

from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.utils import is_torchdynamo_compiling

from ..fused.rms_norm import rms_norm


class MiniMaxM3VLRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` in float32, returned in the dtype of `x`.

    Args:
        dim (`int`): Size of the last axis, over which the mean square is taken.
        eps (`float`): Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def is_plain_norm(norm: nn.Module) -> TypeGuard[MiniMaxM3VLRMSNorm]:
    """Whether a call of `norm` is `rms_norm` and nothing else, so that a larger operator may take its place.

    A norm is not plain if it is of another class (a sub-class, a wrapper), if its `forward` is replaced on the instance
    (as Accelerate does for offloaded weights), or if a hook waits for the call. Compilers fuse the modules by themselves.
    """
    return (
        not is_torchdynamo_compiling()
        and type(norm) is MiniMaxM3VLRMSNorm
        and "forward" not in norm.__dict__
        and norm._compiled_call_impl is None
        and not (
            norm._forward_hooks
            or norm._forward_pre_hooks
            or norm._backward_hooks
            or norm._backward_pre_hooks
            or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks
            or module_hooks._global_backward_hooks
            or module_hooks._global_backward_pre_hooks
        )
    )
