"""Dense attention over a cache on a GPU, each way of it against loops over rows in float64."""

import pytest
import torch

from modeling_minimax_m3.layers import cached_attention as cached

from .cached_attention_cases import CASES, by_rows, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}


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
