"""`max_seqlen_q` and `max_seqlen_k`: which values they may have, and that wrong ones raise."""

import pytest
import torch

from modeling_minimax_m3.msa import block_sparse_attention, indexer_kl_loss, select_blocks


def select(case, ids, **hints):
    return select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, **hints)


def attend(case, ids, **hints):
    return block_sparse_attention(*case.qkv, ids, **case.lengths, block_size=4, **hints)


def loss(case, ids, **hints):
    states = (case.index_query, case.index_key, case.query, case.key)
    return indexer_kl_loss(*states, ids, **case.lengths, block_size=4, **hints)


operators = pytest.mark.parametrize("operator", [select, attend, loss])


@pytest.fixture
def call(inputs):
    """A case whose sequences have at most 6 queries and 9 keys, and block lists for it."""
    case = inputs.make_varlen([5, 9, 3], [5, 6, 0], block_size=4)
    return case, case.random_blocks()


@operators
@pytest.mark.parametrize(
    "hints", [{"max_seqlen_q": 6}, {"max_seqlen_k": 9}, {"max_seqlen_q": 10**9, "max_seqlen_k": 50}]
)
def test_upper_bounds_change_nothing(call, operator, hints):
    assert torch.equal(operator(*call, **hints), operator(*call))


@operators
@pytest.mark.parametrize(("name", "longest"), [("max_seqlen_q", 6), ("max_seqlen_k", 9)])
def test_wrong_hints_are_refused(call, operator, name, longest):
    for hint in (longest - 1, 0):
        with pytest.raises(ValueError, match=rf"`{name}` must be .* {longest} by `cu_seqlens{name[-2:]}`, got {hint}"):
            operator(*call, **{name: hint})
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got -5"):
        operator(*call, **{name: -5})
    for hint in ("x", True, 9.0, torch.tensor(9)):
        with pytest.raises(TypeError, match=f"`{name}` must be an int"):
            operator(*call, **{name: hint})


@operators
def test_lengths_that_are_not_on_the_host_are_not_read(call, operator):
    case, ids = call
    for name in ("index_query", "index_key", "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"):
        setattr(case, name, getattr(case, name).to("meta"))
    operator(case, ids.to("meta"), max_seqlen_q=1, max_seqlen_k=1)
    with pytest.raises(ValueError, match="`max_seqlen_k`"):
        operator(case, ids.to("meta"), max_seqlen_k=-1)


def test_no_sequences():
    offsets, empty = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 2, 4)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    assert select_blocks(empty, empty[:, 0], **lengths, max_seqlen_q=0, max_seqlen_k=0).shape == (0, 2, 16)


def test_a_graph_may_compute_them(call):
    """Without a guard on the value: lengths that differ are one graph."""
    torch._dynamo.reset()
    case, ids = call

    def hinted(query, key, value, cu_seqlens_q, cu_seqlens_k):
        return block_sparse_attention(
            query, key, value, ids, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_size=4,
            max_seqlen_q=cu_seqlens_q.diff().max().item(),
        )  # fmt: skip

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(hinted, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*case.qkv, *case.lengths.values()), attend(case, ids))
