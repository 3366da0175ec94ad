"""Rotary position embedding of the text model: on the first channels of a head, split-half convention."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..fused.attention_input import rotary_table
from ..fused.norm_rotary import apply_rotary, norm_rotary
from ..fused.support import runs_as_written
from .normalization import MiniMaxM3VLRMSNorm


class MiniMaxM3VLRotaryEmbedding(nn.Module):
    """Cosines and sines of every position, for the channels that rotate.

    Their number R is `head_dim * rope_parameters["partial_rotary_factor"]`. A missing factor means all channels.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        initialize = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = initialize(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MiniMaxM3VLTextConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (R / 2,), and a factor of the cosines and sines, which is 1 here."""
        channels = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, channels, 2, dtype=torch.float32) / channels
        return (1.0 / config.rope_parameters["rope_theta"] ** exponent).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, T, R) in the dtype of `x`, for integer `position_ids` (B, T)."""
        return rotary_table(x, position_ids, self.inv_freq, self.attention_scaling)


def normalize_and_rotate(norm: nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rotary(norm(states), cos, sin)`, of shape (B, T, heads, D).

    Args:
        norm (`nn.Module`): `MiniMaxM3VLRMSNorm`, or what stands in its place.
        states (`torch.Tensor`): (B, T, heads, D), or (B, T, D) of a single head.
        cos (`torch.Tensor`): Cosines (B, T, R) of the first R channels.
        sin (`torch.Tensor`): Their sines.
    """
    if runs_as_written(norm, MiniMaxM3VLRMSNorm) and norm.weight.device == states.device:
        return norm_rotary(_with_heads(states), norm.scale(), cos, sin, norm.eps)
    return apply_rotary(_with_heads(norm(states)), cos, sin)


def _with_heads(states: torch.Tensor) -> torch.Tensor:
    return states.unsqueeze(2) if states.dim() == 3 else states
