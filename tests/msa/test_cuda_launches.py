"""Which kernels a call launches, by the profiler: the right ones, with no more shared memory than every GPU has."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from modeling_minimax_m3.msa import (
    StructuredPattern,
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    kernel_build,
    select_blocks,
    select_blocks_with_kvcache,
    structured_blocks_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

MOST_SHARED_MEMORY = 99 * 1024  # of a thread block on Ada and consumer Ampere GPUs
# Calls, and the folders that hold their kernels in the folder of an architecture.
CALLS = {
    "selection": ("selection",),
    "forward": ("forward_query_major", "forward_kv_major"),
    "backward": ("backward",),
    "indexer loss": ("indexer_loss",),
    "decoding": ("decode",),
    "structured": (),
}
LENGTH = 2304  # enough queries for both orders of the forward


def prepare(name, dtype, head_dim, block_size, q_heads_per_kv, topk):
    """A function that calls the operators of `name`, and as little else as can be."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    ends = torch.tensor([0, LENGTH], dtype=torch.int32, device="cuda")
    options = {"block_size": block_size, "backend": "cuda"}
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, **options}
    index_query, index_key = normal(LENGTH, 2, head_dim).requires_grad_(), normal(LENGTH, head_dim).requires_grad_()
    states = [normal(LENGTH, heads, head_dim).requires_grad_() for heads in (2 * q_heads_per_kv, 2, 2)]
    position = torch.arange(LENGTH, device="cuda")[:, None, None]
    ids = torch.rand((LENGTH, 2, LENGTH // block_size), generator=generator, device="cuda").argsort(-1)
    ids = torch.nn.functional.pad(ids[..., :topk], (0, max(0, topk - ids.shape[-1])), value=-1)
    ids = torch.where(position % 400 < 200, ids[:1], ids).to(torch.int32)  # neighbours that share, and that do not
    if name == "selection":
        return lambda: select_blocks(index_query, index_key, topk=topk, **packed)
    if name == "forward":
        return lambda: block_sparse_attention(*states, ids, **packed)
    if name == "backward":
        out = block_sparse_attention(*states, ids, **packed)
        return lambda: torch.autograd.grad(out, states, torch.ones_like(out), retain_graph=True)
    if name == "indexer loss":
        lse = block_sparse_attention(*states, ids, return_lse=True, **packed)[1]

        def loss():
            # Over all keys the gradient computes the probabilities once more; over blocks it reads saved ones.
            over_blocks = indexer_kl_loss(index_query, index_key, *states[:2], ids, lse=lse, **packed)
            over_all = indexer_kl_loss(index_query, index_key, *states[:2], None, lse=lse, **packed)
            return torch.autograd.grad(over_blocks.sum() + over_all.sum(), (index_query, index_key))

        return loss
    if name == "structured":
        return lambda: structured_blocks_of(position, 2, 0, StructuredPattern(2, 6, 8, 8, 0), backend="cuda")
    cached = {"cache_seqlens": ends[1:], **options}
    caches = [state.detach()[None] for state in (index_key, *states[1:])]

    @torch.no_grad()
    def decode():
        select_blocks_with_kvcache(index_query[None, :1], caches[0], topk=topk, **cached)
        block_sparse_attention_with_kvcache(states[0][None, :1], *caches[1:], ids[None, :1], **cached)

    return decode


def launched(call, tmp_path):
    """{name: most shared memory in bytes} of our kernels."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    if not events:
        pytest.skip("the profiler sees no kernels on this machine")
    found = {}
    for event in events:
        if "msa" in event["name"]:  # the namespace
            found[event["name"]] = max(event["args"]["shared memory"], found.get(event["name"], 0))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_those_of_the_parameter(kernels, tmp_path, name):
    """Otherwise tests of the portable kernels would test the GPU's own, or the other way round."""
    names = launched(prepare(name, torch.bfloat16, 128, 128, 16, 16), tmp_path)
    assert names
    newest = kernel_build.kernel_family(torch.cuda.get_device_capability(), CALLS[name])
    expected = {newest if kernels == "newest" else kernel_build.PORTABLE_FAMILY} - {kernel_build.PORTABLE_FAMILY}
    not_portable = {path.name for path in kernel_build.CSRC.glob("sm[0-9]*")} - {kernel_build.PORTABLE_FAMILY}
    assert {family for family in not_portable if any(family in kernel for kernel in names)} == expected, names


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_portable_kernels_fit_every_gpu(monkeypatch, tmp_path, name, dtype, head_dim, block_size):
    """With the most query heads per key/value head and the longest lists."""
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "portable")
    names = launched(prepare(name, dtype, head_dim, block_size, 16, 64), tmp_path)
    assert names
    assert not {kernel: size for kernel, size in names.items() if size > MOST_SHARED_MEMORY}
