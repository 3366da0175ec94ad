"""Loading a synthetic checkpoint beside a plain read of its files: `python -m benchmarks.loading [--gigabytes 40]`.

The checkpoint has random numbers in the layout of the released model, with as many layers and experts as give that
size. It is written to `--folder`, and removed at the end unless `--keep` is given or the folder was there before.

A case is one way to load: on one GPU, over all GPUs by a `device_map`, or one process a GPU with FSDP2 or with expert
parallelism. Before each, the files are read from beginning to end by one thread. Before the read and before the load
they are dropped from the page cache (`posix_fadvise` after `fsync`); the record says how much of them was still cached,
as far as `mincore` tells. The time of a load runs from a process that has its imports and its CUDA context to the last
weight on its device. Host memory is what a process holds beyond what it held at that start: anonymous memory, sampled
all the while, and page-locked memory of PyTorch. `--device cpu` runs the same without GPUs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig, released_config
from modeling_minimax_m3.checkpoint_conversion import Checkpoint, make_synthetic_checkpoint, open_checkpoint

from .disk import drop_from_cache, read_seconds
from .gpu import Run, Skipped, parse_arguments
from .own_process import result_of, start_group
from .report import as_table

GIB = 2**30
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """A way to load.

    Args:
        processes (int or None): How many. None: one for each GPU, or two on a CPU.
        least_devices (int): How many GPUs it needs.
        options (dict): Of `from_pretrained`, beside those that depend on the number of processes.
        plan (tuple[str, ...]): Fields of `DistributedConfig` that get the number of processes.
    """

    processes: int | None
    least_devices: int
    options: dict[str, Any]
    plan: tuple[str, ...] = ()


CASES = {
    "one device": Case(1, 1, {"device_map": "one"}),
    "device_map over all devices": Case(1, 2, {"device_map": "balanced"}),
    "FSDP2": Case(None, 2, {}, ("fsdp_size",)),
    "expert parallelism": Case(None, 2, {}, ("fsdp_size", "ep_size")),
    "one device, quantized to MXFP8": Case(1, 1, {"device_map": "one", "quantize": True}),
}


# ---- the checkpoint -----------------------------------------------------------------------------------------------


def size_of(config: MiniMaxM3VLConfig, layers: int, experts: int) -> float:
    """Gigabytes of a bfloat16 checkpoint with the first layers and so many experts."""
    text, vision = config.text_config, 0.85e9
    hidden, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    attention = hidden * (2 * text.num_attention_heads * text.head_dim + 2 * kv)
    dense = text.mlp_layer_types[:layers].count("dense")
    mlps = dense * 3 * hidden * text.dense_intermediate_size
    mlps += (layers - dense) * 3 * hidden * (text.shared_intermediate_size + experts * text.intermediate_size)
    return 2e-9 * (vision + 2 * text.vocab_size * hidden + layers * attention + mlps)


def layers_and_experts(gigabytes: float) -> tuple[int, int]:
    """The fewest layers of the released geometry, and the number of their experts, that have about this size.

    The number is a multiple of 8, so that up to 8 processes share the experts evenly.

    Raises:
        SystemExit: The size is below that of four layers with eight experts.
    """
    config = released_config()
    least = size_of(config, 4, 8)
    if gigabytes < least:
        raise SystemExit(f"--gigabytes must be at least {least:.1f}, the size of four layers, got {gigabytes}")
    most = config.text_config.num_local_experts
    layers = 4
    while size_of(config, layers, most) < gigabytes and layers < config.text_config.num_hidden_layers:
        layers += 1
    one = size_of(config, layers, 1) - size_of(config, layers, 0)
    experts = 8 * round((gigabytes - size_of(config, layers, 0)) / one / 8)
    return layers, min(most, max(8, experts))


def make_checkpoint(folder: Path, arguments: argparse.Namespace) -> tuple[Checkpoint, float]:
    """The checkpoint in `folder`, written if there is none, and the seconds that writing took.

    Raises:
        SystemExit: The disk has too little room.
    """
    if (folder / "config.json").exists():
        return open_checkpoint(folder), 0.0
    layers: int | None = None
    experts: int | None = None
    if arguments.geometry is None:
        layers, experts = layers_and_experts(arguments.gigabytes)
        config = released_config()
        needed = 1.05e9 * arguments.gigabytes
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise SystemExit(f"--folder {folder}: {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
    else:
        config = MiniMaxM3VLConfig.from_pretrained(arguments.geometry)
    started = time.perf_counter()
    checkpoint = make_synthetic_checkpoint(
        folder, config, layers=layers, experts=experts, max_shard_size=arguments.max_shard_size, repeated=True
    )
    return checkpoint, time.perf_counter() - started


# ---- a process that loads -----------------------------------------------------------------------------------------


def anonymous_bytes() -> tuple[int, str]:
    """Anonymous memory of this process, and where the figure comes from.

    Where the system tells no such figure, it is all memory of the process, mapped files included.
    """
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" in fields:
        return int(fields["RssAnon"].split()[0]) * 1024, "RssAnon"
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.exists():
        for line in rollup.read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024, "smaps_rollup"
    return int(fields["VmRSS"].split()[0]) * 1024, "VmRSS, mapped files included"


def pinned_peak() -> int:
    """The most page-locked memory that PyTorch has held."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


