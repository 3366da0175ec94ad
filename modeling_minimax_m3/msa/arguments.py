"""What each operator is called with: one frozen dataclass per operator, which all backends share.

The fields of a dataclass have the names and the order of the operator's arguments in `torch.library`, unless its
docstring says otherwise. README.md has the legend of dimensions and the contract of the block lists.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of one call, which the public function has checked.

    Sequence offsets, cache lengths and block ids are int32. All tensors are on one device.
    """

    def values(self) -> tuple[Any, ...]:
        """The arguments in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def queries(self) -> torch.Tensor:
        """The first tensor of the call, or of the forward's call: its device and dtype decide which backend runs."""
        first = next(iter(vars(self).values()))
        return first.queries if isinstance(first, Arguments) else first

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors that derivatives pass through."""
        return ()

    def form(self, most_decode_tokens: int) -> str:
        """Which form of the operator runs: "packed", "decode" (few new tokens of cached rows) or "by position".

        Args:
            most_decode_tokens (int): The largest number of new tokens per row that the backend's decode form takes.
        """
        return "packed"


@dataclass(frozen=True, eq=False)
class SelectBlocksArgs(Arguments):
    """`select_blocks`.

    Attributes:
        index_query (total_q, H_idx, D_idx): Queries of the indexer.
        index_key (total_k, D_idx): Keys of the indexer.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): Offsets of the sequences.
        block_size (int): Keys per block.
        topk (int): Blocks per query, forced ones included.
        local_blocks (int): Forced blocks at the query's end.
        init_blocks (int): Forced blocks at the sequence's start.
    """

    index_query: torch.Tensor
    index_key: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_size: int
    topk: int
    local_blocks: int
    init_blocks: int


@dataclass(frozen=True, eq=False)
class SelectBlocksWithKVCacheArgs(Arguments):
    """`select_blocks_with_kvcache`.

    Attributes:
        index_query (B, T, H_idx, D_idx): Queries of the newest tokens of each row.
        index_key_cache ((B, S, D_idx) or (pages, page_size, D_idx)): Keys of the indexer.
        cache_seqlens (B,): Slots in use, new tokens and left padding included.
        cache_leftpad ((B,) or None): Slots of padding at the start of each row.
        block_table ((B, pages of a row) or None): Pages of each row, in order.
        block_size, topk, local_blocks, init_blocks (int): As in `SelectBlocksArgs`.
    """

    index_query: torch.Tensor
    index_key_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    block_size: int
    topk: int
    local_blocks: int
    init_blocks: int

    def form(self, most_decode_tokens: int) -> str:
        """Returns "decode" for few new tokens per row, else "packed": the rows become packed sequences."""
        return "decode" if self.index_query.shape[1] <= most_decode_tokens else "packed"

    def packed(
        self,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
    ) -> SelectBlocksArgs:
        """The same selection over packed sequences."""
        return SelectBlocksArgs(
            index_query, index_key, cu_seqlens_q, cu_seqlens_k, self.block_size, self.topk, self.local_blocks,
            self.init_blocks,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class BlockSparseAttentionArgs(Arguments):
    """`block_sparse_attention`.

    Attributes:
        query (total_q, H_q, D): Queries.
        key (total_k, H_kv, D): Keys.
        value (total_k, H_kv, D_v): Values.
        block_indices (total_q, H_kv, topk): The blocks that each query attends to.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): Offsets of the sequences.
        block_size (int): Keys per block.
        softmax_scale (float): Factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_indices: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_size: int
    softmax_scale: float

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values."""
        return self.query, self.key, self.value

    @property
    def q_heads_per_kv(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True, eq=False)
class BlockSparseAttentionBackwardArgs(Arguments):
    """The gradient of `block_sparse_attention`.

    Its schema in `torch.library` lists the forward's arguments one by one.

    Attributes:
        forward (BlockSparseAttentionArgs): What the forward was called with.
        grad_out (total_q, H_q, D_v): Upstream gradient, of any layout.
        out (total_q, H_q, D_v): The forward's output.
        lse (total_q, H_q): The forward's log-sum-exp.
    """

    forward: BlockSparseAttentionArgs
    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockSparseAttentionWithKVCacheArgs(Arguments):
    """`block_sparse_attention_with_kvcache`.

    Attributes:
        query (B, T, H_q, D): Queries of the newest tokens of each row.
        key_cache ((B, S, H_kv, D) or (pages, page_size, H_kv, D)): Keys.
        value_cache ((B, S, H_kv, D_v) or (pages, page_size, H_kv, D_v)): Values.
        block_indices (B, T, H_kv, topk): The blocks that each query attends to.
        cache_seqlens, cache_leftpad, block_table: As in `SelectBlocksWithKVCacheArgs`.
        block_size (int): Keys per block.
        softmax_scale (float): Factor of the scores.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_indices: torch.Tensor
    cache_seqlens: torch.Tensor
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    block_size: int
    softmax_scale: float

    @property
    def q_heads_per_kv(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[2] // self.key_cache.shape[2]

    def form(self, most_decode_tokens: int) -> str:
        """Returns "decode" for few new tokens per row, else "packed": the rows become packed sequences."""
        return "decode" if self.query.shape[1] <= most_decode_tokens else "packed"

    def packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_indices: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
    ) -> BlockSparseAttentionArgs:
        """The same attention over packed sequences."""
        return BlockSparseAttentionArgs(
            query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, self.block_size, self.softmax_scale
        )


