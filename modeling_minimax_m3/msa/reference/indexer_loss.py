"""`indexer_kl_loss`, its gradient, and the log-sum-exp of the main attention by definition."""

from dataclasses import dataclass

import torch

from ..arguments import Arguments
from ..sequences import compute_dtype, packed_sequences
from .per_sequence import attended_keys, joined, positions


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


def attention_lse(args: AttentionLseArgs) -> torch.Tensor:
    """Log-sum-exp (total_q, H_q) of the scores of the listed blocks, or of all keys s <= t for None; natural log."""
    query = args.query
    lse = torch.full(query.shape[:2], float("-inf"), dtype=compute_dtype(query), device=query.device)
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        scores, attended = _attention_scores(args, queries, keys)
        lse[queries] = scores.masked_fill(~attended.unsqueeze(2), float("-inf")).logsumexp(-1).flatten(1)
    return lse


def indexer_kl_loss(args: IndexerKLLossArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence (total_q, H_idx) and the log-sum-exp (total_q, H_idx) of the index scores.

    The divergence is that of the index softmax from the main attention's probabilities, averaged over the query heads
    of each key/value head. It runs over the listed blocks, or over all keys s <= t for None.
    """
    index_query, dtype = args.index_query, compute_dtype(args.index_query)
    kls, index_lses = [], []
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        probs, index_scores, attended = _teacher_and_student(args, queries, keys)
        # A finite fill, because the softmax of a row of -inf would be NaN, and so would its derivatives.
        log_r = index_scores.masked_fill(~attended, torch.finfo(dtype).min).log_softmax(-1)
        # Keys that are not attended to have p = 0 and add nothing; so do probabilities that underflow.
        kls.append((torch.xlogy(probs, probs) - probs * log_r).sum(-1))
        index_lses.append(index_scores.detach().masked_fill(~attended, float("-inf")).logsumexp(-1))
    no_kl = index_query.new_zeros(index_query.shape[:2], dtype=dtype)
    no_lse = index_query.new_full(index_query.shape[:2], float("-inf"), dtype=dtype)
    return joined(kls, no_kl), joined(index_lses, no_lse)


def indexer_kl_loss_backward(args: IndexerKLLossBackwardArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of index_query and index_key; that of the scaled index scores is r - p."""
    index_query, index_key, index_scale = args.forward.index_query, args.forward.index_key, args.forward.index_scale
    dtype = compute_dtype(index_query)
    grad_index_query = torch.zeros(index_query.shape, dtype=dtype, device=index_query.device)
    grad_index_key = torch.zeros(index_key.shape, dtype=dtype, device=index_key.device)
    for queries, keys in packed_sequences(args.forward.cu_seqlens_q, args.forward.cu_seqlens_k):
        probs, index_scores, attended = _teacher_and_student(args.forward, queries, keys)
        index_probs = (index_scores - args.index_lse[queries].unsqueeze(-1)).exp().masked_fill(~attended, 0.0)
        grad_scores = (index_probs - probs) * args.grad_kl[queries].unsqueeze(-1).to(dtype) * index_scale
        grad_index_query[queries] = torch.einsum("qhk,kd->qhd", grad_scores, index_key[keys].to(dtype))
        grad_index_key[keys] = torch.einsum("qhk,qhd->kd", grad_scores, index_query[queries].to(dtype))
    return grad_index_query.to(index_query.dtype), grad_index_key.to(index_key.dtype)


def _attention_scores(
    args: AttentionLseArgs | IndexerKLLossArgs, queries: slice, keys: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The main attention's scaled scores of one sequence, and which keys each key/value head attends to.

    Returns:
        scores (len_q, H_kv, q_heads_per_kv, len_k), bool attended (len_q, H_kv, len_k).
    """
    query, key, dtype = args.query, args.key, compute_dtype(args.query)
    query_rows = query[queries].to(dtype).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("qhgd,khd->qhgk", query_rows, key[keys].to(dtype)) * args.softmax_scale
    if args.block_indices is not None:
        return scores, attended_keys(args.block_indices, queries, keys, args.block_size, q_heads_per_kv=1)
    position = positions(queries, keys, query.device)[:, None]
    causal = torch.arange(keys.stop - keys.start, device=query.device) <= position
    return scores, causal.unsqueeze(1).expand(-1, key.shape[1], -1)


def _teacher_and_student(
    args: IndexerKLLossArgs, queries: slice, keys: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the loss compares, for one sequence; each (len_q, H_idx, len_k).

    Returns:
        The main attention's mean probabilities p, 0 for keys that are not attended to; the scaled index scores; and
        which keys are attended to.
    """
    scores, attended = _attention_scores(args, queries, keys)
    lse = args.lse[queries].to(scores.dtype).unflatten(1, (args.key.shape[1], -1))
    # Masked before exp: an empty row's lse is -inf, and its differences would be NaN or inf.
    probs = (scores - lse.unsqueeze(-1)).masked_fill(~attended.unsqueeze(2), float("-inf")).exp().mean(2)
    index_rows, index_keys = args.index_query[queries].to(scores.dtype), args.index_key[keys].to(scores.dtype)
    index_scores = torch.einsum("qhd,kd->qhk", index_rows, index_keys) * args.index_scale
    return probs, index_scores, attended
