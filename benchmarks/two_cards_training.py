"""LoRA steps of `benchmarks.two_cards`, in one of its processes."""

import os
import sys
import time
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .step_profile import summary_of, tables, trace_of

STEPS, WARM_UP_STEPS = 6, 2
TOKENS = 8192
GIB = 2**30
ONE = "one card"
FSDP2 = "FSDP2"
GATHERED_ONCE = "FSDP2, gathered once a step"
SHARED = "tensor and expert parallelism"
# FSDP2 gathers the weights of a layer for the forward and again for the backward, or it keeps them in between, which
# takes the memory of the whole model. Tensor and expert parallelism never gather weights; both processes see all rows.
LAYOUTS = (ONE, FSDP2, GATHERED_ONCE, SHARED)
# PEFT cuts no adapters of o_proj, whose inputs are shared.
TARGETS = {SHARED: "q|k|v"}


def is_launched(layout: str) -> bool:
    """Whether `accelerate launch` starts the processes."""
    return layout in (FSDP2, GATHERED_ONCE)


def rows_of(vocabulary: int, tokens: int, seeds: range, device: torch.device) -> torch.Tensor:
    """Random ids (rows, tokens), those of a row by its seed."""
    rows = [torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def gather_rate(device: torch.device) -> float:
    """Bytes per second that a process receives in an all-gather of as many bytes as half a layer has."""
    part = torch.empty(2**30 if device.type == "cuda" else 2**10, dtype=torch.bfloat16, device=device)
    whole = part.new_empty(torch.distributed.get_world_size() * len(part))
    seconds = []
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, part)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return (whole.nbytes - part.nbytes) / min(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """The most memory since the last call of this function."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / GIB


def with_adapters(model: Any, layout: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = rf"model\.language_model\..*\.self_attn\.({TARGETS.get(layout, 'q|k|v|o')})_proj"
    torch.manual_seed(0)  # the same adapters in all processes
    return get_peft_model(model, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))


def optimizer_of(model: Any, on_gpu: bool) -> torch.optim.Optimizer:
    """AdamW, in one kernel as `Trainer` has it, unless tensor parallelism cuts some of the adapters and others not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_mixed = len({isinstance(parameter, DTensor) for parameter in trained}) > 1
    return torch.optim.AdamW(trained, lr=1e-4, foreach=False if is_mixed else None, fused=on_gpu and not is_mixed)


def train(layout: str, load: Any, on_gpu: bool, profiles: bool) -> dict[str, Any]:
    """Milliseconds of a step, tokens per second of all processes together, and the losses of the first process.

    Args:
        layout (str): One of `LAYOUTS`.
        load (Callable): Loads the model, with options of `from_pretrained`.
        on_gpu (bool): Whether this process has a GPU.
        profiles (bool): Whether to print where the time of one more step goes, and to return a summary.
    """
    from accelerate.accelerator import Accelerator
    from accelerate.utils import DistributedType

    found: dict[str, Any] = {}
    if layout == SHARED:
        from transformers.distributed import DistributedConfig

        processes = int(os.environ["WORLD_SIZE"])
        if on_gpu:
            torch.cuda.set_device(int(os.environ["RANK"]))
        model = load(distributed_config=DistributedConfig(tp_size=processes, ep_size=processes))
        device = model.device
        model = with_adapters(model, layout)
        optimizer = optimizer_of(model, on_gpu)
        backward, rows = torch.Tensor.backward, range(processes)
    else:
        accelerator = Accelerator(mixed_precision="bf16")
        device, processes = accelerator.device, accelerator.num_processes
        if processes > 1:
            found["gather_bytes_per_second"] = gather_rate(device)
        model = with_adapters(load(device_map={"": device}), layout)
        if accelerator.distributed_type == DistributedType.FSDP:
            accelerator.state.fsdp_plugin.reshard_after_forward = layout != GATHERED_ONCE
        model, optimizer = accelerator.prepare(model, optimizer_of(model, on_gpu))
        backward, rows = accelerator.backward, range(accelerator.process_index, accelerator.process_index + 1)
    length = TOKENS if on_gpu else 64
    vocabulary = model.config.get_text_config().vocab_size
    tokens = rows_of(vocabulary, length, rows, device)
    losses = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=layout == SHARED):  # as Accelerate does on one card
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        if processes > 1:
            torch.distributed.barrier()

    found["loading_peak_gib"] = peak_gib(device)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds[WARM_UP_STEPS:])[(STEPS - WARM_UP_STEPS) // 2]
    found |= {"ms": 1e3 * median, "tokens_per_second": processes * length / median, "losses": losses[:STEPS]}
    found["peak_gib"] = peak_gib(device)
    is_first = processes == 1 or torch.distributed.get_rank() == 0
    if profiles and is_first:
        found["profile"] = summary_of(trace_of(step, on_gpu))
        print(f"\n{layout}: {tables(found['profile'])}\n", file=sys.stderr, flush=True)
    elif profiles:
        step()
    return found
