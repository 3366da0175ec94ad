"""`block_sparse_attention` and its gradient by definition: every key has a weight, 0 where it is not listed."""

from dataclasses import dataclass

import torch

from ..arguments import Arguments
from ..sequences import cached_sequences, compute_dtype, cu_seqlens_of_one, packed_sequences
from .per_sequence import attended_keys, joined


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
            query=query,
            key=key,
            value=value,
            block_indices=block_indices,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            block_size=self.block_size,
            softmax_scale=self.softmax_scale,
        )


def block_sparse_attention(args: BlockSparseAttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal softmax attention over the listed blocks: out like `query`, lse (total_q, H_q), natural log."""
    query, dtype = args.query, compute_dtype(args.query)
    outs, lses = [], []
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        attended = attended_keys(args.block_indices, queries, keys, args.block_size, args.q_heads_per_kv)
        keys_of_heads = args.key[keys].to(dtype).repeat_interleave(args.q_heads_per_kv, dim=1)
        values_of_heads = args.value[keys].to(dtype).repeat_interleave(args.q_heads_per_kv, dim=1)
        scores = torch.einsum("qhd,khd->qhk", query[queries].to(dtype), keys_of_heads) * args.softmax_scale
        # A finite fill, because the softmax of a row of -inf would be NaN.
        weights = scores.masked_fill(~attended, torch.finfo(dtype).min).softmax(-1) * attended
        outs.append(torch.einsum("qhk,khd->qhd", weights, values_of_heads))
        lses.append(scores.detach().masked_fill(~attended, float("-inf")).logsumexp(-1))
    no_out = query.new_zeros((query.shape[0], query.shape[1], args.value.shape[-1]), dtype=dtype)
    no_lse = query.new_full(query.shape[:2], float("-inf"), dtype=dtype)
    return joined(outs, no_out).to(query.dtype), joined(lses, no_lse)


def block_sparse_attention_backward(
    args: BlockSparseAttentionBackwardArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, by the chain rule through `block_sparse_attention`."""
    query, key, value = args.forward.query, args.forward.key, args.forward.value
    softmax_scale, q_heads_per_kv = args.forward.softmax_scale, args.forward.q_heads_per_kv
    dtype, num_kv_heads = compute_dtype(query), key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in (query, key, value)
    )
    for queries, keys in packed_sequences(args.forward.cu_seqlens_q, args.forward.cu_seqlens_k):
        attended = attended_keys(args.forward.block_indices, queries, keys, args.forward.block_size, q_heads_per_kv)
        query_rows, grad_rows = query[queries].to(dtype), args.grad_out[queries].to(dtype)
        keys_of_heads = key[keys].to(dtype).repeat_interleave(q_heads_per_kv, dim=1)
        values_of_heads = value[keys].to(dtype).repeat_interleave(q_heads_per_kv, dim=1)
        scores = torch.einsum("qhd,khd->qhk", query_rows, keys_of_heads) * softmax_scale
        weights = scores.masked_fill(~attended, torch.finfo(dtype).min).softmax(-1) * attended

        grad_weights = torch.einsum("qhd,khd->qhk", grad_rows, values_of_heads)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * softmax_scale
        grad_query[queries] = torch.einsum("qhk,khd->qhd", grad_scores, keys_of_heads)
        # A key/value head collects the gradients of the query heads that share it.
        grad_key_of_heads = torch.einsum("qhk,qhd->khd", grad_scores, query_rows)
        grad_value_of_heads = torch.einsum("qhk,qhd->khd", weights, grad_rows)
        grad_key[keys] = grad_key_of_heads.unflatten(1, (num_kv_heads, q_heads_per_kv)).sum(2)
        grad_value[keys] = grad_value_of_heads.unflatten(1, (num_kv_heads, q_heads_per_kv)).sum(2)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def block_sparse_attention_with_kvcache(args: BlockSparseAttentionWithKVCacheArgs) -> torch.Tensor:
    """`block_sparse_attention` for the newest T tokens of each cached row: (B, T, H_q, D_v)."""
    query, device = args.query, args.query.device
    num_new = query.shape[1]
    out = torch.zeros((*query.shape[:3], args.value_cache.shape[-1]), dtype=query.dtype, device=device)
    caches = (args.key_cache, args.value_cache)
    rows = cached_sequences(caches, num_new, args.cache_seqlens, args.cache_leftpad, args.block_table)
    for row, padding, (key, value) in rows:
        offsets = cu_seqlens_of_one(num_new - padding, len(key), device)
        block_indices = args.block_indices[row, padding:]
        packed = args.packed(query[row, padding:], key, value, block_indices, *offsets)
        out[row, padding:], _ = block_sparse_attention(packed)
    return out
