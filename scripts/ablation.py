"""Compare attention types, and training on all modalities with training on one: many small runs at once.

    python scripts/ablation.py --plan                    # the budget alone
    python scripts/ablation.py ablation                  # 6 arms, 3 seeds
    python scripts/ablation.py plot ablation/ablation.json docs/images/ablation.png

All runs of a seed read the same packs, in the same order, in the same number of steps. An arm with one modality reads
these packs without the rows of the others. The folder gets `ablation.json` and a picture of it, `ablation.png`.
docs/pretraining.md explains the arms and the figures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Everything is on this machine; both are read when Transformers and its tokenizers are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm import tqdm

from ablation_report import compare, plot_ablation, print_comparison
from ablation_runs import (
    ARMS,
    JOINT,
    arm_config,
    check_rows_of_arms,
    check_start,
    covered_tokens,
    train_run,
    write_packs,
)
from checkpoint_folder import check_checkpoint
from evaluate_pretraining import SHORTEST
from make_tiny_checkpoint import build_processor
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.commands.run_checks import check_output
from modeling_minimax_m3.conversion.source import read_json
from name_lists import read_names
from pretrain import DEFAULTS, commit_of_this_file
from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.pretraining import WEIGHTS, LongRows, Packs, parse_stages
from processing_minimax_m3.pretraining.packs import Stage, check_longest_row
from processing_minimax_m3.pretraining.tokenizer_texts import tokenizer_texts
from replace_when_done import replace_when_done

POLL = 2.0  # seconds between looks at the runs


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", help="folder for ablation.json and ablation.png")
    parser.add_argument("--plan", action="store_true", help="state the budget and stop; `output` is not needed")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--size", choices=("small", "tiny"), help="of the model (small); tiny is for tests")
    parser.add_argument(
        "--init_from", default="", help="folder of a checkpoint whose weights, sizes and tokenizer all runs start with"
    )
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS["learning_rate"], help="at its peak (2e-3)")
    parser.add_argument(
        "--long_share", type=float, default=LongRows.share, help="of the packs begins with a long row (0.4)"
    )
    parser.add_argument("--steps", type=int, default=1500, help="of each run (1500)")
    parser.add_argument("--seconds", type=float, default=380, help="after which a run stops (380)")
    parser.add_argument("--pack_tokens", type=int, default=8192, help="tokens of a step (8192)")
    parser.add_argument("--stages", default="1024:0.3,4096:1", help="curriculum, as of pretrain.py (1024:0.3,4096:1)")
    parser.add_argument("--warmup_share", type=float, default=0.3, help="of the steps, with dense attention (0.3)")
    parser.add_argument("--tasks", default=",".join(WEIGHTS), help="tasks of the packs (all)")
    parser.add_argument("--evaluations", type=int, default=8, help="of a run (8)")
    parser.add_argument("--eval_packs", type=int, default=24, help="held-out packs of an evaluation (24)")
    parser.add_argument(
        "--recall_to",
        type=int,
        default=0,
        help="tokens of the longest text in which a finished run has to find numbers; 0: it finds none (0)",
    )
    parser.add_argument("--recall_rows", type=int, default=12, help="such texts of a length, five questions each (12)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at once (all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that make packs (one a core)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for packs and runs, which stays (default: one that is removed)"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # ARM/SEED: this process is one of the runs
    arguments = parser.parse_args(argv)
    if arguments.output is None and not arguments.plan:
        parser.error("the following arguments are required: output")
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for an option that cannot work."""
    for name, known in (("arms", ARMS), ("tasks", WEIGHTS)):
        setattr(arguments, name, read_names(getattr(arguments, name), f"--{name}", known))
    if arguments.init_from:
        check_checkpoint(Path(arguments.init_from), "--init_from")
        check_start(arguments.arms, arguments.init_from)
        if arguments.size is not None:
            raise ValueError(
                f"`--size` has no effect with `--init_from`, whose folder has the sizes, got {arguments.size}."
            )
    for name in ("seeds", "steps", "evaluations", "eval_packs", "recall_rows", "seconds", "learning_rate"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"`--{name}` must be above 0, got {getattr(arguments, name)}.")
    if arguments.evaluations > arguments.steps:
        raise ValueError(f"`--evaluations` must be at most the {arguments.steps} steps, got {arguments.evaluations}.")
    if arguments.recall_to != 0 and arguments.recall_to < SHORTEST:
        raise ValueError(f"`--recall_to` must be 0 or at least {SHORTEST} tokens, got {arguments.recall_to}.")
    for name in ("jobs", "workers"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"`--{name}` must be at least 0, got {getattr(arguments, name)}.")
    for name in ("warmup_share", "long_share"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"`--{name}` must be from 0 to 1, got {getattr(arguments, name)}.")
    check_longest_row(parse_stages(arguments.stages), arguments.pack_tokens)


def budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the comparison costs, before it starts."""
    parameters = {}
    for name in arguments.arms:
        with torch.device("meta"):
            config = arm_config(ARMS[name], arguments.size, arguments.init_from)
            model = MiniMaxM3SparseForConditionalGeneration(config)
        parameters[name] = model.num_parameters()
    return {
        "arms": arguments.arms,
        "longest_row": parse_stages(arguments.stages)[-1].max_length,
        "covered_tokens": covered_tokens(config),
        "init_from": arguments.init_from,
        "learning_rate": arguments.learning_rate,
        "long_share": arguments.long_share,
        "seeds": arguments.seeds,
        "runs": len(arguments.arms) * arguments.seeds,
        "steps": arguments.steps,
        "pack_tokens": arguments.pack_tokens,
        "tokens": arguments.steps * arguments.pack_tokens,
        "stages": arguments.stages,
        "warmup_share": arguments.warmup_share,
        "seconds": arguments.seconds,
        "parameters": parameters,
    }


def print_budget(plan: dict[str, Any]) -> None:
    print(
        f"{plan['runs']} runs ({len(plan['arms'])} arms, {plan['seeds']} seeds) of {plan['steps']:,} steps of "
        f"{plan['pack_tokens']:,} tokens: {plan['tokens'] / 1e6:.1f}M tokens each, {plan['seconds']:.0f} seconds at most"
    )
    if plan["init_from"]:
        print(f"  all start with the weights of {plan['init_from']}")
    if plan["longest_row"] < plan["covered_tokens"]:
        print(f"  no coverage: it is measured in texts of {plan['covered_tokens']:,} tokens, and no row is that long")
    print(
        f"  learning rate up to {plan['learning_rate']:g}; {plan['long_share']:.0%} of the packs begin with a long row"
    )
    for name, size in plan["parameters"].items():
        arm = ARMS[name]
        print(f"  {name}: {size:,} parameters, {arm.attention}, rows of {', '.join(arm.modalities)}")


def make_data(arguments: argparse.Namespace, folder: Path) -> None:
    """Writes the packs of each seed, and the held-out ones."""
    weights = {task: WEIGHTS[task] for task in arguments.tasks}
    if arguments.init_from:
        processor = MiniMaxM3VLProcessor.from_pretrained(arguments.init_from)
    else:
        processor = build_processor(arm_config(ARMS[JOINT], arguments.size), tokenizer_texts(weights))
    processor.save_pretrained(folder / "processor")
    stages = parse_stages(arguments.stages)
    data: dict[str, Any] = {"tokens": arguments.pack_tokens, "weights": weights}
    last = [Stage(1.0, stages[-1].max_length)]
    sources = {"heldout": Packs(processor, "heldout", arguments.eval_packs, stages=last, **data)}
    for seed in range(arguments.seeds):
        sources[str(seed)] = Packs(
            processor,
            "train",
            arguments.steps,
            stages=stages,
            seed=seed,
            long_rows=LongRows(arguments.long_share),
            **data,
        )
    total = sum(len(packs) for packs in sources.values())
    with tqdm(total=total, desc="packs", unit="pack", disable=None, mininterval=1) as progress:
        for name, packs in sources.items():
            for _ in write_packs(packs, folder / name, arguments.workers):
                progress.update()


def run_folder(work: Path, arm: str, seed: int) -> Path:
    return work / "runs" / f"{arm.replace(' ', '-')}-{seed}"


def visible_devices() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; one empty name without any."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count] or [""]


def steps_done(folder: Path) -> int:
    """The last step that a run has logged."""
    path = folder / "curves.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # the run is writing the line
        return 0


def train_all(arguments: argparse.Namespace, work: Path, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Trains all arms with all seeds, each in a process, and returns the records of those that did not fail."""
    waiting = [(arm, seed) for seed in range(arguments.seeds) for arm in arguments.arms]
    runs = list(waiting)
    active: dict[tuple[str, int], subprocess.Popen] = {}
    done: dict[tuple[str, int], int] = {}
    devices = visible_devices()
    try:
        with tqdm(total=len(runs) * arguments.steps, desc="steps", disable=None, mininterval=1) as progress:
            while waiting or active:
                while waiting and len(active) < (arguments.jobs or len(runs)):
                    environment = os.environ | {"OMP_NUM_THREADS": "1"}
                    if devices != [""]:  # one run after the other, so that each GPU gets as many
                        environment["CUDA_VISIBLE_DEVICES"] = devices[(len(runs) - len(waiting)) % len(devices)]
                    arm, seed = waiting.pop(0)
                    folder = run_folder(work, arm, seed)
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "record.json").unlink(missing_ok=True)  # of an earlier comparison in the same `--work`
                    command = [sys.executable, __file__, *argv, "--work", str(work), "--run", f"{arm}/{seed}"]
                    with (folder / "log.txt").open("w") as log:
                        active[arm, seed] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                time.sleep(POLL if active else 0)
                done |= {run: max(done.get(run, 0), steps_done(run_folder(work, *run))) for run in active}
                progress.update(sum(done.values()) - progress.n)
                active = {run: process for run, process in active.items() if process.poll() is None}
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()  # until then it may write into a folder that is to be removed
    records = []
    for arm, seed in runs:
        path = run_folder(work, arm, seed) / "record.json"
        if path.exists():
            records.append(json.loads(path.read_text()))
        else:
            tail = (path.parent / "log.txt").read_text()[-2000:]
            print(f"the run of {arm!r} with seed {seed} failed:\n{tail}", file=sys.stderr)
    return records


