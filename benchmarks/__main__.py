"""Times this project beside stock Transformers on the CPU: `python -m benchmarks [--quick] [--only TEXT] [--list]`."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from . import decode, layer, measure
from .implementations import OURS, STOCK
from .report import as_table

RESULTS = Path(__file__).parent / "results"
IDLE_CORES = 0.1  # cores that other processes may keep busy during a measurement
SCENARIOS = {
    "layer-forward": (layer.forward, layer),
    "layer-train": (layer.forward_backward, layer),
    "structured-forward": (layer.structured_forward, layer),
    "decode": (decode.decode, decode),
}


@dataclass(frozen=True)
class Case:
    """One measurement, made in a process of its own."""

    scenario: str
    tokens: int
    implementation: str
    needs_gib: float = 1.0  # of free memory
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.scenario}/{self.tokens}/{self.implementation}"


CASES = [
    Case("layer-forward", 2048, STOCK, 2, quick=True),
    Case("layer-forward", 2048, OURS, quick=True),
    Case("layer-forward", 4096, STOCK, 5),
    Case("layer-forward", 4096, OURS),
    Case("layer-forward", 8192, STOCK, 14),
    Case("layer-forward", 8192, OURS, quick=True),
    Case("layer-forward", 16384, OURS, 2),
    Case("layer-forward", 32768, OURS, 2),
    Case("layer-forward", 65536, OURS, 3),
    Case("layer-train", 1024, STOCK, 2, quick=True),
    Case("layer-train", 1024, OURS, quick=True),
    Case("layer-train", 4096, STOCK, 12),
    Case("layer-train", 4096, OURS),
    Case("structured-forward", 8192, OURS, quick=True),
    Case("structured-forward", 32768, OURS, 2),
    Case("structured-forward", 65536, OURS, 3),
    Case("decode", 2048, STOCK, quick=True),
    Case("decode", 2048, OURS, quick=True),
    Case("decode", 16384, STOCK, 3),
    Case("decode", 16384, OURS),
]


# --- measuring ---------------------------------------------------------------------------------------------------


def run_worker(name: str, path: str) -> None:
    """Measures one case in this process and saves the result to `path`."""
    case = next(case for case in CASES if case.name == name)
    run, _ = SCENARIOS[case.scenario]
    rate = measure.matmul_rate()
    result, measured = run(case.implementation, case.tokens)
    torch.save({"result": result, "measured": {**measured, "matmul_flops_per_second": rate}}, path)


def measure_in_process(case: Case, folder: Path) -> Path:
    """Runs one case in a fresh process, so that no other case's memory counts, and returns the path of its result."""
    path = folder / f"{case.name.replace('/', '-')}.pt"
    command = [sys.executable, "-m", "benchmarks", "--worker", case.name, "--worker-result", str(path)]
    completed = subprocess.run(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)
    if completed.returncode != 0:
        raise RuntimeError(f"{case.name} failed with exit code {completed.returncode}:\n{completed.stderr[-2000:]}")
    return path


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/meminfo has no MemAvailable: memory is measured on Linux only")


def measure_undisturbed(case: Case, folder: Path, deadline: float) -> tuple[dict[str, Any], float]:
    """Measures a case, and how many cores other processes kept busy meanwhile.

    Until `deadline` it waits for an idle machine, and measures again if other processes disturbed the case.
    """
    while True:
        measure.wait_until_idle(deadline, IDLE_CORES)
        with measure.OtherLoad() as others:
            path = measure_in_process(case, folder)
        if others.cores < IDLE_CORES or time.monotonic() >= deadline:
            return torch.load(path), others.cores


def run_cases(cases: list[Case], patience: float) -> list[dict[str, Any]]:
    """Measures the cases in order. Compares ours with stock where both ran at the same length."""
    rows, partners = [], {}
    deadline = time.monotonic() + patience
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.name} ... ", end="", flush=True)
            row = {"name": case.name, "scenario": case.scenario, "tokens": case.tokens, "of": case.implementation}
            rows.append(row)
            if available_gib() < case.needs_gib:
                row["skipped"] = f"needs {case.needs_gib:g} GiB of free memory, got {available_gib():.1f}"
                print(row["skipped"], flush=True)
                continue
            stored, others = measure_undisturbed(case, Path(folder), deadline)
            row.update(stored["measured"], others_cores=round(others, 2))
            compare(case, row, stored["result"], partners)
            print(row.get("refused") or f"{row['seconds']:.4g} s", flush=True)
    return rows


def compare(case: Case, row: dict[str, Any], result: dict, partners: dict) -> None:
    """Compares with the other implementation's result of the same case. If they disagree, both lose their figures."""
    key = (case.scenario, case.tokens)
    if key not in partners:
        partners[key] = (row, result)
        return
    other_row, other_result = partners.pop(key)
    pair = {case.implementation: result, "stock" if case.implementation == OURS else "ours": other_result}
    _, module = SCENARIOS[case.scenario]
    report = module.disagreement(pair[STOCK], pair[OURS])
    for either in (row, other_row):
        either["agreement"] = report
    if reason := module.refusal(report):
        for either in (row, other_row):
            for figure in (
                "seconds",
                "seconds_first",
                "seconds_mean",
                "seconds_min",
                "seconds_max",
                "extra_bytes",
                "parts",
            ):
                either.pop(figure, None)
            either["refused"] = f"ours and stock disagree: {reason}"


