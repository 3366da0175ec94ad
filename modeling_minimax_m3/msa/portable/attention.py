"""`block_sparse_attention` in PyTorch, value and gradient: a walk over KV-major tiles; decoding gathers the blocks."""

import torch

from ..reference import (
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
)
from ..sequences import bounded_block_size, cached_sequences, compute_dtype, cu_seqlens_of_one
from .caches import MAX_DECODE_TOKENS, existing_pages, new_positions
from .tiles import listed_tiles, rows_by_head, rows_by_token, tile_scores


def block_sparse_attention(args: BlockSparseAttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    query, key, value, q_heads_per_kv = args.query, args.key, args.value, args.q_heads_per_kv
    dtype, device = compute_dtype(query), query.device
    total_q, num_heads, head_dim = query.shape
    num_kv_heads, value_dim = key.shape[1], value.shape[2]
    scaled_query = rows_by_head(query, num_kv_heads) * args.softmax_scale
    # The running softmax of each row: largest score, sum of exponentials relative to it, weighted sum of values.
    largest = torch.full((num_kv_heads, total_q, q_heads_per_kv), float("-inf"), dtype=dtype, device=device)
    total = torch.zeros_like(largest)
    accumulated = torch.zeros((num_kv_heads, total_q, q_heads_per_kv * value_dim), dtype=dtype, device=device)
    for tile in listed_tiles(
        args.block_indices, args.cu_seqlens_q, args.cu_seqlens_k, args.block_size, q_heads_per_kv
    ):
        head, tokens = tile.head, tile.tokens
        query_rows = scaled_query[head].index_select(0, tokens).view(-1, head_dim)
        scores = tile_scores(query_rows, key[tile.keys, head].to(dtype), tile)
        before = largest[head].index_select(0, tokens)
        # Each row sees at least one key of each of its blocks, so this is finite.
        after = torch.maximum(before, scores.amax(-1))
        weights = scores.sub_(after.unsqueeze(-1)).exp_()
        decay = (before - after).exp_()
        new_total = total[head].index_select(0, tokens).mul_(decay).add_(weights.sum(-1))
        rows = accumulated[head].index_select(0, tokens)
        rows.view(-1, q_heads_per_kv, value_dim).mul_(decay.unsqueeze(-1))
        rows.view(-1, value_dim).addmm_(weights.flatten(0, 1), value[tile.keys, head].to(dtype))
        largest[head].index_copy_(0, tokens, after)
        total[head].index_copy_(0, tokens, new_total)
        accumulated[head].index_copy_(0, tokens, rows)
    lse = rows_by_token(largest + total.log(), q_heads_per_kv, dtype).view(total_q, num_heads)
    # Rows that attend to nothing have a sum of 0 and stay 0.
    divisor = total.masked_fill_(total == 0, 1.0).unsqueeze(-1)
    accumulated.view(num_kv_heads, total_q, q_heads_per_kv, value_dim).div_(divisor)
    return rows_by_token(accumulated, q_heads_per_kv, query.dtype), lse


def block_sparse_attention_backward(
    args: BlockSparseAttentionBackwardArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention_backward`, from the saved lse; results repeat bit for bit."""
    forward, query, key, value = args.forward, args.forward.query, args.forward.key, args.forward.value
    dtype, q_heads_per_kv = compute_dtype(query), forward.q_heads_per_kv
    head_dim, num_kv_heads, value_dim = query.shape[2], key.shape[1], value.shape[2]
    scaled_query = rows_by_head(query, num_kv_heads) * forward.softmax_scale
    grad_out = rows_by_head(args.grad_out, num_kv_heads)
    # What each row's softmax subtracts from the gradient of its probabilities.
    delta = rows_by_head((args.grad_out.to(dtype) * args.out.to(dtype)).sum(-1, keepdim=True), num_kv_heads)
    lse = rows_by_head(args.lse.unsqueeze(-1), num_kv_heads)
    grad_query = torch.zeros_like(scaled_query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    for tile in listed_tiles(
        forward.block_indices, forward.cu_seqlens_q, forward.cu_seqlens_k, forward.block_size, q_heads_per_kv
    ):
        head, tokens = tile.head, tile.tokens
        query_rows = scaled_query[head].index_select(0, tokens).view(-1, head_dim)
        grad_rows = grad_out[head].index_select(0, tokens).view(-1, value_dim)
        key_rows, value_rows = key[tile.keys, head].to(dtype), value[tile.keys, head].to(dtype)
        scores = tile_scores(query_rows, key_rows, tile)
        probs = scores.sub_(lse[head].index_select(0, tokens).unsqueeze(-1)).exp_().flatten(0, 1)
        grad_value[tile.keys, head] += probs.T @ grad_rows
        grad_scores = grad_rows @ value_rows.T
        grad_scores.sub_(delta[head].index_select(0, tokens).view(-1, 1)).mul_(probs)
        # The queries carry the scale already.
        grad_key[tile.keys, head] += grad_scores.T @ query_rows
        # A token occurs once in a tile, so no two of its rows are added at the same place.
        rows = grad_query[head].index_select(0, tokens)
        rows.view(-1, head_dim).addmm_(grad_scores, key_rows)
        grad_query[head].index_copy_(0, tokens, rows)
    grad_query = rows_by_token(grad_query.mul_(forward.softmax_scale), q_heads_per_kv, query.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def block_sparse_attention_with_kvcache(args: BlockSparseAttentionWithKVCacheArgs) -> torch.Tensor:
    """As `reference.block_sparse_attention_with_kvcache`."""
    query, key_cache, value_cache, block_table = args.query, args.key_cache, args.value_cache, args.block_table
    batch, num_new, num_heads, _ = query.shape
    num_kv_heads = key_cache.shape[2]
    device, dtype = query.device, compute_dtype(query)
    if num_new > MAX_DECODE_TOKENS:
        out = query.new_zeros((batch, num_new, num_heads, value_cache.shape[-1]))
        caches = (key_cache, value_cache)
        for row, padding, (key, value) in cached_sequences(
            caches, num_new, args.cache_seqlens, args.cache_leftpad, block_table
        ):
            offsets = cu_seqlens_of_one(num_new - padding, len(key), device)
            block_indices = args.block_indices[row, padding:]
            packed = args.packed(query[row, padding:], key, value, block_indices, *offsets)
            out[row, padding:], _ = block_sparse_attention(packed)
        return out

    slots = key_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    block_size = bounded_block_size(args.block_size, slots)
    position, leftpad = new_positions(num_new, args.cache_seqlens, args.cache_leftpad)
    rank = (args.block_indices.long()[..., None] * block_size + torch.arange(block_size, device=device)).flatten(-2)
    attended = (rank >= 0) & (rank <= position)  # (B, T, H_kv, topk * block_size)
    slot = torch.where(attended, rank + leftpad, 0)
    rows = torch.arange(batch, device=device)[:, None, None, None]
    if block_table is not None:
        page_size = key_cache.shape[1]
        rows, slot = existing_pages(block_table, key_cache)[rows, slot // page_size], slot % page_size
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    keys, values = key_cache[rows, slot, heads].to(dtype), value_cache[rows, slot, heads].to(dtype)
    # Slots that are not attended to may hold anything, and even 0 * NaN must not reach the sum.
    values = values.masked_fill(~attended[..., None], 0.0)
    scaled_query = query.to(dtype).unflatten(2, (num_kv_heads, -1)) * args.softmax_scale
    scores = (scaled_query @ keys.mT).masked_fill(~attended.unsqueeze(-2), torch.finfo(dtype).min)
    # A row without a key averages zeros.
    return (scores.softmax(-1) @ values).flatten(2, 3).to(query.dtype)
