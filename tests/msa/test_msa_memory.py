"""The `torch` backend's memory grows with the tokens, not with their square: every allocation is recorded."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    select_blocks,
    select_blocks_with_kvcache,
)

OPTIONS = {"block_size": 128, "topk": 4}


def allocations(function):
    """Bytes of the largest allocation made while `function` runs, and the most held at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest, peak = max(largest, event.nbytes()), max(peak, held)
    return largest, peak


def selection(inputs, tokens):
    case = inputs.make_varlen([tokens], **OPTIONS)
    return lambda: select_blocks(case.index_query, case.index_key, **case.lengths, **OPTIONS, backend="torch")


def forward_and_backward(inputs, tokens):
    case = inputs.make_varlen([tokens], **OPTIONS)
    # like a real selection: the own block and earlier ones
    own = torch.arange(tokens, dtype=torch.int32)[:, None, None] // 128
    block_indices = torch.where(own >= torch.arange(4), own - torch.arange(4), -1).to(torch.int32)
    block_indices = block_indices.expand(tokens, 2, 4).contiguous()
    leaves = [tensor.requires_grad_() for tensor in case.qkv]

    def call():
        out = block_sparse_attention(*leaves, block_indices, **case.lengths, block_size=128, backend="torch")
        torch.autograd.grad(out.sum(), leaves)

    return call


def indexer_loss(inputs, tokens):
    """Value and gradients over all keys, without the attention's lse."""
    case = inputs.make_varlen([tokens], **OPTIONS)
    leaves = [case.index_query.requires_grad_(), case.index_key.requires_grad_()]

    def call():
        kl = indexer_kl_loss(*leaves, case.query, case.key, None, **case.lengths, backend="torch")
        torch.autograd.grad(kl.sum(), leaves)

    return call


def cached_prefill(inputs, tokens):
    """All tokens as new ones of a cache that is just full."""
    case = inputs.make_varlen([tokens], **OPTIONS)
    where = {"cache_seqlens": torch.tensor([tokens], dtype=torch.int32), "block_size": 128, "backend": "torch"}

    def call():
        selected = select_blocks_with_kvcache(case.index_query[None], case.index_key[None], **where, topk=4)
        block_sparse_attention_with_kvcache(*(tensor[None] for tensor in case.qkv), selected, **where)

    return call


def test_the_recorder_sees_inside_operators(inputs):
    case = inputs.make_varlen([2048], **OPTIONS)
    largest, peak = allocations(
        lambda: select_blocks(case.index_query, case.index_key, **case.lengths, **OPTIONS, backend="reference")
    )
    assert largest >= 4 * 2 * 2048 * 2048, "the reference materialises every score"
    assert peak >= largest


@pytest.mark.parametrize(
    ("scenario", "tokens"),
    [(selection, 8192), (forward_and_backward, 4096), (indexer_loss, 4096), (cached_prefill, 8192)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_memory_is_linear(inputs, scenario, tokens):
    scenario(inputs, 512)()  # whatever is made once
    _, half_peak = allocations(scenario(inputs, tokens // 2))
    largest, peak = allocations(scenario(inputs, tokens))
    assert largest < tokens**2 // 2, f"{largest} bytes in one tensor: half a byte for every query and key"
    assert peak < 2.2 * half_peak, f"peaks of {half_peak} and {peak} bytes at {tokens // 2} and {tokens} tokens"


def test_decoding_memory_does_not_depend_on_the_selection(inputs):
    # one new token after 16k: attention holds its blocks' keys and values, nothing as long as the cache
    case = inputs.make_cached([16384, 16000], 1, block_size=128, topk=4, page_size=128)
    (query, key, value, _), where = case.attention("contiguous")
    block_indices = torch.arange(4, dtype=torch.int32).expand(2, 1, 2, 4).contiguous()
    largest, _ = allocations(lambda: block_sparse_attention_with_kvcache(query, key, value, block_indices, **where))
    assert largest <= 2 * 2 * 4 * 128 * 16 * 8, f"{largest} bytes for 2 rows x 2 heads x 512 keys of 16 channels"
