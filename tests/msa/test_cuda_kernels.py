"""The kernels of the extension on a GPU, against the definition in float64 on the same inputs.

Tests that take `kernels` run on those of Hopper and on those that every GPU from sm_80 on can run; what they compare
with is computed once for both.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from modeling_minimax_m3.msa import (
    backends,
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    extension,
    reference,
    select_blocks,
    select_blocks_with_kvcache,
)
from modeling_minimax_m3.msa.sequences import packed_sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SELECTION_RTOL = 2.0**-20  # of the largest sum of |q_i k_i| over the visible keys
OUTPUT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Scores and sums are float32; exponentials and logarithms are the GPU's fast ones.
LSE_ATOL, LSE_RTOL = 3e-4, 3e-5
DTYPES = [torch.bfloat16, torch.float16]
GEOMETRIES = [(head_dim, block_size) for head_dim in (128, 64) for block_size in (128, 64)]

# name: lengths of keys, lengths of queries (None: the same)
LENGTHS = {
    "1": ([1], None),
    "127": ([127], None),
    "128": ([128], None),
    "129": ([129], None),
    "4095": ([4095], None),
    "4096": ([4096], None),
    "ragged": ([129, 1, 640, 127, 1000], None),
    "chunked": ([700, 300, 2049], [100, 300, 1]),
    "gaps": ([130, 0, 70, 5, 0, 257], [0, 0, 70, 0, 0, 3]),
    "many": ([3] * 300 + [200], None),
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Builds the extension where it has to; the first kernel is not where a missing one should be found."""
    reason = extension.load(build=True)
    assert reason is None, reason


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def normal(*shape, dtype, generator):
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def strided(tensor):
    """The same values, with room between the rows and heads of the tensor."""
    roomy = torch.full([*(2 * size for size in tensor.shape[:-1]), tensor.shape[-1] + 8], math.nan, device="cuda")
    view = roomy.to(tensor.dtype)[tuple(slice(None, None, 2) for _ in tensor.shape[:-1])][..., : tensor.shape[-1]]
    return view.copy_(tensor)


class Packed:
    """Random inputs of both operators over packed sequences."""

    def __init__(self, lengths, dtype=torch.bfloat16, head_dim=128, group=4, num_kv_heads=2, seed=0):
        keys, queries = LENGTHS[lengths] if isinstance(lengths, str) else lengths
        queries = keys if queries is None else queries
        generator = torch.Generator("cuda").manual_seed(seed)
        options = {"dtype": dtype, "generator": generator}
        self.index_query = normal(sum(queries), num_kv_heads, head_dim, **options)
        self.index_key = normal(sum(keys), head_dim, **options)
        self.query = normal(sum(queries), num_kv_heads * group, head_dim, **options)
        self.key = normal(sum(keys), num_kv_heads, head_dim, **options)
        self.value = normal(sum(keys), num_kv_heads, head_dim, **options)
        self.lengths = {"cu_seqlens_q": offsets(queries), "cu_seqlens_k": offsets(keys)}
        self.longest = max(keys)
        self.generator = generator

    @property
    def qkv(self):
        return self.query, self.key, self.value

    def random_blocks(self, topk, block_size):
        """Up to `topk` ids per query and head in random order, some of them in the future or past the sequence."""
        rows, width = (len(self.query), self.key.shape[1]), -(-self.longest // block_size) + 1
        order = torch.rand((*rows, width), generator=self.generator, device="cuda").argsort(-1)[..., :topk]
        order = torch.nn.functional.pad(order, (0, topk - order.shape[-1]), value=-1)
        count = torch.randint(0, topk + 1, (*rows, 1), generator=self.generator, device="cuda")
        return order.masked_fill(torch.arange(topk, device="cuda") >= count, -1).to(torch.int32)


def poison(*tensors):
    """Fills memory of these shapes and dtypes with garbage and frees it, so that the next outputs lie in it."""
    for tensor in tensors:
        torch.empty_like(tensor).fill_(math.nan if tensor.dtype.is_floating_point else 987654321)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def block_scores(case, block_size):
    """For each sequence its queries, exact scores of its blocks (Lq, H, N), -inf in the future, and their tolerance."""
    found = []
    for queries, keys in packed_sequences(*case.lengths.values()):
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

    `exact` is what `block_scores` gives.
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


def exact_attention(case, block_indices, block_size, scale):
    return reference.block_sparse_attention(
        *(tensor.double() for tensor in case.qkv), block_indices, *case.lengths.values(), block_size, scale
    )


def assert_rows(out, expected, tolerance):
    """Within the tolerance in all, and no row of a head lost among the others."""
    assert relative_error(out, expected) < tolerance
    worst = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-3)
    assert worst.numel() == 0 or worst.max().item() < 10 * tolerance


