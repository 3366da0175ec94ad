"""The attention layer: projections, QK-norm, rotary, cache update, then dense attention or MiniMax Sparse Attention."""

import torch
from torch import nn
from transformers.cache_utils import Cache

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from . import msa
from .cache import SPARSE_LAYER_TYPE
from .dense_attention import dense_attention
from .indexer import MiniMaxM3VLIndexer
from .materialized import select_blocks_under_mask, sparse_attention_weights
from .normalization import MiniMaxM3VLRMSNorm
from .rotary import apply_rotary
from .sequence_layout import SequenceLayout


class MiniMaxM3VLAttention(nn.Module):
    """Grouped-query attention with per-head QK-norm and partial rotary; sparse layers attend to selected blocks only.

    Args:
        config (`MiniMaxM3VLTextConfig`): `config.layer_types[layer_idx]` decides between dense and sparse.
        layer_idx (`int`): Position of the layer in the model.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.indexer = MiniMaxM3VLIndexer(config) if config.layer_types[layer_idx] == SPARSE_LAYER_TYPE else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: SequenceLayout,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor`): (B, T, hidden).
            position_embeddings: Cosines and sines, (B, T, R) each.
            attention_mask (`SequenceLayout`): Where the sequences lie.
            past_key_values (`Cache`, *optional*): Receives the keys and values of this pass.
            output_attentions (`bool`): Whether to build the attention weights, at quadratic memory.

        Returns:
            (B, T, hidden), and the weights (B, H_q, T, S) or None.
        """
        layout = attention_mask
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)

        if past_key_values is not None:
            cached = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            if layout.is_cached or layout.allowed is not None:
                key, value = (states.transpose(1, 2) for states in cached)

        if self.indexer is None:
            implementation = "eager" if output_attentions else self.config._attn_implementation
            dropout = self.attention_dropout if self.training else 0.0
            out, weights = dense_attention(
                self, query, key, value, layout, implementation, self.scaling, dropout, **kwargs
            )
        else:
            index_query, index_key = self.indexer(hidden_states, position_embeddings)
            if past_key_values is not None:
                cached = past_key_values.layers[self.layer_idx].update_index(index_key.unsqueeze(1))
                if layout.is_cached or layout.allowed is not None:
                    index_key = cached.squeeze(1)
            out, weights = self._sparse_attention(query, key, value, index_query, index_key, layout, output_attentions)
        return self.o_proj(out.flatten(2)), weights if output_attentions else None

    def _sparse_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        layout: SequenceLayout,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        selection = {
            "block_size": config.index_block_size,
            "topk": config.index_topk_blocks,
            "local_blocks": config.index_local_blocks,
            "init_blocks": config.index_init_blocks,
        }
        attention = {"block_size": config.index_block_size, "softmax_scale": self.scaling}
        backend = {"backend": config.msa_backend}
        query, index_query = layout.order_queries(query), layout.order_queries(index_query)
        key, value, index_key = (layout.order_keys(states) for states in (key, value, index_key))

        if layout.allowed is not None:
            block_indices = select_blocks_under_mask(index_query, index_key, layout, **selection)
            weights = sparse_attention_weights(query, key, block_indices, layout, **attention)
            value = value.repeat_interleave(self.num_key_value_groups, dim=2)
            return torch.einsum("bhts,bshd->bthd", weights, value), weights

        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if layout.is_cached and not needs_grad:
            rows = {"cache_seqlens": layout.cache_seqlens, "cache_leftpad": layout.cache_leftpad}
            block_indices = msa.select_blocks_with_kvcache(index_query, index_key, **rows, **selection, **backend)
            out = msa.block_sparse_attention_with_kvcache(
                query, key, value, block_indices, **rows, **attention, **backend
            )
        else:
            if layout.is_cached:
                cu_seqlens_q, cu_seqlens_k = layout.packed_offsets(key.shape[1])
            else:
                cu_seqlens_q = cu_seqlens_k = layout.cu_seqlens
            offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
            block_indices = msa.select_blocks(
                index_query.flatten(0, 1), index_key.flatten(0, 1), **offsets, **selection, **backend
            )
            flat = (states.flatten(0, 1) for states in (query, key, value))
            out = msa.block_sparse_attention(*flat, block_indices, **offsets, **attention, **backend)
            out = out.unflatten(0, query.shape[:2])
            block_indices = block_indices.unflatten(0, query.shape[:2])

        weights = None
        if output_attentions:
            weights = sparse_attention_weights(query, key, block_indices, layout, **attention)
            weights = layout.restore_weights(weights)
        return layout.restore_order(out), weights
