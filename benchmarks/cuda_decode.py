"""A decoding step of the CUDA operators on one GPU: `python -m benchmarks.cuda_decode [--output NAME]`.

Index scores, top blocks and attention of the newest tokens, captured in a CUDA graph, released head geometry, bf16,
contiguous and paged caches. Cold: steps rotate over caches that hold more than the L2 cache does in the bytes that
they read. The floor is what a step must read and write, at the rate of a device copy in the same run.
What is timed of vLLM beside ours, and where it is found, `rivals.py` says.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_minimax_m3 import msa

from .measure import environment, relative_error
from .rivals import VllmKernels, load_vllm

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16
PAGE = 128
# batch, context in tokens, new tokens of each row
CASES = (
    (1, 8 << 10, 1),
    (1, 32 << 10, 1),
    (1, 128 << 10, 1),
    (1, 1 << 20, 1),
    (16, 32 << 10, 1),
    (16, 128 << 10, 1),
    (16, 1 << 20, 1),
    (256, 8 << 10, 1),
    (1, 128 << 10, 16),
    (1, 1 << 20, 16),
)
COLD_BYTES = 300e6  # several times the L2 cache of any GPU that runs these kernels
STEPS_PER_GRAPH = 48  # at least: starting a graph costs several microseconds
REPLAYS = 15


@dataclass
class Step:
    """The operands of one step; without `block_table` the caches are (B, S, ...), with it (pages, PAGE, ...)."""

    index_query: torch.Tensor
    index_key_cache: torch.Tensor
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor | None

    def select(self, backend: str = "cuda") -> torch.Tensor:
        return msa.select_blocks_with_kvcache(
            self.index_query, self.index_key_cache, topk=TOPK, backend=backend, **self._where()
        )

    def attend(self, blocks: torch.Tensor, backend: str = "cuda") -> torch.Tensor:
        return msa.block_sparse_attention_with_kvcache(
            self.query, self.key_cache, self.value_cache, blocks, backend=backend, **self._where()
        )

    def run(self) -> torch.Tensor:
        return self.attend(self.select())

    def paged(self) -> "Step":
        """The same bytes, with the pages of all rows in random order."""
        rows, slots = self.index_key_cache.shape[:2]
        order = torch.randperm(rows * slots // PAGE, device="cuda", dtype=torch.int32).view(rows, -1)
        caches = (cache.view(-1, PAGE, *cache.shape[2:]) for cache in self._caches())
        index_key_cache, key_cache, value_cache = caches
        return Step(self.index_query, index_key_cache, self.query, key_cache, value_cache, self.cache_seqlens, order)

    def _caches(self) -> tuple[torch.Tensor, ...]:
        return self.index_key_cache, self.key_cache, self.value_cache

    def _where(self) -> dict[str, object]:
        return {"cache_seqlens": self.cache_seqlens, "block_table": self.block_table, "block_size": BLOCK}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def make_step(batch: int, context: int, new: int) -> Step:
    return Step(
        index_query=random(batch, new, KV_HEADS, DIM),
        index_key_cache=random(batch, context, DIM),
        query=random(batch, new, HEADS, DIM),
        key_cache=random(batch, context, KV_HEADS, DIM),
        value_cache=random(batch, context, KV_HEADS, DIM),
        cache_seqlens=torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        block_table=None,
    )


def step_bytes(batch: int, context: int, new: int) -> int:
    """Index keys, selected keys and values, queries and output, two bytes an element."""
    selected = batch * new * KV_HEADS * min(TOPK * BLOCK, context) * 2
    queries = batch * new * (2 * HEADS + KV_HEADS)
    return 2 * DIM * (batch * context + selected + queries)


def graph_us(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one of `calls`, which run one after the other in a CUDA graph, `STEPS_PER_GRAPH` or more."""
    calls = calls * math.ceil(STEPS_PER_GRAPH / len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    times = times[1:]
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}


