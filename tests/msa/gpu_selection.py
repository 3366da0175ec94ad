"""Checks of a selection on a GPU, for many queries at a time."""

import math

import torch

from .comparison import SELECTION_RTOL
from .loops import varlen_sequences


def exact_block_scores(case, block_size):
    """Exact block scores of each sequence that has queries, and how far a kernel's scores may lie from them.

    Returns:
        A list of (slice of the queries, own blocks (len_q, 1, 1), scores (len_q, H_idx, N), -inf in the future,
        tolerance (len_q, H_idx, 1)).
    """
    found = []
    for queries, keys in varlen_sequences(*case.lengths.values()):
        if queries.start == queries.stop:
            continue
        query, key = case.index_query[queries].double(), case.index_key[keys].double()
        position = torch.arange(len(key) - len(query), len(key), device="cuda")[:, None, None]
        future = torch.arange(len(key), device="cuda") > position
        scores = torch.einsum("qhd,kd->qhk", query, key).masked_fill_(future, -math.inf)
        magnitude = torch.einsum("qhd,kd->qhk", query.abs(), key.abs()).masked_fill_(future, 0.0)
        tolerance = SELECTION_RTOL * magnitude.amax(-1, keepdim=True)
        del magnitude
        scores = torch.nn.functional.pad(scores, (0, -len(key) % block_size), value=-math.inf)
        found.append((queries, position // block_size, scores.unflatten(-1, (-1, block_size)).amax(-1), tolerance))
    return found


def assert_selection(selected, case, exact, topk, local_blocks, init_blocks):
    """Every chosen block scores at least the kth best and every omitted one at most that, up to rounding.

    `exact` is the result of `exact_block_scores`.
    """
    assert selected.shape == (*case.index_query.shape[:2], topk)
    assert selected.dtype == torch.int32
    wrong = torch.zeros(6, dtype=torch.bool, device="cuda")  # read once, as reading waits for the device
    for queries, own_block, scores, tolerance in exact:
        ids, num_blocks = selected[queries].long(), scores.shape[-1]
        # Ids that are no block's go to an extra column: -1, which is none, and the rest, which are wrong.
        outside = (ids < -1) | (ids >= num_blocks)
        chosen = torch.zeros((*ids.shape[:2], num_blocks + 1), dtype=torch.int64, device="cuda")
        chosen.scatter_add_(-1, ids.masked_fill(outside | (ids < 0), num_blocks), torch.ones_like(ids))
        chosen = chosen[..., :num_blocks]
        block = torch.arange(num_blocks, device="cuda")
        visible = (block <= own_block).expand_as(chosen)
        count = visible.sum(-1, keepdim=True).clamp(max=topk)
        forced = visible & ((block < init_blocks) | (block > own_block - local_blocks))
        others = scores.masked_fill(forced | ~visible, -math.inf)
        free = (count - forced.sum(-1, keepdim=True)).clamp(min=0)
        ranked = others.sort(-1, descending=True).values
        kth = ranked.gather(-1, (free - 1).clamp(min=0)).masked_fill(free == 0, math.inf)
        chosen, once_each = chosen.bool(), chosen <= 1
        left_out = visible & ~forced & ~chosen
        wrong |= torch.stack(
            [
                ~once_each.all(),
                outside.any() | (chosen & ~visible).any(),
                ((ids >= 0) != (torch.arange(topk, device="cuda") < count)).any(),
                (forced & ~chosen).any(),
                (chosen & ~forced & ~(others >= kth - tolerance)).any(),
                (left_out & ~(others <= kth + tolerance)).any(),
            ]
        )
    faults = (
        "a block twice", "a block in the future or none at all", "not left-packed, or not as many as there are",
        "a forced block is missing", "a block below the kth best", "a better block was left out",
    )  # fmt: skip
    assert not [fault for fault, found in zip(faults, wrong.tolist()) if found]
