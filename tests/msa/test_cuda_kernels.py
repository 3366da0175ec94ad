"""The kernels over packed sequences on a GPU, against the definition in float64 on the same inputs.

Tests that take `kernels` run twice: on Hopper's kernels, and on the portable kernels, which every GPU from sm_80 on
can run. What they compare with is computed once for both.
"""

import math

import pytest
import torch

from modeling_minimax_m3.msa import block_sparse_attention, select_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

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


def exact_attention(case, block_indices, block_size, scale):
    states = (tensor.double() for tensor in case.qkv)
    return block_sparse_attention(
        *states, block_indices, **case.lengths, block_size=block_size, softmax_scale=scale, return_lse=True,
        backend="reference",
    )  # fmt: skip


def assert_attention(gpu, out, lse, case, block_indices, block_size, once, scale=None):
    scale = case.query.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = once(lambda: exact_attention(case, block_indices, block_size, scale))
    assert out.dtype == case.query.dtype
    assert lse.dtype == torch.float32
    gpu.assert_rows(out, expected, OUTPUT_TOLERANCE[out.dtype])
    attends = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, attends)
    assert not out[~attends].any(), "rows without a key are 0"
    torch.testing.assert_close(lse[attends].double(), expected_lse[attends], atol=LSE_ATOL, rtol=LSE_RTOL)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_selection(kernels, gpu, once, head_dim, block_size, dtype, lengths):
    case = gpu.packed(LENGTHS[lengths], dtype, head_dim)
    exact = once(lambda: gpu.block_scores(case, block_size))
    # Where the query's own block is not taken anyway, it shows whether the future's keys were left out of its score.
    for options in (
        {"topk": 5, "local_blocks": 1, "init_blocks": 1},
        {"topk": 2, "local_blocks": 0, "init_blocks": 0},
    ):
        call = {**case.lengths, **options, "block_size": block_size}
        gpu.poison(select_blocks(case.index_query, case.index_key, **call, backend="torch"))
        selected = select_blocks(case.index_query, case.index_key, **call, backend="cuda")
        gpu.assert_selection(selected, case, exact, **options)


@pytest.mark.parametrize(
    "topk, local_blocks, init_blocks",
    [(1, 0, 0), (1, 1, 0), (2, 0, 2), (4, 3, 1), (16, 1, 0), (33, 2, 5), (64, 0, 0), (64, 40, 24)],
)
@pytest.mark.parametrize("num_heads", [1, 3, 4, 8])
def test_selection_options(kernels, gpu, once, num_heads, topk, local_blocks, init_blocks):
    case = gpu.packed(([2900, 400], None), num_kv_heads=num_heads, q_heads_per_kv=1)
    options = {"topk": topk, "local_blocks": local_blocks, "init_blocks": init_blocks}
    selected = select_blocks(
        case.index_query, case.index_key, **case.lengths, **options, block_size=64, backend="cuda"
    )
    gpu.assert_selection(selected, case, once(lambda: gpu.block_scores(case, 64)), **options)


def test_equal_scores_go_to_the_lower_block(kernels, gpu):
    case = gpu.packed(([1500], None))
    case.index_key.fill_(0.5)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, local_blocks=0, backend="cuda")
    assert torch.equal(selected[-1, 0].sort().values, torch.arange(4, dtype=torch.int32, device="cuda"))
    forced = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, local_blocks=1, backend="cuda")
    assert forced[-1, 0].sort().values.tolist() == [0, 1, 2, 11]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_attention(gpu, once, head_dim, block_size, dtype, lengths):
    case = gpu.packed(LENGTHS[lengths], dtype, head_dim)
    block_indices = case.random_blocks(6, block_size)
    gpu.poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(
        *case.qkv, block_indices, **case.lengths, block_size=block_size, return_lse=True, backend="cuda"
    )
    assert_attention(gpu, out, lse, case, block_indices, block_size, once)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_the_released_shape(kernels, gpu, once, dtype, lengths):
    """The one shape of heads and blocks that has Hopper kernels."""
    case = gpu.packed(LENGTHS[lengths], dtype, q_heads_per_kv=16)
    block_indices = case.random_blocks(16, 128)
    gpu.poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(gpu, out, lse, case, block_indices, 128, once)


@pytest.mark.parametrize("topk", [1, 2, 7, 16, 33, 64])
@pytest.mark.parametrize("q_heads_per_kv", [1, 2, 4, 8, 16])
def test_attention_heads_and_widths(gpu, once, q_heads_per_kv, topk):
    case = gpu.packed(([700, 300], [500, 300]), q_heads_per_kv=q_heads_per_kv, seed=q_heads_per_kv)
    block_indices = case.random_blocks(topk, 64)
    out, lse = block_sparse_attention(
        *case.qkv, block_indices, **case.lengths, block_size=64, softmax_scale=0.3, return_lse=True, backend="cuda"
    )
    assert_attention(gpu, out, lse, case, block_indices, 64, once, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [([2049], None), ([1500, 1, 0, 900, 60], [1500, 1, 0, 900, 0]), ([6001, 130], [2500, 130])],
    ids=["one", "ragged", "chunked"],
)
def test_attention_of_many_queries(kernels, gpu, once, lengths, dtype):
    """Enough queries of the released geometry for the KV-major kernels."""
    case = gpu.packed(lengths, dtype, q_heads_per_kv=16)
    block_indices = case.random_blocks(16, 128)
    gpu.poison(case.query, torch.empty(case.query.shape[:2], device="cuda"))
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(gpu, out, lse, case, block_indices, 128, once)
    for _ in range(3):
        again = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


