"""Dense attention over a cache on a CPU: its three ways on a GPU, with plain loops in place of the kernels."""

import itertools

import pytest
import torch

from modeling_minimax_m3.layers import cached_attention as cached

from .cached_attention_cases import CASES, by_rows, random_case


def attend(query, key, value, scaling, is_causal):
    """Out (n, H_q, D) and lse (H_q, n); with `is_causal`, the last query sees all keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(group, dim=1) for states in (key, value))
    scores = torch.einsum("thd,shd->hts", query.double(), key) * scaling
    if is_causal:
        own = torch.arange(len(key) - len(query), len(key))[:, None]
        scores.masked_fill_(torch.arange(len(key)) > own, -torch.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), value)
    return out.to(query.dtype), scores.logsumexp(-1).float()


def flash(query, key, value, offsets, longest, scaling, is_causal, dropout=0.0, seqused_k=None):
    out, lse = torch.zeros_like(query), torch.full((query.shape[1], len(query)), -torch.inf)
    starts, ends = offsets[1][:-1], offsets[1][1:]
    if seqused_k is not None:
        ends = starts + seqused_k
    for (first, last), start, end in zip(itertools.pairwise(offsets[0].tolist()), starts.tolist(), ends.tolist()):
        if last > first and end > start:
            assert last - first <= longest[0] and end - start <= longest[1] and end <= len(key)
            result = attend(query[first:last], key[start:end], value[start:end], scaling, is_causal)
            out[first:last], lse[:, first:last] = result
    return out, lse


@pytest.fixture
def calls_of_kernels(monkeypatch):
    """Lists the calls of each kernel. Pieces are so small that a short cache has several."""
    calls = []
    monkeypatch.setattr(cached, "_flash_takes", lambda query: True)
    monkeypatch.setattr(cached, "_flash", lambda *args, **kwargs: calls.append("flash") or flash(*args, **kwargs))

    def whole(query, key, value, scaling, is_causal=False):
        calls.append("cudnn")
        assert not is_causal or len(query) == len(key)
        return attend(query, key, value, scaling, is_causal)

    monkeypatch.setattr(cached, "_whole", whole)
    monkeypatch.setattr(cached, "_cudnn_pays", lambda query, key: False)
    return calls


@pytest.mark.parametrize("num_new", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("name", CASES)
def test_layouts(calls_of_kernels, relative_error, name, num_new):
    query, key, value, layout = random_case(**CASES[name], num_new=num_new, device="cpu")
    with torch.no_grad():
        out = cached.cached_attention(query, key, value, layout, 0.2)
    expected, real = by_rows(query, key, value, layout, 0.2)
    assert relative_error(out[real], expected[real]) < 5e-3
    assert calls_of_kernels == ["flash"]


def test_the_choice_compiles_into_one_graph(monkeypatch):
    """The compiler cannot trace what PyTorch says about kernels and devices."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def choose(states):
        return states + 1 if cached._flash_is_on(0) else states

    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not cached._flash_is_on(0)


@pytest.mark.parametrize("length", [64, 127, 128, 500])
@pytest.mark.parametrize("past", [0, 100, 128, 1000, 1024, 1333])
def test_pieces(calls_of_kernels, monkeypatch, relative_error, past, length):
    monkeypatch.setattr(cached, "_cudnn_pays", lambda query, key: True)
    monkeypatch.setattr(cached, "_QUERY_PIECE", 64)
    monkeypatch.setattr(cached, "_LARGEST_QUERY_PIECE", 128)
    monkeypatch.setattr(cached, "_KEY_PIECE", 128)
    monkeypatch.setattr(cached, "_PIECE_SCORES", 2**12)
    used = past + length
    case = random_case([used, used], length, leftpad=[0, min(past, 30)], capacity=used + 50, device="cpu")
    with torch.no_grad():
        out = cached.cached_attention(*case, 0.2)
    expected, real = by_rows(*case, 0.2)
    assert relative_error(out[real], expected[real]) < 6e-3
    assert "cudnn" in calls_of_kernels or past < 128
