"""Naive MiniMax Sparse Attention: the definition, which every backend is tested against.

Every function loops over the sequences of a batch and builds the full query x key score matrix of each, so memory is
quadratic in a sequence's length. Half precision inputs are computed in float32, float64 inputs in float64.

README.md has the legend of dimensions; here len_q and len_k are the tokens of one sequence.
"""

from collections.abc import Sequence

import torch

from .arguments import (
    AttentionLseArgs,
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
    IndexerKLLossArgs,
    IndexerKLLossBackwardArgs,
    SelectBlocksArgs,
    SelectBlocksWithKVCacheArgs,
    StructuredBlocksArgs,
)
from .forced_blocks import is_forced
from .sequences import bounded_block_size, cached_sequences, compute_dtype, cu_seqlens_of_one, packed_sequences

# --- selection ---------------------------------------------------------------------------------------------------


def select_blocks(args: SelectBlocksArgs) -> torch.Tensor:
    """The key blocks that each query attends to: int32 (total_q, H_idx, topk), -1 where fewer are visible."""
    index_query, device, dtype = args.index_query, args.index_query.device, compute_dtype(args.index_query)
    selected = torch.full((*index_query.shape[:2], args.topk), -1, dtype=torch.int32, device=device)
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        len_k = keys.stop - keys.start
        block_size = bounded_block_size(args.block_size, len_k)
        num_blocks = -(-len_k // block_size)
        position = _positions(queries, keys, device)[:, None, None]  # (len_q, 1, 1)

        scores = torch.einsum("qhd,kd->qhk", index_query[queries].to(dtype), args.index_key[keys].to(dtype))
        scores = scores.masked_fill(torch.arange(len_k, device=device) > position, float("-inf"))
        scores = torch.nn.functional.pad(scores, (0, num_blocks * block_size - len_k), value=float("-inf"))
        block_scores = scores.unflatten(-1, (num_blocks, block_size)).amax(-1)  # (len_q, H_idx, N)

        own_block = position // block_size
        block = torch.arange(num_blocks, device=device)
        forced = is_forced(block, own_block, args.local_blocks, args.init_blocks)

        # Two stable sorts: by score, NaN first, ties to the lower block id; then forced blocks before all others.
        best = block_scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.where(block <= own_block, torch.where(forced, 0, 1), 2).expand_as(best)
        best = best.gather(-1, rank.gather(-1, best).sort(dim=-1, stable=True).indices)[..., : args.topk]
        best = best.masked_fill(best > own_block, -1)
        selected[queries, :, : best.shape[-1]] = best.to(torch.int32)
    return selected


def select_blocks_with_kvcache(args: SelectBlocksWithKVCacheArgs) -> torch.Tensor:
    """`select_blocks` for the newest T tokens of each cached row: int32 (B, T, H_idx, topk)."""
    index_query, device = args.index_query, args.index_query.device
    num_new = index_query.shape[1]
    selected = torch.full((*index_query.shape[:3], args.topk), -1, dtype=torch.int32, device=device)
    rows = cached_sequences((args.index_key_cache,), num_new, args.cache_seqlens, args.cache_leftpad, args.block_table)
    for row, padding, (index_key,) in rows:
        offsets = cu_seqlens_of_one(num_new - padding, len(index_key), device)
        selected[row, padding:] = select_blocks(args.packed(index_query[row, padding:], index_key, *offsets))
    return selected


def _positions(queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
    """Positions of a sequence's queries, which are its last tokens: (len_q,)."""
    len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
    return torch.arange(len_k - len_q, len_k, device=device)


# --- attention ---------------------------------------------------------------------------------------------------


def block_sparse_attention(args: BlockSparseAttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal softmax attention over the listed blocks: out like `query`, lse (total_q, H_q), natural log."""
    query, dtype = args.query, compute_dtype(args.query)
    outs, lses = [], []
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        attended = _attended(args.block_indices, queries, keys, args.block_size, args.q_heads_per_kv)
        keys_of_heads = args.key[keys].to(dtype).repeat_interleave(args.q_heads_per_kv, dim=1)
        values_of_heads = args.value[keys].to(dtype).repeat_interleave(args.q_heads_per_kv, dim=1)
        scores = torch.einsum("qhd,khd->qhk", query[queries].to(dtype), keys_of_heads) * args.softmax_scale
        # A finite fill, because the softmax of a row of -inf would be NaN.
        weights = scores.masked_fill(~attended, torch.finfo(dtype).min).softmax(-1) * attended
        outs.append(torch.einsum("qhk,khd->qhd", weights, values_of_heads))
        lses.append(scores.detach().masked_fill(~attended, float("-inf")).logsumexp(-1))
    no_out = query.new_zeros((query.shape[0], query.shape[1], args.value.shape[-1]), dtype=dtype)
    no_lse = query.new_full(query.shape[:2], float("-inf"), dtype=dtype)
    return _joined(outs, no_out).to(query.dtype), _joined(lses, no_lse)


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
        attended = _attended(args.forward.block_indices, queries, keys, args.forward.block_size, q_heads_per_kv)
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


def _joined(parts: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """The rows of the sequences, one after the other; the rows after the last sequence come from `empty`."""
    return torch.cat([*parts, empty[sum(map(len, parts)) :]])


def _attended(
    block_indices: torch.Tensor, queries: slice, keys: slice, block_size: int, q_heads_per_kv: int
) -> torch.Tensor:
    """Which keys of its sequence each query head attends to: bool (len_q, H_q, len_k)."""
    len_k = keys.stop - keys.start
    block_size = bounded_block_size(block_size, len_k)
    num_blocks = -(-len_k // block_size)
    position = _positions(queries, keys, block_indices.device)[:, None, None]
    # Ids that name no block of this sequence go to an extra column that is dropped.
    block = block_indices[queries].long()
    block = block.masked_fill((block < 0) | (block >= num_blocks), num_blocks)
    chosen = torch.zeros((*block.shape[:2], num_blocks + 1), dtype=torch.bool, device=block.device)
    chosen = chosen.scatter(-1, block, True)
    attended = chosen[..., :num_blocks].repeat_interleave(block_size, dim=-1)[..., :len_k]
    attended = attended & (torch.arange(len_k, device=block.device) <= position)
    return attended.repeat_interleave(q_heads_per_kv, dim=1)


# --- the indexer's loss ------------------------------------------------------------------------------------------


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
    return _joined(kls, no_kl), _joined(index_lses, no_lse)


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
        return scores, _attended(args.block_indices, queries, keys, args.block_size, q_heads_per_kv=1)
    position = _positions(queries, keys, query.device)[:, None]
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


# --- block lists by position -------------------------------------------------------------------------------------


# Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words, a function of the counter's four words and the key's two."""
    words, mask = counter, 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = (
            (second >> 32) ^ words[1] ^ key[0],
            second & mask,
            (first >> 32) ^ words[3] ^ key[1],
            first & mask,
        )
        key = ((key[0] + PHILOX_KEY_STEPS[0]) & mask, (key[1] + PHILOX_KEY_STEPS[1]) & mask)
    return words


def structured_block_list(
    block: int,
    head: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
) -> list[int]:
    """The key blocks of every query in `block`, for one key/value head of one layer, ascending."""
    width = local_blocks + anchor_blocks + random_blocks
    if block + 1 <= width:
        return list(range(block + 1))
    listed = {max(block - i, 0) for i in range(local_blocks)}
    if anchor_blocks > 0:
        stride = anchor_stride
        while block // stride + 1 > anchor_blocks:
            stride *= 2
        listed |= set(range(0, block + 1, stride))

    # Floyd's sampling fills the remaining places from the n blocks that are not listed, in id order. Draw d takes a
    # number below n - places + d + 1. If an earlier draw took that number, draw d takes n - places + d instead. A
    # 32-bit word w becomes a number below m as the upper half of w * m.
    unlisted = [other for other in range(block + 1) if other not in listed]
    places = width - len(listed)
    drawn: set[int] = set()
    for draw in range(places):
        bound = len(unlisted) - places + draw + 1
        word = philox((layer_idx, head, block, draw), (seed & 0xFFFFFFFF, seed >> 32))[0]
        number = (word * bound) >> 32
        drawn.add(bound - 1 if number in drawn else number)
    return sorted(listed | {unlisted[number] for number in drawn})


def structured_blocks_of(args: StructuredBlocksArgs) -> torch.Tensor:
    """Key blocks chosen by position alone: int32 (..., H_kv, width), ascending ids, -1 after the last."""
    own_block, num_kv_heads = args.own_block, args.num_kv_heads
    rows = []
    for block in own_block.flatten().tolist():
        for head in range(num_kv_heads):
            listed = structured_block_list(
                block, head, args.layer_idx, args.local_blocks, args.anchor_blocks, args.anchor_stride,
                args.random_blocks, args.seed % 2**64,
            )  # fmt: skip
            rows.append(listed + [-1] * (args.width - len(listed)))
    lists = torch.tensor(rows, dtype=torch.int32, device=own_block.device)
    return lists.view(*own_block.shape, num_kv_heads, args.width)
