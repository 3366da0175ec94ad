"""The operators as `torch.library` custom ops: schemas, fake kernels, autograd, whole graphs under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    select_blocks,
    select_blocks_with_kvcache,
)

pytestmark = pytest.mark.compatibility

OPS = torch.ops.minimax_m3_msa
BACKENDS = ("reference", "torch")


def op_calls(inputs, backend, requires_grad=False, dtype=torch.float32):
    """Arguments for every op, as {name: list of positional arguments}."""
    case = inputs.make_varlen([20, 9, 4], [20, 5, 0], block_size=4, q_heads_per_kv=3, dtype=dtype)
    block_indices = case.random_blocks()
    selection = inputs.op_arguments(
        select_blocks, case.index_query, case.index_key, **case.lengths, **case.options, backend=backend
    )
    leaves = (tensor.clone().requires_grad_(requires_grad) for tensor in case.qkv)
    attention = inputs.op_arguments(
        block_sparse_attention, *leaves, block_indices, **case.lengths, block_size=4, backend=backend
    )
    states, where = [tensor.detach() for tensor in attention[:3]], attention[3:]
    out, lse = OPS.block_sparse_attention(*states, *where)
    calls = {
        "select_blocks": [selection],
        "block_sparse_attention": [attention],
        "block_sparse_attention_backward": [(torch.ones_like(out), *states, out, lse, *where)],
        "select_blocks_with_kvcache": [],
        "block_sparse_attention_with_kvcache": [],
    }
    cached = inputs.make_cached([20, 9], 2, leftpad=[0, 3], block_size=4, dtype=dtype)
    for form in ("contiguous", "paged"):
        for function, (tensors, options) in (
            (select_blocks_with_kvcache, cached.selection(form)),
            (block_sparse_attention_with_kvcache, cached.attention(form)),
        ):
            args = inputs.op_arguments(function, *tensors, **options, backend=backend)
            calls[function.__name__].append(args)
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "select_blocks",
        "block_sparse_attention",
        "block_sparse_attention_backward",
        "select_blocks_with_kvcache",
        "block_sparse_attention_with_kvcache",
    ],
)
def test_opcheck(inputs, name, backend):
    for args in op_calls(inputs, backend, requires_grad=True)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_kernels_agree_with_the_real_ones(inputs, backend, dtype):
    for name, calls in op_calls(inputs, backend, dtype=dtype).items():
        for args in calls:
            real = getattr(OPS, name)(*args)
            with FakeTensorMode() as mode:
                fake = getattr(OPS, name)(
                    *(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
                )
            for got, expected in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (fake, real)), strict=True):
                assert got.shape == expected.shape, name
                assert got.dtype == expected.dtype, name
                assert got.stride() == expected.stride(), name


def attention_of_selection(index_query, index_key, query, key, value, cu_seqlens_q, cu_seqlens_k):
    """Both operators in a row, with some work before and after for the compiler to fuse."""
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    selected = select_blocks(index_query * 2, index_key, **lengths, block_size=8, topk=3, max_seqlen_k=len(key))
    out, lse = block_sparse_attention(
        query.sin(), key, value * 2, selected, **lengths, block_size=8, return_lse=True, max_seqlen_k=len(key)
    )
    return out.cos(), lse


@pytest.mark.parametrize("dynamic", ["marked lengths", "static"])
def test_whole_graph_with_gradients(inputs, dynamic):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_of_selection, fullgraph=True, backend=graphs)
    for lengths in ([40, 7], [90, 33], [64, 128]):
        case = inputs.make_varlen(lengths, block_size=8, seed=lengths[0])
        leaves = [tensor.clone().requires_grad_() for tensor in case.qkv]
        compiled_leaves = [tensor.clone().requires_grad_() for tensor in case.qkv]
        if dynamic == "marked lengths":
            for tensor in (case.index_query, case.index_key, *compiled_leaves):
                torch._dynamo.mark_dynamic(tensor, 0)
        out, lse = attention_of_selection(case.index_query, case.index_key, *leaves, *case.lengths.values())
        compiled_out, compiled_lse = compiled(
            case.index_query, case.index_key, *compiled_leaves, *case.lengths.values()
        )
        assert inputs.relative_error(compiled_out, out) < 1e-6
        torch.testing.assert_close(compiled_lse, lse)
        out.square().sum().backward()
        compiled_out.square().sum().backward()
        for leaf, compiled_leaf in zip(leaves, compiled_leaves):
            assert inputs.relative_error(compiled_leaf.grad, leaf.grad) < 1e-6
    if dynamic == "marked lengths":
        assert graphs.frame_count == 1, "lengths that are marked dynamic recompiled"


def test_whole_graph_of_a_decoding_step(inputs):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def step(index_query, index_key, query, key, value, cache_seqlens, cache_leftpad):
        where = {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad}
        selected = select_blocks_with_kvcache(index_query, index_key, **where, block_size=8, topk=3)
        return block_sparse_attention_with_kvcache(query + 0, key, value, selected, **where, block_size=8) * 2

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for newest in range(3):
        case = inputs.make_cached([30, 17], 1, leftpad=[2, 15], spare_slots=4 - newest, seed=newest)
        cache = case.contiguous
        args = (case.index_query, cache["index_key"], case.query, cache["key"], cache["value"])
        where = cache["where"]
        where = (where["cache_seqlens"] - newest, where["cache_leftpad"])
        with torch.no_grad():
            args = [tensor[:, :36] if tensor.shape[1] > 36 else tensor for tensor in args]
            assert inputs.relative_error(compiled(*args, *where), step(*args, *where)) < 1e-6
    assert graphs.frame_count <= 2


def test_no_graph_break_is_hidden(inputs):
    torch._dynamo.reset()
    case = inputs.make_varlen([20, 9], block_size=8)
    explanation = torch._dynamo.explain(attention_of_selection)(
        case.index_query, case.index_key, *case.qkv, *case.lengths.values()
    )
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


def test_shape_errors_surface_while_compiling(inputs):
    torch._dynamo.reset()
    case = inputs.make_varlen([20], block_size=8)
    compiled = torch.compile(attention_of_selection, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="index_query"):
        compiled(case.index_query[0], case.index_key, *case.qkv, *case.lengths.values())


def test_autocast_and_inference_mode(inputs):
    case = inputs.make_varlen([20], block_size=8)
    block_indices = case.random_blocks()
    plain = block_sparse_attention(*case.qkv, block_indices, **case.lengths, block_size=8)
    with torch.inference_mode():
        inference = block_sparse_attention(*case.qkv, block_indices, **case.lengths, block_size=8)
    assert torch.equal(inference, plain)
    # fp32 scores are a promise, so autocast must not reach inside the operators
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = block_sparse_attention(*case.qkv, block_indices, **case.lengths, block_size=8)
    assert automatic.dtype == torch.float32
    assert inputs.relative_error(automatic, plain) < 1e-6


def test_autocast_keeps_the_selection(inputs):
    case = inputs.make_varlen([200], block_size=1, topk=8)
    call = {**case.lengths, **case.options}
    plain = select_blocks(case.index_query, case.index_key, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select_blocks(case.index_query, case.index_key, **call), plain)