def assert_attention(out, lse, case, block_indices, block_size, once, scale=None):
    scale = case.query.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = once(lambda: exact_attention(case, block_indices, block_size, scale))
    assert out.dtype == case.query.dtype
    assert lse.dtype == torch.float32
    assert_rows(out, expected, OUTPUT_TOLERANCE[out.dtype])
    attends = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, attends)
    assert not out[~attends].any(), "rows without a key are 0"
    torch.testing.assert_close(lse[attends].double(), expected_lse[attends], atol=LSE_ATOL, rtol=LSE_RTOL)


# --- packed sequences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_selection(kernels, once, head_dim, block_size, dtype, lengths):
    case = Packed(lengths, dtype, head_dim)
    exact = once(lambda: block_scores(case, block_size))
    # Where the query's own block is not taken anyway, it shows whether the future's keys were left out of its score.
    for options in (
        {"topk": 5, "local_blocks": 1, "init_blocks": 1},
        {"topk": 2, "local_blocks": 0, "init_blocks": 0},
    ):
        call = {**case.lengths, **options, "block_size": block_size}
        poison(select_blocks(case.index_query, case.index_key, **call, backend="torch"))
        selected = select_blocks(case.index_query, case.index_key, **call, backend="cuda")
        assert_selection(selected, case, exact, **options)


@pytest.mark.parametrize(
    "topk, local_blocks, init_blocks",
    [(1, 0, 0), (1, 1, 0), (2, 0, 2), (4, 3, 1), (16, 1, 0), (33, 2, 5), (64, 0, 0), (64, 40, 24)],
)
@pytest.mark.parametrize("num_heads", [1, 3, 4, 8])
def test_selection_options(kernels, once, num_heads, topk, local_blocks, init_blocks):
    case = Packed(([2900, 400], None), num_kv_heads=num_heads, group=1)
    options = {"topk": topk, "local_blocks": local_blocks, "init_blocks": init_blocks}
    selected = select_blocks(
        case.index_query, case.index_key, **case.lengths, **options, block_size=64, backend="cuda"
    )
    assert_selection(selected, case, once(lambda: block_scores(case, 64)), **options)


def test_equal_scores_go_to_the_lower_block(kernels):
    case = Packed(([1500], None))
    case.index_key.fill_(0.5)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, local_blocks=0, backend="cuda")
    assert torch.equal(selected[-1, 0].sort().values, torch.arange(4, dtype=torch.int32, device="cuda"))
    forced = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, local_blocks=1, backend="cuda")
    assert forced[-1, 0].sort().values.tolist() == [0, 1, 2, 11]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_attention(once, head_dim, block_size, dtype, lengths):
    case = Packed(lengths, dtype, head_dim)
    block_indices = case.random_blocks(6, block_size)
    poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(
        *case.qkv, block_indices, **case.lengths, block_size=block_size, return_lse=True, backend="cuda"
    )
    assert_attention(out, lse, case, block_indices, block_size, once)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_the_released_shape(kernels, once, dtype, lengths):
    """The one shape of heads and blocks that has Hopper kernels."""
    case = Packed(lengths, dtype, group=16)
    block_indices = case.random_blocks(16, 128)
    poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(out, lse, case, block_indices, 128, once)


