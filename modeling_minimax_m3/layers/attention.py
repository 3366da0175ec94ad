"""The attention layer: projections, QK-norm, rotary, cache update, then dense or MiniMax Sparse Attention."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .. import msa
from ..fused import few_tokens
from ..fused.attention_input import attention_input, takes_attention_input
from ..fused.shards import Processes, refuse_unknown_adapters
from ..fused.support import runs_as_written
from ..runtime.cache import MiniMaxM3VLStaticLayer
from ..runtime.sequence_layout import SequenceLayout
from ..runtime.transformers_versions import takes_cache
from .dense_attention import dense_attention
from .indexer import MiniMaxM3VLIndexer, with_zero_gradients
from .layer_types import attention_type
from .materialized import materialized_attention
from .normalization import MiniMaxM3VLRMSNorm
from .rotary import normalize_and_rotate
from .token_parts import last_tokens

logger = logging.get_logger(__name__)


class _States(NamedTuple):
    """What a pass attends with and to, in the caller's order.

    Attributes:
        query (B, T, H_q, D): Queries.
        key, value (B, S, H_kv, D): Keys and values, those of the cache included.
        index (tuple or None): The indexer's queries (B, T, H_idx, D_idx) and keys (B, S, D_idx).
        projected_dtype (dtype): That of the projections' outputs, which the output projection expects.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    index: tuple[torch.Tensor, torch.Tensor] | None
    projected_dtype: torch.dtype


