"""The memory planner beside measured peaks: `python -m benchmarks.memory_plan [--cases NAME ...] [--output PATH]`.

Each case runs in a process of its own on one GPU, or on two for the case of two cards: a model of the released layer
geometry with few layers and random weights. The peak is the most that PyTorch's allocator has handed out, so the
estimate beside it leaves the CUDA context out. `--list` prints the estimates alone, and needs no GPU.

Quantised cases replace the linear layers alone, by bitsandbytes or torchao. The routed experts stay in bf16 there, and
the request says so. Cases whose package is missing are recorded as failed.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, released_config
from modeling_minimax_m3.memory_plan import DevicePlan, MemoryPlan, MemoryRequest, plan_memory
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

from .gpu import Run, parse_arguments, require_gpu
from .report import as_table

GIB = 2**30
DEVICE = "cuda"
NEW_TOKENS = 32
# What the quantised cases leave in bf16: only linear layers of attention and MLPs are replaced.
UNQUANTIZED = ("vision", "indexer", "head", "routed experts")


@dataclass(frozen=True)
class Case:
    """A run that is planned and measured.

    Args:
        dense (int): Layers with dense attention and a dense MLP.
        sparse (int): Layers with sparse attention and experts.
        experts (int or None): Experts of a layer. None: the released number.
        request (MemoryRequest): The run.
    """

    dense: int
    sparse: int
    experts: int | None
    request: MemoryRequest

    def config(self) -> MiniMaxM3VLTextConfig:
        """The released geometry with these layers, the dense ones first."""
        fields = released_config().text_config.to_dict() | {"num_hidden_layers": self.dense + self.sparse}
        for name in ("layer_types", "mlp_layer_types"):
            fields[name] = fields[name][:1] * self.dense + fields[name][-1:] * self.sparse
        if self.experts is not None:
            fields["num_local_experts"] = self.experts
        return MiniMaxM3VLTextConfig(**fields)

    def plan(self) -> MemoryPlan:
        return plan_memory(self.config(), self.request)


def generation(context: int, **options: Any) -> MemoryRequest:
    return MemoryRequest(context=context, new_tokens=NEW_TOKENS, **options)


def training(kind: str, context: int, checkpointing: bool = True, **options: Any) -> MemoryRequest:
    return MemoryRequest(training=kind, context=context, gradient_checkpointing=checkpointing, **options)


QUANTIZED: dict[str, Any] = {"unquantized_parts": UNQUANTIZED}
CASES = {
    "generate, 32k": Case(1, 3, None, generation(32768 + NEW_TOKENS)),
    "generate, 128k, static cache": Case(1, 3, None, generation(131072 + NEW_TOKENS, cache="static")),
    "generate, 8 rows of 8k": Case(1, 3, None, generation(8192 + NEW_TOKENS, batch_size=8)),
    "generate, 32k, 7 layers": Case(1, 6, None, generation(32768 + NEW_TOKENS)),
    "LoRA, 8k": Case(1, 3, None, training("lora", 8192)),
    "LoRA, 16k, no checkpointing": Case(1, 3, None, training("lora", 16384, checkpointing=False)),
    "full, 8k": Case(1, 2, 32, training("full", 8192)),
    "full, 16k, SGD": Case(1, 2, 64, training("full", 16384, optimizer="sgd")),
    "indexers, 32k": Case(1, 3, None, training("indexers", 32768)),
    "NF4, generate, 32k": Case(24, 2, 32, generation(32768 + NEW_TOKENS, precision="nf4", **QUANTIZED)),
    "NF4, QLoRA, 8k": Case(24, 2, 32, training("qlora", 8192, precision="nf4", **QUANTIZED)),
    "fp8, generate, 32k": Case(24, 2, 32, generation(32768 + NEW_TOKENS, precision="fp8", **QUANTIZED)),
    "two cards, generate, 32k": Case(
        1, 6, None, generation(32768 + NEW_TOKENS, devices=2, strategy="device_map")
    ),
}  # fmt: skip


# ---- one case -----------------------------------------------------------------------------------------------------


def build(case: Case) -> nn.Module:
    """The model of a case on its devices, ready to run."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        config = case.config()
        config._attn_implementation = "sdpa"
        model = MiniMaxM3VLForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    request = case.request
    if request.is_quantized:
        {"nf4": to_nf4, "fp8": to_fp8}[request.precision](model)
    if request.strategy == "device_map":
        from accelerate.big_modeling import dispatch_model

        model = dispatch_model(model, case.plan().device_map())
    return prepare_training(model, request) if request.training != "none" else model.eval()


