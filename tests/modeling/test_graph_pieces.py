"""The order of pieces and of what the host does between them, with an object in place of a CUDA graph."""

import threading
from contextlib import contextmanager

import pytest
import torch

from modeling_minimax_m3.runtime.graph_pieces import GraphPieces, current_capture


@pytest.fixture
def log(monkeypatch):
    calls = []

    class Graph:
        count = 0

        def __init__(self):
            self.number, Graph.count = Graph.count, Graph.count + 1

        def capture_begin(self, pool, capture_error_mode):
            calls.append(("begin", self.number, pool))

        def capture_end(self):
            calls.append(("end", self.number))

        def replay(self):
            calls.append(("replay", self.number))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return calls


def test_steps_stand_around_the_pieces_behind_them(log):
    pieces = GraphPieces()

    @contextmanager
    def step(name):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    def function():
        assert current_capture() is pieces
        log.append("first")
        pieces.add_host_step(lambda: step("a"))
        log.append("second")
        pieces.add_host_step(lambda: step("b"))

    assert current_capture() is None
    pieces.capture(function, pool=(0, 1))
    assert current_capture() is None
    expected = [("begin", 0, (0, 1)), "first", ("end", 0), ("begin", 1, (0, 1)), "second", ("end", 1)]
    assert log == [*expected, ("begin", 2, (0, 1)), ("end", 2)]
    assert len(pieces) == 3
    for _ in range(2):
        log.clear()
        pieces.replay()
        assert log == [
            *(("replay", 0), "enter a", ("replay", 1), "leave a", "enter b", ("replay", 2), "leave b"),
        ]


def test_an_error_ends_the_capture(log):
    pieces = GraphPieces()

    def function():
        pieces.add_host_step(lambda: None)
        raise KeyError("in the model")

    with pytest.raises(KeyError, match="in the model"):
        pieces.capture(function)
    assert [call[0] for call in log] == ["begin", "end", "begin", "end"]
    assert current_capture() is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_first_error_is_told(log, monkeypatch, error):
    """CUDA ends a capture that went wrong with an error of its own, as does the end of a piece that never began."""

    def end(graph):
        log.append("end")
        raise RuntimeError("operation failed due to a previous error during capture")

    def function():
        raise error("in the model")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", end)
    with pytest.raises(error, match="in the model"):
        GraphPieces().capture(function)
    assert log[-1] == "end" and current_capture() is None


def test_other_threads_capture_nothing(log):
    found = []

    def function():
        thread = threading.Thread(target=lambda: found.append(current_capture()))
        thread.start()
        thread.join()

    GraphPieces().capture(function)
    assert found == [None]