# --- reporting ---------------------------------------------------------------------------------------------------


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios to stock and between lengths, as far as the cases ran."""
    found = {(row["scenario"], row["tokens"], row["of"]): row for row in rows if "seconds" in row}

    def ratio(above: tuple, below: tuple, figure: str = "seconds") -> float | None:
        if above not in found or below not in found:
            return None
        return found[above][figure] / found[below][figure]

    def without(tokens: int, *parts: str) -> float:
        row = found["decode", tokens, OURS]
        return sum(seconds for part, seconds in row["parts"].items() if part not in parts)

    stock_8k, ours_8k = (("layer-forward", 8192, of) for of in (STOCK, OURS))
    ours_64k = ("layer-forward", 65536, OURS)
    structured_8k, structured_64k = (("structured-forward", tokens, OURS) for tokens in (8192, 65536))
    per_token = ratio(structured_64k, structured_8k)
    growth = growth_of_the_rest = None
    if ("decode", 2048, OURS) in found and ("decode", 16384, OURS) in found:
        reads_every_key = ("index scoring", "dense attention")
        growth = without(16384, "index scoring") / without(2048, "index scoring")
        growth_of_the_rest = without(16384, *reads_every_key) / without(2048, *reads_every_key)
    table = {
        "layer forward at 8192 tokens, times faster than stock": ratio(stock_8k, ours_8k),
        "layer forward at 8192 tokens, share of stock's extra memory": ratio(ours_8k, stock_8k, "extra_bytes"),
        "extra memory at 65536 over 8192 tokens": ratio(ours_64k, ours_8k, "extra_bytes"),
        "layer forward and backward at 4096 tokens, times faster than stock": ratio(
            ("layer-train", 4096, STOCK), ("layer-train", 4096, OURS)
        ),
        "structured layer forward, time per token at 65536 over 8192 tokens": per_token and per_token * 8192 / 65536,
        "structured layer, extra memory at 65536 over 8192 tokens": ratio(
            structured_64k, structured_8k, "extra_bytes"
        ),
        "seconds per decoded token after 16384 over 2048 tokens, without index scoring": growth,
        # dense layers attend to every key by definition
        "the same, without the dense layers' attention as well": growth_of_the_rest,
    }
    return [{"what": what, "value": value} for what, value in table.items() if value is not None]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def report(record: dict[str, Any]) -> str:
    rate = max((row["matmul_flops_per_second"] for row in record["rows"] if "seconds" in row), default=0.0)
    rows = []
    for row in record["rows"]:
        if "seconds" not in row:
            rows.append([row["name"], row.get("refused") or row["skipped"], "", "", "", "", "", ""])
            continue
        floor = row["flops"] / rate if "flops" in row else None
        spread = f"{milliseconds(row['seconds_min'])} - {milliseconds(row['seconds_max'])} ({row['runs']})"
        rows.append(
            [
                row["name"],
                milliseconds(row["seconds"]),
                spread,
                milliseconds(row["seconds_first"]) if "seconds_first" in row else "",
                f"{row['extra_bytes'] / 1e6:.0f}" if "extra_bytes" in row else "",
                milliseconds(floor) if floor else "",
                f"{row['seconds'] / floor:.1f}" if floor else "",
                f"{row['others_cores']:.2f}",
            ]
        )
    machine = record["environment"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB, "
        f"load average {machine['load_average_1min']} before the run; torch {machine['torch']}, "
        f"Transformers {machine['transformers']}, commit {machine['commit']}"
        f"{' with uncommitted changes' if machine['uncommitted_changes'] else ''}, {machine['date']}. "
        f"float32; a 2048 x 2048 matmul runs at {rate / 1e9:.0f} GFLOP/s at best.",
        as_table(
            ["case", "ms", "ms, range (runs)", "first run", "extra MB", "floor ms", "ms / floor", "others' cores"],
            rows,
        ),
    ]
    split = [
        [row["name"], part, milliseconds(seconds)]
        for row in record["rows"]
        for part, seconds in row.get("parts", {}).items()
    ]
    if split:
        parts.append(as_table(["ms per decoded token", "part", "mean ms"], split))
    agreement = [
        [row["name"].removesuffix(f"/{row['of']}"), describe_agreement(row["agreement"])]
        for row in record["rows"]
        if row["of"] == OURS and "agreement" in row
    ]
    if agreement:
        parts.append(as_table(["ours and stock", "difference"], agreement))
    if record["ratios"]:
        parts.append(as_table(["ratio", "value"], [[r["what"], f"{r['value']:.3g}"] for r in record["ratios"]]))
    return "\n\n".join(parts)


def describe_agreement(found: dict[str, Any]) -> str:
    if "relative_errors" not in found:
        return f"logits {found['median_error']:.1e} in the median, {found['largest_error']:.1e} at worst"
    name, error = max(found["relative_errors"].items(), key=lambda item: item[1])
    return f"{found['tokens_selecting_otherwise']} tokens select different blocks; largest error {error:.1e} ({name})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="run cases whose name contains this; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="run the short cases only; write files only with --output"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument(
        "--output", type=Path, help="path of the results, without suffix; default: results/cpu, for full runs only"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="MINUTES",
        help="on a shared machine, wait for idle cores and repeat disturbed cases, for at most so many minutes in all",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(args.worker, args.worker_result)
        return

    cases = [
        case
        for case in CASES
        if (case.quick or not args.quick) and (not args.only or any(text in case.name for text in args.only))
    ]
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    if not cases:
        parser.error(f"no case matches {args.only}; `--list` prints the names")

    record = {
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
        "environment": measure.environment(),
    }
    record["rows"] = run_cases(cases, 60 * args.patience)
    record["ratios"] = ratios(record["rows"])
    text = report(record)
    print("\n" + text)
    output = args.output or (None if args.quick or args.only else RESULTS / "cpu")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        output.with_suffix(".md").write_text(text + "\n")
        print(f"\nwritten to {output.with_suffix('.json')} and {output.with_suffix('.md')}")
    if any("refused" in row for row in record["rows"]):
        sys.exit("some cases were refused: ours and stock disagree")


if __name__ == "__main__":
    main()
