"""Measures time, memory, and the speed of the machine."""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

MEBIBYTE = 2**20


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def peak_extra_memory(function: Callable[[], Any]) -> tuple[Any, int]:
    """Runs `function` once and returns its result and its peak of extra memory in bytes.

    Extra memory is what the process holds beyond what it held before the call. The result counts as extra memory.
    Memory that earlier calls freed returns to the system first, so that the call cannot reuse it unseen.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what the process holds now
    before = _status_bytes("VmRSS")
    result = function()
    return result, max(0, _status_bytes("VmHWM") - before)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Runs `function` once and returns its result and its seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def repeat(function: Callable[[], Any], first_seconds: float, *, budget: float = 20.0) -> list[float]:
    """Seconds of each of two to five further runs of `function`, as many as should fit into `budget` seconds.

    The first run does not count: it may wait while the system, or the host of a virtual machine, provides the memory.
    """
    count = min(5, max(2, int(budget / first_seconds)))
    return [timed(function)[1] for _ in range(count)]


def summarise(seconds: list[float]) -> dict[str, float | int]:
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": len(seconds),
    }


def matmul_rate() -> float:
    """Floating-point operations per second of a 2048 x 2048 float32 matmul, the best of ten."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b))[1] for _ in range(10))


class OtherLoad:
    """Measures how many cores other processes, and the host of a virtual machine, kept busy while a block of code ran.

    The time of this process does not count as other load, nor does the time of its children that ended in the block.
    """

    def __enter__(self) -> "OtherLoad":
        self._start = self._clocks()
        return self

    def __exit__(self, *exception: object) -> None:
        wall, busy, own = (after - before for before, after in zip(self._start, self._clocks(), strict=True))
        self.cores = max(0.0, busy - own) / max(wall, 1e-3)

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle_and_waiting = fields[3] + fields[4]
        busy = (sum(fields) - idle_and_waiting) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:4])


def wait_until_idle(deadline: float, cores: float) -> None:
    """Waits until other processes keep fewer than `cores` cores busy for three seconds, or until `deadline`."""
    while time.monotonic() < deadline:
        with OtherLoad() as others:
            time.sleep(3)
        if others.cores < cores:
            return


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def command_output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, Any]:
    """The machine, versions and commit that the record of a run names."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    # A copy of the tree without its git data cannot know its commit: the variable names it.
    named = os.environ.get("COMMIT")
    watched = ("../modeling_minimax_m3", "../configuration", "../benchmarks/*.py")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": named or command_output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_changes": None if named else bool(command_output("git", "status", "--porcelain", "--", *watched)),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
