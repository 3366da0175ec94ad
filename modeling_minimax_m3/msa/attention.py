"""`block_sparse_attention`: softmax attention over selected key blocks. Operators, gradient, dispatch to a backend."""

import torch

from . import checks, derivatives, reference
from .backends import check_backend, run_on_backend
from .sequences import compute_dtype


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

    Query heads g * G to (g + 1) * G - 1 share key/value head g and its blocks (G = H_q / H_kv). Query i of a sequence
    sits at position len_k - len_q + i and never attends to later keys. A row without any key gives 0.

    Args:
        query (total_q, H_q, D): Queries of all sequences, one after the other.
        key (total_k, H_kv, D), value (total_k, H_kv, D_v): Keys and values; same dtype.
        block_indices (total_q, H_kv, topk): int32 ids of the blocks, counted from each sequence's first key, in any
            order, without duplicates, -1 after the last one. Ids past the sequence or the query attend to nothing.
        cu_seqlens_q, cu_seqlens_k (batch + 1): int32 offsets of the sequences, starting at 0. A sequence may have
            no queries, but never more queries than keys.
        max_seqlen_q, max_seqlen_k: At least the length of the longest sequence, in tokens. No backend needs them; they
            are checked against offsets on the CPU, outside of `torch.compile`.
        block_size: Keys per block.
        softmax_scale: Factor of the scores; None means 1 / sqrt(D).
        return_lse: Also return the log-sum-exp of the scaled scores.
        backend: "auto", "cuda", "torch" or "reference".

    Returns:
        out (total_q, H_q, D_v) in the dtype of `query`; with `return_lse` also lse (total_q, H_q), float32 (float64
        for float64 inputs), natural logarithm, -inf for rows without any key, without gradient.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        NotImplementedError: the named backend cannot run the call, or has not the derivatives that it is asked for.
    """
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("query", query, ("total_q", "H_q", "D"), checks.FLOATING_DTYPES)
    checks.check_tensor("key", key, ("total_k", "H_kv", query.shape[-1]), (query.dtype,), query.device)
    checks.check_tensor("value", value, (*key.shape[:2], "D_v"), (query.dtype,), query.device)
    checks.check_head_groups(query, key.shape[1])
    checks.check_tensor(
        "block_indices", block_indices, (query.shape[0], key.shape[1], "topk"), (torch.int32,), query.device
    )
    for name, tensor in (("query", query), ("key", key), ("value", value), ("block_indices", block_indices)):
        checks.check_unit_stride(name, tensor)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, query.device)
    checks.check_max_seqlens(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    softmax_scale = checks.scale("softmax_scale", softmax_scale, query)
    checks.check_bool("return_lse", return_lse)
    check_backend(backend)

    where = (block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale)
    if derivatives.are_beyond_backward(query, key, value):
        out, lse = derivatives.by_definition("block_sparse_attention", backend, (query, key, value), *where)
    else:
        out, lse = torch.ops.minimax_m3_msa.block_sparse_attention(query, key, value, *where, backend)
    return (out, lse) if return_lse else out


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
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    checks.check_block_indices_values(block_indices)
    return run_on_backend(
        backend,
        "block_sparse_attention",
        query,
        key,
        value,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        softmax_scale,
    )


@_block_sparse_attention.register_fake
def _(query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, backend):
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
    return run_on_backend(
        backend,
        "block_sparse_attention_backward",
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        softmax_scale,
    )


@_block_sparse_attention_backward.register_fake
def _(
    grad_out, query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
    backend,
):  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k)
    ctx.options = (block_size, softmax_scale, backend)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = torch.ops.minimax_m3_msa.block_sparse_attention_backward(
        grad_out, query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *grads, None, None, None, None, None, None


_block_sparse_attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx, inputs, output) -> None:
    grad_out, query, key, value, _, _, block_indices, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(grad_out, query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k)


def _backward_of_backward(ctx, *grad_grads):
    grad_out, query, key, value, *where = ctx.saved_tensors
    *options, backend = ctx.options
    derivatives.check_has_definition("block_sparse_attention", backend)
    grads = derivatives.gradient_of_gradient(
        lambda *states: reference.block_sparse_attention(*states, *where, *options)[0],
        grad_out,
        (query, key, value),
        grad_grads,
    )
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
        key_cache (B, S_max, H_kv, D), value_cache (B, S_max, H_kv, D_v), or (pages, page_size, H_kv, ...) with
            `block_table`: Keys and values; strides other than the last are free.
        block_indices (B, T, H_kv, topk): int32 ids as `select_blocks_with_kvcache` returns them.
        cache_seqlens (B,): int32, slots in use in each row, including the new tokens and the left padding.
        cache_leftpad (B,): int32, slots of padding at the start of each row. Not with `block_table`.
        block_table (B, pages of a row): int32, the pages of each row, in order.
        block_size, softmax_scale, backend: As in `block_sparse_attention`.

    Returns:
        (B, T, H_q, D_v) in the dtype of `query`.

    Raises:
        ValueError, TypeError, NotImplementedError: As `block_sparse_attention`.
    """
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("query", query, ("B", "T", "H_q", "D"), checks.FLOATING_DTYPES)
    checks.check_unit_stride("query", query)
    checks.check_tensor("key_cache", key_cache, ("B or pages", "slots", "H_kv", query.shape[-1]), (query.dtype,))
    num_kv_heads = key_cache.shape[2]
    caches = {
        "key_cache": (key_cache, ("H_kv", query.shape[-1])),
        "value_cache": (value_cache, (num_kv_heads, "D_v")),
    }
    checks.check_cache(caches, query, cache_seqlens, cache_leftpad, block_table)
    checks.check_head_groups(query, num_kv_heads)
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
    return torch.ops.minimax_m3_msa.block_sparse_attention_with_kvcache(
        query, key_cache, value_cache, block_indices, cache_seqlens, cache_leftpad, block_table, block_size,
        checks.scale("softmax_scale", softmax_scale, query), check_backend(backend),
    )  # fmt: skip


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
    checks.check_cache_values(key_cache, cache_seqlens, cache_leftpad, block_table)
    checks.check_block_indices_values(block_indices)
    return run_on_backend(
        backend,
        "block_sparse_attention_with_kvcache",
        query,
        key_cache,
        value_cache,
        block_indices,
        cache_seqlens,
        cache_leftpad,
        block_table,
        block_size,
        softmax_scale,
    )


@_block_sparse_attention_with_kvcache.register_fake
def _(
    query, key_cache, value_cache, block_indices, cache_seqlens, cache_leftpad, block_table, block_size,
    softmax_scale, backend,
):  # fmt: skip
    return query.new_empty((*query.shape[:3], value_cache.shape[-1]))