@dataclass(frozen=True, eq=False)
class AttentionLseArgs(Arguments):
    """`attention_lse`: the log-sum-exp of `block_sparse_attention` alone.

    Attributes:
        block_indices ((total_q, H_kv, topk) or None): The blocks that each query attends to; None for all keys s <= t.
        query, key, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale: As in `BlockSparseAttentionArgs`.
    """

    query: torch.Tensor
    key: torch.Tensor
    block_indices: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_size: int
    softmax_scale: float

    @property
    def q_heads_per_kv(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True, eq=False)
class IndexerKLLossArgs(Arguments):
    """`indexer_kl_loss`.

    Its schema in `torch.library` has the number of saved tokens in the place of `saved_probs`.

    Attributes:
        index_query (total_q, H_idx, D_idx): Queries of the indexer.
        index_key (total_k, D_idx): Keys of the indexer.
        query (total_q, H_q, D): The main attention's queries.
        key (total_k, H_kv, D): The main attention's keys.
        lse (total_q, H_q): The main attention's log-sum-exp.
        block_indices ((total_q, H_kv, topk) or None): The blocks that each query attends to; None for all keys s <= t.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): Offsets of the sequences.
        block_size (int): Keys per block.
        softmax_scale (float): Factor of the main attention's scores.
        index_scale (float): Factor of the indexer's scores.
        saved_probs ((saved tokens, H_kv, topk, block_size) or None): float16 buffer that the CUDA kernels of the value
            fill and those of the gradient read, see `cuda.indexer_loss.saved_tokens`. The other backends ignore it.
    """

    index_query: torch.Tensor
    index_key: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    lse: torch.Tensor
    block_indices: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_size: int
    softmax_scale: float
    index_scale: float
    saved_probs: torch.Tensor | None = None

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """Queries and keys of the indexer."""
        return self.index_query, self.index_key

    @property
    def q_heads_per_kv(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True, eq=False)
class IndexerKLLossBackwardArgs(Arguments):
    """The gradient of `indexer_kl_loss`.

    Its schema in `torch.library` lists the forward's arguments one by one.

    Attributes:
        forward (IndexerKLLossArgs): What the forward was called with.
        grad_kl (total_q, H_idx): Upstream gradient.
        index_lse (total_q, H_idx): Log-sum-exp of the indexer's scores, as the forward returned it.
    """

    forward: IndexerKLLossArgs
    grad_kl: torch.Tensor
    index_lse: torch.Tensor


@dataclass(frozen=True, eq=False)
class StructuredBlocksArgs(Arguments):
    """`structured_blocks_of`.

    Attributes:
        own_block (...): int64, the block of each query; negative for padding.
        num_kv_heads (int): H_kv.
        layer_idx (int): Index of the layer, which the random blocks depend on.
        local_blocks, anchor_blocks, anchor_stride, random_blocks (int): As in `StructuredPattern`.
        seed (int): The 64 bits of the seed as a signed integer, which `torch.library` needs.
        num_blocks (int or None): A number that all of `own_block` are below, if known; for the `torch` backend.
    """

    own_block: torch.Tensor
    num_kv_heads: int
    layer_idx: int
    local_blocks: int
    anchor_blocks: int
    anchor_stride: int
    random_blocks: int
    seed: int
    num_blocks: int | None = None

    @property
    def width(self) -> int:
        """Places of a list."""
        return self.local_blocks + self.anchor_blocks + self.random_blocks

    def form(self, most_decode_tokens: int) -> str:
        """Returns "by position"."""
        return "by position"
