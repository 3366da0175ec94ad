"""NaN and inf in the inputs of the compiled kernels: the lists of the definition, and NaN in all that attends to it.

Queries and keys are small integers, so that every other score is exact in every arithmetic.
"""

import math
from functools import partial

import pytest
import torch

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    select_blocks,
    select_blocks_with_kvcache,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

NAN, INF = math.nan, math.inf
FORCED = [(1, 0), (0, 0), (2, 1)]  # local_blocks, init_blocks


def integers(*shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to("cuda", dtype)


def spoil(query, key, what):
    """Changes `query` (tokens, heads, D) and `key` (tokens, D) of some hundred tokens in place."""
    last = len(query) - 1
    if what == "NaN in a key":
        key[300, 5] = NAN
    elif what == "NaN in all keys of two blocks":
        key[256:384] = NAN
        key[512:640] = -NAN
    elif what == "NaN in every key":
        key.fill_(NAN)
    elif what == "NaN in a query":
        query[last, 1, 0] = NAN
        query[last // 2] = NAN
    elif what == "inf in a key":
        key[130, 1] = INF
        key[700, 2] = -INF
    elif what == "scores of inf":
        query.fill_(1.0)
        key[140:600] = INF
    elif what == "scores of -inf":
        query.fill_(1.0)
        key.fill_(-INF)


SPOILT = (
    "NaN in a key", "NaN in all keys of two blocks", "NaN in every key", "NaN in a query", "inf in a key",
    "scores of inf", "scores of -inf",
)  # fmt: skip


def assert_same_lists(found, expected):
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize(("local_blocks", "init_blocks"), FORCED)
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [(torch.bfloat16, 128, 128), (torch.float16, 64, 64)],
    ids=["released", "other"],
)
def test_lists(kernels, gpu, dtype, head_dim, block_size, what, local_blocks, init_blocks):
    query, key = integers(900, 4, head_dim, dtype=dtype), integers(900, head_dim, dtype=dtype)
    other_query, other_key = query[:400].clone(), key[:450].clone()
    spoil(query, key, what)
    query, key = torch.cat([query, other_query]), torch.cat([key, other_key])
    offsets = gpu.offsets([900, 400]), gpu.offsets([900, 450])
    options = {"block_size": block_size, "topk": 4, "local_blocks": local_blocks, "init_blocks": init_blocks}
    select = partial(select_blocks, query, key, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], **options)
    assert_same_lists(select(backend="cuda"), select(backend="reference"))


@pytest.mark.parametrize("num_new", [1, 3, 20])
@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize("what", SPOILT)
def test_lists_from_a_cache(kernels, what, form, num_new):
    query, cache = integers(2, num_new, 4, 128, dtype=torch.bfloat16), integers(2, 1024, 128, dtype=torch.bfloat16)
    for row in range(2):
        spoil(query[row], cache[row], what)
    cache_seqlens = torch.tensor([1000, 777], dtype=torch.int32, device="cuda")
    cache_leftpad, block_table = torch.tensor([0, 60], dtype=torch.int32, device="cuda"), None
    if form == "paged":
        cache = cache.view(16, 128, 128)
        block_table = torch.arange(16, dtype=torch.int32, device="cuda").view(2, 8)
        cache_leftpad = None
    where = {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad, "block_table": block_table}
    options = {"block_size": 128, "topk": 4, "local_blocks": 1, "init_blocks": 1}
    select = partial(select_blocks_with_kvcache, query, cache, **where, **options)
    assert_same_lists(select(backend="cuda"), select(backend="reference"))


@pytest.mark.parametrize("q_heads_per_kv", [1, 4, 16])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("length", [300, 3000])
def test_nan_is_seen_by_all_that_attend_to_it(kernels, gpu, name, q_heads_per_kv, length):
    """In the output and in the gradients."""
    case = gpu.packed(([length, 200], None), q_heads_per_kv=q_heads_per_kv)
    own_block = torch.arange(length, device="cuda") // 128
    lists = torch.stack([torch.zeros_like(own_block), torch.where(own_block > 0, own_block, -1)], dim=-1)
    lists = torch.cat([lists, torch.tensor([[0, 1]], device="cuda").expand(200, -1)])
    ids = lists.int()[:, None].expand(-1, 2, -1).contiguous()
    leaves = [state.requires_grad_() for state in case.qkv]
    with torch.no_grad():
        getattr(case, name)[100] = NAN
    out = block_sparse_attention(*leaves, ids, **case.lengths, block_size=128, backend="cuda")
    grads = torch.autograd.grad(out.float().sum(), leaves)
    rows = slice(100, 101) if name == "query" else slice(100, length)
    assert out[rows].isnan().any(-1).all()
    assert grads[0][rows].isnan().any(-1).all()
    # With one query head per key/value head, a tile of 128 rows has queries of both sequences; and 0 * NaN is NaN.
    if (name, q_heads_per_kv) != ("value", 1):
        assert not out[length:].isnan().any()
        assert not any(grad[length:].isnan().any() for grad in grads)


@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_in_cached_attention(kernels, gpu, name, form):
    case = gpu.cached([700, 300], 2)
    args, options = case.attention(form, torch.zeros(2, 2, 2, 1, dtype=torch.int32, device="cuda"))
    if name == "query":
        case.query[0] = NAN
    elif form == "paged":
        getattr(case, form)[name][options["block_table"][0, 0], 5] = NAN
    else:
        getattr(case, form)[name][0, 5] = NAN
    out = block_sparse_attention_with_kvcache(*args, **options, backend="cuda")
    assert out[0].isnan().any(-1).all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("over", ["blocks", "all keys"])
@pytest.mark.parametrize("name", ["index_query", "index_key", "query", "key"])
def test_nan_in_the_loss(kernels, gpu, name, over):
    case = gpu.packed(([300, 200], None), q_heads_per_kv=16)
    own_block = torch.cat([torch.arange(300), torch.arange(200)]).cuda() // 128
    ids = torch.stack([torch.zeros_like(own_block), torch.where(own_block > 0, own_block, -1)], dim=-1)
    ids = None if over == "all keys" else ids.int()[:, None].expand(-1, 2, -1).contiguous()
    leaves = [state.requires_grad_() for state in (case.index_query, case.index_key)]
    with torch.no_grad():
        getattr(case, name)[100] = NAN
    kl = indexer_kl_loss(*leaves, case.query, case.key, ids, **case.lengths, block_size=128, backend="cuda")
    grads = torch.autograd.grad(kl.sum(), leaves)
    rows = slice(100, 101) if name.endswith("query") else slice(100, 300)
    assert kl[rows].isnan().all()
    assert grads[0][rows].isnan().any(-1).all()
    assert not kl[300:].isnan().any()
