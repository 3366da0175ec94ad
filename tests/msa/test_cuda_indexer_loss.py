"""The kernels of `indexer_kl_loss` on a GPU, value and gradients, against the definition in float64.

Tests that take `kernels` run twice: on Hopper's kernels, which exist for blocks of 128 keys and for 128 channels, and
on the portable kernels, which every GPU from sm_80 on can run. What they compare with is computed once for both.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_minimax_m3.msa import indexer_kl_loss
from modeling_minimax_m3.msa.cuda import indexer_loss as kernels_of_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

OPS = torch.ops.minimax_m3_msa
DTYPES = [torch.bfloat16, torch.float16]
GRADIENT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}

# name: lengths of keys, lengths of queries
LENGTHS = {
    "1": ([1], [1]),
    "127": ([127], [127]),
    "128": ([128], [128]),
    "129": ([129], [129]),
    "2049": ([2049], [2049]),
    "4095": ([4095], [4095]),
    "ragged": ([129, 1, 640, 127, 1000], [129, 1, 640, 127, 1000]),
    "chunked": ([700, 300, 2049], [100, 300, 1]),
    "gaps": ([130, 0, 70, 5, 0, 257], [0, 0, 70, 0, 0, 3]),
    "many": ([3] * 300 + [200], [3] * 300 + [200]),
}


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


class Case:
    """Random inputs between NaN: rows, heads and channels that belong to no argument must not be read."""

    def __init__(
        self, lengths="ragged", dtype=torch.bfloat16, head_dim=128, index_dim=128, q_heads_per_kv=16, num_kv_heads=2
    ):
        keys, queries = LENGTHS[lengths] if isinstance(lengths, str) else lengths
        self.generator = torch.Generator("cuda").manual_seed(sum(keys) + q_heads_per_kv)
        self.index_query = self.normal(sum(queries), num_kv_heads, index_dim, dtype=dtype)
        self.index_key = self.normal(sum(keys), 1, index_dim, dtype=dtype)[:, 0]
        self.query = self.normal(sum(queries), num_kv_heads * q_heads_per_kv, head_dim, dtype=dtype)
        self.key = self.normal(sum(keys), num_kv_heads, head_dim, dtype=dtype)
        self.grad_kl = torch.randn(self.index_query.shape[:2], generator=self.generator, device="cuda")
        self.lengths = {"cu_seqlens_q": offsets(queries), "cu_seqlens_k": offsets(keys)}
        self.longest = max(keys)

    def normal(self, *shape, dtype):
        roomy = torch.full([size + 8 * (1 + (i == 0) * 20) for i, size in enumerate(shape)], math.nan, device="cuda")
        view = roomy.to(dtype)[tuple(map(slice, shape))]
        return view.copy_(torch.randn(shape, generator=self.generator, device="cuda"))

    def random_blocks(self, topk, block_size):
        """Up to `topk` ids per query and head in random order, some of them in the future or past the sequence."""
        rows, width = (len(self.query), self.key.shape[1]), -(-self.longest // block_size) + 1
        order = torch.rand((*rows, width), generator=self.generator, device="cuda").argsort(-1)[..., :topk]
        order = torch.nn.functional.pad(order, (0, topk - order.shape[-1]), value=-1)
        count = torch.randint(0, topk + 1, (*rows, 1), generator=self.generator, device="cuda")
        return order.masked_fill(torch.arange(topk, device="cuda") >= count, -1).to(torch.int32)

    def run(self, block_indices, block_size, backend="cuda", dtype=None, grad_kl=None):
        """Returns (kl, gradient of index_query, gradient of index_key)."""
        states = [
            x if dtype is None else x.to(dtype) for x in (self.index_query, self.index_key, self.query, self.key)
        ]
        leaves = [state.detach().requires_grad_() for state in states[:2]]
        kl = indexer_kl_loss(
            *leaves, *states[2:], block_indices, **self.lengths, block_size=block_size, backend=backend
        )
        kl.backward((self.grad_kl if grad_kl is None else grad_kl).to(kl.dtype))
        return kl.detach(), *(leaf.grad for leaf in leaves)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def poison():
    """Leaves NaN where the next workspace and outputs will lie."""
    torch.full((2**25,), math.nan, device="cuda")


def check(case, block_indices, block_size, once):
    """Compares with the exact results, once with saved probabilities and once without any."""
    expected = once(lambda: case.run(block_indices, block_size, "reference", torch.float64))
    compare(case, block_indices, block_size, *expected)
    if block_indices is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels_of_loss, "MAX_SAVED_BYTES", 0)
            compare(case, block_indices, block_size, *expected)


def compare(case, block_indices, block_size, expected_kl, *expected_grads):
    poison()
    kl, *grads = case.run(block_indices, block_size)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected_kl, atol=5e-5, rtol=5e-5)
    for grad, expected in zip(grads, expected_grads):
        assert grad.dtype == case.index_query.dtype
        assert grad.shape == expected.shape
        tolerance = GRADIENT_TOLERANCE[grad.dtype]
        # Where all rows attend to a single key, gradients are rounding only.
        assert relative_error(grad, expected) < tolerance or (grad.double() - expected).norm() < 1e-4
        size, wrong = expected.norm(dim=-1), (grad.double() - expected).norm(dim=-1)
        assert (wrong < 10 * tolerance * size.clamp_min(size.square().mean().sqrt()) + 1e-4).all(), "of some row"
        assert (grad[(expected == 0).all(-1)].abs() < 1e-4).all(), "rows that no key or a single one decides"


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_heads_per_kv", [16, 4])
def test_lengths(kernels, once, q_heads_per_kv, dtype, lengths):
    case = Case(lengths, dtype, q_heads_per_kv=q_heads_per_kv)
    check(case, case.random_blocks(6, 128), 128, once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("head_dim, index_dim", [(128, 128), (64, 64), (128, 64), (64, 128)])
def test_geometries(once, head_dim, index_dim, block_size, dtype):
    case = Case("ragged", dtype, head_dim, index_dim, q_heads_per_kv=8)
    check(case, case.random_blocks(6, block_size), block_size, once)


@pytest.mark.parametrize("topk", [1, 7, 33, 64])
@pytest.mark.parametrize(
    "q_heads_per_kv, block_size", [(1, 64), (2, 64), (4, 128), (8, 64), (16, 64), (1, 128), (16, 128)]
)
def test_heads_and_widths(kernels, once, q_heads_per_kv, block_size, topk):
    case = Case(([700, 300], [500, 300]), q_heads_per_kv=q_heads_per_kv)
    check(case, case.random_blocks(topk, block_size), block_size, once)


@pytest.mark.parametrize("q_heads_per_kv", [1, 16])
def test_all_keys(kernels, once, q_heads_per_kv):
    """The dense warm-up form."""
    check(Case("chunked", q_heads_per_kv=q_heads_per_kv, num_kv_heads=1), None, 128, once)


def test_one_block_that_all_choose(kernels, once):
    """A list of several tiles, whose sums wait for each other."""
    case = Case(([2500], [2500]))
    block_indices = case.random_blocks(4, 128)
    block_indices = block_indices.masked_fill(block_indices == 0, -1)
    block_indices[..., 0] = 0
    check(case, block_indices, 128, once)


@pytest.mark.parametrize("dims, block_size", [(64, 64), (128, 128)])
@pytest.mark.parametrize("topk", [64, None], ids=["sparse", "dense"])
def test_more_queries_than_a_workspace_holds(kernels, once, topk, dims, block_size):
    """Several parts; compared with the `torch` backend, whose memory is linear."""
    lengths = [24000] if topk else [12000]
    case = Case((lengths, lengths), q_heads_per_kv=1, num_kv_heads=4, head_dim=dims, index_dim=dims)
    block_indices = topk and case.random_blocks(topk, block_size)
    kl, *grads = case.run(block_indices, block_size)
    expected_kl, *expected_grads = once(lambda: case.run(block_indices, block_size, "torch", torch.float32))
    torch.testing.assert_close(kl, expected_kl, atol=5e-5, rtol=5e-5)
    for grad, expected in zip(grads, expected_grads):
        assert relative_error(grad, expected.double()) < 1e-2


@pytest.mark.parametrize(
    "dtype, size",
    [(torch.bfloat16, size) for size in (1e-30, 1e-6, 1e6)] + [(torch.float16, size) for size in (1e-3, 1e3)],
    ids=str,
)
def test_size_of_the_upstream_gradient(kernels, dtype, size):
    """Small ones must not vanish between the kernels, even where 16 bits hold them in the end."""
    case = Case("ragged", dtype)
    block_indices = case.random_blocks(6, 128)
    _, *unit = case.run(block_indices, 128)
    _, *grads = case.run(block_indices, 128, grad_kl=case.grad_kl * size)
    info = torch.finfo(dtype)
    for grad, expected in zip(grads, unit):
        expected = (expected.double() * size).to(dtype).double()
        assert expected.isfinite().all()
        lost = info.smallest_normal * info.eps * expected.numel() ** 0.5  # by rounding to subnormal numbers
        assert lost < 1e-2 * expected.norm(), "nothing could be seen"
        assert (grad.double() - expected).norm() < 1e-2 * expected.norm() + lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, index_dim, q_heads_per_kv", [(128, 128, 16), (128, 64, 2), (64, 128, 8)])
def test_probabilities_of_some_tokens(kernels, once, monkeypatch, head_dim, index_dim, q_heads_per_kv, dtype):
    """The value saves those of 700 tokens, and the gradient computes the others."""
    case = Case("ragged", dtype, head_dim, index_dim, q_heads_per_kv)
    block_indices = case.random_blocks(6, 128)
    monkeypatch.setattr(kernels_of_loss, "MAX_SAVED_BYTES", 700 * 2 * 6 * 128 * 2 + 1)
    assert kernels_of_loss.saved_tokens(block_indices, 128) == 700 < len(case.query)
    compare(case, block_indices, 128, *once(lambda: case.run(block_indices, 128, "reference", torch.float64)))


def test_what_is_kept(kernels):
    case = Case(([300], [300]))
    block_indices = torch.zeros((300, 2, 1), dtype=torch.int32, device="cuda")
    args = arguments(case, block_indices, 200)
    kept = OPS.indexer_kl_loss(*args)[2]
    scores = torch.einsum("thgd,khd->thgk", case.query[:200].unflatten(1, (2, 16)).double(), case.key[:128].double())
    probs = (0.09 * scores - args[4][:200].unflatten(1, (2, 16)).unsqueeze(-1).double()).exp().mean(2)
    visible = (torch.arange(128) <= torch.arange(200)[:, None]).cuda()[:, None].expand(-1, 2, -1)
    found = kept[:, :, 0].double() / kernels_of_loss.SAVED_SCALE
    torch.testing.assert_close(found[visible], probs[visible], rtol=2e-3, atol=2e-9)


@pytest.fixture(params=[None, 700, 0], ids=["all", "some", "none"])
def some_saved(request, monkeypatch):
    """Bounds the tokens whose probabilities the value saves, for 2 x 6 blocks of 128 keys per token."""
    if request.param is not None:
        monkeypatch.setattr(kernels_of_loss, "MAX_SAVED_BYTES", request.param * 2 * 6 * 128 * 2)
    return request.param


@pytest.mark.parametrize("q_heads_per_kv", [16, 1])
def test_an_indexer_that_agrees(kernels, some_saved, q_heads_per_kv):
    """With r = p the gradient is nothing but rounding: that of the saved probabilities, and that of r."""
    case = Case("ragged", torch.float16, q_heads_per_kv=q_heads_per_kv)
    case.index_key = case.key[:, 0]
    case.key = case.index_key[:, None].expand(-1, 2, -1)
    case.query = case.index_query.repeat_interleave(q_heads_per_kv, dim=1)
    block_indices = case.random_blocks(6, 128)
    grads = case.run(block_indices, 128)[1:]
    case.query = case.query.flip(-1)
    for grad, of_another in zip(grads, case.run(block_indices, 128)[1:]):
        assert grad.norm() < 1e-3 * of_another.norm()


def test_results_repeat(kernels, some_saved):
    case = Case(([1500, 700], [1500, 700]))
    block_indices = case.random_blocks(16, 128)
    first = case.run(block_indices, 128)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(case.run(block_indices, 128), first))


@pytest.mark.parametrize("lengths", ["chunked", ([9000, 1, 700], [9000, 300, 700])])
def test_log_sums_over_all_keys(kernels, lengths, once):
    """9000 keys are more blocks than a call of the attention takes."""
    case = Case(lengths)
    args = (case.query, case.key, None, *case.lengths.values(), 128, 0.09)
    expected = once(lambda: OPS.attention_lse(case.query.double(), case.key.double(), *args[2:], "torch"))
    lse = OPS.attention_lse(*args, "cuda")
    assert torch.equal(lse.isneginf(), expected.isneginf())
    torch.testing.assert_close(lse, expected.float(), atol=5e-3, rtol=0)


def arguments(case, block_indices, saved_tokens):
    where = (block_indices, *case.lengths.values(), 128)
    lse = OPS.attention_lse(case.query, case.key, *where, 0.09, "cuda")
    states = (state.contiguous() for state in (case.index_query, case.index_key, case.query, case.key))
    return *states, lse, *where, 0.09, 0.1, saved_tokens, "cuda"


def gradient_arguments(case, args, index_lse, saved):
    return case.grad_kl, *args[:5], index_lse, saved, *args[5:11], args[12]


@pytest.mark.parametrize("saved_tokens", [0, 300])
def test_operators(saved_tokens):
    case = Case("ragged")
    # All slots are used, because the saved probabilities of unused slots may be anything.
    args = arguments(case, torch.zeros((len(case.query), 2, 1), dtype=torch.int32, device="cuda"), saved_tokens)
    torch.library.opcheck(OPS.indexer_kl_loss.default, args)
    leaves = [x.detach().requires_grad_() for x in args[:2]]
    torch.library.opcheck(OPS.indexer_kl_loss.default, (*leaves, *args[2:]))
    _, *kept = OPS.indexer_kl_loss(*args)
    torch.library.opcheck(OPS.indexer_kl_loss_backward.default, gradient_arguments(case, args, *kept))
    torch.library.opcheck(OPS.attention_lse.default, (*args[2:4], *args[5:10], "cuda"))


def test_whole_graph():
    torch._dynamo.reset()
    case = Case("ragged")
    block_indices = case.random_blocks(6, 128)

    def loss(index_query, index_key):
        options = {**case.lengths, "backend": "cuda"}
        return indexer_kl_loss(index_query * 2, index_key.sin(), case.query, case.key, block_indices, **options).sum()

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in (case.index_query, case.index_key)]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(loss), strict=True):
        assert relative_error(got, expected.double()) < 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    case = Case("ragged")
    block_indices = case.random_blocks(6, 128)

    def loss(index_query, index_key):
        options = {**case.lengths, "backend": "cuda"}
        return indexer_kl_loss(index_query, index_key, case.query, case.key, block_indices, **options)

    gradients = []
    for function in (loss, partial(checkpoint, loss, use_reentrant=use_reentrant)):
        leaves = [x.detach().requires_grad_() for x in (case.index_query, case.index_key)]
        function(*leaves).backward(case.grad_kl)
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(got, expected) for got, expected in zip(*gradients, strict=True))


def test_capture(kernels):
    case = Case("ragged")
    block_indices = case.random_blocks(6, 128)
    args = arguments(case, block_indices, 700)

    def both():
        kl, *kept = OPS.indexer_kl_loss(*args)
        return kl, *OPS.indexer_kl_loss_backward(*gradient_arguments(case, args, *kept))

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    args[0].neg_()
    block_indices.copy_(case.random_blocks(6, 128))
    args[4].copy_(arguments(case, block_indices, 0)[4])  # the lse of other blocks would give NaN, which equals nothing
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both()))


def test_wrong_values_stay_inside(kernels):
    """Values are not checked on a GPU; wrong ones may give any result but no illegal access."""
    case = Case("ragged")
    wild = torch.randint(-(2**31), 2**31 - 1, (len(case.query), 2, 8), dtype=torch.int32, device="cuda")
    case.run(wild, 128)
    case.run(torch.zeros_like(wild), 128)  # one block eight times
    case.lengths = {name: value * 3 for name, value in case.lengths.items()}
    case.run(case.random_blocks(4, 128), 128)
    torch.cuda.synchronize()


def test_nothing_to_do():
    for keys, queries, topk in (([64], [0], 4), ([0], [0], 4), ([70], [70], 0)):
        case = Case((keys, queries))
        kl, *grads = case.run(torch.zeros((len(case.query), 2, topk), dtype=torch.int32, device="cuda"), 128)
        assert kl.shape == case.index_query.shape[:2]
        assert not any(x.any() for x in (kl, *grads))


def test_offsets_past_32_bits(kernels, needs_memory):
    """300000 tokens of 64 heads: 2.4e9 elements of queries. Only the last rows have a gradient and are compared."""
    needs_memory(24)
    total, rows = 300_000, 5
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    states = [normal(total, 4, 128), normal(total, 128), normal(total, 64, 128), normal(total, 4, 128)]
    assert states[2].numel() > 2**31
    first = torch.randint(0, 2340, (total, 4, 1), generator=generator, device="cuda", dtype=torch.int32)
    block_indices = (first + 61 * torch.arange(4, dtype=torch.int32, device="cuda")) % 2343  # no duplicates
    grad_kl = torch.zeros(total, 4, device="cuda")
    grad_kl[-rows:].normal_(generator=generator)

    def run(states, block_indices, grad_kl, backend):
        leaves = [state.detach().requires_grad_() for state in states[:2]]
        lengths = {"cu_seqlens_q": offsets([len(grad_kl)]), "cu_seqlens_k": offsets([total])}
        kl = indexer_kl_loss(*leaves, *states[2:], block_indices, **lengths, backend=backend)
        return kl.detach(), *torch.autograd.grad(kl, leaves, grad_kl)

    kl, grad_query, grad_key = run(states, block_indices, grad_kl, "cuda")
    assert not grad_query[:-rows].any()
    last = [states[0][-rows:], states[1], states[2][-rows:], states[3]]
    expected_kl, *expected = run(
        [state.double() for state in last], block_indices[-rows:], grad_kl[-rows:].double(), "torch"
    )
    torch.testing.assert_close(kl[-rows:].double(), expected_kl, atol=5e-5, rtol=5e-5)
    for got, exact in zip((grad_query[-rows:], grad_key), expected, strict=True):
        assert relative_error(got, exact) < GRADIENT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("lengths", ["127", "129", "ragged", "chunked"])
def test_keys_past_the_end_weigh_nothing_beside_very_negative_scores(kernels, lengths):
    """A key that does not exist has the score 0, so exp(0 - lse) overflows where all scores are below -88.7."""
    case = Case(lengths)
    for query, key in ((case.query, case.key), (case.index_query, case.index_key)):
        query[..., 0], key[..., 0] = 1.0, -120 * query.shape[-1] ** 0.5
    block_indices = case.random_blocks(6, 128)
    found = case.run(block_indices, 128)
    expected = case.run(block_indices, 128, "reference", torch.float64)
    for got, wanted, first in zip(found, expected, (0, 1, 0), strict=True):
        assert got.isfinite().all()
        # In channel 0, large keys multiply the rounding of gradients whose sum is 0.
        assert relative_error(got[..., first:], wanted[..., first:]) < GRADIENT_TOLERANCE[torch.bfloat16]
