"""The cached forms on a GPU, against the definition in float64 on the same inputs: decoding, and longer chunks.

Chunks of more new tokens than the decoding kernels take run as packed sequences. Tests of them that take `kernels` run
twice, on Hopper's kernels and on the portable ones. What they compare with is computed once for both.
"""

from types import SimpleNamespace

import pytest
import torch

from modeling_minimax_m3.msa import (
    block_sparse_attention_with_kvcache,
    select_blocks_with_kvcache,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

OUTPUT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [torch.bfloat16, torch.float16]
GEOMETRIES = [(head_dim, block_size) for head_dim in (128, 64) for block_size in (128, 64)]
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
    "many queries": {"lengths": [1900, 1111], "num_new": 1100, "leftpad": [3, 70], "q_heads_per_kv": 16, "topk": 16},
}


class CachedRows:
    """The rows of a cache as the packed sequences that they mean, without padding queries."""

    def __init__(self, case, offsets):
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


def run_cached(gpu, case, form, once):
    (index_query, index_key_cache), options = case.selection(form)
    rows = CachedRows(case, gpu.offsets)
    exact = once(lambda: gpu.block_scores(rows, options["block_size"]))
    # The second call may leave out the query's own block. A slot of no token would score high or low, not NaN.
    loud = torch.where(index_key_cache.isnan(), 100 * torch.randn_like(index_key_cache), index_key_cache)
    for cache, changed in (
        (index_key_cache, {}),
        (loud, {"local_blocks": 0, "topk": min(options["topk"], 2)}),
    ):
        call = {**options, **changed}
        gpu.poison(torch.empty((*index_query.shape[:3], call["topk"]), dtype=torch.int32, device="cuda"))
        selected = select_blocks_with_kvcache(index_query, cache, **call, backend="cuda")
        selection = {name: call[name] for name in ("topk", "local_blocks", "init_blocks")}
        gpu.assert_selection(rows.of(selected), rows, exact, **selection)
        for row, padding in rows.take:
            assert (selected[row, :padding] == -1).all(), "padding selects nothing"

    tensors, attention_options = case.attention(form)
    gpu.poison(tensors[0])
    out = block_sparse_attention_with_kvcache(*tensors, **attention_options, backend="cuda")
    query, key_cache, value_cache, block_indices = tensors
    exact_states = (tensor.double() for tensor in (query, key_cache, value_cache))
    expected = once(
        lambda: block_sparse_attention_with_kvcache(
            *exact_states, block_indices, **attention_options, backend="reference"
        )
    )
    assert out.shape == tensors[0].shape
    gpu.assert_rows(out, expected, OUTPUT_TOLERANCE[out.dtype])
    assert not out[(expected == 0).all(-1)].any(), "rows without a key are 0"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", CACHED)
def test_caches(gpu, once, rows, form):
    run_cached(gpu, gpu.cached(**CACHED[rows]), form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks(kernels, gpu, once, chunk, form):
    run_cached(gpu, once(lambda: gpu.cached(**CHUNKS[chunk])), form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_cache_geometries(gpu, once, head_dim, block_size, dtype, form):
    case = gpu.cached([700, 129, 64], 3, head_dim=head_dim, block_size=block_size, dtype=dtype, leftpad=[0, 7, 1])
    run_cached(gpu, case, form, once)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("q_heads_per_kv, topk", [(1, 1), (2, 64), (8, 16), (16, 16), (16, 64)])
def test_cache_heads_and_widths(gpu, once, q_heads_per_kv, topk, form):
    run_cached(gpu, gpu.cached([1500, 40], 2, block_size=64, q_heads_per_kv=q_heads_per_kv, topk=topk), form, once)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_page_sizes(gpu, once, page_size):
    run_cached(gpu, gpu.cached([1500, 40, 257], 2, page_size=page_size), "paged", once)


@pytest.mark.parametrize("form", FORMS)
def test_cache_strides(gpu, form):
    """Caches that keep the heads of a row apart, with room between slots, give what plain ones give."""
    case = gpu.cached([700, 129, 64], 3, leftpad=[0, 7, 1])
    args, options = case.selection(form)
    tensors, attention_options = case.attention(form)
    selected = select_blocks_with_kvcache(*args, **options, backend="cuda")
    out = block_sparse_attention_with_kvcache(*tensors, **attention_options, backend="cuda")
    query, *caches, block_indices = tensors
    caches = [gpu.strided(cache.transpose(1, 2)).transpose(1, 2) for cache in caches]
    assert caches[0].stride(1) < caches[0].stride(2)
    assert torch.equal(select_blocks_with_kvcache(*map(gpu.strided, args), **options, backend="cuda"), selected)
    again = block_sparse_attention_with_kvcache(
        gpu.strided(query), *caches, block_indices, **attention_options, backend="cuda"
    )
    assert torch.equal(again, out)


def test_cache_offsets_past_32_bits(gpu, needs_memory):
    """Eight rows of a million slots: 2.1e9 elements in a cache."""
    needs_memory(20)
    batch, slots, generator = 8, 2**20 + 100, torch.Generator("cuda").manual_seed(0)
    key, value = (torch.empty((batch, slots, 2, 128), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert key.numel() > 2**31
    for cache in (key, value):
        cache.normal_(generator=generator)
    query = torch.empty((batch, 1, 8, 128), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    used = [slots - 7 * row for row in range(batch)]
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
        gpu.assert_rows(out[row, None], expected, 1e-2)

    # The index keys of a row of the values' cache, of which there is one head.
    index_query = torch.empty((batch, 1, 2, 128), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    selected = select_blocks_with_kvcache(
        index_query, value.view(batch, 2 * slots, 128), cache_seqlens=2 * cache_seqlens, topk=8, backend="cuda"
    )
    rows = SimpleNamespace(
        index_query=index_query[-1], index_key=value.view(batch, 2 * slots, 128)[-1, : 2 * used[-1]],
        lengths={"cu_seqlens_q": gpu.offsets([1]), "cu_seqlens_k": gpu.offsets([2 * used[-1]])},
    )  # fmt: skip
    gpu.assert_selection(selected[-1], rows, gpu.block_scores(rows, 128), topk=8, local_blocks=1, init_blocks=0)


def test_odd_page_sizes_run_on_another_backend(gpu):
    case = gpu.cached([300, 40], 1, page_size=24)
    args, options = case.selection("paged")
    with pytest.raises(NotImplementedError, match="page size"):
        select_blocks_with_kvcache(*args, **options, backend="cuda")
    expected = select_blocks_with_kvcache(*args, **options, backend="torch")
    assert torch.equal(select_blocks_with_kvcache(*args, **options), expected)


def test_wrong_cache_values_stay_inside(gpu):
    case = gpu.cached([300, 40], 1)
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
