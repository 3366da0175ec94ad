"""A whole model at work on one GPU, ours and stock's: `python -m benchmarks.model_step [--cases GROUP,GROUP] ...`.

Layers of the released geometry with 128 experts, bf16, batch 1, random weights: "4 layers" are one dense and three
sparse, "7 layers" one and six. A training step has one and two, with 64 experts. Each implementation and each size of
the model runs in a process of its own. Each result is printed as a line of JSON as soon as it is there, and recorded.

Groups of cases, and about how many seconds each takes on an H200, without the 15 to 30 of building each model:

- `decode` (60, and 90 for stock, which compiles for its static cache): steps in a CUDA graph, and tokens of `generate`.
- `batch` (15): a step of 16 rows, and the routed experts of one of its layers.
- `turns` (15): new tokens behind cached ones.
- `prefill` (15): one call that reads a prompt.
- `memory` (20): memory of a prefill of 128k tokens in one call.
- `million` (60 to 240, then it ends): 1M tokens in chunks of 32k, static cache, 7 layers.
- `sharing` (15): block attention alone, with lists that neighbouring queries share.
- `training` (20): forward and backward with gradient checkpointing.
- `leak` (60 to 240): memory around 1000 calls of `generate`.
- `breakdown` (40): the time of each part of the model, from a profile.

Floors are in `model_step_floors.py`; the rates that they use are measured at the start of the same run. Runs of some
groups each join to one record by `--merge FILE FILE`. `--plot` makes the picture of a record, and `--docs` the
tables in docs/performance.md. These three need no GPU.
"""

import gc
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import model_step_breakdown as breakdown
from . import model_step_workloads as workloads
from .gpu import Run, parse_arguments, record_text, require_gpu
from .implementations import OURS, STOCK
from .model_step_leak import leak
from .model_step_report import key_of, merge, plot, tables, with_floor, write_docs
from .model_step_workloads import Case


def _decoding(model: str) -> list[Case]:
    step, loop = "decode step in a CUDA graph", "token of generate"
    return [
        # before the profiler runs, which might slow the host down
        Case("decode", model, loop, workloads.generate, past=8192, stock=True),
        *([Case("decode", model, loop, workloads.generate, past=131072)] if model == "4 layers" else []),
        Case("decode", model, f"{loop}, static cache", workloads.generate, past=8192, stock=model == "4 layers"),
        Case("decode", model, step, workloads.graph_step, past=8192),
        Case("decode", model, step, workloads.graph_step, past=131072),
    ]


def _passes(model: str) -> list[Case]:
    return [
        Case("turns", model, "later turn", workloads.one_pass, new=4096, past=32768),
        Case("turns", model, "later turn", workloads.one_pass, new=1024, past=131072),
        Case("prefill", model, "prefill", workloads.one_pass, new=8192, stock=model == "4 layers"),
        Case("prefill", model, "prefill", workloads.one_pass, new=32768),
        Case("memory", model, "prefill in one call", workloads.prefill_memory, new=131072),
    ]


