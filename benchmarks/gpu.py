"""What the GPU benchmarks share: geometry, inputs, timing, dense attention, and a record that grows case by case."""

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .measure import command_output, environment

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16


# --- inputs and timing -------------------------------------------------------------------------------------------


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def clustered_blocks(tokens: int, stay: int = 16, device: str | torch.device = "cuda") -> torch.Tensor:
    """Block lists (tokens, KV_HEADS, TOPK) in which each entry keeps its block for `stay` tokens.

    A list is as long as a selection: it holds every visible block where TOPK or fewer are visible.
    """
    token = torch.arange(tokens, device=device)
    own = (token // BLOCK)[:, None]
    place = torch.arange(TOPK, device=device)
    # Entry p draws from the p-th part of the visible blocks, so that no block is listed twice.
    start, stop = own * place // TOPK, own * (place + 1) // TOPK
    lists = torch.rand((tokens - 1) // stay + 1, KV_HEADS, TOPK, device=device)[token // stay]
    ids = start[:, None] + (lists * (stop - start)[:, None]).long()
    ids[..., -1] = own
    ids = torch.where((own < TOPK)[..., None], (own - place).clamp(min=-1)[:, None], ids)
    return ids.sort(dim=-1, descending=True).values.to(torch.int32)


def selected_flops(tokens: int) -> float:
    """FLOPs of exact attention over TOPK blocks: a token's own block up to the token, and whole earlier blocks."""
    token = torch.arange(tokens, dtype=torch.float64)
    keys = token % BLOCK + 1 + (token // BLOCK).floor().clamp(max=TOPK - 1) * BLOCK
    return float(keys.sum()) * 4 * HEADS * DIM


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's causal attention over all keys, of shape (1, H_q, T, DIM); cuDNN runs where it supports the call."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def time_ms(function: Callable[[], Any], seconds: float = 0.2, once: bool = False) -> float:
    """Median milliseconds of a call of `function`, measured by CUDA events after one warm-up call.

    Events surround runs of about 5 ms, or single calls that take longer.

    Args:
        function (Callable): The call to time.
        seconds (float): How long to repeat the runs.
        once (bool): Call `function` a single time, without a warm-up: for calls of tens of seconds.
    """

    def run(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / calls

    first = run(1)
    if once:
        return first
    started = time.perf_counter()
    times = [run(1)]
    calls = max(1, min(50, int(5 / times[0])))
    if calls > 1:
        times.clear()  # the time of a single short call includes the host's work
    # three runs at least, unless they take long
    while not times or time.perf_counter() - started < (seconds if len(times) >= 3 else 4 * seconds):
        times.append(run(calls))
    return sorted(times)[len(times) // 2]


def ceilings(side: int = 8192, size: int = 1 << 30) -> dict[str, float]:
    """Rates that the card reaches: an 8192^3 bf16 matmul, a copy of 4 GiB (read and written), a sum of 4 GiB."""
    a, b = random(side, side), random(side, side)
    source, target = (torch.ones(size, device="cuda") for _ in range(2))
    return {
        "matmul_tflops": 2 * side**3 / time_ms(lambda: a @ b) / 1e9,
        "copy_bytes_per_second": 2e3 * source.nbytes / time_ms(lambda: target.copy_(source)),
        "read_bytes_per_second": 1e3 * source.nbytes / time_ms(source.sum),
    }


# --- the record --------------------------------------------------------------------------------------------------


def parse_arguments(name: str, description: str, add: Callable[[argparse.ArgumentParser], Any] | None = None):
    """Parses the options that every GPU benchmark has, and the options that `add` adds."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--output", type=Path, default=RESULTS / name, help="write results to this .json and .md")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    if add is not None:
        add(parser)
    return parser.parse_args()


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and this machine has none")


def _card() -> dict[str, Any]:
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, **ceilings()}


class Skipped(Exception):
    """This machine cannot run a case. The message says why."""


class Run:
    """The record of a benchmark, which is written after every case, so that a time limit loses no result.

    Args:
        name (str): Module of the benchmark.
        arguments (argparse.Namespace): What `parse_arguments` returned.
        tables (Callable): Makes the Markdown tables from the record.
        needs_gpu (bool): Whether it runs on a GPU. Without one, the record has no rates of a card.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, tables: Callable, needs_gpu: bool = True):
        if needs_gpu:
            require_gpu()
        self._started = time.monotonic()
        self._arguments, self._tables = arguments, tables
        torch.manual_seed(0)
        self.record: dict[str, Any] = {
            "machine": {
                **environment(),
                "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
                **(_card() if needs_gpu else {}),
            },
            "state": "no case ran yet",
            "failed": {},
        }

    def cases(self, cases: Iterable[tuple], measure: Callable[..., Any]) -> None:
        """Calls `measure` with each case in order. A case that fails, or is `Skipped`, is recorded and ends no run."""
        cases = {", ".join(map(str, case)): case for case in cases}
        left = list(cases)
        for label, case in cases.items():
            elapsed = time.monotonic() - self._started
            if elapsed > self._arguments.seconds:
                break
            print(f"{elapsed:6.1f} s  {label}", flush=True)
            try:
                torch.cuda.empty_cache()
                measure(*case)
            except Skipped as reason:
                print(f"          skipped: {reason}", flush=True)
                self.record.setdefault("skipped", {})[label] = str(reason)
            except Exception as reason:
                traceback.print_exc()
                self.record["failed"][label] = f"{type(reason).__name__}: {reason}"[:500]
            left.remove(label)
            self.record["state"] = f"partial, without: {'; '.join(left)}" if left else "complete"
            self.write()

    def write(self) -> None:
        output: Path = self._arguments.output
        output.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(self.record, indent=2) + "\n"), (".md", self.text() + "\n")):
            unfinished = output.with_suffix(suffix + ".part")  # a reader never sees half a file
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, output.with_suffix(suffix))

    def text(self) -> str:
        return record_text(self.record, self._tables)

    def finish(self) -> None:
        """Prints the tables. Exits with an error if a case failed."""
        print("\n" + self.text(), flush=True)
        if self.record["failed"]:
            raise SystemExit(f"{len(self.record['failed'])} cases failed")


def record_text(record: dict[str, Any], tables: Callable[[dict], str]) -> str:
    """The card, the tables and the failures of a record."""
    machine = record["machine"]
    place = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores"
    line = f"{place}, torch {machine['torch']}, Transformers {machine['transformers']}, {machine['date']}"
    if "gpu" in machine:
        line += (
            f"; an 8192^3 bf16 matmul runs at {machine['matmul_tflops']:.0f} TFLOP/s, a copy reads and writes "
            f"{machine['copy_bytes_per_second'] / 1e12:.2f} TB/s, a sum reads "
            f"{machine['read_bytes_per_second'] / 1e12:.2f} TB/s"
        )
    parts = [
        f"{line}.",
        tables(record),
    ]
    if record["state"] != "complete":
        parts.insert(1, f"Not complete: {record['state']}.")
    parts += [f"Skipped: {label}: {reason}" for label, reason in record.get("skipped", {}).items()]
    parts += [f"Failed: {label}: {reason}" for label, reason in record["failed"].items()]
    return "\n\n".join(parts)
