"""Naive MiniMax Sparse Attention: the definition, for reading and for truth.

Every function loops over the sequences of a batch and builds the full query x key score matrix of each, so memory is
quadratic. Half precision inputs are computed in float32, float64 stays
float64.

Dimension legend (see README.md): total_q, total_k tokens of all sequences; Lq, Lk tokens of one sequence; H_idx index
heads, equal to H_kv key/value heads; H_q query heads; G = H_q / H_kv; D head_dim; N key blocks of one sequence.
"""

import torch

from .sequences import bounded_block_size, cached_sequences, compute_dtype, packed_sequences


def _positions(queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
    """Positions of a sequence's queries, which are its last tokens: (Lq,)."""
    len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
    return torch.arange(len_k - len_q, len_k, device=device)


def select_blocks(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """The key blocks that each query attends to: int32 (total_q, H_idx, topk), -1 where fewer are visible."""
    device, dtype = index_query.device, compute_dtype(index_query)
    selected = torch.full((*index_query.shape[:2], topk), -1, dtype=torch.int32, device=device)
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        len_k = keys.stop - keys.start
        size = bounded_block_size(block_size, len_k)
        num_blocks = -(-len_k // size)
        position = _positions(queries, keys, device)[:, None, None]  # (Lq, 1, 1)

        scores = torch.einsum("qhd,kd->qhk", index_query[queries].to(dtype), index_key[keys].to(dtype))
        scores = scores.masked_fill(torch.arange(len_k, device=device) > position, float("-inf"))
        scores = torch.nn.functional.pad(scores, (0, num_blocks * size - len_k), value=float("-inf"))
        block_scores = scores.unflatten(-1, (num_blocks, size)).amax(-1)  # (Lq, H_idx, N)

        own_block = position // size
        block = torch.arange(num_blocks, device=device)
        visible = block <= own_block
        forced = (block < init_blocks) | (block > own_block - local_blocks)

        # Stable sorts: by score, NaN first, ties to the lower block id; then by what comes before any score.
        best = block_scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.where(visible, torch.where(forced, 0, 1), 2).expand_as(best)
        best = best.gather(-1, rank.gather(-1, best).sort(dim=-1, stable=True).indices)[..., :topk]
        best = best.masked_fill(best > own_block, -1)
        selected[queries, :, : best.shape[-1]] = best.to(torch.int32)
    return selected


def _packed(parts: list[torch.Tensor], rest: torch.Tensor) -> torch.Tensor:
    """The rows of the sequences, one after the other; those that belong to no sequence as in `rest`, which has all."""
    return torch.cat([*parts, rest[sum(map(len, parts)) :]])


def _attended(block_indices: torch.Tensor, queries: slice, keys: slice, block_size: int, group: int) -> torch.Tensor:
    """Which keys of its sequence each query head attends to: bool (Lq, H_q, Lk)."""
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
    return attended.repeat_interleave(group, dim=1)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal softmax attention over the listed blocks: out like `query`, lse (total_q, H_q), natural log."""
    dtype = compute_dtype(query)
    group = query.shape[1] // key.shape[1]
    out, lse = [], []
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        attended = _attended(block_indices, queries, keys, block_size, group)
        keys_of_heads = key[keys].to(dtype).repeat_interleave(group, dim=1)
        values_of_heads = value[keys].to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->qhk", query[queries].to(dtype), keys_of_heads) * softmax_scale
        # A finite fill, because the softmax of a row of -inf would be NaN.
        weights = scores.masked_fill(~attended, torch.finfo(dtype).min).softmax(-1) * attended
        out.append(torch.einsum("qhk,khd->qhd", weights, values_of_heads))
        lse.append(scores.detach().masked_fill(~attended, float("-inf")).logsumexp(-1))
    no_out = query.new_zeros((query.shape[0], query.shape[1], value.shape[-1]), dtype=dtype)
    no_lse = query.new_full(query.shape[:2], float("-inf"), dtype=dtype)
    return _packed(out, no_out).to(query.dtype), _packed(lse, no_lse)


def block_sparse_attention_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, by the chain rule through `block_sparse_attention`."""
    dtype = compute_dtype(query)
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads
    grads = [torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in (query, key, value)]
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        attended = _attended(block_indices, queries, keys, block_size, group)
        query_rows, grad_rows = query[queries].to(dtype), grad_out[queries].to(dtype)
        keys_of_heads = key[keys].to(dtype).repeat_interleave(group, dim=1)
        values_of_heads = value[keys].to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->qhk", query_rows, keys_of_heads) * softmax_scale
        weights = scores.masked_fill(~attended, torch.finfo(dtype).min).softmax(-1) * attended

        grad_weights = torch.einsum("qhd,khd->qhk", grad_rows, values_of_heads)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * softmax_scale
        grads[0][queries] = torch.einsum("qhk,khd->qhd", grad_scores, keys_of_heads)
        # A key/value head collects the gradients of the query heads that share it.
        grad_key = torch.einsum("qhk,qhd->khd", grad_scores, query_rows)
        grad_value = torch.einsum("qhk,qhd->khd", weights, grad_rows)
        grads[1][keys] = grad_key.unflatten(1, (num_kv_heads, group)).sum(2)
        grads[2][keys] = grad_value.unflatten(1, (num_kv_heads, group)).sum(2)
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, (query, key, value)))


def _attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    queries: slice,
    keys: slice,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled scores (Lq, H_kv, G, Lk) of one sequence, and which keys each group attends to: bool (Lq, H_kv, Lk)."""
    dtype = compute_dtype(query)
    query_rows = query[queries].to(dtype).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("qhgd,khd->qhgk", query_rows, key[keys].to(dtype)) * softmax_scale
    if block_indices is not None:
        return scores, _attended(block_indices, queries, keys, block_size, group=1)
    position = _positions(queries, keys, query.device)[:, None]
    causal = torch.arange(keys.stop - keys.start, device=query.device) <= position
    return scores, causal.unsqueeze(1).expand(-1, key.shape[1], -1)


def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Log-sum-exp (total_q, H_q) of the scores of the listed blocks, or of all keys s <= t for None; natural log."""
    lse = torch.full(query.shape[:2], float("-inf"), dtype=compute_dtype(query), device=query.device)
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        scores, attended = _attention_scores(query, key, block_indices, queries, keys, block_size, softmax_scale)
        lse[queries] = scores.masked_fill(~attended.unsqueeze(2), float("-inf")).logsumexp(-1).flatten(1)
    return lse


def _teacher_and_student(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    queries: slice,
    keys: slice,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one sequence: the main attention's mean probabilities p, 0 where not attended; the scaled index scores; and
    which keys are attended to. All (Lq, H_idx, Lk)."""
    scores, attended = _attention_scores(query, key, block_indices, queries, keys, block_size, softmax_scale)
    grouped_lse = lse[queries].to(scores.dtype).unflatten(1, (key.shape[1], -1))
    # Masked before exp: an empty row's lse is -inf, and its differences would be NaN or inf.
    probs = (scores - grouped_lse.unsqueeze(-1)).masked_fill(~attended.unsqueeze(2), float("-inf")).exp().mean(2)
    index_rows = index_query[queries].to(scores.dtype)
    index_scores = torch.einsum("qhd,kd->qhk", index_rows, index_key[keys].to(scores.dtype)) * index_scale
    return probs, index_scores, attended


def indexer_kl_loss(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence (total_q, H_idx) of the index softmax from the main attention's mean over each group, over the
    listed blocks, or all keys s <= t for None; and the log-sum-exp (total_q, H_idx) of the index scores."""
    dtype = compute_dtype(index_query)
    kl, index_lse = [], []
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        probs, index_scores, attended = _teacher_and_student(
            index_query, index_key, query, key, lse, block_indices, queries, keys, block_size, softmax_scale,
            index_scale,
        )  # fmt: skip
        # A finite fill, because the softmax of a row of -inf would be NaN, and so would its derivatives.
        log_r = index_scores.masked_fill(~attended, torch.finfo(dtype).min).log_softmax(-1)
        # Keys that are not attended have p = 0 and add nothing; so do probabilities that underflow.
        kl.append((torch.xlogy(probs, probs) - probs * log_r).sum(-1))
        index_lse.append(index_scores.detach().masked_fill(~attended, float("-inf")).logsumexp(-1))
    no_kl = index_query.new_zeros(index_query.shape[:2], dtype=dtype)
    no_lse = index_query.new_full(index_query.shape[:2], float("-inf"), dtype=dtype)
    return _packed(kl, no_kl), _packed(index_lse, no_lse)


def indexer_kl_loss_backward(
    grad_kl: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    index_lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of index_query and index_key: r - p is that of the scaled index scores."""
    dtype = compute_dtype(index_query)
    grad_index_query = torch.zeros(index_query.shape, dtype=dtype, device=index_query.device)
    grad_index_key = torch.zeros(index_key.shape, dtype=dtype, device=index_key.device)
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        probs, index_scores, attended = _teacher_and_student(
            index_query, index_key, query, key, lse, block_indices, queries, keys, block_size, softmax_scale,
            index_scale,
        )  # fmt: skip
        index_probs = (index_scores - index_lse[queries].unsqueeze(-1)).exp().masked_fill(~attended, 0.0)
        grad_scores = (index_probs - probs) * grad_kl[queries].unsqueeze(-1).to(dtype) * index_scale
        grad_index_query[queries] = torch.einsum("qhk,kd->qhd", grad_scores, index_key[keys].to(dtype))
        grad_index_key[keys] = torch.einsum("qhk,qhd->kd", grad_scores, index_query[queries].to(dtype))
    return grad_index_query.to(index_query.dtype), grad_index_key.to(index_key.dtype)


def select_blocks_with_kvcache(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """`select_blocks` for the last T tokens of each cached row: int32 (B, T, H_idx, topk)."""
    num_new = index_query.shape[1]
    selected = torch.full((*index_query.shape[:3], topk), -1, dtype=torch.int32, device=index_query.device)
    rows = cached_sequences((index_key_cache,), num_new, cache_seqlens, cache_leftpad, block_table)
    for row, padding, (index_key,) in rows:
        cu_seqlens_q = torch.tensor([0, num_new - padding], dtype=torch.int32, device=index_query.device)
        cu_seqlens_k = torch.tensor([0, len(index_key)], dtype=torch.int32, device=index_query.device)
        selected[row, padding:] = select_blocks(
            index_query[row, padding:], index_key, cu_seqlens_q, cu_seqlens_k, block_size, topk, local_blocks,
            init_blocks,
        )  # fmt: skip
    return selected


def block_sparse_attention_with_kvcache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """`block_sparse_attention` for the last T tokens of each cached row: (B, T, H_q, D)."""
    num_new = query.shape[1]
    out = torch.zeros((*query.shape[:3], value_cache.shape[-1]), dtype=query.dtype, device=query.device)
    rows = cached_sequences((key_cache, value_cache), num_new, cache_seqlens, cache_leftpad, block_table)
    for row, padding, (key, value) in rows:
        cu_seqlens_q = torch.tensor([0, num_new - padding], dtype=torch.int32, device=query.device)
        cu_seqlens_k = torch.tensor([0, len(key)], dtype=torch.int32, device=query.device)
        out[row, padding:], _ = block_sparse_attention(
            query[row, padding:], key, value, block_indices[row, padding:], cu_seqlens_q, cu_seqlens_k, block_size,
            softmax_scale,
        )  # fmt: skip
    return out


# Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words that depend on the four words of the counter and the two of the key only."""
    words, mask = counter, 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = (
            (second >> 32) ^ words[1] ^ key[0],
            second & mask,
            (first >> 32) ^ words[3] ^ key[1],
            first & mask,
        )
        key = tuple((k + step) & mask for k, step in zip(key, PHILOX_KEY_STEPS))
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

    # Floyd's sampling of the remaining places among the n blocks that are not listed, in id order. Draw d of them takes
    # a number below n - places + d + 1, or the largest such number where the draw was taken before. A 32-bit word w
    # becomes a number below m as the upper half of w * m.
    unlisted = [other for other in range(block + 1) if other not in listed]
    places = width - len(listed)
    drawn = set()
    for draw in range(places):
        bound = len(unlisted) - places + draw + 1
        word = philox((layer_idx, head, block, draw), (seed & 0xFFFFFFFF, seed >> 32))[0]
        number = (word * bound) >> 32
        drawn.add(bound - 1 if number in drawn else number)
    return sorted(listed | {unlisted[number] for number in drawn})


def structured_blocks_of(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
) -> torch.Tensor:
    """Key blocks chosen by position alone, for queries in `own_block` (...): int32 (..., num_kv_heads, width),
    ascending, -1 after the last. `seed` may be that of `structured_block_list` minus 2**64, to fit 64 signed bits."""
    width = local_blocks + anchor_blocks + random_blocks
    pattern = (layer_idx, local_blocks, anchor_blocks, anchor_stride, random_blocks, seed % 2**64)
    rows = []
    for block in own_block.flatten().tolist():
        for head in range(num_kv_heads):
            listed = structured_block_list(block, head, *pattern)
            rows.append(listed + [-1] * (width - len(listed)))
    lists = torch.tensor(rows, dtype=torch.int32, device=own_block.device)
    return lists.view(*own_block.shape, num_kv_heads, width)