def copy_bandwidth() -> float:
    """Bytes per second that a copy of 4 GiB reads and writes. Not in a graph, where another engine may do it."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * source.nbytes / statistics.median(times[1:]) * 1e3


def check(step: Step) -> None:
    """Raises unless the step does what the plain PyTorch backend does on the same operands."""
    blocks = step.select()
    error = relative_error(step.attend(blocks), step.attend(blocks, "torch"))
    expected = step.select("torch")
    # Rounding may decide between two blocks, of which the worst selected one is the likely one.
    same = (blocks.sort(-1).values == expected.sort(-1).values).all(-1).float().mean().item()
    if not (error < 1e-2 and same > 0.95):
        raise RuntimeError(f"wrong results: attention differs by {error:.1e}, {same:.1%} of the selections agree")


def vllm_step(vllm: VllmKernels, step: Step) -> Callable[[], torch.Tensor]:
    """The step on vLLM's kernels, whose cache holds (pages, H_kv, PAGE, keys and values side by side)."""
    pages = torch.cat((step.key_cache, step.value_cache), dim=-1).transpose(1, 2).contiguous()
    longest = step.block_table.shape[1] * PAGE

    def run() -> torch.Tensor:
        out = vllm.decode(
            step.index_query[:, 0], step.index_key_cache, step.query[:, 0], pages, step.block_table,
            step.cache_seqlens, longest, TOPK,
        )  # fmt: skip
        return out[:, None]

    return run


def measure_vllm(vllm: VllmKernels, steps: list[Step]) -> dict[str, float] | str:
    try:
        calls = [vllm_step(vllm, step) for step in steps]
        error = relative_error(calls[0](), steps[0].run())
        return graph_us(calls) if error < 2e-2 else f"not timed: its output differs by {error:.1e}"
    except Exception as reason:  # a rival that cannot run a case must not end the run
        return f"failed: {reason}"[:300]


def measure(batch: int, context: int, new: int, vllm: VllmKernels | None) -> dict[str, object]:
    """Microseconds of the step and its two halves with a contiguous and a paged cache."""
    size = step_bytes(batch, context, new)
    steps = [make_step(batch, context, new) for _ in range(min(24, math.ceil(COLD_BYTES / size)))]
    row: dict[str, object] = {"bytes": size, "caches": len(steps)}
    for layout in ("contiguous", "paged"):
        if layout == "paged":
            steps = [step.paged() for step in steps]
        check(steps[0])
        blocks = [step.select() for step in steps]
        row[layout] = {
            "step": graph_us([step.run for step in steps]),
            "select": graph_us([step.select for step in steps]),
            "attend": graph_us([lambda step=s, own=b: step.attend(own) for s, b in zip(steps, blocks)]),
            "hot": graph_us([steps[0].run]),
        }
    if vllm is not None and new == 1:
        row["vllm, paged"] = measure_vllm(vllm, steps)
    return row


def table(rows: list[dict[str, object]]) -> list[str]:
    columns = ["batch", "context", "new tokens", "floor", "contiguous", "over the floor", "paged", "over the floor"]
    columns += ["selection alone", "attention alone", "hot", "vLLM, paged"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        contiguous, paged = row["contiguous"], row["paged"]
        cells = [f"{row['batch']}", f"{row['context']}", f"{row['new']}", f"{row['floor_us']:.1f}"]
        for layout in (contiguous, paged):
            cells += [f"{layout['step']['us']:.1f}", f"{layout['step']['us'] / row['floor_us'] - 1:.1%}"]
        cells += [f"{contiguous[part]['us']:.1f}" for part in ("select", "attend", "hot")]
        vllm = row.get("vllm, paged")
        cells.append(f"{vllm['us']:.1f}" if isinstance(vllm, dict) else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decoding steps of the CUDA operators.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_decode", help="results go to .json and .md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    vllm = load_vllm()
    torch.manual_seed(0)
    copy_rate = copy_bandwidth()
    torch.cuda.empty_cache()
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda_decode", *sys.argv[1:]]),
        "copy_bytes_per_second": copy_rate,
        "empty_kernel_us": graph_us([lambda: torch.cuda._sleep(0)] * 200)["us"],
    }
    rows = []
    for batch, context, new in tqdm(CASES, desc="cases"):
        row = measure(batch, context, new, vllm)
        floor_us = row["bytes"] / copy_rate * 1e6
        rows.append({"batch": batch, "context": context, "new": new, "floor_us": floor_us, **row})
        torch.cuda.empty_cache()
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; a device copy reads and writes "
        f"{copy_rate / 1e12:.2f} TB/s; a chain of empty kernels takes {machine['empty_kernel_us']:.2f} us each. "
        "Microseconds a step inside a CUDA graph, cold but for the hot column; parts and hot figures with a "
        "contiguous cache.",
        "",
        *table(rows),
    ]
    text = "\n".join(lines) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "cases": rows}
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
