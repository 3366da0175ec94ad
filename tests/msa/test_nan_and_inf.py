"""NaN and inf in the operators' inputs: results are the same on every backend, and show the NaN."""

import math

import pytest
import torch

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    select_blocks,
    select_blocks_with_kvcache,
)

BACKENDS = ("reference", "torch")
BLOCK_SIZE = 4
NAN, INF = math.nan, math.inf


def ranked(query, keys, position, topk, local_blocks, init_blocks):
    """The list of one row, sorted, by the words of the README."""
    if position < 0:
        return [-1] * topk
    own = position // BLOCK_SIZE
    scores = {}
    for key in range(position + 1):
        product = (query * keys[key]).sum().item()
        block = key // BLOCK_SIZE
        best = scores.get(block, -INF)
        scores[block] = NAN if math.isnan(product) or math.isnan(best) else max(product, best)

    def rank(block):
        is_forced = block < init_blocks or block > own - local_blocks
        score = scores[block]
        return (not is_forced, not math.isnan(score), 0.0 if math.isnan(score) else -score, block)

    chosen = sorted(sorted(scores, key=rank)[:topk])
    return chosen + [-1] * (topk - len(chosen))


def left_packed(ids):
    """Rows in ascending order, -1 last, as `ranked` gives them."""
    return (
        torch.where(ids < 0, 2**31 - 1, ids).sort(-1).values.masked_fill_(ids.sort(-1, descending=True).values < 0, -1)
    )


def spoil(case, what):
    """Puts NaN or inf among index queries and keys of 20 and 9 tokens."""
    query, key = case.index_query, case.index_key
    if what == "NaN in a key":
        key[6, 1] = NAN
    elif what == "NaN in the keys of some blocks":
        key[4:8] = NAN
        key[9, 0] = -NAN
        key[17] = NAN
    elif what == "NaN in every key":
        key[:] = NAN
    elif what == "NaN in a query":
        query[11, 1, 0] = NAN
        query[25] = NAN
    elif what == "inf in a key":
        key[6, 1] = INF
        key[13] = INF
        key[22, 0] = -INF
    elif what == "scores of -inf":
        query[:] = 1.0
        key[:] = -INF
    elif what == "scores of inf":
        query[:] = 1.0
        key[:14] = INF
        key[21] = INF
    elif what == "inf in a query":
        query[11, 1, 0] = INF
        query[19] = -INF
    return case


SPOILT = (
    "NaN in a key", "NaN in the keys of some blocks", "NaN in every key", "NaN in a query", "inf in a key",
    "scores of -inf", "scores of inf", "inf in a query",
)  # fmt: skip
FORCED = [(1, 0), (0, 0), (1, 1), (2, 1), (0, 3)]  # local_blocks, init_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("local_blocks", "init_blocks"), FORCED)
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_stay_full_and_nan_wins(inputs, backend, what, local_blocks, init_blocks, dtype):
    case = inputs.make_varlen([20, 9], [20, 7], block_size=BLOCK_SIZE, index_dim=4, dtype=dtype)
    spoil(case, what)
    options = {"topk": 3, "local_blocks": local_blocks, "init_blocks": init_blocks}
    ids = select_blocks(
        case.index_query, case.index_key, **case.lengths, block_size=BLOCK_SIZE, **options, backend=backend
    )
    row = 0
    for queries, keys in ((slice(0, 20), slice(0, 20)), (slice(20, 27), slice(20, 29))):
        own_keys, past = case.index_key[keys].double(), keys.stop - keys.start - (queries.stop - queries.start)
        for i, heads in enumerate(case.index_query[queries].double()):
            expected = [ranked(head, own_keys, past + i, **options) for head in heads]
            assert left_packed(ids[row]).tolist() == expected, f"row {row}"
            row += 1


