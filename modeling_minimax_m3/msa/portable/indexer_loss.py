"""`indexer_kl_loss` in PyTorch, value and gradient, and the attention's log-sum-exp: walks over KV-major tiles."""

from collections.abc import Iterator

import torch

from ..reference import AttentionLseArgs, IndexerKLLossArgs, IndexerKLLossBackwardArgs
from ..sequences import compute_dtype
from .tiles import RunningSum, Tile, rows_by_head, rows_by_token, tile_scores, tiles_of


def attention_lse(args: AttentionLseArgs) -> torch.Tensor:
    """As `reference.attention_lse`."""
    query, key, q_heads_per_kv = args.query, args.key, args.q_heads_per_kv
    dtype = compute_dtype(query)
    (total_q, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    scaled_query = rows_by_head(query, num_kv_heads) * args.softmax_scale
    sums = RunningSum((num_kv_heads, total_q, q_heads_per_kv), dtype, query.device)
    for tile in tiles_of(
        args.block_indices, args.cu_seqlens_q, args.cu_seqlens_k, num_kv_heads, args.block_size, q_heads_per_kv
    ):
        query_rows = scaled_query[tile.head].index_select(0, tile.tokens).view(-1, head_dim)
        scores = tile_scores(query_rows, key[tile.keys, tile.head].to(dtype), tile)
        sums.add(tile.head, tile.tokens, scores)
    return rows_by_token(sums.log(), q_heads_per_kv, dtype).view(total_q, num_heads)


def indexer_kl_loss(args: IndexerKLLossArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss`, in one pass.

    With z the scaled index scores, the divergence is the sum of p * (log p - z), plus the sum of p times the
    log-sum-exp of z.
    """
    index_query = args.index_query
    dtype, device = compute_dtype(index_query), index_query.device
    shape = (index_query.shape[1], index_query.shape[0])
    sums = RunningSum(shape, dtype, device)
    divergence, mass = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    for tile, probs, rows, keys in _index_tiles(args):
        head, tokens = tile.head, tile.tokens
        scores = rows @ keys.T
        terms = torch.xlogy(probs, probs).sub_(probs * scores).sum(-1)
        divergence[head].index_copy_(0, tokens, terms.add_(divergence[head].index_select(0, tokens)))
        mass[head].index_copy_(0, tokens, probs.sum(-1).add_(mass[head].index_select(0, tokens)))
        if tile.future is not None:
            scores[: len(tile.future)].masked_fill_(tile.future.squeeze(1), float("-inf"))
        sums.add(head, tokens, scores)
    index_lse = sums.log()
    kl = divergence.add_(mass.mul_(index_lse.masked_fill(sums.total == 0, 0.0)))
    return kl.T.contiguous(), index_lse.T.contiguous()


def indexer_kl_loss_backward(args: IndexerKLLossBackwardArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss_backward`; results repeat bit for bit."""
    index_query, index_key = args.forward.index_query, args.forward.index_key
    dtype = compute_dtype(index_query)
    grad_rows = torch.zeros_like(index_query.transpose(0, 1), dtype=dtype).contiguous()
    grad_index_key = torch.zeros(index_key.shape, dtype=dtype, device=index_key.device)
    for tile, probs, rows, keys in _index_tiles(args.forward):
        head, tokens = tile.head, tile.tokens
        scores = rows @ keys.T
        if tile.future is not None:
            scores[: len(tile.future)].masked_fill_(tile.future.squeeze(1), float("-inf"))
        grad_scores = scores.sub_(args.index_lse[:, head].index_select(0, tokens).unsqueeze(-1)).exp_().sub_(probs)
        grad_scores.mul_(args.grad_kl[:, head].index_select(0, tokens).unsqueeze(-1))
        # The rows carry the scale already.
        grad_index_key[tile.keys] += grad_scores.T @ rows
        grad_rows[head].index_copy_(0, tokens, grad_rows[head].index_select(0, tokens).addmm_(grad_scores, keys))
    grad_rows.mul_(args.forward.index_scale)
    return grad_rows.transpose(0, 1).to(index_query.dtype).contiguous(), grad_index_key.to(index_key.dtype)


def _index_tiles(args: IndexerKLLossArgs) -> Iterator[tuple[Tile, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tiles, each with what the loss compares in it.

    Yields:
        The tile, the main attention's mean probabilities (n, keys), scaled index queries (n, D_idx), and index keys
        (keys, D_idx).
    """
    key, q_heads_per_kv = args.key, args.q_heads_per_kv
    dtype = compute_dtype(args.query)
    num_kv_heads, head_dim = key.shape[1:]
    scaled_query = rows_by_head(args.query, num_kv_heads) * args.softmax_scale
    lse = rows_by_head(args.lse.unsqueeze(-1), num_kv_heads)
    scaled_index_query = rows_by_head(args.index_query, num_kv_heads) * args.index_scale
    for tile in tiles_of(
        args.block_indices, args.cu_seqlens_q, args.cu_seqlens_k, num_kv_heads, args.block_size, q_heads_per_kv
    ):
        head, tokens = tile.head, tile.tokens
        query_rows = scaled_query[head].index_select(0, tokens).view(-1, head_dim)
        scores = tile_scores(query_rows, key[tile.keys, head].to(dtype), tile)
        probs = scores.sub_(lse[head].index_select(0, tokens).unsqueeze(-1)).exp_().mean(1)
        yield tile, probs, scaled_index_query[head].index_select(0, tokens), args.index_key[tile.keys].to(dtype)
