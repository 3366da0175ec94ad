"""Where the wall time of a profiled training step goes: kernels, exposed communication, and waits of the host."""

import json
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .report import as_table

STEP = "profiled step"
# Calls of the host that may wait for the device, or that make other streams wait.
WAITS = ("Synchronize", "cudaMalloc", "cudaFree", "cuMem", "cudaHostAlloc")
Interval = tuple[float, float]


def trace_of(function: Callable[[], Any], on_gpu: bool) -> list[dict[str, Any]]:
    """The events of a call of `function` in the format of Chrome's traces, the call itself as the event `STEP`."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function(STEP):
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as intervals that do not overlap, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def gaps_of(intervals: list[Interval], start: float, end: float) -> list[Interval]:
    """The times between `start` and `end` outside of intervals that `joined` returned."""
    edges = [start, *(edge for interval in intervals for edge in interval), end]
    return [(left, right) for left, right in zip(edges[::2], edges[1::2]) if right > left]


def shared(some: list[Interval], others: list[Interval]) -> float:
    """For how long intervals of both kinds run at once."""
    return length(some) + length(others) - length(joined([*some, *others]))


def interval_of(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def is_communication(event: dict[str, Any]) -> bool:
    return "nccl" in event["name"].lower()


def summary_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables show, in milliseconds.

    Args:
        events (list): Those of `trace_of`.

    Returns:
        `wall_ms`; `compute_ms`, with a kernel or a copy running; `exposed_ms`, with communication alone; `idle_ms`,
        with nothing; `communication_ms` in all; `kernels`, `communication` and `host_calls` with time and number by
        name; `waits_in`, the number of waits by the operator that waits; and `gaps`, the longest times without compute.
    """
    events = [event for event in events if event.get("ph") == "X"]
    (step,) = (event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    start, end = interval_of(step)
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    compute = sorted((event for event in on_device if not is_communication(event)), key=lambda event: event["ts"])
    communication = [event for event in on_device if is_communication(event)]
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    busy, talking = (joined(map(interval_of, some)) for some in (compute, communication))
    gaps = gaps_of(busy, start, end)
    exposed = shared(gaps, talking)
    starts = [event["ts"] for event in compute]

    def described(gap: Interval) -> dict[str, Any]:
        after = bisect_right(starts, gap[0])
        # the kernel that starts after the gap, and the last that started before it
        names = [compute[place]["name"] if 0 <= place < len(compute) else "" for place in (after - 1, after)]
        talk = shared([gap], talking)
        return {
            "at_ms": (gap[0] - start) / 1e3,
            "ms": length([gap]) / 1e3,
            "communication_ms": talk / 1e3,
            "between": names,
        }

    return {
        "wall_ms": (end - start) / 1e3,
        "compute_ms": length(busy) / 1e3,
        "exposed_ms": exposed / 1e3,
        "idle_ms": (length(gaps) - exposed) / 1e3,
        "communication_ms": length(talking) / 1e3,
        "kernels": _by_name(compute),
        "communication": _by_name(communication),
        "host_calls": _by_name(event for event in calls if any(name in event["name"] for name in WAITS)),
        "waits_in": _operators_of([event for event in calls if "Synchronize" in event["name"]], events),
        "gaps": [described(gap) for gap in sorted(gaps, key=lambda gap: gap[0] - gap[1])[:16]],
    }


def _by_name(events: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds and number of the events of each name, the longest first."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        found[event["name"]][0] += event["dur"] / 1e3
        found[event["name"]][1] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _operators_of(calls: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[str, int]:
    """How many of these calls of the host each operator makes: the innermost operator around a call."""
    found: Counter[str] = Counter()
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    for call in calls:
        around = [
            event
            for event in operators
            if event["tid"] == call["tid"] and event["ts"] <= call["ts"] <= event["ts"] + event["dur"]
        ]
        found[max(around, key=lambda event: event["ts"])["name"] if around else "outside of operators"] += 1
    return dict(found.most_common())


def tables(summary: dict[str, Any]) -> str:
    parts = [
        "A step of {wall_ms:.0f} ms: {compute_ms:.0f} ms with compute, {exposed_ms:.0f} ms with communication alone, "
        "{idle_ms:.0f} ms with nothing on the device. Communication in all: {communication_ms:.0f} ms.".format(
            **summary
        )
    ]
    heads = {"kernels": 32, "communication": 8, "host_calls": 10}
    for name, most in heads.items():
        rows = [[short(key), f"{ms:.2f}", f"{count:.0f}"] for key, (ms, count) in list(summary[name].items())[:most]]
        parts.append(as_table([name.replace("_", " "), "ms", "times"], rows))
    parts.append(f"Waits of the host, by operator: {summary['waits_in'] or 'none'}")
    rows = [
        [f"{gap['at_ms']:.1f}", f"{gap['ms']:.2f}", f"{gap['communication_ms']:.2f}", *map(short, gap["between"])]
        for gap in summary["gaps"]
    ]
    parts.append(as_table(["no compute at, ms", "for, ms", "with communication", "after", "before"], rows))
    return "\n\n".join(parts)


def short(name: str, width: int = 90) -> str:
    return name.replace("|", "/")[:width]