def is_quantized(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name and ".indexer." not in name


def to_nf4(model: Any) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(model.named_modules()):
        if is_quantized(name, linear):
            with torch.device("meta"):
                replaced = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
            weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=replaced)
            replaced.weight = weight.to(DEVICE)
            model.set_submodule(name, replaced)
    model.is_loaded_in_4bit = True  # PEFT asks


def to_fp8(model: nn.Module) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(model, Float8WeightOnlyConfig(), filter_fn=lambda module, name: is_quantized(name, module))


def prepare_training(model: Any, request: MemoryRequest) -> Any:
    if request.training == "indexers":
        model.requires_grad_(False)
        model.set_indexer_training(0.1)
    model.config.use_cache = False
    model.train()
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if request.training in ("lora", "qlora"):
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            task_type="CAUSAL_LM",
            r=request.lora_rank,
            target_modules=list(request.lora_targets),
            exclude_modules=r".*\bindexer\b.*",
        )
        model = get_peft_model(model, adapters)
    return model


def run_generation(model: Any, request: MemoryRequest) -> None:
    shape = (request.batch_size, request.context - request.new_tokens)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)
    options = {"cache_implementation": "static"} if request.cache == "static" else {}
    model.generate(
        tokens, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=request.new_tokens, **options
    )


def run_training(model: Any, request: MemoryRequest) -> None:
    """Two steps: in the second, the optimizer's states are there from the start."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-5, fused=True),
        "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-5, fused=True),
    }
    optimizer = make[request.optimizer](trained)
    tokens = torch.randint(0, model.config.vocab_size, (request.batch_size, request.context), device=DEVICE)
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(case: Case) -> dict[str, Any]:
    """GiB of each device: the estimate and its parts, the peak, and what the allocator held."""
    plan = case.plan()
    model = build(case)
    gc.collect()
    torch.cuda.empty_cache()
    indices = range(case.request.devices)
    for index in indices:
        torch.cuda.reset_peak_memory_stats(index)
    weights = [torch.cuda.memory_allocated(index) / GIB for index in indices]
    run = run_generation if case.request.training == "none" else run_training
    run(model, case.request)
    rows = []
    for index, device in enumerate(plan.devices):
        torch.cuda.synchronize(index)
        rows.append(
            {
                "device": device.name,
                "estimate_gib": allocated_estimate(device),
                "peak_gib": torch.cuda.max_memory_allocated(index) / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved(index) / GIB,
                "weights_gib": weights[index],
                "parts": device.gib,
                "moment": device.moment,
            }
        )
    return {"devices": rows}


def allocated_estimate(device: DevicePlan) -> float:
    return device.total_gib - device.gib["CUDA context"]


# ---- the record ---------------------------------------------------------------------------------------------------


def in_own_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def difference(row: dict[str, Any]) -> float:
    return row["estimate_gib"] / row["peak_gib"] - 1


def tables(record: dict[str, Any]) -> str:
    """Estimate, peak and difference of each device, and the largest difference."""
    measured = [(name, row) for name, found in record["cases"].items() for row in found["devices"]]
    rows = [
        [
            name,
            row["device"],
            f"{row['estimate_gib']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{difference(row):+.1%}",
            f"{row['reserved_gib']:.2f}",
            row["moment"],
        ]
        for name, row in measured
    ]
    header = ["", "device", "estimate, GiB", "peak, GiB", "difference", "held by the allocator, GiB", "planned moment"]
    text = as_table(header, rows)
    if measured:
        text += f"\n\nThe largest difference is {max(abs(difference(row)) for _, row in measured):.1%}."
    return text


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="which cases to measure")
        parser.add_argument("--only", choices=CASES, help="measure one case here and print a line of JSON")
        parser.add_argument("--list", action="store_true", help="print the plans without measuring")

    arguments = parse_arguments("memory_plan", "Measure peaks beside the memory planner's estimates.", add)
    if arguments.list:
        for name in arguments.cases:
            print(f"{name}\n{CASES[name].plan().table()}\n")
        return
    require_gpu()
    if arguments.only:
        print(json.dumps(measure(CASES[arguments.only])))
        return
    run = Run("memory_plan", arguments, tables)
    run.record["cases"] = {}

    def case(name: str) -> None:
        if CASES[name].request.devices > torch.cuda.device_count():
            raise RuntimeError(f"needs {CASES[name].request.devices} devices")
        run.record["cases"][name] = in_own_process(name)

    run.cases([(name,) for name in arguments.cases], case)
    run.finish()


if __name__ == "__main__":
    main()
