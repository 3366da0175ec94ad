"""The lightning indexer: small queries and keys whose dot products choose the key blocks of a sparse layer."""

import torch
from torch import nn

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .normalization import MiniMaxM3VLRMSNorm
from .rotary import apply_rotary


class MiniMaxM3VLIndexer(nn.Module):
    """Index queries, one head per key/value head, and one shared index key head.

    It has no value projection and adds nothing to the residual stream. As a selection passes no gradient, its
    parameters receive none from the language loss.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.head_dim = config.index_head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.index_n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.q_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries (B, T, H_idx, D_idx) and keys (B, T, D_idx) of `hidden_states` (B, T, hidden)."""
        index_query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        index_key = self.k_norm(self.k_proj(hidden_states)).unsqueeze(2)
        return apply_rotary(index_query, *position_embeddings), apply_rotary(index_key, *position_embeddings).squeeze(
            2
        )
