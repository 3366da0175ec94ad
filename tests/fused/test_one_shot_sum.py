"""Small sums over processes: which ones the kernel makes, and that all processes take the same way."""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_minimax_m3.fused import one_shot_sum

WORKER = Path(__file__).with_name("one_shot_sum_worker.py")
TIMEOUT = 240  # seconds; processes that wait for each other for ever fail the test
KIB = 1024


def run_worker(kind: str, **environment: str) -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port",
            port,
            str(WORKER),
            kind,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "changes, count, expected",
    [
        ({}, 2, True),
        ({"dtype": torch.float32}, 2, True),
        ({"nbytes": 256 * KIB}, 2, True),
        ({"nbytes": 256 * KIB + 16}, 2, False),
        ({"nbytes": 64 * KIB}, 8, True),
        ({"nbytes": 64 * KIB + 16}, 8, False),
        ({"nbytes": 0}, 2, False),
        ({"nbytes": 4}, 2, False),
        ({"dtype": torch.float16}, 2, False),
        ({"is_cuda": False}, 2, False),
        ({}, 1, False),
        ({}, 9, False),
    ],
)
def test_which_sums(changes, count, expected):
    states = SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, "nbytes": 12 * KIB, **changes})
    assert one_shot_sum.takes(states, count) == expected


def test_not_while_a_compiler_traces(monkeypatch):
    monkeypatch.setattr(one_shot_sum, "is_torchdynamo_compiling", lambda: True)
    assert not one_shot_sum.takes(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, nbytes=12 * KIB), 2)


class Group:
    """Stands for processes, all of which have the same terms."""

    group_name = "two"


@pytest.fixture
def cards(monkeypatch):
    """What stands for CUDA on a CPU: whether a graph is captured, the buffer of the set-up, and the inputs of the kernel."""
    cards = SimpleNamespace(captures=False, buffer=torch.zeros(256 * KIB, dtype=torch.uint8), set_ups=0, terms=[])

    def set_up(group, device):
        cards.set_ups += 1
        return cards.buffer

    def kernel(terms, operation, name):
        assert (operation, name) == ("sum", "two")
        cards.terms.append(terms)
        return terms * 2

    monkeypatch.setattr(one_shot_sum, "_set_up", set_up)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cards.captures)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce", kernel, raising=False)
    return cards


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_terms_are_in_the_buffer(cards, mode):
    group = Group()
    for dtype in (torch.bfloat16, torch.float32):
        states = torch.randn(3, 2, 16).to(dtype).transpose(0, 1)
        before = states.clone()
        with mode():
            result = one_shot_sum.total(states, group)
        assert torch.equal(result, before * 2) and torch.equal(states, before)
        terms = cards.terms[-1]
        assert terms.shape == states.shape and terms.is_contiguous()
        assert terms.data_ptr() == cards.buffer.data_ptr()
    assert cards.set_ups == 1


def test_nothing_is_set_up_in_a_capture(cards):
    group, states = Group(), torch.ones(8)
    cards.captures = True
    assert one_shot_sum.total(states, group) is None
    assert cards.set_ups == 0
    cards.captures = False
    assert one_shot_sum.total(states, group) is not None
    cards.captures = True
    assert torch.equal(one_shot_sum.total(states, group), states * 2)
    assert cards.set_ups == 1


def test_failed_set_up_is_not_repeated(cards):
    group, cards.buffer = Group(), None
    for _ in range(3):
        assert one_shot_sum.total(torch.ones(8), group) is None
    assert cards.set_ups == 1 and not cards.terms


def test_buffer_goes_with_the_processes(cards):
    group = Group()
    one_shot_sum.total(torch.ones(8), group)
    count = len(one_shot_sum._buffers)
    del group
    assert len(one_shot_sum._buffers) == count - 1


@pytest.mark.parametrize("before", [None, "0"])
def test_multicast_is_off_in_the_set_up_alone(monkeypatch, before):
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with pytest.raises(ZeroDivisionError), one_shot_sum._without_multicast():
        assert os.environ[name] == "1"
        raise ZeroDivisionError
    assert os.environ.get(name) == before


@pytest.mark.slow
def test_two_processes_agree():
    run_worker("set_up", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(record_property):
    torch.cuda.init()
    if not one_shot_sum._has_atomics(0, 1):
        pytest.skip("needs two CUDA devices with NVLink between them")
    record_property("table", run_worker("kernel"))