def test_attention_of_many_queries_is_captured(kernels, gpu):
    case = gpu.packed(([2500, 300], None), q_heads_per_kv=16)
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


def test_clustered_selection(kernels, gpu, once):
    """Neighbouring tokens that share most of their blocks."""
    case = gpu.packed(([3000], None), q_heads_per_kv=16)
    shared = case.random_blocks(16, 128)[:1]
    block_indices = shared.repeat(3000, 1, 1)
    block_indices[::7] = case.random_blocks(16, 128)[::7]
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    assert_attention(gpu, out, lse, case, block_indices, 128, once)


def test_large_scores(kernels, gpu, inputs):
    """Logits in the hundreds, where a softmax without its maximum would overflow."""
    case = gpu.packed(LENGTHS["ragged"], q_heads_per_kv=16)
    case.query *= 30
    block_indices = case.random_blocks(6, 128)
    out, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, return_lse=True, backend="cuda")
    expected, expected_lse = exact_attention(case, block_indices, 128, 128**-0.5)
    assert inputs.relative_error(out, expected) < 1e-2
    attends = expected_lse > -math.inf
    assert inputs.relative_error(lse[attends], expected_lse[attends]) < 1e-4


def test_strides(kernels, gpu):
    case = gpu.packed(LENGTHS["ragged"], q_heads_per_kv=16)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, topk=4, backend="cuda")
    out, lse = block_sparse_attention(*case.qkv, selected, **case.lengths, return_lse=True, backend="cuda")
    roomy = [gpu.strided(tensor) for tensor in (case.index_query, case.index_key, *case.qkv)]
    assert not any(tensor.is_contiguous() for tensor in roomy)
    assert torch.equal(select_blocks(*roomy[:2], **case.lengths, topk=4, backend="cuda"), selected)
    wide = torch.full((*selected.shape[:2], 9), 3, dtype=torch.int32, device="cuda")
    wide[..., :4] = selected
    again, lse_again = block_sparse_attention(
        *roomy[2:], wide[..., :4], **case.lengths, return_lse=True, backend="cuda"
    )
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("lengths", [LENGTHS["ragged"], ([2100, 40], None)], ids=["few queries", "many queries"])
def test_wrong_ids_and_lengths_stay_inside(kernels, gpu, lengths):
    """Values are not checked on a GPU; wrong ones may give any result but no illegal access."""
    case = gpu.packed(lengths, q_heads_per_kv=16)
    wild = torch.randint(-(2**31), 2**31 - 1, (len(case.query), 2, 8), dtype=torch.int32, device="cuda")
    block_sparse_attention(*case.qkv, wild, **case.lengths, backend="cuda")
    too_long = {name: value * 3 for name, value in case.lengths.items()}
    select_blocks(case.index_query, case.index_key, **too_long, backend="cuda")
    block_sparse_attention(*case.qkv, case.random_blocks(4, 128), **too_long, backend="cuda")
    torch.cuda.synchronize()


def test_nothing_to_do(gpu):
    case = gpu.packed(([64], [0]))
    assert select_blocks(case.index_query, case.index_key, **case.lengths, backend="cuda").shape == (0, 2, 16)
    block_indices = torch.empty((0, 2, 16), dtype=torch.int32, device="cuda")
    assert block_sparse_attention(*case.qkv, block_indices, **case.lengths, backend="cuda").shape == (0, 8, 128)


def test_offsets_past_32_bits(kernels, gpu, inputs, needs_memory):
    """A million tokens of 64 heads: 8.6e9 elements."""
    needs_memory(60)
    total, generator = 2**20, torch.Generator("cuda").manual_seed(0)
    query = torch.empty((total, 64, 128), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    key, value = torch.randn((2, total, 4, 128), generator=generator, device="cuda").to(torch.bfloat16)
    lengths = {name: gpu.offsets([total]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    first = torch.randint(0, 8192, (total, 4, 1), generator=generator, device="cuda", dtype=torch.int32)
    block_indices = (first + 61 * torch.arange(4, dtype=torch.int32, device="cuda")) % 8192  # 61 is odd: no duplicates
    out, lse = block_sparse_attention(query, key, value, block_indices, **lengths, return_lse=True, backend="cuda")
    assert out.numel() > 2**31
    last = {"cu_seqlens_q": gpu.offsets([5]), "cu_seqlens_k": lengths["cu_seqlens_k"]}
    expected, expected_lse = block_sparse_attention(
        query[-5:].double(), key.double(), value.double(), block_indices[-5:], **last, return_lse=True, backend="torch"
    )
    assert inputs.relative_error(out[-5:], expected) < 1e-2
    torch.testing.assert_close(lse[-5:].double(), expected_lse, atol=LSE_ATOL, rtol=LSE_RTOL)