class MiniMaxM3VLAttention(nn.Module):
    """Grouped-query attention with per-head QK-norm and partial rotary, over all keys or over selected blocks of them.

    Args:
        config (`MiniMaxM3VLTextConfig`): `config.layer_types[layer_idx]` names the kind of layer; `layer_types.py` has
            the kinds.
        layer_idx (`int`): Position of the layer in the model.

    Attributes:
        selection_observer (`Callable`, *optional*): Called in every pass over selected blocks with the layer, the
            queries (B, T, H_q, D), the keys (B, S, H_kv, D), the block ids (B, T, H_kv, W), all in working order, and
            the layout. T counts the tokens that attend, which may be the last ones of the pass alone.
        processes (`Processes`, *optional*): Those that share the heads. Each has key/value heads of its own, with their
            queries, index queries and cache: H_q, H_kv and H_idx count these.
    """

    selection_observer: Callable[..., None] | None = None
    processes: Processes | None = None

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
        kind = attention_type(config.layer_types[layer_idx])
        self.indexer = MiniMaxM3VLIndexer(config) if kind.layer_type.has_indexer else None
        self.selector = None if kind.selector is None else kind.selector(config, layer_idx)
        if self.selector is not None and self.attention_dropout > 0:
            logger.warning_once(
                f"`attention_dropout` is {self.attention_dropout}, but layers that attend to chosen blocks apply none."
            )

    def share_heads(self, processes: Processes) -> None:
        """Let each process have heads of its own. The plan has cut the projections."""
        self.processes = processes
        norms = [self.q_norm, self.k_norm]
        if self.indexer is not None:
            self.indexer.processes = processes
            norms.append(self.indexer.q_norm)
        for norm in norms:
            norm.processes = processes
        if self.selector is not None:
            self.selector.processes = processes

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: SequenceLayout,
        cache: Cache | None = None,
        output_attentions: bool = False,
        output_indexer_loss: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend from the tokens of this pass to those before them.

        Args:
            hidden_states (`torch.Tensor`): (B, T, hidden).
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines, each (B, T, rotary channels).
            attention_mask (`SequenceLayout`): Where the sequences lie. If it has fewer new tokens than `hidden_states`,
                the last ones attend, and the others give keys and values only. Such a layout is one with a cache.
            cache (`Cache`, *optional*): Receives the keys and values of this pass.
            output_attentions (`bool`): Whether to build the attention weights, which takes quadratic memory, and
                compute the output from them.
            output_indexer_loss (`bool`): Whether to compute the KL divergence of the indexer from the attention.

        Returns:
            The output (B, T, hidden); the weights (B, H_q, T, S), or None; and `indexer_kl` (B, T) in nats, the mean
            over the index heads, or None. A layer without an indexer has none. T counts the tokens that attend.

        Raises:
            NotImplementedError: `output_indexer_loss` together with a 4-D mask.
        """
        layout = attention_mask
        if self.processes is not None and layout.allowed is not None and layout.allowed.shape[1] > 1:
            layout = replace(layout, allowed=self.processes.part_of(layout.allowed, 1))
        projected = (hidden_states, position_embeddings, layout, cache)
        states = self._states_of_few_tokens(*projected) or self._states(*projected)
        query, key, value, index, projected_dtype = states

        output_indexer_loss = output_indexer_loss and index is not None
        if output_indexer_loss and layout.allowed is not None:
            raise NotImplementedError(
                "the indexer's loss has no form for a 4-D `attention_mask`: pass a 2-D mask, or "
                "`output_indexer_loss=False`"
            )
        indexer_kl = None
        if self.selector is None or (index is not None and self.config.indexer_warmup):
            implementation = "eager" if output_attentions else self.config._attn_implementation
            dropout = self.attention_dropout if self.training else 0.0
            out, weights = dense_attention(
                self, query, key, value, layout, implementation, self.scaling, dropout, **kwargs
            )
            weights = weights if output_attentions else None
            if output_indexer_loss:
                states = (layout.order_queries(query), layout.order_keys(key), self._order_index(index, layout))
                indexer_kl = self._indexer_kl(*states, None, None, layout)
        else:
            layout = self.selector.layout_of(layout)
            out, weights, indexer_kl = self._block_attention(
                query, key, value, index, layout, output_attentions, output_indexer_loss
            )
        is_trained = output_indexer_loss and self.config.indexer_loss_coef > 0
        if index is not None and not is_trained and torch.is_grad_enabled() and index[0].requires_grad:
            out = with_zero_gradients(out, *index)
        if self.processes is not None and weights is not None:
            weights = self.processes.gathered(weights, 1)
        del states, query, key, value  # the queries are larger than the hidden states
        return few_tokens.linear(out.flatten(2).to(projected_dtype), [self.o_proj]), weights, indexer_kl

    def _states(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        layout: SequenceLayout,
        cache: Cache | None,
    ) -> "_States":
        """What this pass attends with and to, after the cache has received its part."""
        if self.processes is not None:
            refuse_unknown_adapters(self, ("q_proj", "k_proj", "v_proj", "o_proj"))
            if self.indexer is not None:
                refuse_unknown_adapters(self.indexer, ("q_proj",))
        num_queries = layout.num_new
        query = self.q_proj(last_tokens(hidden_states, num_queries)).unflatten(-1, (-1, self.head_dim))
        query = normalize_and_rotate(
            self.q_norm, query, *(last_tokens(states, num_queries) for states in position_embeddings)
        )
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key = normalize_and_rotate(self.k_norm, key, *position_embeddings)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        projected_dtype, dtype = query.dtype, self._attention_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if cache is not None:
            cached = cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            if layout.is_cached or layout.allowed is not None:
                key, value = (states.transpose(1, 2) for states in cached)
        if self.indexer is None:
            return _States(query, key, value, None, projected_dtype)
        index_query, index_key = self.indexer(hidden_states, position_embeddings, num_queries)
        index_query, index_key = index_query.to(dtype), index_key.to(dtype)
        if cache is not None:
            cached = cache.layers[self.layer_idx].update_index(index_key.unsqueeze(1))
            if layout.is_cached or layout.allowed is not None:
                index_key = cached.squeeze(1)
        return _States(query, key, value, (index_query, index_key), projected_dtype)

    def _states_of_few_tokens(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        layout: SequenceLayout,
        cache: Cache | None,
    ) -> "_States | None":
        """As `_states`, by one product and one kernel that writes to a static cache. None where they do not take it."""
        # The cache moves offloaded layers to the device and back in its own `update`.
        is_used = cache is not None and layout.is_cached and not getattr(cache, "offloading", False)
        layer = cache.layers[self.layer_idx] if cache is not None and is_used else None
        if not isinstance(layer, MiniMaxM3VLStaticLayer) or not layer.is_initialized or layout.allowed is not None:
            return None
        projections, norms = [self.q_proj, self.k_proj, self.v_proj], [self.q_norm, self.k_norm]
        slots = layer.slots()
        indexer = self.indexer
        if indexer is not None:
            if slots.index_keys is None or not runs_as_written(indexer, MiniMaxM3VLIndexer):
                return None
            projections += [indexer.q_proj, indexer.k_proj]
            norms += [indexer.q_norm, indexer.k_norm]
        if not few_tokens.takes_linear(hidden_states, projections):
            return None
        if indexer is not None and indexer.q_proj.out_features != self.k_proj.out_features:
            return None  # the kernel expects as many index heads as key/value heads
        if not all(runs_as_written(norm, MiniMaxM3VLRMSNorm) and norm.eps == self.q_norm.eps for norm in norms):
            return None
        weights = [norm.weight for norm in norms]
        if not takes_attention_input(hidden_states, weights, position_embeddings, slots):
            return None
        projected = few_tokens.linear(hidden_states, projections)
        query, index_query = attention_input(projected, weights, position_embeddings, self.q_norm.eps, slots)
        layer.count_tokens(hidden_states.shape[1])
        index = None if slots.index_keys is None else (index_query, slots.index_keys.squeeze(2))
        return _States(query, slots.keys, slots.values, index, hidden_states.dtype)

    def _attention_dtype(self, query: torch.Tensor) -> torch.dtype:
        """The dtype of attention and cache: that of the projected `query`, but half precision for a quantized model.

        Quantized projections return the dtype of their input, under autocast too. After PEFT's
        `prepare_model_for_kbit_training` that is float32, which no kernel takes. So the states are cast to the dtype
        that the model computes in, as Transformers' flash attention does. A float32 model stays in float32.
        """
        if query.dtype != torch.float32:
            return query.dtype
        if torch.is_autocast_enabled(query.device.type):
            return torch.get_autocast_dtype(query.device.type)
        projection = self.q_proj
        while hasattr(projection, "base_layer"):  # of PEFT's adapters, whose own weights may be float32
            projection = projection.base_layer
        weight_dtype = getattr(getattr(projection, "weight", None), "dtype", None)
        if weight_dtype == torch.float32:
            return torch.float32
        compute_dtype = getattr(projection, "compute_dtype", None)  # of 4-bit layers of bitsandbytes
        model_dtype = self.config.dtype if hasattr(self.config, "_is_quantized") else None
        for dtype in (compute_dtype, model_dtype, weight_dtype):
            if dtype in (torch.float16, torch.bfloat16):
                return dtype
        return torch.float32

    def _block_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor] | None,
        layout: SequenceLayout,
        output_attentions: bool,
        output_indexer_loss: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attention over selected blocks, of states in the caller's order.

        `index` holds the indexer's queries (B, T, H_idx, D_idx) and keys (B, S, D_idx), or is None where the layer has
        no indexer. Returns what `forward` does, before the output projection: (B, T, H_q, D), weights, `indexer_kl`.
        """
        unordered = (query, key, value)
        query, key, value = layout.order_queries(query), layout.order_keys(key), layout.order_keys(value)
        if index is not None:
            index = self._order_index(index, layout)
        options = {"block_size": self.config.index_block_size, "softmax_scale": self.scaling}
        backend = {"backend": self.config.msa_backend}
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        reads_cache = layout.is_cached and not needs_grad and not output_indexer_loss
        block_indices = self.selector.select(layout, key, index, reads_cache)
        if self.selection_observer is not None:
            self.selection_observer(self, query, key, block_indices, layout)
        lse = weights = indexer_kl = None
        if output_attentions or layout.allowed is not None:
            out, weights = materialized_attention(*unordered, block_indices, layout, **options)
        elif reads_cache:
            rows = {"cache_seqlens": layout.cache_seqlens, "cache_leftpad": layout.cache_leftpad}
            out = msa.block_sparse_attention_with_kvcache(
                query, key, value, block_indices, **rows, **options, **backend
            )
            out = layout.restore_order(out)
        else:
            flat = (states.flatten(0, 1) for states in (query, key, value, block_indices))
            offsets = layout.packed_offsets(key.shape[1])
            out, lse = msa.block_sparse_attention(*flat, **offsets, **options, **backend, return_lse=True)
            out = layout.restore_order(out.unflatten(0, query.shape[:2]))
        if output_indexer_loss:
            indexer_kl = self._indexer_kl(query, key, index, block_indices.flatten(0, 1), lse, layout)
        return out, weights if output_attentions else None, indexer_kl

    @staticmethod
    def _order_index(
        index: tuple[torch.Tensor, torch.Tensor], layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return layout.order_queries(index[0]), layout.order_keys(index[1])

    def _indexer_kl(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor],
        block_indices: torch.Tensor | None,
        lse: torch.Tensor | None,
        layout: SequenceLayout,
    ) -> torch.Tensor:
        """The indexer's KL divergence from the attention: (B, T) in the caller's order, from states in working order.

        `block_indices` is (B * T, H_kv, W), or None for all keys. `lse` is (B * T, H_q), or None if unknown.
        """
        flat = (states.flatten(0, 1) for states in (*index, query, key))
        indexer_kl = msa.indexer_kl_loss(
            *flat,
            block_indices,
            **layout.packed_offsets(key.shape[1]),
            lse=lse,
            block_size=self.config.index_block_size,
            softmax_scale=self.scaling,
            backend=self.config.msa_backend,
        )
        indexer_kl = indexer_kl.mean(-1)
        if self.processes is not None:
            indexer_kl = self.processes.total(indexer_kl / self.processes.count)
        return layout.restore_order(indexer_kl.view(query.shape[:2]))
