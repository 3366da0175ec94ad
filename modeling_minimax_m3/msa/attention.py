"""`block_sparse_attention`: softmax attention over selected key blocks. Checks, operators, gradient."""

from dataclasses import replace
from typing import Any

import torch

from . import checks, cuda, derivatives, portable, reference
from .backends import Operator, check_backend, run_on_backend
from .reference import (
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
)
from .sequences import compute_dtype

BLOCK_SPARSE_ATTENTION = Operator(
    name="block_sparse_attention",
    reference=reference.block_sparse_attention,
    portable=portable.block_sparse_attention,
    cuda=cuda.block_sparse_attention,
    unsupported=cuda.block_sparse_attention_unsupported,
    kernels=("forward_query_major", "forward_kv_major"),
)
BLOCK_SPARSE_ATTENTION_BACKWARD = Operator(
    name="block_sparse_attention_backward",
    reference=reference.block_sparse_attention_backward,
    portable=portable.block_sparse_attention_backward,
    cuda=cuda.block_sparse_attention_backward,
    unsupported=cuda.block_sparse_attention_backward_unsupported,
    kernels=("backward",),
)
BLOCK_SPARSE_ATTENTION_WITH_KVCACHE = Operator(
    name="block_sparse_attention_with_kvcache",
    reference=reference.block_sparse_attention_with_kvcache,
    portable=portable.block_sparse_attention_with_kvcache,
    cuda=cuda.block_sparse_attention_with_kvcache,
    unsupported=cuda.block_sparse_attention_with_kvcache_unsupported,
    kernels=("forward_query_major", "forward_kv_major"),
)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_size: int = 128,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact causal softmax attention of every query to the keys of its blocks, and to nothing else. Differentiable.

    The query heads h * q_heads_per_kv to (h + 1) * q_heads_per_kv - 1 share key/value head h and its blocks, where
    q_heads_per_kv = H_q / H_kv. Query i of a sequence sits at position len_k - len_q + i and never attends to later
    keys. A row without any key gives 0.

    Args:
        query (total_q, H_q, D): Queries of all sequences, one after the other.
        key (total_k, H_kv, D): Keys; same dtype.
        value (total_k, H_kv, D_v): Values; same dtype.
        block_indices (total_q, H_kv, topk): int32 ids of the blocks, counted from each sequence's first key, in any
            order, without duplicates, -1 after the last one. Ids past the sequence or the query attend to nothing.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): int32 offsets of the sequences, starting at 0. A sequence may have
            no queries, but never more queries than keys.
        max_seqlen_q, max_seqlen_k (int or None): At least the length of the longest sequence, in tokens. No backend
            needs them; they are checked against offsets on the CPU, outside of `torch.compile`.
        block_size (int): Keys per block.
        softmax_scale (float or None): Factor of the scores; None means 1 / sqrt(D).
        return_lse (bool): Also return the log-sum-exp of the scaled scores.
        backend (str): "auto", "cuda", "torch" or "reference".

    Returns:
        out (total_q, H_q, D_v) in the dtype of `query`; with `return_lse` also lse (total_q, H_q), float32 (float64
        for float64 inputs), natural logarithm, -inf for rows without any key, without gradient.

    Raises:
        ValueError, TypeError: An argument's shape, dtype, device or value is not as above.
        NotImplementedError: The named backend cannot run the call, or lacks the derivatives that the call needs.
    """
    args = block_sparse_attention_args(
        query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
        softmax_scale, return_lse, backend,
    )  # fmt: skip
    if derivatives.are_beyond_backward(*args.differentiable):
        out, lse = derivatives.by_definition(BLOCK_SPARSE_ATTENTION, backend, args)
    else:
        out, lse = torch.ops.minimax_m3_msa.block_sparse_attention(*args.values(), backend)
    return (out, lse) if return_lse else out


def block_sparse_attention_args(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_size: int,
    softmax_scale: float | None,
    return_lse: bool,
    backend: str,
) -> BlockSparseAttentionArgs:
    """Checks the arguments of a call of `block_sparse_attention`."""
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("query", query, ("total_q", "H_q", "D"), checks.FLOATING_DTYPES)
    checks.check_tensor("key", key, ("total_k", "H_kv", query.shape[-1]), (query.dtype,), query.device)
    checks.check_tensor("value", value, (*key.shape[:2], "D_v"), (query.dtype,), query.device)
    checks.check_q_heads_per_kv(query, key.shape[1])
    checks.check_tensor(
        "block_indices", block_indices, (query.shape[0], key.shape[1], "topk"), (torch.int32,), query.device
    )
    for name, tensor in (("query", query), ("key", key), ("value", value), ("block_indices", block_indices)):
        checks.check_unit_stride(name, tensor)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, query.device)
    checks.check_max_seqlens(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    scale = checks.scale("softmax_scale", softmax_scale, query)
    checks.check_bool("return_lse", return_lse)
    check_backend(backend)
    return BlockSparseAttentionArgs(query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, scale)


@torch.library.custom_op("minimax_m3_msa::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    args = BlockSparseAttentionArgs(
        query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale
    )
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    checks.check_block_indices_values(block_indices)
    return run_on_backend(backend, BLOCK_SPARSE_ATTENTION, args)


@_block_sparse_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_empty((*query.shape[:2], value.shape[-1]))
    return out, query.new_empty(query.shape[:2], dtype=compute_dtype(query))


@torch.library.custom_op("minimax_m3_msa::block_sparse_attention_backward", mutates_args=())
def _block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    forward = BlockSparseAttentionArgs(
        query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale
    )
    args = BlockSparseAttentionBackwardArgs(forward, grad_out, out, lse)
    return run_on_backend(backend, BLOCK_SPARSE_ATTENTION_BACKWARD, args)


@_block_sparse_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k)
    ctx.options = (block_size, softmax_scale, backend)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = torch.ops.minimax_m3_msa.block_sparse_attention_backward(
        grad_out, query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *grads, None, None, None, None, None, None


_block_sparse_attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    grad_out, query, key, value, _, _, block_indices, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(grad_out, query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k)


def _backward_of_backward(ctx: Any, *grad_grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grad_out, *tensors = ctx.saved_tensors
    *options, backend = ctx.options
    args = BlockSparseAttentionArgs(*tensors, *options)
    derivatives.check_has_definition(BLOCK_SPARSE_ATTENTION.name, backend)

    def out_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return reference.block_sparse_attention(replace(args, query=query, key=key, value=value))[0]

    grads = derivatives.gradient_of_gradient(out_of, grad_out, args.differentiable, grad_grads)
    return *grads, *[None] * 8


_block_sparse_attention_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)


def block_sparse_attention_with_kvcache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    block_size: int = 128,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`block_sparse_attention` for the newest T tokens of each row, reading straight from a cache. No derivatives.

    The new tokens' keys and values are already in the cache. Query i of a row sits at position
    `cache_seqlens - cache_leftpad - T + i`; where that is negative the query is padding and gives 0.

    Args:
        query (B, T, H_q, D): Queries of the T newest tokens of each row.
        key_cache ((B, S, H_kv, D), or (pages, page_size, H_kv, D) with `block_table`): Keys; strides other than the
            last are free.
        value_cache ((B, S, H_kv, D_v), or (pages, page_size, H_kv, D_v) with `block_table`): Values; likewise.
        block_indices (B, T, H_kv, topk): int32 ids as `select_blocks_with_kvcache` returns them.
        cache_seqlens (B,): int32, slots in use in each row, including the new tokens and the left padding.
        cache_leftpad ((B,) or None): int32, slots of padding at the start of each row. Not with `block_table`.
        block_table ((B, pages of a row) or None): int32, the pages of each row, in order.
        block_size, softmax_scale, backend: As in `block_sparse_attention`.

    Returns:
        (B, T, H_q, D_v) in the dtype of `query`.

    Raises:
        ValueError, TypeError, NotImplementedError: As `block_sparse_attention`.
    """
    args = block_sparse_attention_with_kvcache_args(
        query, key_cache, value_cache, block_indices, cache_seqlens, cache_leftpad, block_table, block_size,
        softmax_scale, backend,
    )  # fmt: skip
    return torch.ops.minimax_m3_msa.block_sparse_attention_with_kvcache(*args.values(), backend)


