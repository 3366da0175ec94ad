"""The loop orders of the attention forward and the choice between them, against the definition in float64.

A tile of eight neighbouring queries runs query-major where they share enough blocks, else KV-major. Short inputs run
query-major as a whole. Tests of the released shape run on Hopper's kernels and on the portable ones.
"""

import math

import pytest
import torch

from modeling_minimax_m3.msa import block_sparse_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

KV_HEADS, GROUP, BLOCK = 2, 16, 128
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [torch.bfloat16, torch.float16]
# (queries, keys) of each sequence; the first two are long enough for both orders
LENGTHS = {
    "one": [(2500, 2500)],
    "ragged": [(1, 1), (1100, 1100), (0, 200), (3, 300), (0, 0), (1200, 4000), (5, 5)],
    "short": [(300, 1000), (2, 2), (3, 0), (130, 257)],
    "tiny": [(1, 1), (2, 130), (1, 128), (9, 9)],
}
SELECTIONS = ("shared", "scattered", "mixed")


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


class Case:
    """Random inputs; the memory after the last key and the last value holds NaN."""

    def __init__(self, lengths, dtype, head_dim=128, block_size=BLOCK, seed=0):
        queries, keys = zip(*LENGTHS[lengths])
        self.generator = torch.Generator("cuda").manual_seed(seed)
        total, self.block_size = sum(keys), block_size
        self.num_blocks = -(-max(keys) // block_size)
        self.query = self.normal(sum(queries), KV_HEADS * GROUP, head_dim).to(dtype)
        beyond = torch.full((2, total + 2 * block_size, KV_HEADS, head_dim), math.nan, dtype=dtype, device="cuda")
        self.key, self.value = beyond[:, :total]
        for tensor in (self.key, self.value):
            tensor.copy_(self.normal(*tensor.shape))
        self.lengths = {"cu_seqlens_q": offsets(queries), "cu_seqlens_k": offsets(keys)}
        self.ends = self.lengths["cu_seqlens_k"][1:].tolist()

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, device="cuda")

    def lists(self, selection, topk=16):
        """Up to `topk` ids per query, unsorted, some in the future; shared by all neighbours, by none, or by some."""
        tokens = len(self.query)
        order = torch.rand((tokens, KV_HEADS, self.num_blocks + 1), generator=self.generator, device="cuda").argsort(
            -1
        )
        ids = torch.nn.functional.pad(order[..., :topk], (0, max(0, topk - order.shape[-1])), value=-1)
        count = torch.randint(0, topk + 1, (tokens, KV_HEADS, 1), generator=self.generator, device="cuda")
        ids = ids.masked_fill(torch.arange(topk, device="cuda") >= count, -1).to(torch.int32)
        shared = ids[torch.arange(tokens, device="cuda") // 20 * 20]
        row = torch.arange(tokens, device="cuda")[:, None, None]
        head = torch.arange(KV_HEADS, device="cuda")[:, None]
        takes_shared = {"shared": row >= 0, "scattered": row < 0, "mixed": (row // 50 + head) % 2 == 0}[selection]
        return torch.where(takes_shared, shared, ids)

    def attend(self, ids, **options):
        poison = torch.empty_like(self.query).fill_(math.nan)
        del poison  # the output lies in its memory
        return block_sparse_attention(
            self.query, self.key, self.value, ids, **self.lengths, block_size=self.block_size, return_lse=True,
            backend="cuda", **options,
        )  # fmt: skip

    def exact(self, ids, scale):
        states = (tensor.double() for tensor in (self.query, self.key, self.value))
        return block_sparse_attention(
            *states, ids, **self.lengths, block_size=self.block_size, softmax_scale=scale, return_lse=True,
            backend="reference",
        )  # fmt: skip

    def assert_right(self, out, lse, ids, once, scale=None):
        scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        expected, expected_lse = once(lambda: self.exact(ids, scale))
        attends = expected_lse > -math.inf
        assert ((out.double() - expected).norm() / expected.norm()).item() < TOLERANCE[out.dtype]
        # no query may be lost in the others' norm
        worst = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-3)
        assert worst.max().item() < 10 * TOLERANCE[out.dtype]
        assert torch.equal(lse > -math.inf, attends)
        assert not out[~attends].any(), "rows without a key are 0"
        torch.testing.assert_close(lse[attends].double(), expected_lse[attends], atol=3e-4, rtol=3e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orders(kernels, once, dtype, lengths, selection):
    case = Case(lengths, dtype)
    ids = case.lists(selection)
    out, lse = case.attend(ids)
    case.assert_right(out, lse, ids, once)
    for _ in range(2):
        again = case.attend(ids)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


@pytest.mark.parametrize("topk", [1, 2, 5, 32, 33, 64])
@pytest.mark.parametrize("lengths", ["one", "short"])
def test_widths(kernels, once, lengths, topk):
    case = Case(lengths, torch.bfloat16)
    ids = case.lists("mixed", topk)
    case.assert_right(*case.attend(ids), ids, once)


@pytest.mark.parametrize("head_dim, block_size", [(64, 128), (128, 64), (64, 64)])
def test_other_shapes(once, head_dim, block_size):
    case = Case("ragged", torch.bfloat16, head_dim, block_size)
    ids = case.lists("mixed")
    case.assert_right(*case.attend(ids), ids, once)


@pytest.mark.parametrize("scale", [-0.05, 1e-30, 3.0])
@pytest.mark.parametrize("lengths", ["one", "short"])
def test_scales(kernels, once, lengths, scale):
    case = Case(lengths, torch.bfloat16)
    ids = case.lists("mixed")
    case.assert_right(*case.attend(ids, softmax_scale=scale), ids, once, scale)


def test_unused_keys_between_sequences_do_not_leak(kernels):
    """Each sequence's last block reaches into keys of none, as in a cache with unused slots."""
    case = Case("ragged", torch.bfloat16)
    ids = case.lists("shared")
    expected = case.attend(ids)
    room, shift = 70, torch.arange(len(case.ends), device="cuda", dtype=torch.int32)
    roomy = [
        torch.full(
            (len(tensor) + room * len(case.ends), *tensor.shape[1:]), math.nan, dtype=tensor.dtype, device="cuda"
        )
        for tensor in (case.key, case.value)
    ]
    begins = [0, *case.ends]
    for number, (begin, end) in enumerate(zip(begins, case.ends)):
        for tensor, target in zip((case.key, case.value), roomy):
            target[begin + room * number : end + room * number] = tensor[begin:end]
    # A sequence without queries takes each gap.
    keys = torch.tensor(case.ends, dtype=torch.int32, device="cuda") + room * shift
    keys = torch.nn.functional.pad(torch.stack((keys, keys + room), dim=1).flatten(), (1, 0))
    queries = case.lengths["cu_seqlens_q"][1:]
    queries = torch.nn.functional.pad(torch.stack((queries, queries), dim=1).flatten(), (1, 0))
    case.key, case.value = roomy
    case.lengths = {"cu_seqlens_q": queries, "cu_seqlens_k": keys}
    out, lse = case.attend(ids)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_the_choice_is_made_on_the_device(kernels, once):
    """A captured graph follows the lists that it finds when it is replayed."""
    case = Case("one", torch.bfloat16)
    ids = case.lists("scattered")
    case.attend(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.attend(ids)
    for selection in ("shared", "mixed", "scattered"):
        ids.copy_(case.lists(selection))
        graph.replay()
        case.assert_right(*captured, ids, once)


def test_both_orders_are_taken(kernels):
    """Kernels of the other order find nothing to do: they take a small share of the time."""
    from torch.profiler import ProfilerActivity, profile

    generator = torch.Generator("cuda").manual_seed(0)
    tokens = 32768
    query, key, value = (
        torch.randn(tokens, heads, 128, generator=generator, device="cuda").to(torch.bfloat16)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    lengths = {"cu_seqlens_q": offsets([tokens]), "cu_seqlens_k": offsets([tokens])}
    scattered = torch.rand(tokens, KV_HEADS, 16, generator=generator, device="cuda")
    own = torch.arange(tokens, device="cuda")[:, None, None] // BLOCK
    scattered = (scattered * (own + 1)).to(torch.int32)
    shared = scattered[torch.arange(tokens, device="cuda") // BLOCK * BLOCK]
    shares = {}
    for name, ids in (("scattered", scattered), ("shared", shared)):
        block_sparse_attention(query, key, value, ids, **lengths, backend="cuda")
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            block_sparse_attention(query, key, value, ids, **lengths, backend="cuda")
            torch.cuda.synchronize()
        times = {event.key: event.self_device_time_total for event in found.key_averages()}
        query_major = sum(time for kernel, time in times.items() if "query_major_kernel" in kernel)
        shares[name] = query_major / sum(times.values())
    # Of scattered lists too: the first tokens see so few blocks that they share them. Where other processes use the
    # GPU, launches that do nothing seem to take longer; so the check is only which order does most of the work.
    assert shares["shared"] > 0.5 > shares["scattered"], shares


def test_lists_of_some_parts_at_a_time(kernels, needs_memory):
    """Many heads over many small blocks: the inverse lists are made for one part of the queries at a time."""
    needs_memory(16)
    tokens, total, heads, width = 10_240, 500_000, 64, 64
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.empty(tokens, 16 * heads, 64, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    key, value = (
        torch.empty(total, 1, 64, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for _ in range(2)
    )
    # All blocks are in the past; no query names one twice.
    first = torch.randint(0, 7000, (tokens, heads, 1), generator=generator, device="cuda", dtype=torch.int32)
    ids = (first + 61 * torch.arange(width, dtype=torch.int32, device="cuda")) % 7600

    def attend(query, ids, keys, states, backend):
        states = (state[:keys].expand(-1, heads, -1) for state in states)
        lengths = {"cu_seqlens_q": offsets([len(query)]), "cu_seqlens_k": offsets([keys])}
        return block_sparse_attention(query, *states, ids, **lengths, block_size=64, backend=backend)

    out = attend(query, ids, total, (key, value), "cuda")
    exact = (key.double(), value.double())
    for row in (0, 1, 247, 248, 4000, 7935, 7936, 8200, tokens - 1):
        rows = slice(row, row + 1)
        expected = attend(query[rows].double(), ids[rows], total - tokens + row + 1, exact, "torch")
        assert ((out[rows] - expected).norm() / expected.norm()).item() < TOLERANCE[torch.bfloat16]
