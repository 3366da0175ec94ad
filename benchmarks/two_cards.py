"""A model over several GPUs beside the same one on one: `python -m benchmarks.two_cards [--folder FOLDER]`.

Seven layers of the released geometry, one dense and six sparse, with 40 experts a layer, so that the whole model fits
one card beside a training step (36 GB). A token uses four experts of a layer, as in the released model, so a decoding
step reads as many bytes. The checkpoint has random numbers in the layout of the released model.

Decoding: `generate` reads 8192 tokens and writes 96. The time is that of a token between the 32nd and the last, the
better of two calls. Beside it stand the relative error of the first logits and how many of the first tokens are those
of one card. Training: LoRA on the attention's projections, 8192 tokens for each card, activation checkpointing, bf16; on
several cards FSDP2 by Accelerate with `examples/accelerate/fsdp2.yaml`, each process with tokens of its own.

FSDP2 gathers all experts of a layer in each pass. With the released number, 128, that is three times as much as here.
`--device cpu` runs the same with a tiny model and two processes, to try the script.

`--layouts "one card" "tensor parallelism" --experts 12` measures these layouts' decoding alone, with a checkpoint of
17 GB in place of 36 GB: experts that no token takes cost a step no time. `--training` measures the training alone, also
with each layer gathered once a step and with tensor and expert parallelism (`two_cards_training.py`). `--profile` also
prints where the time goes: of a token kernel by kernel, of a training step also the communication that no kernel hides,
and the calls in which the host waits (`step_profile.py`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig, released_config, tiny_config
from modeling_minimax_m3.checkpoint_conversion import make_synthetic_checkpoint

from . import two_cards_training
from .gpu import Run, Skipped, parse_arguments
from .model_step_workloads import Clock
from .own_process import result_of, start_group
from .report import as_table

DENSE, SPARSE, EXPERTS = 1, 6, 40
PROMPT, NEW_TOKENS, FIRST_TIMED = 8192, 96, 32
FSDP2 = Path(__file__).parent.parent / "examples" / "accelerate" / "fsdp2.yaml"
ONE = "one card"
# One process lays the model out over all cards, or each card has a process and Transformers shares the model.
LAYOUTS: dict[str, dict[str, Any]] = {
    ONE: {},
    "device_map": {"device_map": "balanced"},
    "tensor parallelism": {"tp_size": 0, "tp_plan": "auto"},
    "tensor and expert parallelism": {"tp_size": 0, "ep_size": 0},
}
GIB = 2**30


def geometry(is_tiny: bool, experts: int) -> MiniMaxM3VLConfig:
    """The released geometry with these layers and so many experts in a layer, or a tiny one."""
    config = tiny_config() if is_tiny else released_config()
    text = config.text_config
    if not is_tiny:
        text.num_hidden_layers, text.num_local_experts = DENSE + SPARSE, experts
        for name in ("layer_types", "mlp_layer_types"):
            layers = getattr(text, name)
            setattr(text, name, layers[:1] * DENSE + layers[-1:] * SPARSE)
    return config


def load(folder: str, **options: Any) -> Any:
    from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **options)


def decode(layout: str, folder: str, on_gpu: bool, profiles: bool) -> dict[str, Any]:
    """Milliseconds of a token of `generate`, and of how many tokens the step was a CUDA graph.

    The first process leaves tokens and logits in `folder`.
    """
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = dict(LAYOUTS[layout])
    processes = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    if any(name.endswith("_size") for name in options):
        if on_gpu:
            torch.cuda.set_device(rank)
        sizes: dict[str, Any] = {
            name: processes if name.endswith("_size") else value for name, value in options.items()
        }
        options = {"distributed_config": DistributedConfig(**sizes)}
    elif not options:
        options = {"device_map": {"": 0 if on_gpu else "cpu"}}
    elif not on_gpu:
        raise RuntimeError(f"{layout} needs GPUs")
    model = load(folder, **options).eval()
    vocabulary = model.config.text_config.vocab_size
    length, new, first = (PROMPT, NEW_TOKENS, FIRST_TIMED) if on_gpu else (64, 8, 2)
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    calls = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    clocks = [Clock(first, new) for _ in range(2)] if on_gpu else []
    for clock in clocks:
        model.generate(tokens, logits_processor=[clock], **calls)
    with mock.patch.object(
        torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay
    ) as replay:
        output = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **calls)
    if profiles:
        activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            model.generate(tokens, **calls)
        if rank == 0:
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            averages = profile.key_averages()
            print(averages.table(sort_by=order, row_limit=40, max_name_column_width=90), file=sys.stderr, flush=True)
    if rank == 0:
        found = {"tokens": output.sequences[0, length:].cpu(), "logits": output.logits[0][0].float().cpu()}
        torch.save(found, Path(folder) / f"{layout}.pt")
    peak = [torch.cuda.max_memory_allocated(index) / GIB for index in range(torch.cuda.device_count())]
    ms = min((clock.ms() for clock in clocks), default=None)
    return {"ms": ms, "peak_gib": max(peak, default=0.0), "replayed_tokens": replay.call_count}


def run_group(
    work: str, layout: str, folder: Path, device: str, seconds: float, options: list[str]
) -> list[dict[str, Any]]:
    """The results of all processes of a case, which get these further options.

    Raises:
        Skipped: There are too few GPUs.
        RuntimeError: A process failed or took too long.
    """
    devices = torch.cuda.device_count() if device == "cuda" else 2
    if layout != ONE and devices < 2:
        raise Skipped(f"needs 2 GPUs, and this machine has {devices}")
    worker = ["benchmarks.two_cards", "--worker", work, layout, "--folder", str(folder), "--device", device, *options]
    if work == "train" and two_cards_training.is_launched(layout):
        launch = ["accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", str(devices), "-m"]
        if device == "cpu":
            launch[-1:] = ["--cpu", "-m"]
        command = [sys.executable, "-m", *launch, *worker]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        processes = [process]
    else:
        is_shared = any(name.endswith("_size") for name in LAYOUTS[layout])
        processes = start_group(worker, devices if is_shared else 1)
    try:
        return [result_of(process, seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside_one_card(layout: str, folder: Path) -> dict[str, Any]:
    """How tokens and logits of a layout compare with those of one card."""
    ours, expected = (torch.load(folder / f"{name}.pt") for name in (layout, ONE))
    same = (ours["tokens"] == expected["tokens"]).long().cumprod(0).sum()
    error = (ours["logits"] - expected["logits"]).norm() / expected["logits"].norm()
    return {"same_tokens": int(same), "logits_error": float(error)}


def tables(record: dict[str, Any]) -> str:
    decoding, training = record["decoding"], record["training"]
    rows = [
        [
            layout,
            "" if found["ms"] is None else f"{found['ms']:.2f}",
            f"{found['ms'] / decoding[ONE]['ms']:.2f}" if found["ms"] and ONE in decoding else "",
            str(found.get("replayed_tokens", "")),
            f"{found['peak_gib']:.1f}",
            f"{found.get('logits_error', 0.0):.1e}",
            f"{found.get('same_tokens', NEW_TOKENS)} of {NEW_TOKENS}",
        ]
        for layout, found in decoding.items()
    ]
    head = ["decoding", "ms a token", "of one card's", "replayed", "peak of a card, GiB", "error of the logits"]
    parts = [as_table([*head, "equal tokens"], rows)] if decoding else []
    if training:
        parts += training_tables(training)
    return "\n\n".join(parts)


def training_tables(training: dict[str, Any]) -> list[str]:
    rows = [
        [
            layout,
            f"{found['ms']:.0f}",
            f"{found['tokens_per_second']:.0f}",
            f"{found['tokens_per_second'] / training[ONE]['tokens_per_second']:.2f}" if ONE in training else "",
            f"{found['peak_gib']:.1f}",
            f"{found['loading_peak_gib']:.1f}",
            f"{found['losses'][0]:.4f}",
        ]
        for layout, found in training.items()
    ]
    head = ["LoRA", "ms a step", "tokens/s of all cards", "of one card's", "peak of a card, GiB", "while loading"]
    parts = [as_table([*head, "loss of the first step"], rows)]
    rates = [found["gather_bytes_per_second"] for found in training.values() if "gather_bytes_per_second" in found]
    if rates:
        parts.append(f"An all-gather alone brings {max(rates) / 1e9:.0f} GB/s to a card.")
    return parts


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--folder", type=Path, default=Path("/tmp/synthetic-m3-7"), help="of the checkpoint")
        parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
        parser.add_argument("--only_write", action="store_true", help="write the checkpoint and stop")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model")
        parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="measure the decoding of these alone")
        names = two_cards_training.LAYOUTS
        parser.add_argument(
            "--training", nargs="*", choices=names, help="measure the training of these alone, or of all"
        )
        parser.add_argument("--experts", type=int, default=EXPERTS, help="of a layer, if the checkpoint is written")
        parser.add_argument("--profile", action="store_true", help="print where the time of a token or a step goes")
        parser.add_argument("--case_seconds", type=float, default=120.0, help="stop a case after so many seconds")
        parser.add_argument("--worker", nargs=2, help="run in this process, as the benchmark itself calls it")

    arguments = parse_arguments("two_cards", "Time a model over several GPUs beside one.", add)
    on_gpu = arguments.device == "cuda"
    if arguments.worker:
        work, layout = arguments.worker
        folder = str(arguments.folder)
        is_launched = work == "train" and two_cards_training.is_launched(layout)
        if work == "train":
            found = two_cards_training.train(layout, partial(load, folder), on_gpu, arguments.profile)
        else:
            found = decode(layout, folder, on_gpu, arguments.profile)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found), flush=True)
        else:
            # the launcher's processes share a standard output, whose last line is that of the first process
            print("null", file=sys.stderr if is_launched else sys.stdout, flush=True)
        sys.stderr.flush()
        os._exit(0)  # threads of the process group may still run
    was_there = (arguments.folder / "config.json").exists()
    if not was_there:
        make_synthetic_checkpoint(arguments.folder, geometry(not on_gpu, arguments.experts), repeated=on_gpu)
    if arguments.only_write:
        return
    run = Run("two_cards", arguments, tables, needs_gpu=on_gpu)
    run.record["decoding"], run.record["training"] = {}, {}

    def case(work: str, layout: str) -> None:
        options = ["--profile"] if arguments.profile else []
        found = run_group(work, layout, arguments.folder, arguments.device, arguments.case_seconds, options)[0]
        if work == "decode" and layout != ONE:
            found |= beside_one_card(layout, arguments.folder)
        run.record["decoding" if work == "decode" else "training"][layout] = found

    is_chosen = arguments.layouts is not None or arguments.training is not None
    everywhere = [layout for layout in LAYOUTS if on_gpu or layout != "device_map"]
    layouts = arguments.layouts or ([] if is_chosen else everywhere)
    training = arguments.training if is_chosen else [ONE, two_cards_training.FSDP2]
    if arguments.training == []:
        training = two_cards_training.LAYOUTS
    cases = [("decode", layout) for layout in layouts] + [("train", layout) for layout in training or []]
    try:
        run.cases(cases, case)
    finally:
        if not was_there and not arguments.keep:
            shutil.rmtree(arguments.folder)
    run.finish()


if __name__ == "__main__":
    main()
