"""The benchmark of several cards: what it reads from the trace of a training step, and its tables."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def step_profile():
    return importlib.import_module("benchmarks.step_profile")


def event(name, kind, start, length, thread=1):
    """An event of Chrome's traces, in milliseconds."""
    return {"ph": "X", "name": name, "cat": kind, "ts": 1e3 * start, "dur": 1e3 * length, "tid": thread}


@pytest.fixture
def trace(step_profile):
    return [
        event(step_profile.STEP, "user_annotation", 0, 100),
        event(step_profile.STEP, "gpu_user_annotation", 0, 100),  # no kernel
        event("gemm", "kernel", 0, 30),
        event("gemm", "kernel", 20, 20),  # beside the first, on another stream
        event("Memcpy DtoD", "gpu_memcpy", 40, 10),
        event("ncclDevKernel_AllGather", "kernel", 45, 25),  # 20 ms alone
        event("norm", "kernel", 80, 20),  # 10 ms of nothing before it
        event("aten::nonzero", "cpu_op", 10, 20),
        event("cudaStreamSynchronize", "cuda_runtime", 15, 10),
        event("cudaDeviceSynchronize", "cuda_runtime", 60, 5),
        event("cudaStreamSynchronize", "cuda_runtime", 15, 1, thread=2),  # beside the operator, not in it
        event("cudaLaunchKernel", "cuda_runtime", 1, 1),
        {"ph": "M", "name": "process_name"},
    ]


def test_times_of_a_step(step_profile, trace):
    summary = step_profile.summary_of(trace)
    times = {name: value for name, value in summary.items() if name.endswith("_ms")}
    assert times == pytest.approx(
        {"wall_ms": 100, "compute_ms": 70, "exposed_ms": 20, "idle_ms": 10, "communication_ms": 25}
    )
    assert summary["kernels"] == {"gemm": [50, 2], "norm": [20, 1], "Memcpy DtoD": [10, 1]}
    assert summary["communication"] == {"ncclDevKernel_AllGather": [25, 1]}
    assert summary["host_calls"] == {"cudaStreamSynchronize": [11, 2], "cudaDeviceSynchronize": [5, 1]}
    assert summary["waits_in"] == {"outside of operators": 2, "aten::nonzero": 1}


def test_longest_gaps(step_profile, trace):
    (gap,) = step_profile.summary_of(trace)["gaps"]
    assert gap == {"at_ms": 50, "ms": 30, "communication_ms": 20, "between": ["Memcpy DtoD", "norm"]}
    text = step_profile.tables(step_profile.summary_of(trace))
    assert "70 ms with compute, 20 ms with communication alone, 10 ms with nothing" in text


def test_a_profiled_call(step_profile):
    """On a CPU there are no kernels, and the call is found by its name."""
    summary = step_profile.summary_of(step_profile.trace_of(lambda: sum(range(100_000)), on_gpu=False))
    assert 0 < summary["idle_ms"] == summary["wall_ms"]


def test_training_tables():
    two_cards = importlib.import_module("benchmarks.two_cards")
    found = {"ms": 400.0, "tokens_per_second": 20_000.0, "losses": [13.5], "peak_gib": 38.0, "loading_peak_gib": 34.0}
    other = found | {"ms": 480.0, "tokens_per_second": 34_000.0, "gather_bytes_per_second": 3.5e11}
    text = two_cards.tables({"decoding": {}, "training": {"one card": found, "FSDP2": other}})
    assert [cell.strip() for cell in text.splitlines()[3].split("|")[1:5]] == ["FSDP2", "480", "34000", "1.70"]
    assert "350 GB/s" in text