@pytest.mark.parametrize("topk", [1, 2, 7, 16, 33, 64])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_attention_groups_and_widths(once, group, topk):
    case = Packed(([700, 300], [500, 300]), group=group, seed=group)
    block_indices = case.random_blocks(topk, 64)
    out, lse = block_sparse_attention(
        *case.qkv, block_indices, **case.lengths, block_size=64, softmax_scale=0.3, return_lse=True, backend="cuda"
    )
    assert_attention(out, lse, case, block_indices, 64, once, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [([2049], None), ([1500, 1, 0, 900, 60], [1500, 1, 0, 900, 0]), ([6001, 130], [2500, 130])],
    ids=["one", "ragged", "chunked"],
)
def test_attention_of_many_queries(kernels, once, lengths, dtype):
    """Enough queries of the released geometry for kernels that go from key blocks to their queries."""
    case = Packed(lengths, dtype, group=16)
    block_indices = case.random_blocks(16, 128)
    poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(out, lse, case, block_indices, 128, once)
    for _ in range(3):
        again = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


def test_attention_of_many_queries_is_captured(kernels):
    case = Packed(([2500, 300], None), group=16)
    block_indices = case.random_blocks(16, 128)
    call = {**case.lengths, "backend": "cuda"}
    block_sparse_attention(*case.qkv, block_indices, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(*case.qkv, block_indices, **call)
    case.query.neg_()
    block_indices.copy_(case.random_blocks(16, 128))
    graph.replay()
    assert torch.equal(captured, block_sparse_attention(*case.qkv, block_indices, **call))


def test_clustered_selection(kernels, once):
    """Neighbouring tokens that share most of their blocks."""
    case = Packed(([3000], None), group=16)
    shared = case.random_blocks(16, 128)[:1]
    block_indices = shared.repeat(3000, 1, 1)
    block_indices[::7] = case.random_blocks(16, 128)[::7]
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(out, lse, case, block_indices, 128, once)


def test_large_scores(kernels):
    """Logits in the hundreds, where a softmax without its maximum would overflow."""
    case = Packed("ragged", group=16)
    case.query *= 30
    block_indices = case.random_blocks(6, 128)
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    expected, expected_lse = reference.block_sparse_attention(
        *(tensor.double() for tensor in case.qkv), block_indices, *case.lengths.values(), 128, 128**-0.5
    )
    assert relative_error(out, expected) < 1e-2
    attends = expected_lse > -math.inf
    assert relative_error(lse[attends], expected_lse[attends]) < 1e-4


def test_strides(kernels):
    case = Packed("ragged", group=16)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, backend="cuda")
    out, lse = block_sparse_attention(*case.qkv, selected, **case.lengths, return_lse=True, backend="cuda")
    roomy = [strided(tensor) for tensor in (case.index_query, case.index_key, *case.qkv)]
    assert not any(tensor.is_contiguous() for tensor in roomy)
    assert torch.equal(select_blocks(*roomy[:2], **case.lengths, topk=4, backend="cuda"), selected)
    wide = torch.full((*selected.shape[:2], 9), 3, dtype=torch.int32, device="cuda")
    wide[..., :4] = selected
    again, lse_again = block_sparse_attention(
        *roomy[2:], wide[..., :4], **case.lengths, return_lse=True, backend="cuda"
    )
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("lengths", ["ragged", ([2100, 40], None)], ids=["few queries", "many queries"])
def test_wrong_ids_and_lengths_stay_inside(kernels, lengths):
    """Values are not checked on a GPU; wrong ones may give any result but no illegal access."""
    case = Packed(lengths, group=16)
    wild = torch.randint(-(2**31), 2**31 - 1, (len(case.query), 2, 8), dtype=torch.int32, device="cuda")
    block_sparse_attention(*case.qkv, wild, **case.lengths, backend="cuda")
    too_long = {name: value * 3 for name, value in case.lengths.items()}
    select_blocks(case.index_query, case.index_key, **too_long, backend="cuda")
    block_sparse_attention(*case.qkv, case.random_blocks(4, 128), **too_long, backend="cuda")
    torch.cuda.synchronize()


def test_nothing_to_do():
    case = Packed(([64], [0]))
    assert select_blocks(case.index_query, case.index_key, **case.lengths, backend="cuda").shape == (0, 2, 16)
    block_indices = torch.empty((0, 2, 16), dtype=torch.int32, device="cuda")
    assert block_sparse_attention(*case.qkv, block_indices, **case.lengths, backend="cuda").shape == (0, 8, 128)


