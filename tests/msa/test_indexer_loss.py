"""`indexer_kl_loss`: value and gradients against loops over rows, layouts, registration, dispatch."""

import math
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_minimax_m3.msa import (
    backends,
    block_sparse_attention,
    cuda,
    extension,
    indexer_kl_loss,
    indexer_loss,
)
from modeling_minimax_m3.msa.portable import tiles
from modeling_minimax_m3.msa.reference import AttentionLseArgs, IndexerKLLossArgs, IndexerKLLossBackwardArgs

from .pretended_gpu import on_device

OPS = torch.ops.minimax_m3_msa
BACKENDS = ("reference", "torch")

# (key lengths, query lengths): gaps without queries, sequences that have a past, several lengths of the last block.
LAYOUTS = {
    "one": ([37], None),
    "past": ([50, 16], [9, 16]),
    "gaps": ([5, 33, 7, 20], [0, 33, 0, 11]),
    "short": ([1, 15, 16, 17], None),
    "nothing": ([0, 4], [0, 0]),
}


def by_rows(case, block_indices, block_size, softmax_scale=None, index_scale=None):
    """The divergence of every row in float64, one row and key at a time; differentiable in the index states."""
    softmax_scale = case.query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    index_scale = case.index_query.shape[-1] ** -0.5 if index_scale is None else index_scale
    num_heads = case.index_query.shape[1]
    q_heads_per_kv = case.query.shape[1] // num_heads
    rows = []
    for sequence in range(len(case.cu_seqlens_q) - 1):
        first_q, end_q = case.cu_seqlens_q[sequence : sequence + 2].tolist()
        first_k, end_k = case.cu_seqlens_k[sequence : sequence + 2].tolist()
        for i in range(first_q, end_q):
            position = end_k - first_k - (end_q - i)
            for head in range(num_heads):
                seen = range(position + 1)
                if block_indices is not None:
                    blocks = set(block_indices[i, head].tolist())
                    seen = [s for s in seen if s // block_size in blocks]
                if not seen:
                    rows.append(torch.zeros((), dtype=torch.float64))
                    continue
                keys = torch.tensor(seen) + first_k
                teacher = 0.0
                for member in range(head * q_heads_per_kv, (head + 1) * q_heads_per_kv):
                    logits = case.key[keys, head].double() @ case.query[i, member].double() * softmax_scale
                    teacher = teacher + logits.softmax(0).detach() / q_heads_per_kv
                logits = case.index_key[keys].double() @ case.index_query[i, head].double() * index_scale
                rows.append((teacher * (teacher.log() - logits.log_softmax(0))).sum())
    return torch.stack(rows).view(-1, num_heads) if rows else torch.zeros(0, num_heads, dtype=torch.float64)


def call(case, block_indices, **kwargs):
    states = (case.index_query, case.index_key, case.query, case.key)
    return indexer_kl_loss(*states, block_indices, **case.lengths, block_size=case.block_size, **kwargs)


def with_grad(case):
    case.index_query.requires_grad_()
    case.index_key.requires_grad_()
    return case.index_query, case.index_key


@pytest.mark.parametrize("keys", ["blocks", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_are_those_of_the_rows(inputs, backend, layout, keys):
    case = inputs.make_varlen(*LAYOUTS[layout], q_heads_per_kv=3, index_dim=8, dtype=torch.float64)
    block_indices = case.random_blocks() if keys == "blocks" else None
    leaves = with_grad(case)
    expected = by_rows(case, block_indices, case.block_size)
    weights = case.randn_like(expected)
    kl = call(case, block_indices, backend=backend)
    assert kl.dtype == torch.float64
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)
    if kl.numel() > 0:
        expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
        for grad, expected_grad in zip(torch.autograd.grad((kl * weights).sum(), leaves), expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keys", ["blocks", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(inputs, backend, keys):
    case = inputs.make_varlen([11, 6], [7, 6], block_size=4, head_dim=5, index_dim=3, dtype=torch.float64)
    block_indices = case.random_blocks() if keys == "blocks" else None

    def loss(index_query, index_key):
        states = (index_query, index_key, case.query, case.key)
        return indexer_kl_loss(*states, block_indices, **case.lengths, block_size=4, backend=backend)

    assert torch.autograd.gradcheck(loss, with_grad(case))


@pytest.mark.parametrize("keys", ["blocks", "all"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_precision(inputs, backend, dtype, tolerance, keys):
    case = inputs.make_varlen([150, 40], [90, 40], block_size=16, topk=4, dtype=dtype)
    block_indices = case.random_blocks() if keys == "blocks" else None
    leaves = with_grad(case)
    kl = call(case, block_indices, backend=backend)
    grads = torch.autograd.grad(kl.sum(), leaves)
    case.index_query, case.index_key = (leaf.detach().double() for leaf in leaves)
    exact_leaves = with_grad(case)
    expected = by_rows(case, block_indices, 16)
    assert kl.dtype == torch.float32
    assert inputs.relative_error(kl, expected) < 1e-5  # of the inputs as they are, whatever their dtype
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), exact_leaves)):
        assert grad.dtype == dtype
        assert inputs.relative_error(grad, expected_grad) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_of_the_attention_gives_the_same(inputs, backend):
    case = inputs.make_varlen([50, 16], [9, 16], dtype=torch.float64)
    block_indices = case.random_blocks()
    options = {"block_size": case.block_size, "softmax_scale": 0.3, "backend": backend}
    _, lse = block_sparse_attention(*case.qkv, block_indices, **case.lengths, **options, return_lse=True)
    assert (lse == -math.inf).any(), "an empty row is among them"
    given = call(case, block_indices, lse=lse, softmax_scale=0.3, index_scale=0.7, backend=backend)
    torch.testing.assert_close(given, call(case, block_indices, softmax_scale=0.3, index_scale=0.7, backend=backend))
    expected = by_rows(case, block_indices, case.block_size, softmax_scale=0.3, index_scale=0.7)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_are_all_blocks(inputs, backend):
    case = inputs.make_varlen([40, 23], [40, 10], topk=3)
    every_block = torch.arange(3, dtype=torch.int32).expand(50, 2, 3).contiguous()
    torch.testing.assert_close(call(case, None, backend=backend), call(case, every_block, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indexer_that_repeats_the_attention_has_no_divergence(inputs, backend):
    case = inputs.make_varlen([60], num_kv_heads=1, q_heads_per_kv=1, dtype=torch.float64)
    leaves = [case.query.clone().requires_grad_(), case.key[:, 0].clone().requires_grad_()]
    for block_indices in (case.random_blocks(), None):
        kl = indexer_kl_loss(
            *leaves, case.query, case.key, block_indices, **case.lengths, block_size=16, backend=backend
        )
        assert kl.abs().max() < 1e-12
        for grad in torch.autograd.grad(kl.sum(), leaves):
            assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_gets_no_gradient(inputs, backend):
    case = inputs.make_varlen([30])
    with_grad(case)
    case.query.requires_grad_()
    case.key.requires_grad_()
    lse = torch.zeros(30, 4, requires_grad=True)
    call(case, None, lse=lse, backend=backend).sum().backward()
    assert case.query.grad is None and case.key.grad is None and lse.grad is None
    assert case.index_query.grad.norm() > 0 and case.index_key.grad.norm() > 0


@pytest.mark.parametrize("keys", ["blocks", "all"])
def test_large_scores_stay_finite(inputs, keys):
    case = inputs.make_varlen([60], topk=2)
    block_indices = case.random_blocks() if keys == "blocks" else None
    case.query, case.index_query = case.query * 200, case.index_query * 200
    leaves = with_grad(case)
    expected = by_rows(case, block_indices, case.block_size)
    # Probabilities that underflow in float64 leave 0 * -inf in the loops.
    expected = expected.nan_to_num(0.0)
    kl = call(case, block_indices, backend="torch")
    assert kl.isfinite().all() and kl.max() > 100
    reference = call(case, block_indices, backend="reference")
    assert inputs.relative_error(kl, reference) < 1e-5
    assert inputs.relative_error(kl[expected > 0], expected[expected > 0]) < 1e-4
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(kl.sum(), leaves))


def test_tiles_of_every_size_agree(inputs, monkeypatch):
    case = inputs.make_varlen([300, 40], [260, 40], topk=5)
    leaves = with_grad(case)
    for block_indices in (case.random_blocks(), None):
        kl = call(case, block_indices, backend="torch")
        grads = torch.autograd.grad(kl.sum(), leaves)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "ATTENTION_TILE", 2**9)
            patch.setattr(tiles, "DENSE_KEYS", 24)
            tiled = call(case, block_indices, backend="torch")
            tiled_grads = torch.autograd.grad(tiled.sum(), leaves)
        torch.testing.assert_close(tiled, kl)
        for tiled_grad, grad in zip(tiled_grads, grads):
            assert inputs.relative_error(tiled_grad, grad) < 1e-5


def test_repeats_bit_for_bit_and_reads_nothing_uninitialised(inputs, poisoned_empty):
    case = inputs.make_varlen([5, 70, 7], [0, 70, 3])
    leaves = with_grad(case)
    for block_indices in (case.random_blocks(), None):
        runs = []
        for _ in range(2):
            kl = call(case, block_indices, backend="torch")
            runs.append((kl, *torch.autograd.grad(kl.sum(), leaves)))
        assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(inputs, backend):
    case = inputs.make_varlen([40])
    block_indices = case.random_blocks()
    expected = call(case, block_indices, backend=backend)
    wide = {name: torch.nan_to_num(torch.full((80, 6, 20), float("nan")), 7.0) for name in ("iq", "q", "k")}
    case.index_query = wide["iq"][::2, 1:3, 2:18].copy_(case.index_query)
    case.query = wide["q"][::2, :4, 2:18].copy_(case.query)
    case.key = wide["k"][1::2, 3:5, :16].copy_(case.key)
    case.index_key = torch.zeros(40, 32)[:, 16:].copy_(case.index_key)
    torch.testing.assert_close(call(case, block_indices, backend=backend), expected)


@pytest.mark.parametrize("keys", ["blocks", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(inputs, backend, keys):
    case = inputs.make_varlen([20, 9, 4], [20, 5, 0], block_size=4, q_heads_per_kv=3)
    block_indices = case.random_blocks() if keys == "blocks" else None
    where = (block_indices, *case.lengths.values(), 4)
    lse_args = (case.query, case.key, *where, 0.25, backend)
    torch.library.opcheck(OPS.attention_lse.default, lse_args)
    lse = OPS.attention_lse(*lse_args)
    states = (case.index_query, case.index_key, case.query, case.key, lse)
    kl, index_lse, saved = OPS.indexer_kl_loss(*states, *where, 0.25, 0.5, 0, backend)
    backward_args = (torch.ones_like(kl), *states, index_lse, saved, *where, 0.25, 0.5, backend)
    torch.library.opcheck(OPS.indexer_kl_loss_backward.default, backward_args)
    leaves = [state.clone().requires_grad_() for state in states[:2]]
    torch.library.opcheck(OPS.indexer_kl_loss.default, (*leaves, *states[2:], *where, 0.25, 0.5, 0, backend))


@pytest.mark.compatibility
@pytest.mark.parametrize("keys", ["blocks", "blocks, with room for probabilities", "all"])
def test_whole_graph_with_gradients(inputs, keys, monkeypatch):
    if "room" in keys:
        monkeypatch.setattr(indexer_loss, "_is_for_extension", lambda *args: True)
        # 100 tokens, of 2 x 3 blocks of 8
        monkeypatch.setattr(cuda.indexer_loss, "MAX_SAVED_BYTES", 2 * 2 * 3 * 8 * 100)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(index_query, index_key, query, key, block_indices, cu_seqlens_q, cu_seqlens_k):
        lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": len(key)}
        kl = indexer_kl_loss(index_query * 2, index_key.sin(), query, key, block_indices, **lengths, block_size=8)
        return kl.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for lengths in ([40, 7], [90, 33]):
        case = inputs.make_varlen(lengths, block_size=8)
        block_indices = None if keys == "all" else case.random_blocks()
        leaves = with_grad(case)
        args = (*leaves, case.query, case.key, block_indices, *case.lengths.values())
        expected, value = loss(*args), compiled(*args)
        torch.testing.assert_close(value, expected)
        for grad, expected_grad in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)):
            assert inputs.relative_error(grad, expected_grad) < 1e-6


def test_autocast_does_not_reach_inside(inputs):
    case = inputs.make_varlen([60])
    plain = call(case, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(case, None), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index_key": torch.zeros(20, 5)}, ValueError, "`index_key`.*16"),
        ({"query": torch.zeros(20, 3, 16)}, ValueError, "multiple.*3 and 2"),
        ({"key": torch.zeros(20, 3, 16)}, ValueError, "`key`.*20, 2, 16"),
        ({"key": torch.zeros(20, 2, 16).double()}, TypeError, "`key`.*float32.*float64"),
        ({"lse": torch.zeros(20, 2)}, ValueError, "`lse`.*20, 4"),
        ({"lse": torch.zeros(20, 4).half()}, TypeError, "`lse`.*float32.*float16"),
        ({"block_indices": torch.zeros(20, 4, 3, dtype=torch.int32)}, ValueError, "`block_indices`.*20, 2"),
        ({"block_indices": torch.zeros(20, 2, 3, dtype=torch.int32)}, ValueError, "twice"),
        ({"cu_seqlens_k": torch.tensor([0, 19], dtype=torch.int32)}, ValueError, "`cu_seqlens_k`.*20"),
        ({"index_scale": float("nan")}, ValueError, "`index_scale`.*finite"),
        ({"softmax_scale": "1"}, TypeError, "`softmax_scale`"),
        ({"block_size": 0}, ValueError, "`block_size`"),
        ({"backend": "fast"}, ValueError, "`backend`"),
        ({"backend": "cuda"}, NotImplementedError, "CUDA device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(inputs, change, error, message):
    case = inputs.make_varlen([20])
    arguments = {
        "index_query": case.index_query,
        "index_key": case.index_key,
        "query": case.query,
        "key": case.key,
        "block_indices": None,
        **case.lengths,
    }
    with pytest.raises(error, match=message):
        indexer_kl_loss(**arguments | change)


# --- which backend runs ------------------------------------------------------------------------------------------


def loss_args(q_heads_per_kv=16, topk=16, blocks=True, index_dim=128):
    """Arguments that the kernels take, but for what is changed."""
    tensors = {
        "index_query": on_device(8, 2, index_dim),
        "index_key": on_device(8, index_dim),
        "query": on_device(8, 2 * q_heads_per_kv, 128),
        "key": on_device(8, 2, 128),
        "lse": on_device(8, 2 * q_heads_per_kv, dtype=torch.float32),
        "block_indices": on_device(8, 2, topk, dtype=torch.int32) if blocks else None,
    }
    options = {"block_size": 128, "softmax_scale": 0.1, "index_scale": 0.1}
    return IndexerKLLossArgs(**tensors, cu_seqlens_q=None, cu_seqlens_k=None, **options)


def lse_args(**changed):
    loss = loss_args(**changed)
    return AttentionLseArgs(loss.query, loss.key, loss.block_indices, None, None, loss.block_size, 0.1)


def backward_args(**changed):
    index_lse = on_device(8, 2, dtype=torch.float32)
    return IndexerKLLossBackwardArgs(loss_args(**changed), grad_kl=index_lse, index_lse=index_lse)


LOSS_OPERATORS = {
    "attention_lse": (indexer_loss.ATTENTION_LSE, lse_args),
    "indexer_kl_loss": (indexer_loss.INDEXER_KL_LOSS, loss_args),
    "indexer_kl_loss_backward": (indexer_loss.INDEXER_KL_LOSS_BACKWARD, backward_args),
}


@pytest.mark.parametrize("name", LOSS_OPERATORS)
def test_what_the_kernels_support(monkeypatch, name):
    monkeypatch.setattr(extension, "device_reason", lambda index: None)
    operator, args = LOSS_OPERATORS[name]
    assert operator.unsupported(args()) is None
    assert operator.unsupported(args(blocks=False)) is None
    assert "64 blocks" in operator.unsupported(args(topk=65))
    assert operator.unsupported(args(q_heads_per_kv=3)).endswith("they are 3")
    if name != "attention_lse":
        assert operator.unsupported(args(index_dim=64)) is None
        assert "96 for `index_query`" in operator.unsupported(args(index_dim=96))


@pytest.mark.parametrize("name", ["indexer_kl_loss", "indexer_kl_loss_backward"])
def test_a_binary_without_the_kernel_is_not_taken(monkeypatch, name):
    class Binary:
        select_blocks = None

    monkeypatch.setattr(extension, "device_reason", lambda index: None)
    monkeypatch.setattr(extension, "load", lambda build: None)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(torch.ops, "minimax_m3_msa_cuda", Binary)
    operator, args = LOSS_OPERATORS[name][0], LOSS_OPERATORS[name][1]()
    with pytest.warns(UserWarning, match="no kernel"):
        assert backends.resolve_backend("auto", operator, args) == "torch"
    with pytest.raises(NotImplementedError, match="no kernel"):
        backends.resolve_backend("cuda", operator, args)
    with torch.library._scoped_library("minimax_m3_test_of_old_binaries", "DEF") as library:
        library.define("old(Tensor query) -> Tensor")
        library.define("now(Tensor query, Tensor(a!) saved_probs) -> Tensor")
        library.define("spelled_out(Tensor query, Tensor(a!) saved_probabilities) -> Tensor")
        operators = torch.ops.minimax_m3_test_of_old_binaries
        monkeypatch.setattr(Binary, name, operators.old, raising=False)
        with pytest.raises(NotImplementedError, match="too old"):
            backends.resolve_backend("cuda", operator, args)
        for known in (operators.now, operators.spelled_out):
            monkeypatch.setattr(Binary, name, known)
            assert backends.resolve_backend("auto", operator, args) == "cuda"


def test_what_is_saved_for_the_gradient_is_bounded():
    """16 KB per token of the released model, and 1 GiB in all."""
    saved = {tokens: cuda.saved_tokens(torch.empty((tokens, 4, 16), device="meta"), 128) for tokens in (0, 700, 2**17)}
    assert saved == {0: 0, 700: 700, 2**17: 2**16}
    assert cuda.saved_tokens(torch.empty((700, 4, 0), device="meta"), 128) == 700


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_fill_the_saved_probabilities_with_nan(inputs, backend):
    """A graph that was traced for the extension makes room for them."""
    case = inputs.make_varlen([20], block_size=4)
    states = (case.index_query, case.index_key, case.query, case.key)
    where = (case.random_blocks(), *case.lengths.values(), 4)
    lse = OPS.attention_lse(*states[2:], *where, 0.25, backend)
    saved = OPS.indexer_kl_loss(*states, lse, *where, 0.25, 0.5, 7, backend)[2]
    assert saved.shape[0] == 7
    assert saved.isnan().all()


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_fake_tensors_build_and_load_nothing(monkeypatch, backend):
    """Nor does anything read their addresses, which they do not have."""
    monkeypatch.setattr(extension, "load", lambda build: pytest.fail("built") if build else "not there")
    with torch._subclasses.FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        states = [
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((8, 2, 64), (8, 64), (8, 4, 64))
        ]
        key, ids = states[2][:, :2], torch.empty((8, 2, 3), dtype=torch.int32, device="cuda")
        offsets = torch.empty(2, dtype=torch.int32, device="cuda")
        leaves = [state.requires_grad_() for state in states[:2]]
        kl = indexer_kl_loss(
            *leaves, states[2], key, ids, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_k=8, backend=backend
        )
        assert kl.shape == (8, 2)
