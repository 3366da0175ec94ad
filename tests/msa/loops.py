"""What the operators mean, in plain loops and dicts: a second reference, independent of `msa.reference`.

Everything here handles one row (a query and a head) at a time, in float64, and calls no operator.
"""

import math

import torch

from .comparison import SELECTION_RTOL

# --- one row: a query and a head ---------------------------------------------------------------------------------


def block_scores(query, keys, position, block_size):
    """Largest dot product of `query` (D,) with each block's keys s <= position, as {block id: score}."""
    scores = {}
    for s, product in enumerate((keys[: position + 1].double() @ query.double()).tolist()):
        block = s // block_size
        scores[block] = max(scores.get(block, -math.inf), product)
    return scores


def forced_blocks(position, block_size, local_blocks, init_blocks):
    """Ids of the blocks that are selected whatever their score, among those the query can see."""
    own = position // block_size
    local = {own - i for i in range(local_blocks)}
    initial = set(range(init_blocks))
    return {block for block in local | initial if 0 <= block <= own}


def best_others(scores, forced, topk):
    """Ids of the best-scoring blocks that are not forced, as many as `topk` leaves, ties to the lower id."""
    others = sorted((block for block in scores if block not in forced), key=lambda block: (-scores[block], block))
    return others[: max(topk - len(forced), 0)]


def select_row(query, keys, position, *, block_size, topk, local_blocks, init_blocks):
    if position < 0:
        return set()
    forced = forced_blocks(position, block_size, local_blocks, init_blocks)
    return forced | set(best_others(block_scores(query, keys, position, block_size), forced, topk))


def check_selected_row(ids, query, keys, position, *, block_size, topk, local_blocks, init_blocks, where):
    """Asserts that `ids`, a row as the operator returned it, is a correct selection up to rounding of the scores."""
    chosen = [block for block in ids if block != -1]
    assert ids == chosen + [-1] * (topk - len(chosen)), f"{where}: not left-packed: {ids}"
    if position < 0:
        assert not chosen, f"{where}: a padding query selected {chosen}"
        return
    assert len(set(chosen)) == len(chosen), f"{where}: duplicates in {ids}"
    scores = block_scores(query, keys, position, block_size)
    assert set(chosen) <= set(scores), f"{where}: {ids} are not all visible from position {position}"
    assert len(chosen) == min(topk, len(scores)), f"{where}: {len(chosen)} of {len(scores)} blocks, topk {topk}"
    forced = forced_blocks(position, block_size, local_blocks, init_blocks)
    assert forced <= set(chosen), f"{where}: forced {forced} not all in {ids}"
    best = best_others(scores, forced, topk)
    if not best:
        return
    kth = scores[best[-1]]
    tolerance = SELECTION_RTOL * (keys[: position + 1].double() * query.double()).abs().sum(-1).max().item()
    for block, score in scores.items():
        if block in forced:
            continue
        if block in chosen:
            assert score >= kth - tolerance, f"{where}: chose block {block} at {score}, kth best is {kth}"
        else:
            assert score <= kth + tolerance, f"{where}: left out block {block} at {score}, kth best is {kth}"


def attend_row(query, keys, values, blocks, position, block_size, scale):
    """Softmax attention of `query` (D,) to the keys s <= position of `blocks`: out (D_v,) and the log-sum-exp."""
    attended = []
    for block in blocks:
        if block >= 0:
            attended += range(block * block_size, min((block + 1) * block_size, position + 1, len(keys)))
    if not attended:
        return torch.zeros(values.shape[-1], dtype=torch.float64), -math.inf
    logits = scale * (keys[attended].double() @ query.double())
    largest = logits.max()
    weights = (logits - largest).exp()
    return weights @ values[attended].double() / weights.sum(), (largest + weights.sum().log()).item()


# --- sequences, from the variable-length form and from caches ---------------------------------------------------


def varlen_sequences(cu_seqlens_q, cu_seqlens_k):
    """Yields (slice of the queries, slice of the keys) for each sequence."""
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for sequence in range(len(offsets_q) - 1):
        yield (
            slice(offsets_q[sequence], offsets_q[sequence + 1]),
            slice(offsets_k[sequence], offsets_k[sequence + 1]),
        )


