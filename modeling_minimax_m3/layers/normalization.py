"""Gemma-style RMS normalisation, shared by the decoder layers, the per-head QK-norm and the indexer."""

import torch
from torch import nn

from ..fused.rms_norm import rms_norm
from ..fused.shards import Processes


class MiniMaxM3VLRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` in float32, returned in the dtype of `x`.

    Args:
        dim (`int`): Size of the last axis, over which the mean square is taken.
        eps (`float`): Added to the mean square.

    Attributes:
        processes (`Processes`, *optional*): Those that share the heads that are normalised, each with heads of its own.
    """

    processes: Processes | None = None

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.scale(), self.eps)

    def scale(self) -> torch.Tensor:
        """The weight, whose gradient counts the heads of all processes."""
        return self.weight if self.processes is None else self.processes.fan_out(self.weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
