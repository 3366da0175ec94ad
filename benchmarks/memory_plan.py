"""The memory planner beside measured peaks: `python -m benchmarks.memory_plan [--cases TEXT ...] [--output PATH]`.

Each case runs in a process of its own on one GPU, or on two for the case of two cards: a model of the released layer
geometry with few layers and random weights. The peak is the most that PyTorch's allocator has handed out, so the
estimate beside it leaves the CUDA context out. `--list` prints the estimates alone, and needs no GPU.

Quantized layers are put into the model by hand, as a quantizer would have loaded them: MXFP8 and NF4 into experts and
the linear layers of the decoder, fp8 into experts alone. NF4 needs bitsandbytes. A case that this machine cannot run is
skipped, and the record says why. `--replan` puts the estimates of a changed planner beside the peaks of a record.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, released_config
from modeling_minimax_m3 import offload_experts
from modeling_minimax_m3.fused.four_bit_format import FOUR_BIT_FORMATS
from modeling_minimax_m3.fused.scaled_rows_format import FLOAT8_ROWS
from modeling_minimax_m3.fused.weight_formats import WeightFormat
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts
from modeling_minimax_m3.layers.quantized import QuantizedExperts, QuantizedModule
from modeling_minimax_m3.memory_plan import QUANTIZABLE_PARTS, DevicePlan, MemoryPlan, MemoryRequest, plan_memory
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

from . import mxfp8_model
from .gpu import Run, Skipped, parse_arguments, record_text
from .own_process import in_own_process
from .report import as_table

GIB = 2**30
DEVICE = "cuda"
NEW_TOKENS = 32


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


EXPERTS_ALONE = tuple(part for part in QUANTIZABLE_PARTS if part != "routed experts")
# The quick ones that say most come first.
CASES = {
    "generate, 32k": Case(1, 3, None, generation(32768 + NEW_TOKENS)),
    "MXFP8, generate, 32k, 7 layers": Case(1, 6, None, generation(32768 + NEW_TOKENS, precision="mxfp8")),
    "LoRA, 8k": Case(1, 3, None, training("lora", 8192)),
    "MXFP8, QLoRA with experts, 8k, 7 layers": Case(
        1, 6, None, training("qlora", 8192, precision="mxfp8", lora_experts=True)
    ),
    "full, 8k": Case(1, 2, 32, training("full", 8192)),
    "generate, 128k, static cache": Case(1, 3, None, generation(131072 + NEW_TOKENS, cache="static")),
    "LoRA with experts, 8k": Case(1, 2, 32, training("lora", 8192, lora_experts=True)),
    "experts on the host, generate, 32k": Case(1, 3, 32, generation(32768 + NEW_TOKENS, experts_on_device=0.25)),
    "generate, 8 rows of 8k": Case(1, 3, None, generation(8192 + NEW_TOKENS, batch_size=8)),
    "LoRA, 16k, no checkpointing": Case(1, 3, None, training("lora", 16384, checkpointing=False)),
    "indexers, 32k": Case(1, 3, None, training("indexers", 32768)),
    "full, 16k, SGD": Case(1, 2, 64, training("full", 16384, optimizer="sgd")),
    "fp8 experts, generate, 32k": Case(
        1, 3, None, generation(32768 + NEW_TOKENS, precision="fp8", unquantized_parts=EXPERTS_ALONE)
    ),
    "NF4, generate, 32k, 7 layers": Case(1, 6, None, generation(32768 + NEW_TOKENS, precision="nf4")),
    "NF4, QLoRA with experts, 8k, 7 layers": Case(
        1, 6, None, training("qlora", 8192, precision="nf4", lora_experts=True)
    ),
    "two cards, generate, 32k, 7 layers": Case(
        1, 6, None, generation(32768 + NEW_TOKENS, devices=2, strategy="device_map")
    ),
}


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
        {"mxfp8": mxfp8_model.quantize, "nf4": to_nf4, "fp8": to_fp8}[request.precision](model)
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.finish_loading()
    if request.strategy == "device_map":
        from accelerate.big_modeling import dispatch_model

        model = dispatch_model(model, case.plan().device_map())
    if request.experts_on_device is not None:
        offload_experts(model, DEVICE, request.experts_on_device, show_progress=False)
    return prepare_training(model, request) if request.training != "none" else model.eval()


@torch.no_grad()
def quantize_experts(model: nn.Module, weight_format: WeightFormat) -> None:
    """Puts experts in a format in the place of plain ones, one layer after the other."""
    for name, experts in list(model.named_modules()):
        if type(experts) is not MiniMaxM3VLExperts:
            continue
        with torch.device("meta"):
            replacement = QuantizedExperts(experts, weight_format, torch.bfloat16)
        for weight in replacement.weight_names:
            plain: Any = experts._parameters.pop(weight)
            stored = weight_format.quantize(plain)
            del plain
            for suffix, tensor in zip(weight_format.suffixes, stored, strict=True):
                replacement.register_parameter(weight + suffix, nn.Parameter(tensor, requires_grad=False))
        model.set_submodule(name, replacement)


def to_nf4(model: Any) -> None:
    """Experts and all linear layers but the head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantize_experts(model, FOUR_BIT_FORMATS["nf4", False])
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or "lm_head" in name:
            continue
        with torch.device("meta"):
            replaced = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=replaced)
        replaced.weight = weight.to(DEVICE)
        model.set_submodule(name, replaced)
    model.is_loaded_in_4bit = True  # PEFT asks


