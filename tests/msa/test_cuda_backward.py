"""Gradients of the compiled attention on a GPU, against the definition in float64 on the same inputs.

Tests that take `kernels` run twice: on Hopper's kernels, which exist for 16 query heads of 128 channels per key/value
head and blocks of 128 keys, and on the portable kernels, which every GPU from sm_80 on can run. What they compare with
is computed once for both.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_minimax_m3.msa import block_sparse_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
GEOMETRIES = [(head_dim, block_size) for head_dim in (128, 64) for block_size in (128, 64)]

# name: lengths of keys, lengths of queries (None: the same)
LENGTHS = {
    "1": ([1], None),
    "127": ([127], None),
    "128": ([128], None),
    "129": ([129], None),
    "4095": ([4095], None),
    "1030": ([1030], None),
    "ragged": ([129, 1, 640, 127, 1000], None),
    "chunked": ([700, 300, 2049], [100, 300, 1]),
    "gaps": ([130, 0, 70, 5, 0, 257], [0, 0, 70, 0, 0, 3]),
    "many": ([3] * 300 + [200], None),
}


class Case:
    """Random inputs on the GPU: queries, keys and values, their lengths, block lists, and a gradient of the output."""

    def __init__(
        self,
        lengths,
        dtype=torch.bfloat16,
        head_dim=128,
        block_size=128,
        topk=6,
        q_heads_per_kv=4,
        num_kv_heads=2,
        seed=0,
    ):
        keys, queries = LENGTHS[lengths] if isinstance(lengths, str) else lengths
        queries = keys if queries is None else queries
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.query = self.normal(sum(queries), num_kv_heads * q_heads_per_kv, head_dim).to(dtype)
        self.key, self.value = (self.normal(sum(keys), num_kv_heads, head_dim).to(dtype) for _ in range(2))
        self.grad_out = self.normal(*self.query.shape).to(dtype)
        self.options = {"cu_seqlens_q": offsets(queries), "cu_seqlens_k": offsets(keys), "block_size": block_size}
        # Up to `topk` ids per query and head in random order, some of them in the future or past the sequence.
        rows, width = (len(self.query), num_kv_heads), -(-max(keys) // block_size) + 1
        order = torch.rand((*rows, width), generator=self.generator, device="cuda").argsort(-1)[..., :topk]
        order = torch.nn.functional.pad(order, (0, topk - order.shape[-1]), value=-1)
        count = torch.randint(0, topk + 1, (*rows, 1), generator=self.generator, device="cuda")
        self.block_indices = order.masked_fill(torch.arange(topk, device="cuda") >= count, -1).to(torch.int32)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, device="cuda")

    @property
    def qkv(self):
        return self.query, self.key, self.value

    def gradients(self, backend="cuda", grad_out=None, dtype=None, **options):
        """Gradients of query, key and value; in float64 for `reference`, or where `dtype` says so."""
        leaves, grad_out = self.qkv, self.grad_out if grad_out is None else grad_out
        if backend == "reference" or dtype == torch.float64:
            leaves, grad_out = [leaf.double() for leaf in leaves], grad_out.double()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = block_sparse_attention(*leaves, self.block_indices, **self.options, **options, backend=backend)
        return torch.autograd.grad(out, leaves, grad_out)


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def relative_error(actual, expected):
    # A query of one key has no gradient, but for rounding.
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-2)).item()


def assert_gradients(case, once, actual=None, backend="reference", **options):
    """Within the tolerance of the exact gradients, zero where those are, and the same a second time."""
    poison(case)
    actual = case.gradients(**options) if actual is None else actual
    exact, lse = once(
        lambda: (
            case.gradients(backend, dtype=torch.float64, **options),
            block_sparse_attention(
                *case.qkv, case.block_indices, **case.options, return_lse=True, backend="torch"
            )[1],
        )
    )  # fmt: skip
    for name, leaf, got, expected in zip("qkv", case.qkv, actual, exact, strict=True):
        assert got.shape == leaf.shape
        assert got.dtype == leaf.dtype
        assert relative_error(got, expected) < TOLERANCE[leaf.dtype], name
        # No row may be lost in the others' norm.
        size = expected.norm(dim=-1)
        wrong = (got.double() - expected).norm(dim=-1)
        assert (wrong < 10 * TOLERANCE[leaf.dtype] * size.clamp_min(size.square().mean().sqrt()) + 1e-4).all(), name
    # Rows without a key, and keys without a row: those whose values have no gradient.
    assert not actual[0][lse == -math.inf].any(), "queries without a key"
    unused = (exact[2] == 0).all(-1)
    assert not actual[1][unused].any(), "keys without a query"
    assert not actual[2][unused].any(), "values without a query"
    for got, again in zip(actual, case.gradients(**options), strict=True):
        assert torch.equal(got, again), "another run gave other bits"


def poison(case):
    """Fills memory with NaN and frees it, so that the next outputs and workspaces lie in it."""
    torch.full((64 * 2**20,), math.nan, device="cuda")
    for tensor in case.qkv:
        torch.full_like(tensor, math.nan)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
def test_gradients(once, head_dim, block_size, dtype, lengths):
    assert_gradients(Case(lengths, dtype, head_dim, block_size), once)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_released_shape(kernels, once, dtype, lengths):
    assert_gradients(Case(lengths, dtype, topk=16, q_heads_per_kv=16), once)


@pytest.mark.parametrize("topk", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("q_heads_per_kv", [1, 2, 4, 8, 16])
def test_heads_and_widths(once, q_heads_per_kv, topk):
    case = Case(
        ([700, 300], [500, 300]),
        block_size=64,
        topk=topk,
        q_heads_per_kv=q_heads_per_kv,
        head_dim=64 if topk == 7 else 128,
    )
    assert_gradients(case, once, softmax_scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [([2049], None), ([1500, 1, 0, 900, 60], [1500, 1, 0, 900, 0]), ([3001, 130], [1500, 130])],
    ids=["one", "ragged", "chunked"],
)
def test_many_queries(kernels, once, lengths, dtype):
    assert_gradients(Case(lengths, dtype, topk=16, q_heads_per_kv=16), once)


@pytest.mark.parametrize("topk", [1, 2, 33, 64])
def test_widths_of_the_released_shape(kernels, once, topk):
    assert_gradients(Case(([1200, 300], [700, 300]), topk=topk, q_heads_per_kv=16), once, softmax_scale=0.1)


@pytest.mark.parametrize(
    "lengths, options",
    [
        ([2000, 40], {"topk": 16, "q_heads_per_kv": 16}),
        ([40, 6000], {"topk": 2, "q_heads_per_kv": 16, "num_kv_heads": 1}),
    ],
)
def test_a_block_that_everybody_chose(kernels, once, lengths, options):
    """One list over all queries, which many thread blocks share, beside short ones."""
    case = Case((lengths, None), **options)
    case.block_indices[..., 0] = 0
    case.block_indices[..., 1:].masked_fill_(case.block_indices[..., 1:] == 0, -1)
    assert_gradients(case, once)


def test_more_queries_than_the_workspace_takes_at_once(once):
    """64 blocks of 64 heads: a megabyte of partial gradients for each token."""
    assert_gradients(Case(([1300, 1300], None), block_size=64, topk=64, q_heads_per_kv=16, num_kv_heads=4), once)


def test_more_queries_of_the_released_shape_than_the_workspace_takes_at_once(kernels, once):
    """64 blocks of 16 heads; against the `torch` backend in float64, whose memory is linear."""
    assert_gradients(Case(([9100, 700], None), topk=64, q_heads_per_kv=16, num_kv_heads=1), once, backend="torch")


def test_keys_outside_the_sequences_may_be_nan(kernels, once):
    """The last block of a sequence reaches into the next sequence, whose gradients are not compared."""
    case = Case(([130, 60, 200, 100], [130, 0, 200, 0]), q_heads_per_kv=16)
    for tensor in (case.key, case.value):
        tensor[130:190] = tensor[390:] = math.nan
    actual = case.gradients()
    for tensor in (case.key, case.value):
        tensor.nan_to_num_(0.0)
    assert_gradients(case, once, actual)


def test_large_scores(kernels, once):
    case = Case("ragged", q_heads_per_kv=16)
    case.query *= 30
    # The probabilities are nearly zero or one, so that little of the gradients is left but rounding.
    for got, exact in zip(case.gradients(), once(lambda: case.gradients("reference")), strict=True):
        assert got.isfinite().all()
        assert relative_error(got, exact) < 5e-2


def test_strides(kernels):
    case = Case("ragged", q_heads_per_kv=16)
    plain = case.gradients()

    def spread(tensor):
        roomy = torch.full([*(2 * size for size in tensor.shape[:-1]), tensor.shape[-1] + 8], math.nan, device="cuda")
        view = roomy.to(tensor.dtype)[::2, ::2, : tensor.shape[-1]]
        return view.copy_(tensor)

    grad_out = case.grad_out
    unaligned = torch.empty(grad_out.numel() + 1, dtype=grad_out.dtype, device="cuda")[1:].view_as(grad_out)
    transposed = grad_out.transpose(0, 2).contiguous().transpose(0, 2)
    case.query, case.key, case.value = (spread(tensor) for tensor in case.qkv)
    for given in (spread(grad_out), unaligned.copy_(grad_out), transposed):
        for got, expected in zip(case.gradients(grad_out=given), plain, strict=True):
            assert torch.equal(got, expected)
    ones = torch.ones((), dtype=grad_out.dtype, device="cuda").expand_as(grad_out)
    for got, expected in zip(case.gradients(grad_out=ones), case.gradients(grad_out=ones.contiguous()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("lengths", ["ragged", ([2100, 40], None)], ids=["few queries", "many queries"])
def test_wrong_ids_and_lengths_stay_inside(kernels, lengths):
    """Values are not checked on a GPU; wrong ones may give any result but no illegal access, and no endless wait."""
    case = Case(lengths, q_heads_per_kv=16, topk=8)
    case.block_indices = torch.randint(-(2**31), 2**31 - 1, case.block_indices.shape, device="cuda").to(torch.int32)
    case.gradients()
    case.block_indices = torch.zeros_like(case.block_indices)
    case.gradients()
    case = Case(lengths, q_heads_per_kv=16, topk=8)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        case.options[name] = case.options[name] * 3
    case.gradients()
    torch.cuda.synchronize()


def test_nothing_to_do():
    case = Case(([64], [0]))
    grad_query, grad_key, grad_value = case.gradients()
    assert grad_query.shape == (0, 8, 128)
    assert not grad_key.any()
    assert not grad_value.any()


def plain_attention(query, key, value, attended):
    """The same maths of one sequence in PyTorch, in the dtype of its inputs: matmuls, and a softmax in float32."""
    q_heads_per_kv = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(q_heads_per_kv, 1).transpose(0, 1) for tensor in (key, value))
    scores = query.transpose(0, 1) @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~attended, -math.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(0, 1)


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred keys", "keys with a mean"])
def test_no_worse_than_twice_the_error_of_pytorch(kernels, once, shift, record_property):
    """Partial gradients of queries are rounded; where keys have a mean, much of them cancels in the sum."""
    case = Case(([2000], None), topk=16, q_heads_per_kv=16)
    case.key += shift
    length, heads, block_size = len(case.query), case.key.shape[1], case.options["block_size"]
    case.block_indices[..., 0] = torch.arange(length, device="cuda")[:, None] // block_size  # no empty rows
    case.block_indices[..., 1:].masked_fill_(case.block_indices[..., 1:] == case.block_indices[..., :1], -1)
    chosen = torch.zeros(length, heads, length // block_size + 3, dtype=torch.bool, device="cuda")
    chosen.scatter_(-1, case.block_indices.long() % chosen.shape[-1], True)  # -1 goes to the last column
    position = torch.arange(length, device="cuda")
    attended = chosen[..., position // block_size] & (position <= position[:, None])[:, None]
    attended = attended.transpose(0, 1).repeat_interleave(16, 0)

    def compared():
        leaves = [leaf.detach().requires_grad_() for leaf in case.qkv]
        plain = torch.autograd.grad(plain_attention(*leaves, attended), leaves, case.grad_out)
        return plain, case.gradients("torch"), case.gradients("reference")

    plain, torch_backend, exact_ones = once(compared)
    table = [f"Relative errors of gradients: cuda ({kernels}), PyTorch in bfloat16, the torch backend in float32"]
    errors = {}
    for name, *grads, exact in zip("qkv", case.gradients(), plain, torch_backend, exact_ones, strict=True):
        errors[name] = [relative_error(grad, exact) for grad in grads]
        table.append(f"{name} {' '.join(f'{error:.2e}' for error in errors[name])}")
    record_property("table", "\n".join(table))
    for name, (ours, plain_error, _) in errors.items():
        assert ours < 2 * plain_error, name
        assert ours < 2e-2, name


# --- what PyTorch does with gradients ----------------------------------------------------------------------------


def test_opcheck():
    case = Case("ragged", head_dim=64, block_size=64)
    options = (*case.options.values(), 0.125, "cuda")
    leaves = [leaf.requires_grad_() for leaf in case.qkv]
    torch.library.opcheck(
        torch.ops.minimax_m3_msa.block_sparse_attention.default, (*leaves, case.block_indices, *options)
    )
    out, lse = torch.ops.minimax_m3_msa.block_sparse_attention(*leaves, case.block_indices, *options)
    torch.library.opcheck(
        torch.ops.minimax_m3_msa.block_sparse_attention_backward.default,
        tuple(
            tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
            for tensor in (case.grad_out, *leaves, out, lse, case.block_indices, *options)
        ),
    )


def scaled_attention(query, key, value, block_indices, options):
    """The operator with some work before and after it."""
    return block_sparse_attention(query.sin(), key, value * 2, block_indices, **options, backend="cuda").cos()


def gradients_of(function, case):
    leaves = [leaf.detach().requires_grad_() for leaf in case.qkv]
    out = function(*leaves, case.block_indices, case.options)
    return torch.autograd.grad(out, leaves, case.grad_out)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_graph(backend):
    torch._dynamo.reset()
    case = Case("ragged")
    compiled = torch.compile(scaled_attention, fullgraph=True, backend=backend)
    for got, expected in zip(gradients_of(compiled, case), gradients_of(scaled_attention, case), strict=True):
        assert relative_error(got, expected.double()) < 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    case = Case("ragged")

    def wrapped(*args):
        return checkpoint(partial(scaled_attention, options=args[-1]), *args[:-1], use_reentrant=use_reentrant)

    # Through `backward`: the reentrant kind knows nothing else.
    leaves = [leaf.detach().requires_grad_() for leaf in case.qkv]
    wrapped(*leaves, case.block_indices, case.options).backward(case.grad_out)
    for leaf, expected in zip(leaves, gradients_of(scaled_attention, case), strict=True):
        assert torch.equal(leaf.grad, expected)


def test_forward_and_backward_are_captured(kernels):
    case = Case(([2500, 300], None), q_heads_per_kv=16, topk=16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = case.gradients()  # autograd's threads and the allocator warm up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.gradients()
    case.query.neg_()
    case.block_indices.copy_(case.block_indices.roll(7, 0))
    graph.replay()
    for got, old, expected in zip(captured, before, case.gradients(), strict=True):
        assert torch.equal(got, expected)
        assert not torch.equal(got, old), "nothing changed"


def test_offsets_past_32_bits(kernels, needs_memory):
    """300000 tokens of 64 heads: 2.4e9 elements each of queries, outputs and gradients."""
    needs_memory(40)
    total, rows = 300_000, 5
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.empty((total, 64, 128), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    assert query.numel() > 2**31
    key, value = torch.randn((2, total, 4, 128), generator=generator, device="cuda").to(torch.bfloat16)
    first = torch.randint(0, 2340, (total, 4, 1), generator=generator, device="cuda", dtype=torch.int32)
    block_indices = (first + 61 * torch.arange(4, dtype=torch.int32, device="cuda")) % 2343  # no duplicates
    # Only the last rows have a gradient, so that they alone decide all gradients.
    grad_out = torch.zeros_like(query)
    grad_out[-rows:].normal_(generator=generator)
    lengths = {"cu_seqlens_q": offsets([total]), "cu_seqlens_k": offsets([total])}
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
    out = block_sparse_attention(*leaves, block_indices, **lengths, backend="cuda")
    grad_query, grad_key, grad_value = torch.autograd.grad(out, leaves, grad_out)
    assert not grad_query[:-rows].any()

    exact = [leaf.detach().double().requires_grad_() for leaf in (query[-rows:], key, value)]
    lengths["cu_seqlens_q"] = offsets([rows])
    out = block_sparse_attention(*exact, block_indices[-rows:], **lengths, backend="torch")
    expected = torch.autograd.grad(out, exact, grad_out[-rows:].double())
    for got, exact_one in zip((grad_query[-rows:], grad_key, grad_value), expected, strict=True):
        assert relative_error(got, exact_one) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("lengths", ["1", "127", "129", "ragged", "chunked"])
def test_keys_past_the_end_weigh_nothing_beside_very_negative_scores(kernels, lengths):
    """A key that does not exist has the score 0, so exp(0 - lse) overflows where all scores are below -88.7."""
    case = Case(lengths, q_heads_per_kv=16)
    case.query[..., 0], case.key[..., 0] = 1.0, -120 * case.query.shape[-1] ** 0.5
    found, exact = case.gradients(), case.gradients("reference")
    for name, got, expected in zip("qkv", found, exact, strict=True):
        assert got.isfinite().all(), name
        # In channel 0, large keys multiply the rounding of gradients whose sum is 0.
        assert relative_error(got[..., 1:], expected[..., 1:]) < TOLERANCE[torch.bfloat16], name
