"""`block_sparse_attention` and its gradient on the compiled kernels."""

import torch

from ..reference import (
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
)
from . import support
from .caches import MAX_DECODE_TOKENS, rows_as_sequences
from .layout import contiguous, is_aligned


def block_sparse_attention(args: BlockSparseAttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    args = contiguous(args, "cu_seqlens_q", "cu_seqlens_k")
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention(*args.values())


def block_sparse_attention_unsupported(args: BlockSparseAttentionArgs) -> str | None:
    """Why the kernels cannot run a call of `block_sparse_attention`; None where they can."""
    states = {"query": args.query, "key": args.key, "value": args.value}
    topk = args.block_indices.shape[-1]
    return support.sizes_unsupported(states, args.block_size, topk, args.q_heads_per_kv) or support.rows_unsupported(
        states
    )


def block_sparse_attention_backward(
    args: BlockSparseAttentionBackwardArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention_backward`, from the saved out and lse; results repeat bit for bit."""
    grad_out, forward = args.grad_out, contiguous(args.forward, "cu_seqlens_q", "cu_seqlens_k")
    # A gradient may come expanded, so that elements share memory, or as any view.
    if not is_aligned(grad_out) or grad_out.stride(-1) != 1 or 0 in grad_out.stride():
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention_backward(
        grad_out, forward.query, forward.key, forward.value, args.out.contiguous(), args.lse.contiguous(),
        forward.block_indices, forward.cu_seqlens_q, forward.cu_seqlens_k, forward.block_size, forward.softmax_scale,
    )  # fmt: skip


def block_sparse_attention_backward_unsupported(args: BlockSparseAttentionBackwardArgs) -> str | None:
    """Why the kernels cannot run a call of `block_sparse_attention_backward`; None where they can."""
    # The gradient's own arguments are copied where the kernels cannot read them.
    return block_sparse_attention_unsupported(args.forward)


def block_sparse_attention_with_kvcache(args: BlockSparseAttentionWithKVCacheArgs) -> torch.Tensor:
    """As `reference.block_sparse_attention_with_kvcache`."""
    batch, num_new = args.query.shape[:2]
    if num_new > MAX_DECODE_TOKENS:
        (key, value), *offsets = rows_as_sequences(
            (args.key_cache, args.value_cache), num_new, args.cache_seqlens, args.cache_leftpad, args.block_table
        )
        packed = args.packed(args.query.flatten(0, 1), key, value, args.block_indices.flatten(0, 1), *offsets)
        return block_sparse_attention(packed)[0].unflatten(0, (batch, num_new))
    args = contiguous(args, "block_indices", "cache_seqlens", "cache_leftpad", "block_table")
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention_with_kvcache(*args.values())


def block_sparse_attention_with_kvcache_unsupported(args: BlockSparseAttentionWithKVCacheArgs) -> str | None:
    """Why the kernels cannot run a call of `block_sparse_attention_with_kvcache`; None where they can."""
    states = {"query": args.query, "key": args.key_cache, "value": args.value_cache}
    topk, decodes = args.block_indices.shape[-1], args.query.shape[1] <= MAX_DECODE_TOKENS
    return (
        support.sizes_unsupported(states, args.block_size, topk, args.q_heads_per_kv)
        or (support.pages_unsupported(args.key_cache, args.block_table) if decodes else None)
        or support.rows_unsupported(states)
    )