def block_sparse_attention_with_kvcache_args(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float | None,
    backend: str,
) -> BlockSparseAttentionWithKVCacheArgs:
    """Checks the arguments of a call of `block_sparse_attention_with_kvcache`."""
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("query", query, ("B", "T", "H_q", "D"), checks.FLOATING_DTYPES)
    checks.check_unit_stride("query", query)
    checks.check_tensor("key_cache", key_cache, ("B or pages", "slots", "H_kv", query.shape[-1]), (query.dtype,))
    num_kv_heads = key_cache.shape[2]
    caches: checks.Caches = {
        "key_cache": (key_cache, ("H_kv", query.shape[-1])),
        "value_cache": (value_cache, (num_kv_heads, "D_v")),
    }
    checks.check_cache(caches, query, cache_seqlens, cache_leftpad, block_table)
    checks.check_q_heads_per_kv(query, num_kv_heads)
    checks.check_tensor(
        "block_indices", block_indices, (*query.shape[:2], num_kv_heads, "topk"), (torch.int32,), query.device
    )
    states = (query, key_cache, value_cache)
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states)
    if has_gradient or derivatives.are_beyond_backward(*states):
        raise NotImplementedError(
            "`block_sparse_attention_with_kvcache` has no gradient and no other derivative: call it under "
            "torch.no_grad() and outside of `torch.func.grad`, `torch.func.jvp` and the like, or use "
            "`block_sparse_attention`"
        )
    scale = checks.scale("softmax_scale", softmax_scale, query)
    check_backend(backend)
    return BlockSparseAttentionWithKVCacheArgs(
        query, key_cache, value_cache, block_indices, cache_seqlens, cache_leftpad, block_table, block_size, scale
    )


@torch.library.custom_op("minimax_m3_msa::block_sparse_attention_with_kvcache", mutates_args=())
def _block_sparse_attention_with_kvcache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> torch.Tensor:
    args = BlockSparseAttentionWithKVCacheArgs(
        query, key_cache, value_cache, block_indices, cache_seqlens, cache_leftpad, block_table, block_size,
        softmax_scale,
    )  # fmt: skip
    checks.check_cache_values(key_cache, cache_seqlens, cache_leftpad, block_table)
    checks.check_block_indices_values(block_indices)
    return run_on_backend(backend, BLOCK_SPARSE_ATTENTION_WITH_KVCACHE, args)


@_block_sparse_attention_with_kvcache.register_fake
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value_cache.shape[-1]))
