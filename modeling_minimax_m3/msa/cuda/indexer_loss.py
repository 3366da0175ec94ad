"""`indexer_kl_loss`, its gradient and the attention's log-sum-exp on the compiled kernels."""

import functools

import torch

from ..reference import AttentionLseArgs, BlockSparseAttentionArgs, IndexerKLLossArgs, IndexerKLLossBackwardArgs
from . import support
from .attention import block_sparse_attention
from .layout import contiguous, is_aligned

# Bytes of the probabilities that a loss saves for its gradient, at most.
MAX_SAVED_BYTES = 2**30

# Factor of the saved probabilities, so that float16 holds the small ones. The kernels have the same constant.
SAVED_SCALE = 2**15


def attention_lse(args: AttentionLseArgs) -> torch.Tensor:
    """As `reference.attention_lse`, by a whole attention whose output nobody uses.

    Over all keys this takes one attention per `MAX_TOPK` blocks. It counts the blocks as if all keys were one
    sequence, because lengths are not read.
    """
    if args.block_indices is not None:
        lists = [args.block_indices]
    else:
        # No sequence has more blocks than all keys together. A list may name blocks that a query does not have.
        blocks = torch.arange(-(-len(args.key) // args.block_size), dtype=torch.int32, device=args.query.device)
        lists = [ids.expand(len(args.query), args.key.shape[1], -1) for ids in blocks.split(support.MAX_TOPK)]
    return functools.reduce(torch.logaddexp, (_lse_of_blocks(args, ids) for ids in lists))


def attention_lse_unsupported(args: AttentionLseArgs) -> str | None:
    """Why the kernels cannot run a call of `attention_lse`; None where they can."""
    states = {"query": args.query, "key": args.key}
    return _sizes_unsupported(args, states) or support.rows_unsupported(states)


def saved_tokens(block_indices: torch.Tensor, block_size: int) -> int:
    """The number of query tokens, from the first, whose mean probabilities the loss saves for its gradient.

    The probabilities are those of the main attention, times `SAVED_SCALE`, in float16. `saved_probs` holds them as
    (saved tokens, H_kv, topk, block_size), in the places of `block_indices`; its values for keys that a query does not
    see are unspecified. The gradient computes those of the other tokens once more.
    """
    total_q, num_heads, topk = block_indices.shape
    return min(total_q, MAX_SAVED_BYTES // (2 * num_heads * max(topk, 1) * block_size))


def indexer_kl_loss(args: IndexerKLLossArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss`; fills `saved_probs`, see `saved_tokens`."""
    args = contiguous(args, "lse", "block_indices", "cu_seqlens_q", "cu_seqlens_k")
    return torch.ops.minimax_m3_msa_cuda.indexer_kl_loss(*args.values())


def indexer_kl_loss_unsupported(args: IndexerKLLossArgs) -> str | None:
    """Why the kernels cannot run a call of `indexer_kl_loss`; None where they can."""
    states = {"index_query": args.index_query, "index_key": args.index_key, "query": args.query, "key": args.key}
    return _sizes_unsupported(args, states) or support.rows_unsupported(states)


def indexer_kl_loss_missing() -> str | None:
    """Why the loaded binary cannot run `indexer_kl_loss`; None where it can."""
    return _missing("indexer_kl_loss")


def indexer_kl_loss_backward(args: IndexerKLLossBackwardArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss_backward`; reads the `saved_probs` of the value."""
    forward = contiguous(args.forward, "lse", "block_indices", "cu_seqlens_q", "cu_seqlens_k")
    saved_probs = forward.saved_probs
    # Hooks of autograd may have put it elsewhere.
    if saved_probs is not None and not (saved_probs.is_contiguous() and is_aligned(saved_probs)):
        saved_probs = saved_probs.clone(memory_format=torch.contiguous_format)
    return torch.ops.minimax_m3_msa_cuda.indexer_kl_loss_backward(
        args.grad_kl.contiguous(), forward.index_query, forward.index_key, forward.query, forward.key, forward.lse,
        args.index_lse.contiguous(), forward.block_indices, forward.cu_seqlens_q, forward.cu_seqlens_k,
        forward.block_size, forward.softmax_scale, forward.index_scale, saved_probs,
    )  # fmt: skip


def indexer_kl_loss_backward_unsupported(args: IndexerKLLossBackwardArgs) -> str | None:
    """Why the kernels cannot run a call of `indexer_kl_loss_backward`; None where they can."""
    # The gradient's own arguments are copied where the kernels cannot read them.
    return indexer_kl_loss_unsupported(args.forward)


def indexer_kl_loss_backward_missing() -> str | None:
    """Why the loaded binary cannot run `indexer_kl_loss_backward`; None where it can."""
    return _missing("indexer_kl_loss_backward")


def _lse_of_blocks(args: AttentionLseArgs, block_indices: torch.Tensor) -> torch.Tensor:
    attention = BlockSparseAttentionArgs(
        args.query, args.key, args.key, block_indices, args.cu_seqlens_q, args.cu_seqlens_k, args.block_size,
        args.softmax_scale,
    )  # fmt: skip
    return block_sparse_attention(attention)[1]


def _sizes_unsupported(args: AttentionLseArgs | IndexerKLLossArgs, states: dict[str, torch.Tensor]) -> str | None:
    topk = 0 if args.block_indices is None else args.block_indices.shape[-1]
    return support.sizes_unsupported(states, args.block_size, topk, args.q_heads_per_kv)


def _missing(name: str) -> str | None:
    """Why the loaded binary cannot run an operator; None where it can.

    A binary that MINIMAX_M3_MSA_LIBRARY names may be older than the operator's kernel.
    """
    operator = getattr(torch.ops.minimax_m3_msa_cuda, name, None)
    if operator is None:
        return "the compiled extension has no kernel for it"
    # Some binaries spell `saved_probs` out.
    if not any(argument.name.startswith("saved_prob") for argument in operator.default._schema.arguments):
        return "the compiled extension is too old for it"
    return None
