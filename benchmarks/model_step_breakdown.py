"""The time of each part of the model, in the workloads of `model_step`."""

from collections.abc import Callable
from typing import Any

import torch

from . import kernel_parts
from .gpu import time_ms
from .model_step_workloads import Case, captured_step, graph_of, pass_over, synchronized_ms, training_step


def _eager_breakdown(model: Any, run: Callable[[], Any], forget: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    times = []
    for _ in range(4):
        times.append(synchronized_ms(run))
        forget()
    with kernel_parts.model_ranges(model):
        kernels = kernel_parts.profile(run)
    forget()
    parts = [kernel_parts.part_of(kernel) for kernel in kernels]
    return kernel_parts.breakdown(kernels, parts, sorted(times[1:])[1])


@torch.no_grad()
def step_breakdown(model: Any, case: Case) -> dict[str, Any]:
    """By part, a captured step: the parts of an eager run of the same pass, the times of a replay."""
    captured, inputs = captured_step(model, case)
    with model._optimize_model_for_decode():
        captured(**inputs)
        step = captured._pass
        if step is None:
            raise RuntimeError(f"the step was not captured: {captured._told}")
        with kernel_parts.model_ranges(model):
            eager = kernel_parts.profile(lambda: step._on_side_stream(step._forward))
        captured(**inputs)
    graph = graph_of(captured)
    ms = time_ms(graph.replay)
    replayed = kernel_parts.profile(graph.replay)
    return kernel_parts.breakdown(replayed, kernel_parts.parts_by_order(replayed, eager), ms)


def pass_breakdown(model: Any, case: Case) -> dict[str, Any]:
    return _eager_breakdown(model, *pass_over(model, case))


def training_breakdown(model: Any, case: Case) -> dict[str, Any]:
    return _eager_breakdown(model, training_step(model, case.new))