def cache_rows(cache, cache_seqlens, cache_leftpad=None, block_table=None):
    """Lists each row's own tokens, in order, gathered slot by slot from a contiguous or paged cache."""
    rows = []
    for row, used in enumerate(cache_seqlens.tolist()):
        first = 0 if cache_leftpad is None else int(cache_leftpad[row])
        tokens = []
        for slot in range(first, used):
            if block_table is None:
                tokens.append(cache[row, slot])
            else:
                page_size = cache.shape[1]
                tokens.append(cache[int(block_table[row, slot // page_size]), slot % page_size])
        rows.append(torch.stack(tokens) if tokens else cache.new_zeros(0, *cache.shape[2:]))
    return rows


def check_selection(block_indices, index_query, index_key, *, cu_seqlens_q, cu_seqlens_k, **options):
    assert block_indices.dtype == torch.int32
    assert block_indices.shape == (*index_query.shape[:2], options["topk"])
    for sequence, (queries, keys) in enumerate(varlen_sequences(cu_seqlens_q, cu_seqlens_k)):
        own_queries, own_keys = index_query[queries], index_key[keys]
        for i in range(len(own_queries)):
            for head in range(index_query.shape[1]):
                check_selected_row(
                    block_indices[queries][i, head].tolist(),
                    own_queries[i, head],
                    own_keys,
                    len(own_keys) - len(own_queries) + i,
                    where=f"sequence {sequence}, query {i}, head {head}",
                    **options,
                )


def check_selection_with_kvcache(
    block_indices, index_query, index_key_cache, *, cache_seqlens, cache_leftpad=None, block_table=None, **options
):
    assert block_indices.dtype == torch.int32
    assert block_indices.shape == (*index_query.shape[:3], options["topk"])
    for row, keys in enumerate(cache_rows(index_key_cache, cache_seqlens, cache_leftpad, block_table)):
        num_queries = index_query.shape[1]
        for i in range(num_queries):
            for head in range(index_query.shape[2]):
                check_selected_row(
                    block_indices[row, i, head].tolist(),
                    index_query[row, i, head],
                    keys,
                    len(keys) - num_queries + i,
                    where=f"row {row}, query {i}, head {head}",
                    **options,
                )


def selected_sets(index_query, index_key, *, cu_seqlens_q, cu_seqlens_k, **options):
    """The exact selection in float64, as a list over queries of a list over heads of sets of ids."""
    selected = []
    for queries, keys in varlen_sequences(cu_seqlens_q, cu_seqlens_k):
        own_queries, own_keys = index_query[queries], index_key[keys]
        for i, heads in enumerate(own_queries):
            position = len(own_keys) - len(own_queries) + i
            selected.append([select_row(head, own_keys, position, **options) for head in heads])
    return selected


def attend(query, key, value, block_indices, *, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale=None):
    """Block-sparse attention in float64: out (total_q, H_q, D_v), lse (total_q, H_q)."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_heads_per_kv = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(query.shape[:2], dtype=torch.float64)
    for queries, keys in varlen_sequences(cu_seqlens_q, cu_seqlens_k):
        own_keys, own_values = key[keys], value[keys]
        offset = len(own_keys) - (queries.stop - queries.start)
        for i in range(queries.start, queries.stop):
            for head in range(query.shape[1]):
                kv_head = head // q_heads_per_kv
                out[i, head], lse[i, head] = attend_row(
                    query[i, head],
                    own_keys[:, kv_head],
                    own_values[:, kv_head],
                    block_indices[i, kv_head].tolist(),
                    offset + i - queries.start,
                    block_size,
                    scale,
                )
    return out, lse


def attend_with_kvcache(
    query,
    key_cache,
    value_cache,
    block_indices,
    *,
    cache_seqlens,
    cache_leftpad=None,
    block_table=None,
    block_size,
    softmax_scale=None,
):
    """Block-sparse attention of the newest T tokens of each row, in float64: out (B, T, H_q, D_v)."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_heads_per_kv = query.shape[2] // key_cache.shape[2]
    out = torch.zeros(*query.shape[:3], value_cache.shape[-1], dtype=torch.float64)
    all_keys = cache_rows(key_cache, cache_seqlens, cache_leftpad, block_table)
    all_values = cache_rows(value_cache, cache_seqlens, cache_leftpad, block_table)
    for row, (keys, values) in enumerate(zip(all_keys, all_values)):
        for i in range(query.shape[1]):
            for head in range(query.shape[2]):
                kv_head = head // q_heads_per_kv
                out[row, i, head], _ = attend_row(
                    query[row, i, head],
                    keys[:, kv_head],
                    values[:, kv_head],
                    block_indices[row, i, kv_head].tolist(),
                    len(keys) - query.shape[1] + i,
                    block_size,
                    scale,
                )
    return out
