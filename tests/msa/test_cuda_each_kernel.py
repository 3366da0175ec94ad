"""Every kernel at the smallest sizes that have several tiles, ragged ends, empty sequences and rows without keys.

`make sanitize-kernels` runs these tests; KERNEL=backward runs only those with that word in their name. They compare
with no reference, which would take most of the time: other tests check that results are right.
"""

import math

import pytest
import torch

from modeling_minimax_m3.msa import select_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

OPS = torch.ops.minimax_m3_msa
# The released shape, which has kernels of its own on Hopper, and one that differs from it in everything.
SHAPES = {
    "released": {"dtype": torch.bfloat16, "head_dim": 128, "block_size": 128, "q_heads_per_kv": 16},
    "other": {"dtype": torch.float16, "head_dim": 64, "block_size": 64, "q_heads_per_kv": 4},
}
# (queries, keys) of each sequence
LENGTHS = [(130, 130), (0, 0), (1, 1), (37, 300), (0, 70), (9, 9)]


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


class Inputs:
    """Random inputs of the packed operators; some rows list no block, some list blocks in their future."""

    def __init__(self, dtype, head_dim, block_size, q_heads_per_kv, lengths=None, num_kv_heads=2, topk=5):
        queries, keys = zip(*(LENGTHS if lengths is None else lengths))
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to("cuda", dtype)

        self.block_size, self.scale = block_size, head_dim**-0.5
        self.index_query, self.index_key = normal(sum(queries), num_kv_heads, head_dim), normal(sum(keys), head_dim)
        self.query = normal(sum(queries), num_kv_heads * q_heads_per_kv, head_dim)
        self.key, self.value = (normal(sum(keys), num_kv_heads, head_dim) for _ in range(2))
        self.lengths = (offsets(queries), offsets(keys))
        width = -(-max(keys) // block_size) + 1
        order = torch.rand((sum(queries), num_kv_heads, width), generator=generator).argsort(-1)[..., :topk]
        count = torch.randint(0, topk + 1, (sum(queries), num_kv_heads, 1), generator=generator)
        self.block_indices = order.masked_fill(torch.arange(order.shape[-1]) >= count, -1).to("cuda", torch.int32)

    @property
    def where(self):
        return self.block_indices, *self.lengths, self.block_size, self.scale

    def forward(self):
        return OPS.block_sparse_attention(self.query, self.key, self.value, *self.where, "cuda")


def assert_repeats(call):
    """Runs a call twice; the outputs hold no NaN, and are equal."""
    first, again = call(), call()
    first, again = ((found,) if isinstance(found, torch.Tensor) else found for found in (first, again))
    for output, other in zip(first, again, strict=True):
        assert not output.isnan().any()
        assert torch.equal(output, other)
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES)
def test_selection(kernels, shape):
    case = Inputs(**SHAPES[shape])
    options = {"block_size": case.block_size, "topk": 3, "init_blocks": 1, "backend": "cuda"}
    cu_seqlens_q, cu_seqlens_k = case.lengths
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    assert_repeats(lambda: select_blocks(case.index_query, case.index_key, **lengths, **options))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(kernels, shape):
    assert_repeats(Inputs(**SHAPES[shape]).forward)