class MemorySampler:
    """Samples the anonymous memory of this process in a thread, as a context.

    Attributes:
        start (int): Bytes when it began.
        peak (int): The most bytes.
        end (int): Bytes at the end.
        source (str): Where the figures come from.
    """

    def __enter__(self) -> "MemorySampler":
        self.start, self.source = anonymous_bytes()
        self.peak = self.start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes()[0])

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.end, _ = anonymous_bytes()
        self.peak = max(self.peak, self.end)


def load(name: str, folder: str, device: str) -> dict[str, Any]:
    """Loads a checkpoint as a case does, in a process that torch.distributed knows where there are several.

    Waits for a line of the standard input first, so that the files can be dropped from the page cache meanwhile.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    import modeling_minimax_m3

    case, processes = CASES[name], int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    options = dict(case.options)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
    if options.pop("quantize", False):
        options["quantization_config"] = modeling_minimax_m3.mxfp8_config()
    if options.get("device_map") == "one":
        options["device_map"] = {"": 0 if device == "cuda" else "cpu"}
    if case.plan:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        plan: dict[str, Any] = dict.fromkeys(case.plan, processes)
        options["distributed_config"] = DistributedConfig(**plan)
    print("ready", flush=True)
    sys.stdin.readline()
    with MemorySampler() as memory:
        started = time.perf_counter()
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
        if device == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)
        seconds = time.perf_counter() - started
    model, info = loaded
    parameters = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"the checkpoint and the model differ: {info}")
    kept = sum(parameter.nbytes for parameter in parameters if parameter.device.type == "cpu")
    found = {
        "seconds": seconds,
        "anonymous_start_bytes": memory.start,
        "anonymous_peak_bytes": memory.peak,
        "anonymous_end_bytes": memory.end,
        "anonymous_source": memory.source,
        "pinned_peak_bytes": pinned_peak(),
        "weights_on_host_bytes": kept,
        "weights_on_device_bytes": sum(parameter.nbytes for parameter in parameters) - kept,
    }
    if case.plan:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return found


# ---- cases --------------------------------------------------------------------------------------------------------


def run_case(name: str, checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read and load, each from a page cache without the files.

    Raises:
        Skipped: There are too few GPUs.
        RuntimeError: A process failed or took too long.
    """
    case = CASES[name]
    devices = torch.cuda.device_count() if arguments.device == "cuda" else 2
    if devices < case.least_devices:
        raise Skipped(f"needs {case.least_devices} GPUs, and this machine has {devices}")
    files = list(checkpoint.files)
    cached = [drop_from_cache(files)]
    read = read_seconds(files)
    worker = ["benchmarks.loading", "--worker", name, "--folder", str(checkpoint.folder), "--device", arguments.device]
    processes = start_group(worker, case.processes or devices)
    try:
        for process in processes:
            _wait_until_ready(process)
        cached.append(drop_from_cache(files))
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [result_of(process, arguments.case_seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    seconds = max(result["seconds"] for result in found)
    size = sum(file.stat().st_size for file in files)
    shard = max(file.stat().st_size for file in files)
    hosts = [host_bytes(result) for result in found]
    return {
        "bytes": size,
        "largest_shard_bytes": shard,
        "read_seconds": read,
        "load_seconds": seconds,
        "load_over_read": seconds / read,
        "cached_before_read": cached[0],
        "cached_before_load": cached[1],
        "host_bytes": max(hosts),
        "host_shards": max(hosts) / shard,
        "processes": found,
    }


def host_bytes(found: dict[str, Any]) -> int:
    """What a process held on the host for loading: without what it held before, and the weights that it keeps."""
    anonymous = found["anonymous_peak_bytes"] - found["anonymous_start_bytes"]
    return max(0, anonymous - found["weights_on_host_bytes"]) + found["pinned_peak_bytes"]


def _wait_until_ready(process: subprocess.Popen) -> None:
    for line in process.stdout or ():
        if line.strip() == "ready":
            return
    raise RuntimeError(f"a process ended with exit code {process.wait()} before it loaded; its error is above")


def tables(record: dict[str, Any]) -> str:
    """Seconds of reading and of loading, and host memory beside a shard."""
    rows = [
        [
            name,
            str(len(found["processes"])),
            f"{found['bytes'] / 1e9:.1f}",
            f"{found['read_seconds']:.1f}",
            f"{found['load_seconds']:.1f}",
            f"{found['load_over_read']:.2f}",
            f"{found['host_bytes'] / GIB:.2f}",
            f"{found['host_shards']:.2f}",
        ]
        for name, found in record["cases"].items()
    ]
    head = ["", "processes", "GB", "read, s", "load, s", "load / read", "host memory, GiB", "in shards"]
    return as_table(head, rows)


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="which ways to load")
        parser.add_argument("--gigabytes", type=float, default=40.0, help="size of the checkpoint (default: 40)")
        parser.add_argument("--geometry", help="a config.json in place of --gigabytes, with all its layers")
        parser.add_argument("--max_shard_size", type=int, default=16_100_000_000, help="bytes; default as released")
        parser.add_argument("--folder", type=Path, default=Path("/tmp/synthetic-m3"), help="of the checkpoint")
        parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: two processes, with gloo")
        parser.add_argument("--case_seconds", type=float, default=300.0, help="stop a case after so many seconds")
        parser.add_argument("--worker", choices=CASES, help="load in this process, as the benchmark itself calls it")

    arguments = parse_arguments("loading", "Time the loading of a checkpoint beside a read of its files.", add)
    if arguments.worker:
        print(json.dumps(load(arguments.worker, str(arguments.folder), arguments.device)))
        return
    run = Run("loading", arguments, tables, needs_gpu=arguments.device == "cuda")
    was_there = arguments.folder.exists()
    checkpoint, seconds = make_checkpoint(arguments.folder, arguments)
    run.record["checkpoint"] = {
        "files": [file.stat().st_size for file in checkpoint.files],
        "tensors": len(checkpoint.tensors),
        "write_seconds": seconds,
    }
    run.record["cases"] = {}

    def case(name: str) -> None:
        run.record["cases"][name] = run_case(name, checkpoint, arguments)

    try:
        run.cases([(name,) for name in arguments.cases], case)
    finally:
        if not was_there and not arguments.keep:
            shutil.rmtree(arguments.folder)
    run.finish()


if __name__ == "__main__":
    main()