@pytest.mark.parametrize("num_new", [1, 3, 18])
@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize("what", ["NaN in a key", "NaN in a query", "scores of -inf", "scores of inf"])
def test_lists_from_a_cache(inputs, what, form, num_new):
    case = inputs.make_cached([20, 9], num_new, leftpad=[0, 3], block_size=BLOCK_SIZE, page_size=4, index_dim=4)
    cache = getattr(case, form)["index_key"]
    if what == "NaN in a key":
        cache[0, 2] = NAN
    elif what == "NaN in a query":
        case.index_query[:, -1, 1] = NAN
    else:
        case.index_query.fill_(1.0)
        cache.masked_fill_(cache < 0, INF if what == "scores of inf" else -INF)
    args, options = case.selection(form)
    found = {backend: select_blocks_with_kvcache(*args, **options, backend=backend) for backend in BACKENDS}
    assert torch.equal(*(left_packed(ids) for ids in found.values()))
    lengths = torch.tensor([20, 9])
    positions = lengths[:, None] - num_new + torch.arange(num_new)
    visible = torch.div(positions, BLOCK_SIZE, rounding_mode="floor") + 1
    expected = visible.clamp(0, options["topk"])[..., None].expand(found["torch"].shape[:-1])
    assert torch.equal((found["torch"] >= 0).sum(-1), expected), "a list is not full"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_nan_reaches_all_that_see_it(inputs, backend):
    """As in dense attention. Other sequences are as they were."""
    case = inputs.make_varlen([40, 24], block_size=BLOCK_SIZE, topk=2, local_blocks=1)
    clean = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options)
    expected = block_sparse_attention(*case.qkv, clean, **case.lengths, block_size=BLOCK_SIZE)
    for states in (case.index_query, case.index_key, *case.qkv):
        states[6] = NAN
    ids = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    out = block_sparse_attention(*case.qkv, ids, **case.lengths, block_size=BLOCK_SIZE, backend=backend)
    assert out[6:40].isnan().all()
    assert inputs.relative_error(out[40:], expected[40:]) < 1e-5


@pytest.mark.parametrize("over", ["blocks", "all keys"])
@pytest.mark.parametrize("name", ["index_query", "index_key", "query", "key"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_loss(inputs, backend, name, over):
    """Every row that attends to it is NaN and so is the row's gradient; other sequences are as they were."""
    case = inputs.make_varlen([20, 9], block_size=BLOCK_SIZE, dtype=torch.float64)
    own_block = torch.cat([torch.arange(20), torch.arange(9)]) // BLOCK_SIZE
    # Its own block and the one of token 7, or that alone.
    ids = torch.stack([own_block, torch.where(own_block > 1, 1, -1)], dim=-1).int()[:, None].expand(-1, 2, -1)
    ids = None if over == "all keys" else ids

    def loss_and_gradients():
        states = [getattr(case, key) for key in ("index_query", "index_key", "query", "key")]
        leaves = [state.clone().requires_grad_() for state in states[:2]]
        kl = indexer_kl_loss(*leaves, *states[2:], ids, **case.lengths, block_size=BLOCK_SIZE, backend=backend)
        return kl, *torch.autograd.grad(kl.sum(), leaves)

    before = loss_and_gradients()
    getattr(case, name)[7] = NAN
    after = loss_and_gradients()
    rows = slice(7, 8) if name.endswith("query") else slice(7, 20)
    assert after[0][rows].isnan().all()
    assert after[1][rows].isnan().all()
    for found, expected in zip(after, before):
        assert torch.equal(found[20:], expected[20:])


@pytest.mark.parametrize("form", ["contiguous", "paged"])
def test_nan_in_cached_attention(inputs, form):
    case = inputs.make_cached([20, 9], 2, block_size=BLOCK_SIZE)
    case.query[0, 1, 3] = NAN
    args, options = case.attention(form, torch.zeros(2, 2, 2, 1, dtype=torch.int32))
    for backend in BACKENDS:
        is_nan = block_sparse_attention_with_kvcache(*args, **options, backend=backend).isnan()
        assert is_nan[0, 1, 3].all(), backend
        assert is_nan.sum() == is_nan[0, 1, 3].numel(), backend
