"""A CUDA graph in pieces: between two of them the host reads what the GPU has found, and prepares what comes next."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

# Makes a context in which the next piece is queued. Entering it does what that piece needs from the host.
HostStep = Callable[[], AbstractContextManager]

_capturing = threading.local()


def current_capture() -> "GraphPieces | None":
    """What is captured now in this thread."""
    return getattr(_capturing, "pieces", None)


class GraphPieces:
    """What a function queues on the GPU, as a CUDA graph for each piece, and what the host does between the pieces."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._steps: list[HostStep] = []
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, function: Callable[[], object], pool: Any = None) -> None:
        """Captures what `function` queues on the current stream, which must not be the default one. Nothing runs.

        Args:
            function (callable): Calls `add_host_step` where the host has to do something.
            pool (*optional*): Memory that the pieces use, from `torch.cuda.CUDAGraph.pool()` of another graph.
        """
        self._pool = pool
        self._begin()
        _capturing.pieces = self
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):  # its own error must not replace the first one
                self._graphs[-1].capture_end()
            raise
        finally:
            _capturing.pieces = None
        self._graphs[-1].capture_end()

    def pool(self) -> Any:
        """The memory that all pieces share."""
        return self._graphs[0].pool()

    def add_host_step(self, step: HostStep) -> None:
        """Ends a piece. A replay enters `step()` before it queues the next piece, and leaves it afterwards.

        Tensors that `step` refers to keep their memory for as long as this object exists. While `step` runs, they have
        the values of that replay.
        """
        self._graphs[-1].capture_end()
        self._steps.append(step)
        self._begin()

    def replay(self) -> None:
        """Runs everything once more, on the current stream."""
        self._graphs[0].replay()
        for step, graph in zip(self._steps, self._graphs[1:], strict=True):
            with step():
                graph.replay()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: streamers are read from one.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)