def to_fp8(model: nn.Module) -> None:
    """Experts alone, in E4M3 with a scale for each row, as torchao's `Float8WeightOnlyConfig` has them."""
    quantize_experts(model, FLOAT8_ROWS)


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
            target_parameters=[f"mlp.experts.{name}" for name in QuantizedExperts.weight_names]
            if request.lora_experts
            else None,
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


def cannot_run(case: Case) -> str | None:
    """Why this machine cannot run the case, or None."""
    devices = torch.cuda.device_count()
    if case.request.devices > devices:
        return f"needs {case.request.devices} GPUs, and this machine has {devices}"
    if case.request.precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return "needs bitsandbytes"
    return None


def measure_named(name: str) -> dict[str, Any]:
    """Measures a case of `CASES`, and how long that took."""
    started = time.monotonic()
    return measure(CASES[name]) | {"seconds": time.monotonic() - started}


def replan(record: dict[str, Any]) -> None:
    """Puts the estimates of today's planner beside the measured peaks of a record."""
    for name, found in record["cases"].items():
        for row, device in zip(found["devices"], CASES[name].plan().devices, strict=True):
            row.update(estimate_gib=allocated_estimate(device), parts=device.gib, moment=device.moment)


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


def chosen(texts: list[str]) -> list[str]:
    """The cases of these names, and those whose names contain one of the other texts.

    Raises:
        SystemExit: A text is in no name.
    """
    for text in texts:
        if not any(text in name for name in CASES):
            raise SystemExit(f"--cases: {text!r} must be in the name of a case: {'; '.join(CASES)}")
    return [name for name in CASES if any(text == name or (text in name and text not in CASES) for text in texts)]


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cases", nargs="+", default=[""], help="run the cases whose names contain one of these")
        parser.add_argument("--case_seconds", type=float, default=120.0, help="stop a case after so many seconds")
        parser.add_argument("--list", action="store_true", help="print the plans without measuring")
        parser.add_argument(
            "--replan", action="store_true", help="renew the estimates in --output, and measure nothing"
        )

    arguments = parse_arguments("memory_plan", "Measure peaks beside the memory planner's estimates.", add)
    names = chosen(arguments.cases)
    if arguments.list:
        for name in names:
            print(f"{name}\n{CASES[name].plan().table()}\n")
        return
    if arguments.replan:
        path = arguments.output.with_suffix(".json")
        record = json.loads(path.read_text())
        replan(record)
        path.write_text(json.dumps(record, indent=2) + "\n")
        path.with_suffix(".md").write_text(record_text(record, tables) + "\n")
        return
    run = Run("memory_plan", arguments, tables)
    for package in ("peft", "accelerate", "bitsandbytes"):
        if importlib.util.find_spec(package) is not None:
            run.record["machine"][package] = importlib.metadata.version(package)
    run.record["cases"] = {}

    def case(name: str) -> None:
        reason = cannot_run(CASES[name])
        if reason is not None:
            raise Skipped(reason)
        found = run.record["cases"][name] = in_own_process(measure_named, (name,), arguments.case_seconds)
        for row in found["devices"]:
            print(f"{'':10}{row['device']}: estimate {row['estimate_gib']:.2f}, peak {row['peak_gib']:.2f} GiB")

    run.cases([(name,) for name in names], case)
    run.finish()


if __name__ == "__main__":
    main()
