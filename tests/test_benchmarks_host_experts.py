"""The benchmark of experts on the host: its traces, how they replace the routing, and its table."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, offload_experts
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.runtime.expert_slots import ExpertSlots


@pytest.fixture
def host_experts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    return importlib.import_module("benchmarks.host_experts")


def hit_rate(trace: np.ndarray, experts: int, slots: int, warm_up: int) -> float:
    table, found = ExpertSlots(trace.shape[1], experts, slots), []
    for token, layers in enumerate(trace.tolist()):
        for layer, chosen in enumerate(layers):
            table.count(layer, dict.fromkeys(chosen, 1), 1)
            _, missing = table.place(layer, chosen)
            if token >= warm_up:
                found.append(1 - len(missing) / len(chosen))
    return float(np.mean(found))


def test_traces_are_as_described(host_experts):
    uniform, skewed = (host_experts.make_trace(kind, 600, 2, 128, 4) for kind in host_experts.TRACES)
    for trace in (uniform, skewed):
        assert trace.shape == (600, 2, 4)
        assert (np.diff(np.sort(trace, axis=-1)) > 0).all()  # distinct
        assert trace.min() == 0 and trace.max() == 127
    assert np.bincount(uniform.ravel(), minlength=128).max() < 4 * 600 * 2 * 4 / 128
    assert np.bincount(skewed[:, 0].ravel(), minlength=128).max() > 4 * 600 * 4 / 128
    assert hit_rate(uniform, 128, 64, 200) == pytest.approx(0.25, abs=0.03)
    assert 0.5 < hit_rate(skewed, 128, 64, 200) < 0.75


def test_a_trace_replaces_the_routing_of_single_tokens(host_experts, monkeypatch):
    monkeypatch.setattr(few_tokens, "takes_mlp", lambda x, *_: len(x) <= few_tokens.MAX_TOKENS)
    monkeypatch.setattr(few_tokens, "mlp", few_tokens.mlp_reference)
    model = MiniMaxM3VLForCausalLM(tiny_config(text={"num_local_experts": 8}).text_config).eval()
    offload = offload_experts(model, device="cpu", experts_on_device=1.0, prefetch=True, show_progress=False)
    blocks = host_experts.blocks_of(model)
    trace = np.array([[[0, 1]] * 3, [[2, 3]] * 3, [[0, 1]] * 3])
    routing = host_experts.TracedRouting(model, trace)
    routing.guess(blocks, right=1.0)
    with torch.no_grad():
        for token, misses in enumerate((2, 2, 0)):  # of the first layer; the others are guessed
            offload.stats.reset()
            routing.begin(token)
            model(torch.tensor([[5]]))
            assert (offload.stats.misses, offload.stats.prefetched) == (misses, 2 * misses)
        routing.remove(blocks)
        assert all(
            torch.equal(block.gate(torch.ones(1, 64))[2], block.predicted(torch.ones(1, 64))) for block in blocks
        )


def test_the_table_compares_with_the_floor(host_experts):
    row = {"by": "this project", "seconds": 0.05, "missed_bytes": 2e9, "hit_rate": 0.25}
    record = {
        "copy_bytes_per_second": 50e9,
        "rows": [
            {**row, "work": "a token"},
            {**row, "work": "all there", "missed_bytes": 0, "hit_rate": 1.0},
            {**row, "work": "a token", "by": "Accelerate", "hit_rate": None},
        ],
    }
    text = host_experts.tables(record)
    assert "50.0 GB/s" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[-3:]]
    assert lines[0] == ["a token", "this project", "50.0", "0.25", "2.00", "40.0", "1.25"]
    assert lines[1][3:] == ["1.00", "0.00", "0.0", "-"]
    assert lines[2][3] == "-"
