"""A decoding step of the CUDA operators on one GPU: `python -m benchmarks.cuda_decode [--output NAME]`.

A step is index scores, top blocks and attention of the newest tokens, captured in a CUDA graph: released head
geometry, bf16, contiguous and paged caches. Figures are cold: steps rotate over several caches, and the bytes that
these steps read exceed the L2 cache. The floor is the time to copy the bytes that a step must read and write, at the
rate of a device copy in the same run. Steps of vLLM and SGLang are timed in the same way, where `baselines.py` finds
their kernels and their outputs agree with ours.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modeling_minimax_m3 import msa

from .baselines import PAGE, check_output, load_triton_baselines
from .gpu import BLOCK, DIM, HEADS, KV_HEADS, TOPK, Run, parse_arguments, random
from .measure import relative_error
from .report import as_table

# batch, context in tokens, new tokens of each row
CASES = (
    (1, 1 << 20, 1),
    (16, 128 << 10, 1),
    (1, 32 << 10, 1),
    (1, 8 << 10, 1),
    (1, 128 << 10, 1),
    (16, 32 << 10, 1),
    (16, 1 << 20, 1),
    (256, 8 << 10, 1),
    (1, 128 << 10, 16),
    (1, 1 << 20, 16),
)
COLD_BYTES = 300e6  # several times the L2 cache of any GPU that runs these kernels
STEPS_PER_GRAPH = 48  # at least this many, because starting a graph costs several microseconds
REPLAYS = 15


@dataclass
class Step:
    """The operands of one step. Caches are (B, S, ...) without a `block_table`, and (pages, PAGE, ...) with one."""

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
        """The same step over paged caches, whose pages lie in random order."""
        rows, slots = self.index_key_cache.shape[:2]
        order = torch.randperm(rows * slots // PAGE, device="cuda", dtype=torch.int32).view(rows, -1)
        caches = (cache.view(-1, PAGE, *cache.shape[2:]) for cache in self._caches())
        index_key_cache, key_cache, value_cache = caches
        return Step(self.index_query, index_key_cache, self.query, key_cache, value_cache, self.cache_seqlens, order)

    def _caches(self) -> tuple[torch.Tensor, ...]:
        return self.index_key_cache, self.key_cache, self.value_cache

    def _where(self) -> dict[str, object]:
        return {"cache_seqlens": self.cache_seqlens, "block_table": self.block_table, "block_size": BLOCK}


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
    """Bytes of index keys, selected keys and values, queries and output, at two bytes an element."""
    selected = batch * new * KV_HEADS * min(TOPK * BLOCK, context) * 2
    queries = batch * new * (2 * HEADS + KV_HEADS)
    return 2 * DIM * (batch * context + selected + queries)


def graph_us(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one call, where `STEPS_PER_GRAPH` or more run one after the other in a CUDA graph."""
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


def check(step: Step) -> None:
    """Raises RuntimeError unless the step agrees with the `torch` backend on the same operands."""
    blocks = step.select()
    error = relative_error(step.attend(blocks), step.attend(blocks, "torch"))
    expected = step.select("torch")
    # Rounding decides between blocks of nearly equal scores, mostly for the last place of a list.
    same = (blocks.sort(-1).values == expected.sort(-1).values).all(-1).float().mean().item()
    if not (error < 1e-2 and same > 0.95):
        raise RuntimeError(f"wrong results: attention differs by {error:.1e}, {same:.1%} of the selections agree")


def make_steps(batch: int, context: int, new: int) -> list[Step]:
    """As many steps as together read more than the L2 cache holds."""
    size = step_bytes(batch, context, new)
    return [make_step(batch, context, new) for _ in range(min(24, math.ceil(COLD_BYTES / size)))]


def measure(batch: int, context: int, new: int) -> dict[str, object]:
    """Microseconds of the step and its two halves with a contiguous and a paged cache."""
    steps = make_steps(batch, context, new)
    row: dict[str, object] = {"bytes": step_bytes(batch, context, new), "caches": len(steps)}
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
    return row


def measure_baseline(name: str, baseline, batch: int, context: int, new: int) -> dict[str, float]:
    """Microseconds of a baseline's step with a paged cache."""
    steps = [step.paged() for step in make_steps(batch, context, new)]
    expected = steps[0].run()
    calls = []
    while steps:  # one by one, because a baseline may keep a copy of the cache
        step = steps.pop(0)
        caches = (step.index_key_cache, step.query, step.key_cache, step.value_cache)
        calls.append(baseline.decode(step.index_query, *caches, step.block_table, step.cache_seqlens, TOPK))
        del step, caches
    check_output(name, calls[0](), expected)
    return graph_us(calls)


def _over_floor(row: dict, layout: str) -> float | None:
    return row[layout]["step"]["us"] / row["floor_us"] - 1 if layout in row else None


def tables(record: dict) -> str:
    def us(timing: dict | None) -> str:
        return "-" if timing is None else f"{timing['us']:.1f}"

    baselines = sorted({name for row in record["cases"] for name in row if name.endswith(", paged")})
    rows = []
    for row in record["cases"]:
        cells = [str(row["batch"]), str(row["context"]), str(row["new"]), f"{row['floor_us']:.1f}"]
        for layout in ("contiguous", "paged"):
            over = _over_floor(row, layout)
            cells += [us(row.get(layout, {}).get("step")), "-" if over is None else f"{over:.1%}"]
        cells += [us(row.get("contiguous", {}).get(part)) for part in ("select", "attend", "hot")]
        rows.append(cells + [us(row.get(baseline)) for baseline in baselines])
    header = ["batch", "context", "new tokens", "floor", "contiguous", "over the floor", "paged", "over the floor"]
    header += ["selection alone", "attention alone", "hot", *baselines]
    return (
        f"In a chain of empty kernels each takes {record['machine']['empty_kernel_us']:.2f} us. Figures are "
        "microseconds of a step inside a CUDA graph. Only the hot column reads the same cache every time. The columns "
        "selection alone, attention alone and hot use a contiguous cache. The floor is at the rate of the copy.\n\n"
        + as_table(header, rows)
    )


def main() -> None:
    run = Run("cuda_decode", parse_arguments("cuda_decode", "Time decoding steps of the CUDA operators."), tables)
    baselines = load_triton_baselines()
    run.record["machine"]["empty_kernel_us"] = graph_us([lambda: torch.cuda._sleep(0)] * 200)["us"]
    rows = {}
    run.record["cases"] = []

    def measure_case(batch: int, context: int, new: int, name: str) -> None:
        timings = (
            measure(batch, context, new)
            if name == "ours"
            else {f"{name}, paged": measure_baseline(name, baselines[name], batch, context, new)}
        )
        if (batch, context, new) not in rows:
            floor_us = step_bytes(batch, context, new) / run.record["machine"]["copy_bytes_per_second"] * 1e6
            rows[batch, context, new] = {"batch": batch, "context": context, "new": new, "floor_us": floor_us}
            run.record["cases"].append(rows[batch, context, new])
        rows[batch, context, new].update(timings)

    cases = [(*case, name) for case in CASES for name in ("ours", "vLLM") if name == "ours" or name in baselines]
    run.cases(cases + [(*case, "SGLang") for case in CASES if "SGLang" in baselines and case[2] == 1], measure_case)
    run.finish()


if __name__ == "__main__":
    main()
