"""Whether `generate` leaks memory: many calls of different lengths, each of which captures a graph."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from .model_step_workloads import Case, tokens_of

CALLS = 1000


@contextmanager
def counted_captures() -> Iterator[list[None]]:
    found: list[None] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def counting(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        found.append(None)
        begin(graph, *args, **kwargs)

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", counting):
        yield found


def leak(model: Any, case: Case, calls: int = CALLS, limit_s: float = 240.0) -> dict[str, Any]:
    """Memory before and after many calls of `generate` with prompts and answers of different lengths."""
    lengths = random.Random(0)

    def call() -> None:
        prompt, new = lengths.randint(1, 64), lengths.randint(3, 10)
        model.generate(
            tokens_of(model, 1, prompt), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    for _ in range(20):
        call()
    before = _memory_mib()
    started, done = time.monotonic(), 0
    with counted_captures() as found:
        while done < calls and time.monotonic() - started < limit_s:
            call()
            done += 1
    seconds = time.monotonic() - started
    return {
        "ms": 1e3 * seconds / done,
        "calls": done,
        "captures": len(found),
        "before_mib": before,
        "after_mib": _memory_mib(),
    }


def _memory_mib() -> dict[str, float]:
    """Memory in use by tensors, held by PyTorch, and taken from the card by anyone."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    held = {"tensors": torch.cuda.memory_allocated(), "held": torch.cuda.memory_reserved(), "card": total - free}
    return {name: round(size / 2**20, 1) for name, size in held.items()}
