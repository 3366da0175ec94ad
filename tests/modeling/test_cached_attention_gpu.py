"""Dense attention over a cache on a GPU, each way of it against loops over rows in float64."""

import pytest
import torch

from modeling_minimax_m3.layers import cached_attention as cached
from modeling_minimax_m3.runtime.sequence_layout import SequenceLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}


def random_case(
    used, num_new, *, leftpad=None, capacity=None, spare=0, heads=(8, 2), head_dim=64, dtype=torch.bfloat16
):
    """Query, key, value and layout. `capacity`: slots of a static cache. `spare`: slots of a buffer that nobody sees."""
    generator = torch.Generator("cuda").manual_seed(num_new + sum(used))
    batch, slots = len(used), capacity or max(used)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    query = random(batch, num_new, heads[0], head_dim)
    key, value = (random(batch, slots + spare, heads[1], head_dim)[:, :slots] for _ in range(2))
    if dtype != torch.float32:  # a mask cannot keep NaN out
        for row, length in enumerate(used):
            key[row, length:], value[row, length:] = torch.nan, torch.nan
    layout = SequenceLayout(batch, num_new, cache_seqlens=torch.tensor(used, dtype=torch.int32, device="cuda"))
    if leftpad is not None:
        layout.cache_leftpad = torch.tensor(leftpad, dtype=torch.int32, device="cuda")
    elif capacity is None and len(set(used)) == 1:
        layout.num_keys = slots
    return query, key, value, layout


def by_rows(query, key, value, layout, scaling):
    """(B, T, H_q, D) in float64, and which of the queries are no padding, (B, T)."""
    out = torch.zeros_like(query, dtype=torch.float64)
    real = torch.zeros(query.shape[:2], dtype=torch.bool, device="cuda")
    group = query.shape[2] // key.shape[2]
    leftpad = [0] * len(query) if layout.cache_leftpad is None else layout.cache_leftpad.tolist()
    for row, (start, end) in enumerate(zip(leftpad, layout.cache_seqlens.tolist())):
        keys, values = (x[row, start:end].double().repeat_interleave(group, dim=1) for x in (key, value))
        count = min(query.shape[1], end - start)
        if count <= 0:
            continue
        queries = query[row, -count:].double()
        scores = torch.einsum("thd,shd->hts", queries, keys) * scaling
        position = torch.arange(end - start - count, end - start, device="cuda")
        scores.masked_fill_(torch.arange(end - start, device="cuda") > position[:, None], -torch.inf)
        out[row, -count:] = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
        real[row, -count:] = True
    return out, real


CASES = {
    "one row": {"used": [700]},
    "growing buffer": {"used": [700, 700], "spare": 211},
    "static": {"used": [700, 700], "capacity": 1024},
    "ragged": {"used": [700, 333, 650], "capacity": 800},
    "left padding": {"used": [700, 700, 700], "leftpad": [0, 123, 640], "spare": 11},
    "nothing but padding": {"used": [700, 700], "leftpad": [0, 700]},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_new", [1, 2, 5, 16, 17, 64, 300])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_layouts(relative_error, name, num_new, dtype):
    query, key, value, layout = random_case(**CASES[name], num_new=num_new, dtype=dtype)
    out = cached.cached_attention(query, key, value, layout, 0.2)
    expected, real = by_rows(query, key, value, layout, 0.2)
    assert out.isfinite().all()
    assert relative_error(out[real], expected[real]) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 4), (16, 1), (64, 4)], ids=str)
@pytest.mark.parametrize("num_new", [1, 3, 40])
@torch.no_grad()
def test_groups_of_heads(relative_error, heads, num_new):
    query, key, value, layout = random_case([333], num_new, heads=heads, head_dim=128)
    out = cached.cached_attention(query, key, value, layout, 0.1)
    assert relative_error(out, by_rows(query, key, value, layout, 0.1)[0]) < 6e-3


@pytest.mark.parametrize("length", [64, 127, 128, 500])
@pytest.mark.parametrize("past", [0, 100, 128, 1000, 1024, 1333])
@torch.no_grad()
def test_pieces(monkeypatch, relative_error, past, length):
    """With pieces so small that a short cache has several of both kinds."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs cuDNN on Hopper")
    monkeypatch.setattr(cached, "_QUERY_PIECE", 64)
    monkeypatch.setattr(cached, "_LARGEST_QUERY_PIECE", 128)
    monkeypatch.setattr(cached, "_KEY_PIECE", 128)
    monkeypatch.setattr(cached, "_PIECE_SCORES", 2**12)
    whole, pieces = cached._whole, []
    monkeypatch.setattr(cached, "_whole", lambda *args, **kwargs: pieces.append(args) or whole(*args, **kwargs))
    used = past + length
    query, key, value, layout = random_case([used, used], length, leftpad=[0, min(past, 30)], capacity=used + 50)
    out = cached.cached_attention(query, key, value, layout, 0.2)
    expected, real = by_rows(query, key, value, layout, 0.2)
    assert relative_error(out[real], expected[real]) < 6e-3
    assert pieces or past < 128


@torch.no_grad()
def test_few_tokens_are_captured(relative_error):
    """A CUDA graph holds the call, and follows lengths that change on the device."""
    query, key, value, layout = random_case([100, 100], 2, capacity=512, dtype=torch.float16)
    key.normal_(), value.normal_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cached.cached_attention(query, key, value, layout, 0.2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cached.cached_attention(query, key, value, layout, 0.2)
    for used in ([100, 100], [2, 511], [512, 77]):
        layout.cache_seqlens.copy_(torch.tensor(used))
        graph.replay()
        assert relative_error(out, by_rows(query, key, value, layout, 0.2)[0]) < 8e-4


def test_gradients(relative_error):
    """Of a past and of new tokens, as a learned prefix has them."""
    query, key, value, layout = random_case([150, 150], 40, leftpad=[0, 30])
    states = [states.clone().requires_grad_() for states in (query, key, value)]
    exact = [states.detach().double().requires_grad_() for states in states]
    out = cached.cached_attention(*states, layout, 0.2)
    expected, _ = by_rows(*exact, layout, 0.2)
    upstream = torch.randn_like(query)
    grads = torch.autograd.grad(out, states, upstream)
    for grad, other in zip(grads, torch.autograd.grad(expected, exact, upstream.double())):
        assert relative_error(grad, other) < 1e-2