def run_one(arguments: argparse.Namespace) -> None:
    """One of the runs, in a process of its own."""
    arm, _, seed = arguments.run.partition("/")
    names = (
        "size",
        "init_from",
        "learning_rate",
        "steps",
        "evaluations",
        "eval_packs",
        "seconds",
        "warmup_share",
        "pack_tokens",
        "recall_to",
        "recall_rows",
    )
    options = {name: getattr(arguments, name) for name in names}
    train_run(arm, int(seed), arguments.work / "data", run_folder(arguments.work, arm, int(seed)), options)


def write_results(arguments: argparse.Namespace, work: Path, argv: Sequence[str]) -> dict[str, Any]:
    plan = budget(arguments)
    print_budget(plan)
    started = time.perf_counter()
    try:
        make_data(arguments, work / "data")
    except ImportError as error:  # of scikit-learn
        raise SystemExit(f"ablation: {error}") from error
    data_seconds = time.perf_counter() - started
    print(f"packs written in {data_seconds:.0f} s; training {plan['runs']} runs", flush=True)
    records = train_all(arguments, work, argv)
    if not records:
        raise SystemExit("ablation: all runs failed")
    result: dict[str, Any] = {
        "command": ["python", "scripts/ablation.py", *argv],
        "commit": commit_of_this_file(),
        "budget": plan,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": len(visible_devices()),
        "torch": torch.__version__,
        "python": sys.version.split()[0],  # the texts are those of this release
        "data_seconds": round(data_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "comparison": compare(records),
        "runs": records,
    }
    with replace_when_done(arguments.output / "ablation.json") as unfinished:
        unfinished.write_text(json.dumps(result) + "\n")
    print_comparison(result["comparison"])
    print(f"wrote {plot_ablation(result, arguments.output / 'ablation.png')}, and ablation.json beside it")
    if len(records) < plan["runs"]:
        raise SystemExit(f"ablation: {plan['runs'] - len(records)} of {plan['runs']} runs failed")
    return result


def main(argv: Iterable[str] | None = None) -> None:
    """Trains and compares. Errors of arguments end the program with their message."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["plot"]:
        parser = argparse.ArgumentParser("ablation.py plot", description="Draw the results.")
        parser.add_argument("results", type=Path, help="ablation.json")
        parser.add_argument("picture", type=Path, help="path of the picture")
        arguments = parser.parse_args(given[1:])
        try:
            print(f"wrote {plot_ablation(read_json(arguments.results), arguments.picture)}")
        except (OSError, ValueError) as error:
            raise SystemExit(f"ablation: {error}") from error
        return
    arguments = read_arguments(given)
    try:
        check_arguments(arguments)
        if not arguments.plan and not arguments.run:
            check_rows_of_arms(arguments.arms, arguments.tasks)
            for path, name in ((arguments.output, "`output`"), (arguments.work, "`--work`")):
                if path is not None:
                    check_output(path, name)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"ablation: {error}") from error
    if arguments.run:
        run_one(arguments)
    elif arguments.plan:
        print_budget(budget(arguments))
    elif arguments.work:
        write_results(arguments, arguments.work, given)
    else:
        with tempfile.TemporaryDirectory(prefix="ablation-") as work:
            write_results(arguments, Path(work), given)


if __name__ == "__main__":
    main()