@pytest.mark.parametrize("selection", ["scattered", "half shared"])
def test_forward_of_many_queries(kernels, selection):
    """The fewest queries that may run KV-major; where lists are shared, some of them run query-major."""
    case = Inputs(**SHAPES["released"], lengths=[(2020, 2020), (0, 3), (40, 170)], num_kv_heads=1, topk=4)
    if selection == "half shared":
        rows = torch.arange(len(case.query), device="cuda")
        case.block_indices = case.block_indices[torch.where(rows % 400 < 200, rows // 8 * 8, rows)]
    assert_repeats(case.forward)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(kernels, shape):
    case = Inputs(**SHAPES[shape])
    out, lse = case.forward()
    args = (torch.ones_like(out), case.query, case.key, case.value, out, lse, *case.where, "cuda")
    assert_repeats(lambda: OPS.block_sparse_attention_backward(*args))


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_indexer_loss(kernels, shape, form):
    case = Inputs(**SHAPES[shape])
    block_indices, *where = case.where
    block_indices = block_indices if form == "sparse" else None
    states = (case.index_query, case.index_key, case.query, case.key)
    lse = OPS.attention_lse(case.query, case.key, block_indices, *where, "torch")
    options = (block_indices, *where, case.scale)
    saved_tokens = len(case.query) // 2 if form == "sparse" else 0
    assert_repeats(lambda: OPS.indexer_kl_loss(*states, lse, *options, saved_tokens, "cuda")[:2])
    _, *kept = OPS.indexer_kl_loss(*states, lse, *options, saved_tokens, "cuda")
    grad_kl = torch.ones_like(kept[0])
    assert_repeats(lambda: OPS.indexer_kl_loss_backward(grad_kl, *states, lse, *kept, *options, "cuda"))


# slots in use, left padding and new tokens of each row
CACHES = {
    "one token": ([300, 0, 1, 129], [0, 0, 0, 5], 1),
    "several tokens": ([300, 2, 140], [7, 0, 0], 3),
}


@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize("rows", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape, rows, form):
    """Selection and attention; the caches hold NaN where no token is."""
    used, leftpad, num_new = CACHES[rows]
    options, generator = SHAPES[shape], torch.Generator().manual_seed(0)
    head_dim, block_size, batch, page = options["head_dim"], options["block_size"], len(used), 16
    slots = -(-max(used) // page) * page

    def normal(*size):
        return torch.randn(size, generator=generator).to("cuda", options["dtype"])

    index_keys = normal(batch, slots, head_dim)
    keys, values = normal(batch, slots, 2, head_dim), normal(batch, slots, 2, head_dim)
    if form == "paged":
        leftpad = [0] * batch
    slot = torch.arange(slots, device="cuda")
    used, leftpad = (torch.tensor(given, dtype=torch.int32, device="cuda") for given in (used, leftpad))
    unused = (slot < leftpad[:, None]) | (slot >= used[:, None])
    where = (used, leftpad, None)
    caches = [cache.masked_fill_(unused.view(*unused.shape, *[1] * (cache.ndim - 2)), math.nan)
              for cache in (index_keys, keys, values)]  # fmt: skip
    if form == "paged":
        order = torch.randperm(batch * slots // page, generator=generator).to("cuda")
        caches = [cache.unflatten(1, (-1, page)).flatten(0, 1)[order.argsort()] for cache in caches]
        where = (used, None, order.view(batch, -1).to(torch.int32))
    query, index_query = (
        normal(batch, num_new, 2 * options["q_heads_per_kv"], head_dim),
        normal(batch, num_new, 2, head_dim),
    )
    ids = torch.stack([torch.randperm(5, generator=generator)[:4] for _ in range(batch * num_new * 2)])
    ids = ids.view(batch, num_new, 2, 4).to("cuda", torch.int32)
    assert_repeats(lambda: OPS.select_blocks_with_kvcache(index_query, caches[0], *where, block_size, 2, 1, 0, "cuda"))
    assert_repeats(
        lambda: OPS.block_sparse_attention_with_kvcache(query, *caches[1:], ids, *where, block_size, 0.1, "cuda")
    )


def test_decode_of_a_long_row():
    """More blocks than the short form of the last step takes."""
    generator = torch.Generator().manual_seed(0)
    index_key_cache = torch.randn((1, 2100 * 64, 64), generator=generator).to("cuda", torch.bfloat16)
    used = torch.tensor([2100 * 64 - 5], dtype=torch.int32, device="cuda")
    args = (index_key_cache[:, :2].unsqueeze(1), index_key_cache, used, None, None, 64, 8, 1, 1, "cuda")
    assert_repeats(lambda: OPS.select_blocks_with_kvcache(*args))


def test_structured():
    own_block = torch.arange(-3, 300, device="cuda")
    assert_repeats(lambda: OPS.structured_blocks_of(own_block, 3, 5, 2, 6, 8, 8, 1, None, "cuda"))
