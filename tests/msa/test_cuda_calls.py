"""Calls of the operators on a GPU: opcheck, streams, devices, CUDA graphs, torch.compile, results that repeat."""

import pytest
import torch

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    explain,
    select_blocks,
    select_blocks_with_kvcache,
)

from .cases import op_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

DTYPES = [torch.bfloat16, torch.float16]
GEOMETRIES = [(head_dim, block_size) for head_dim in (128, 64) for block_size in (128, 64)]
FORMS = ("contiguous", "paged")
RAGGED = ([129, 1, 640, 127, 1000], None)


def calls(gpu, head_dim=128, block_size=128, dtype=torch.bfloat16):
    """Every operator's arguments, by its name among `torch.ops.minimax_m3_msa`."""
    case = gpu.packed(([300, 129], None), dtype, head_dim, q_heads_per_kv=16)
    options = {**case.lengths, "block_size": block_size, "backend": "cuda"}
    block_indices = case.random_blocks(2, block_size)
    found = [
        (select_blocks, (case.index_query, case.index_key), {**options, "topk": 2}),
        (block_sparse_attention, (*case.qkv, block_indices), {**options, "softmax_scale": 0.1}),
    ]
    cached = gpu.cached([300, 40], 2, head_dim=head_dim, block_size=block_size, dtype=dtype, q_heads_per_kv=16)
    (index_states, selection), (states, attention) = cached.selection("paged"), cached.attention("paged")
    found += [
        (select_blocks_with_kvcache, index_states, {**selection, "topk": 2, "backend": "cuda"}),
        (block_sparse_attention_with_kvcache, states, {**attention, "softmax_scale": 0.1, "backend": "cuda"}),
    ]
    return {function.__name__: op_arguments(function, *tensors, **options) for function, tensors, options in found}


def outputs(name, args):
    result = getattr(torch.ops.minimax_m3_msa, name)(*args)
    return (result,) if isinstance(result, torch.Tensor) else result


PACKED = ("select_blocks", "block_sparse_attention")
OPERATORS = (*PACKED, "select_blocks_with_kvcache", "block_sparse_attention_with_kvcache")


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(gpu, name):
    torch.library.opcheck(getattr(torch.ops.minimax_m3_msa, name).default, calls(gpu)[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, block_size", GEOMETRIES)
@pytest.mark.parametrize("name", OPERATORS)
def test_repeated_calls_agree_bit_for_bit(kernels, gpu, once, name, head_dim, block_size, dtype):
    args = once(lambda: calls(gpu, head_dim, block_size, dtype))[name]
    first = outputs(name, args)
    assert not any(output.isnan().any() for output in first), "NaN would equal nothing"
    for _ in range(5):
        assert all(torch.equal(again, before) for again, before in zip(outputs(name, args), first))


@pytest.mark.parametrize("name", OPERATORS)
def test_graph_replay(kernels, gpu, name):
    """A captured call follows new values in its tensors, the lengths of a cache among them."""
    args = list(calls(gpu)[name])
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


def test_a_long_chunk_is_captured(gpu):
    case = gpu.cached([300, 140], 40, leftpad=[0, 3])
    args, options = case.selection("contiguous")
    select_blocks_with_kvcache(*args, **options, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks_with_kvcache(*args, **options, backend="cuda")
    options["cache_seqlens"].sub_(9)
    graph.replay()
    assert torch.equal(captured, select_blocks_with_kvcache(*args, **options, backend="cuda"))


@pytest.mark.parametrize("name", OPERATORS)
def test_calls_run_on_the_current_stream(kernels, gpu, name):
    args = list(calls(gpu)[name])
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
def test_tensors_on_another_than_the_current_device(gpu, name):
    args = calls(gpu)[name]
    elsewhere = [arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg for arg in args]
    for found, expected in zip(outputs(name, elsewhere), outputs(name, args)):
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.to("cuda:0"), expected)


def test_auto_takes_the_extension(gpu):
    case, cached = gpu.packed(RAGGED), gpu.cached([300, 40], 2)
    selection, options = cached.selection("paged")
    attention, attention_options = cached.attention("paged")
    block_indices = case.random_blocks(2, 128)
    found = (
        explain(select_blocks, case.index_query, case.index_key, **case.lengths),
        explain(block_sparse_attention, *case.qkv, block_indices, **case.lengths),
        explain(select_blocks_with_kvcache, *selection, **options),
        explain(block_sparse_attention_with_kvcache, *attention, **attention_options),
    )
    assert {explanation.backend for explanation in found} == {"cuda"}
    assert [explanation.kernel.partition(", ")[2] for explanation in found] == ["packed", "packed", "decode", "decode"]
    args = (case.index_query.float(), case.index_key.float())
    expected = select_blocks(*args, **case.lengths, backend="torch")
    assert torch.equal(select_blocks(*args, **case.lengths), expected), "float32 runs elsewhere"


def test_whole_graph_under_compile(gpu):
    torch._dynamo.reset()

    def step(case):
        selected = select_blocks(case.index_query * 2, case.index_key, **case.lengths, topk=4)
        return block_sparse_attention(case.query + 1, case.key, case.value, selected, **case.lengths) * 2

    case = gpu.packed(RAGGED)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(case), step(case))


@pytest.mark.parametrize("form", FORMS)
def test_whole_graph_with_a_cache(gpu, form):
    torch._dynamo.reset()
    case = gpu.cached([300, 129], 1)
    (index_query, index_key_cache), options = case.selection(form)
    (query, key_cache, value_cache, _), attention_options = case.attention(form)

    def step(index_query, query):
        selected = select_blocks_with_kvcache(index_query * 2, index_key_cache, **options, backend="cuda")
        return block_sparse_attention_with_kvcache(
            query + 1, key_cache, value_cache, selected, **attention_options, backend="cuda"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index_query, query), step(index_query, query))