def test_offsets_past_32_bits(kernels, needs_memory):
    """A million tokens of 64 heads: 8.6e9 elements."""
    needs_memory(60)
    total, generator = 2**20, torch.Generator("cuda").manual_seed(0)
    query = torch.empty((total, 64, 128), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    key, value = (normal(total, 4, 128, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    lengths = {name: offsets([total]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    first = torch.randint(0, 8192, (total, 4, 1), generator=generator, device="cuda", dtype=torch.int32)
    block_indices = (first + 61 * torch.arange(4, dtype=torch.int32, device="cuda")) % 8192  # 61 is odd: no duplicates
    out, lse = block_sparse_attention(query, key, value, block_indices, **lengths, return_lse=True, backend="cuda")
    assert out.numel() > 2**31
    last = {"cu_seqlens_q": offsets([5]), "cu_seqlens_k": lengths["cu_seqlens_k"]}
    expected, expected_lse = block_sparse_attention(
        query[-5:].double(), key.double(), value.double(), block_indices[-5:], **last, return_lse=True, backend="torch"
    )
    assert relative_error(out[-5:], expected) < 1e-2
    torch.testing.assert_close(lse[-5:].double(), expected_lse, atol=LSE_ATOL, rtol=LSE_RTOL)


# --- caches ------------------------------------------------------------------------------------------------------

FORMS = ("contiguous", "paged")
CACHED = {
    "one token": {"lengths": [1, 127, 128, 129, 4095], "num_new": 1},
    "long": {"lengths": [20000], "num_new": 1},
    "several tokens": {"lengths": [5, 127, 128, 700, 260], "num_new": 5},
    "sixteen tokens": {"lengths": [16, 300, 1025], "num_new": 16},
    "left padding": {"lengths": [300, 17, 640], "num_new": 2, "leftpad": [0, 130, 5]},
    "shorter than the new tokens": {"lengths": [1, 3, 200], "num_new": 8, "leftpad": [0, 9, 70]},
    "many rows": {"lengths": [1 + 37 * row % 400 for row in range(256)], "num_new": 1},
    "empty rows": {"lengths": [0, 5, 0, 130], "num_new": 1},
    "empty padded rows": {"lengths": [0, 140, 2], "num_new": 3, "leftpad": [6, 0, 200]},
}

# More new tokens than the decoding kernels take: these run as packed sequences.
CHUNKS = {
    "short": {"lengths": [17, 300, 1025], "num_new": 17, "leftpad": [3, 0, 12]},
    "rows shorter than the chunk": {"lengths": [100, 0, 1025], "num_new": 200},
    # As `test_attention_of_many_queries`, between slots that hold NaN.
    "many queries": {"lengths": [1900, 1111], "num_new": 1100, "leftpad": [3, 70], "group": 16, "topk": 16},
}


def on_gpu(inputs, lengths, num_new, head_dim=128, block_size=128, topk=5, **options):
    """Caches of `conftest.make_cached`, whose unused slots hold NaN, on the GPU."""
    case = inputs.make_cached(
        lengths, num_new, head_dim=head_dim, index_dim=head_dim, block_size=block_size, topk=topk,
        **{"page_size": 128, "dtype": torch.bfloat16, "group": 4, **options},
    )  # fmt: skip
    case.index_query, case.query, case.block_indices = (
        tensor.cuda() for tensor in (case.index_query, case.query, case.block_indices)
    )
    for form in FORMS:
        cache = getattr(case, form)
        for name in ("index_key", "key", "value"):
            cache[name] = cache[name].cuda()
        cache["where"] = {name: tensor.cuda() for name, tensor in cache["where"].items()}
    return case


class CachedRows:
    """The rows of a cache as the packed sequences that they mean, without padding queries."""

    def __init__(self, case):
        num_new = case.query.shape[1]
        count = [min(num_new, len(own)) for own in case.index_key]
        self.take = [(row, num_new - own) for row, own in enumerate(count)]
        self.index_query = self.of(case.index_query)
        self.index_key = torch.cat(case.index_key).cuda()
        self.lengths = {
            "cu_seqlens_q": offsets(count),
            "cu_seqlens_k": offsets([len(own) for own in case.index_key]),
        }

    def of(self, tensor):
        return torch.cat([tensor[row, padding:] for row, padding in self.take])


def run_cached(case, form, once):
    (index_query, index_key_cache), options = case.selection(form)
    rows = CachedRows(case)
    exact = once(lambda: block_scores(rows, options["block_size"]))
    # The query's own block need not be taken in the second call, and slots of no token would score high or low, not NaN.
    loud = torch.where(index_key_cache.isnan(), 100 * torch.randn_like(index_key_cache), index_key_cache)
    for cache, changed in (
        (index_key_cache, {}),
        (loud, {"local_blocks": 0, "topk": min(options["topk"], 2)}),
    ):
        call = {**options, **changed}
        poison(torch.empty((*index_query.shape[:3], call["topk"]), dtype=torch.int32, device="cuda"))
        selected = select_blocks_with_kvcache(index_query, cache, **call, backend="cuda")
        selection = {name: call[name] for name in ("topk", "local_blocks", "init_blocks")}
        assert_selection(rows.of(selected), rows, exact, **selection)
        for row, padding in rows.take:
            assert (selected[row, :padding] == -1).all(), "padding selects nothing"

    tensors, attention_options = case.attention(form)
    poison(tensors[0])
    out = block_sparse_attention_with_kvcache(*tensors, **attention_options, backend="cuda")
    where = attention_options
    expected = once(
        lambda: reference.block_sparse_attention_with_kvcache(
            *(tensor.double() for tensor in tensors[:3]), tensors[3], where["cache_seqlens"],
            where.get("cache_leftpad"), where.get("block_table"), where["block_size"], tensors[0].shape[-1] ** -0.5,
        )
    )  # fmt: skip
    assert out.shape == tensors[0].shape
    assert_rows(out, expected, OUTPUT_TOLERANCE[out.dtype])
    assert not out[(expected == 0).all(-1)].any(), "rows without a key are 0"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", CACHED)
def test_caches(inputs, once, rows, form):
    run_cached(on_gpu(inputs, **CACHED[rows]), form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks(kernels, inputs, once, chunk, form):
    run_cached(once(lambda: on_gpu(inputs, **CHUNKS[chunk])), form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_cache_geometries(inputs, once, head_dim, block_size, dtype, form):
    case = on_gpu(inputs, [700, 129, 64], 3, head_dim=head_dim, block_size=block_size, dtype=dtype, leftpad=[0, 7, 1])
    run_cached(case, form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group, topk", [(1, 1), (2, 64), (8, 16), (16, 16), (16, 64)])
def test_cache_groups_and_widths(inputs, once, group, topk, form):
    run_cached(on_gpu(inputs, [1500, 40], 2, block_size=64, group=group, topk=topk), form, once)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_page_sizes(inputs, once, page_size):
    run_cached(on_gpu(inputs, [1500, 40, 257], 2, page_size=page_size), "paged", once)


@pytest.mark.parametrize("form", FORMS)
def test_cache_strides(inputs, form):
    """Caches that keep the heads of a row apart, with room between slots, give what plain ones give."""
    case = on_gpu(inputs, [700, 129, 64], 3, leftpad=[0, 7, 1])
    args, options = case.selection(form)
    tensors, attention_options = case.attention(form)
    selected = select_blocks_with_kvcache(*args, **options, backend="cuda")
    out = block_sparse_attention_with_kvcache(*tensors, **attention_options, backend="cuda")
    query, *caches, block_indices = tensors
    caches = [strided(cache.transpose(1, 2)).transpose(1, 2) for cache in caches]
    assert caches[0].stride(1) < caches[0].stride(2)
    assert torch.equal(select_blocks_with_kvcache(*map(strided, args), **options, backend="cuda"), selected)
    again = block_sparse_attention_with_kvcache(
        strided(query), *caches, block_indices, **attention_options, backend="cuda"
    )
    assert torch.equal(again, out)


def test_cache_offsets_past_32_bits(needs_memory):
    """Eight rows of a million slots: 2.1e9 elements in a cache."""
    needs_memory(20)
    batch, slots, generator = 8, 2**20 + 100, torch.Generator("cuda").manual_seed(0)
    options = {"dtype": torch.bfloat16, "generator": generator}
    key, value = (torch.empty((batch, slots, 2, 128), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert key.numel() > 2**31
    for cache in (key, value):
        cache.normal_(generator=generator)
    query, used = normal(batch, 1, 8, 128, **options), [slots - 7 * row for row in range(batch)]
    cache_seqlens = torch.tensor(used, dtype=torch.int32, device="cuda")
    block_indices = torch.randint(0, 2000, (batch, 1, 2, 4), generator=generator, dtype=torch.int32, device="cuda")
    block_indices += 2000 * torch.arange(4, dtype=torch.int32, device="cuda")  # from the first to nearly the last
    out = block_sparse_attention_with_kvcache(
        query, key, value, block_indices, cache_seqlens=cache_seqlens, backend="cuda"
    )
    for row in range(batch):
        expected = block_sparse_attention_with_kvcache(
            query[row, None].double(), key[row, None].double(), value[row, None].double(), block_indices[row, None],
            cache_seqlens=cache_seqlens[row, None], backend="torch",
        )  # fmt: skip
        assert_rows(out[row, None], expected, 1e-2)

    # The index keys of a row of the values' cache, of which there is one head.
    index_query = normal(batch, 1, 2, 128, **options)
    selected = select_blocks_with_kvcache(
        index_query, value.view(batch, 2 * slots, 128), cache_seqlens=2 * cache_seqlens, topk=8, backend="cuda"
    )
    rows = SimpleNamespace(
        index_query=index_query[-1], index_key=value.view(batch, 2 * slots, 128)[-1, : 2 * used[-1]],
        lengths={"cu_seqlens_q": offsets([1]), "cu_seqlens_k": offsets([2 * used[-1]])},
    )  # fmt: skip
    assert_selection(selected[-1], rows, block_scores(rows, 128), topk=8, local_blocks=1, init_blocks=0)


def test_odd_page_sizes_run_on_another_backend(inputs):
    case = on_gpu(inputs, [300, 40], 1, page_size=24)
    args, options = case.selection("paged")
    with pytest.raises(NotImplementedError, match="page size"):
        select_blocks_with_kvcache(*args, **options, backend="cuda")
    expected = select_blocks_with_kvcache(*args, **options, backend="torch")
    assert torch.equal(select_blocks_with_kvcache(*args, **options), expected)


def test_wrong_cache_values_stay_inside(inputs):
    case = on_gpu(inputs, [300, 40], 1)
    for form in FORMS:
        args, options = case.selection(form)
        tensors, attention_options = case.attention(form)
        for where in (options, attention_options):
            where["cache_seqlens"] = where["cache_seqlens"] * 10**6
            if "block_table" in where:
                where["block_table"] = torch.full_like(where["block_table"], 2**31 - 1)
        tensors = (*tensors[:3], torch.full_like(tensors[3], 2**30))
        select_blocks_with_kvcache(*args, **options, backend="cuda")
        block_sparse_attention_with_kvcache(*tensors, **attention_options, backend="cuda")
    torch.cuda.synchronize()


# --- how calls are made ------------------------------------------------------------------------------------------


def calls(inputs, head_dim=128, block_size=128, dtype=torch.bfloat16):
    """Every operator's arguments, by its name among `torch.ops.minimax_m3_msa`."""
    case = Packed(([300, 129], None), dtype, head_dim, group=16)
    lengths = tuple(case.lengths.values())
    found = {
        "select_blocks": (case.index_query, case.index_key, *lengths, block_size, 2, 1, 0, "cuda"),
        "block_sparse_attention": (*case.qkv, case.random_blocks(2, block_size), *lengths, block_size, 0.1, "cuda"),
    }
    cached = on_gpu(inputs, [300, 40], 2, head_dim=head_dim, block_size=block_size, dtype=dtype, group=16)
    where = cached.paged["where"]
    rows = (where["cache_seqlens"], None, where["block_table"])
    found["select_blocks_with_kvcache"] = (*cached.selection("paged")[0], *rows, block_size, 2, 1, 0, "cuda")
    found["block_sparse_attention_with_kvcache"] = (*cached.attention("paged")[0], *rows, block_size, 0.1, "cuda")
    return found


def outputs(name, args):
    result = getattr(torch.ops.minimax_m3_msa, name)(*args)
    return (result,) if isinstance(result, torch.Tensor) else result


PACKED = ("select_blocks", "block_sparse_attention")
OPERATORS = (*PACKED, "select_blocks_with_kvcache", "block_sparse_attention_with_kvcache")


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(inputs, name):
    torch.library.opcheck(getattr(torch.ops.minimax_m3_msa, name).default, calls(inputs)[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
@pytest.mark.parametrize("name", OPERATORS)
def test_repeated_calls_agree_bit_for_bit(kernels, inputs, once, name, head_dim, block_size, dtype):
    args = once(lambda: calls(inputs, head_dim, block_size, dtype))[name]
    first = outputs(name, args)
    assert not any(output.isnan().any() for output in first), "NaN would equal nothing"
    for _ in range(5):
        assert all(torch.equal(again, before) for again, before in zip(outputs(name, args), first))


@pytest.mark.parametrize("name", OPERATORS)
def test_graph_replay(kernels, inputs, name):
    """A captured call follows new values in its tensors, the lengths of a cache among them."""
    args = list(calls(inputs)[name])
    before = outputs(name, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(name, args)
    args[0].copy_(args[0].flip(0))
    if name.endswith("_with_kvcache"):
        lengths = args[2 if name.startswith("select") else 4]
        lengths.sub_(7)
    graph.replay()
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(captured, outputs(name, args)))
    assert not any(torch.equal(replayed, old) for replayed, old in zip(captured, before)), "nothing changed"


def test_a_long_chunk_is_captured(inputs):
    case = on_gpu(inputs, [300, 140], 40, leftpad=[0, 3])
    args, options = case.selection("contiguous")
    select_blocks_with_kvcache(*args, **options, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks_with_kvcache(*args, **options, backend="cuda")
    options["cache_seqlens"].sub_(9)
    graph.replay()
    assert torch.equal(captured, select_blocks_with_kvcache(*args, **options, backend="cuda"))


@pytest.mark.parametrize("name", OPERATORS)
def test_calls_run_on_the_current_stream(kernels, inputs, name):
    args = list(calls(inputs)[name])
    expected = outputs(name, args)
    values, args[0] = args[0], torch.zeros_like(args[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some tens of milliseconds, during which the inputs are still zeros
        args[0].copy_(values)
        found = outputs(name, args)
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(found, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_on_another_than_the_current_device(inputs, name):
    args = calls(inputs)[name]
    elsewhere = [arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg for arg in args]
    for found, expected in zip(outputs(name, elsewhere), outputs(name, args)):
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.to("cuda:0"), expected)


def test_auto_takes_the_extension(inputs):
    for name, args in calls(inputs).items():
        assert backends.resolve_backend("auto", name, args[:-1]) == "cuda"
    case = Packed("ragged")
    args = (case.index_query.float(), case.index_key.float())
    expected = select_blocks(*args, **case.lengths, backend="torch")
    assert torch.equal(select_blocks(*args, **case.lengths), expected), "float32 runs elsewhere"


def test_whole_graph_under_compile():
    torch._dynamo.reset()

    def step(case):
        selected = select_blocks(case.index_query * 2, case.index_key, **case.lengths, topk=4)
        return block_sparse_attention(case.query + 1, case.key, case.value, selected, **case.lengths) * 2

    case = Packed("ragged")
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(case), step(case))


@pytest.mark.parametrize("form", FORMS)
def test_whole_graph_with_a_cache(inputs, form):
    torch._dynamo.reset()
    case = on_gpu(inputs, [300, 129], 1)
    (index_query, index_key_cache), options = case.selection(form)
    (query, key_cache, value_cache, _), attention_options = case.attention(form)

    def step(index_query, query):
        selected = select_blocks_with_kvcache(index_query * 2, index_key_cache, **options, backend="cuda")
        return block_sparse_attention_with_kvcache(
            query + 1, key_cache, value_cache, selected, **attention_options, backend="cuda"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index_query, query), step(index_query, query))