# In the order of the tables. Of what has no `stock`, stock needs minutes, or more memory than the card has, or it has
# no such thing.
CASES = (
    *_decoding("4 layers"),
    *_decoding("7 layers"),
    Case("decode", "4 layers", "output head of a token", workloads.head, stock=True),
    Case("batch", "4 layers", "router and experts of a layer", workloads.experts_of_a_layer, batch=16, stock=True),
    Case("batch", "4 layers", "decode step in a CUDA graph", workloads.graph_step, past=8192, batch=16),
    *_passes("4 layers"),
    *_passes("7 layers"),
    Case("million", "7 layers", "prefill in chunks of 32k", workloads.chunked_prefill, new=2**20),
    *(
        Case(
            "sharing",
            "small",
            f"block attention alone, lists shared by {queries}",
            partial(workloads.shared_lists, queries=queries),
            new=tokens,
        )
        for tokens in (32768, 131072)
        for queries in (1, 2, 3, 4, 8)
    ),
    Case("training", "training", "training step", workloads.training, new=8192, stock=True),
    Case("leak", "small", "call of generate", leak),
    Case("breakdown", "4 layers", "decode step in a CUDA graph", breakdown.step_breakdown, past=8192),
    Case("breakdown", "4 layers", "prefill", breakdown.pass_breakdown, new=8192),
    Case("breakdown", "4 layers", "later turn", breakdown.pass_breakdown, new=4096, past=32768),
    Case("breakdown", "training", "training step", breakdown.training_breakdown, new=8192),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
DOCS = Path(__file__).parents[1] / "docs"


def chosen(implementation: str, model: str, groups: list[str]) -> list[Case]:
    return [
        case
        for case in CASES
        if case.model == model and case.group in groups and (implementation == OURS or case.stock)
    ]


def run_all(implementation: str, model: str, groups: list[str], seconds: float) -> None:
    """Prints a line of JSON for each case of one model."""
    started = time.monotonic()
    built = workloads.build(implementation, model)
    for case in chosen(implementation, model, groups):
        if time.monotonic() - started > seconds:
            break
        row = {"implementation": implementation, **case.key()}
        begun = time.monotonic()
        try:
            row |= workloads.measured(implementation, built, case)
        except Exception as reason:
            row["failed"] = f"{type(reason).__name__}: {reason}"[:300]
        print(json.dumps(row | {"seconds": round(time.monotonic() - begun, 1)}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def groups_of(text: str) -> list[str]:
    groups = text.split(",")
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"no such group of cases: {', '.join(sorted(unknown))}")
    return groups


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--cases", type=groups_of, default=list(GROUPS), help=f"groups of {','.join(GROUPS)}")
        parser.add_argument("--implementation", choices=(OURS, STOCK), help="measure only one")
        parser.add_argument("--model", choices=tuple(workloads.MODELS), help="measure only models of this size")
        parser.add_argument("--child", action="store_true", help="measure in this process and only print lines")
        parser.add_argument("--merge", type=Path, nargs="+", help="join records into --output")
        parser.add_argument("--plot", action="store_true", help="make the picture of the record --output")
        parser.add_argument(
            "--docs", action="store_true", help="write the tables of --output into docs/performance.md"
        )

    arguments = parse_arguments("model_step", "Time a whole model beside stock's.", add)
    if arguments.merge or arguments.plot or arguments.docs:
        _without_gpu(arguments)
        return
    if arguments.child:
        require_gpu()
        run_all(arguments.implementation, arguments.model, arguments.cases, arguments.seconds)
        return
    run = Run("model_step", arguments, tables)
    run.record["rows"] = []
    started = time.monotonic()

    def case(implementation: str, model: str) -> None:
        left = arguments.seconds - (time.monotonic() - started)
        command = [sys.executable, "-m", "benchmarks.model_step", "--child", "--implementation", implementation]
        command += ["--model", model, "--cases", ",".join(arguments.cases), "--seconds", str(left)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith('{"implementation"'):
                    continue
                row = with_floor(json.loads(line), run.record["machine"])
                print(json.dumps({name: value for name, value in row.items() if name != "longest"}), flush=True)
                run.record["rows"].append(row)
                if "failed" in row:
                    run.record["failed"][", ".join(map(str, key_of(row)))] = row["failed"]
                run.write()
        if child.returncode:
            raise RuntimeError(f"the process ended with {child.returncode}")

    pairs = [
        (implementation, model)
        for implementation in (OURS, STOCK)
        for model in workloads.MODELS
        if arguments.implementation in (None, implementation) and arguments.model in (None, model)
    ]
    run.cases([pair for pair in pairs if chosen(*pair, arguments.cases)], case)
    run.finish()


def _without_gpu(arguments) -> None:
    output: Path = arguments.output
    if arguments.merge:
        record = merge([json.loads(path.read_text(encoding="utf-8")) for path in arguments.merge], expected_rows())
        output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(record_text(record, tables) + "\n", encoding="utf-8")
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    if arguments.plot:
        plot(record, DOCS / "images" / "model_step.svg")
    if arguments.docs:
        write_docs(record, DOCS / "performance.md")


def expected_rows() -> list[tuple]:
    return [
        key_of({"implementation": implementation, **case.key()})
        for implementation in (OURS, STOCK)
        for model in workloads.MODELS
        for case in chosen(implementation, model, list(GROUPS))
    ]


if __name__ == "__main__":
    main()
