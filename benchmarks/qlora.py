"""LoRA on attention and experts over a base in bf16, MXFP8 and 4 bits: `python -m benchmarks.qlora [--output PATH]`.

On one GPU. Speed and memory: seven layers of the released geometry with random weights (47B parameters, one dense
layer, six sparse), rank 16, 8192 tokens, activation checkpointing, autocast to bf16. The peak is that of PyTorch's
allocator. Quantized layers are put into the model by hand, as in `memory_plan`.

Curves: a tiny model learns the bytes of this project's documentation in bf16, is quantized, and its adapters learn
those of its Python code. Every base starts from the same weights and sees the same batches.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.layers.quantized import QuantizedModule
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

from . import memory_plan
from .gpu import Run, Skipped, parse_arguments
from .memory_plan import DEVICE, GIB, Case, prepare_training, training
from .own_process import in_own_process
from .report import as_table

KINDS = ("speed", "curves")
FORMS = {"bf16": "bf16", "MXFP8": "mxfp8", "4 bits (NF4)": "nf4"}
TOKENS, WARM_UP, MEASURED = 8192, 2, 4
CURVE_ROWS, CURVE_TOKENS, PRETRAINING_STEPS, CURVE_STEPS = 8, 512, 150, 80
# Of the tiny model: what the compiled kernels take, and rows of a multiple of 64, the block of a scale of 4 bits.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "dense_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_n_heads": 2,
    "index_block_size": 64,
    "index_topk_blocks": 4,
}
REPOSITORY = Path(__file__).parent.parent


def request_of(form: str) -> Any:
    kind = "lora" if form == "bf16" else "qlora"
    return training(kind, TOKENS, precision=FORMS[form], lora_experts=True)


def speed(form: str) -> dict[str, Any]:
    """Milliseconds of a training step, and GiB at its peak."""
    case = Case(1, 6, None, request_of(form))
    model: Any = memory_plan.build(case)
    weights = torch.cuda.memory_allocated()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS), device=DEVICE)
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + MEASURED):
        started = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds[WARM_UP:])[MEASURED // 2]
    return {
        "ms": 1e3 * median,
        "tokens_per_second": TOKENS / median,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "weights_gib": weights / GIB,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
    }


def bytes_of(folder: str, pattern: str) -> torch.Tensor:
    """The bytes of all such files as token ids."""
    text = b"".join(path.read_bytes() for path in sorted((REPOSITORY / folder).glob(pattern)))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def learn(model: Any, text: torch.Tensor, steps: int, learning_rate: float) -> list[float]:
    """Trains on random pieces of a text. Returns the loss of each step."""
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - CURVE_TOKENS, (CURVE_ROWS, 1), generator=generator)
        tokens = text[starts + torch.arange(CURVE_TOKENS)].to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def tiny_model() -> Any:
    torch.manual_seed(0)
    model: Any = MiniMaxM3VLForCausalLM(tiny_config(text=SIZES).text_config)
    return model.to(DEVICE)


def pretrain(path: str) -> None:
    """Saves the weights that all bases start from. Training on a GPU twice gives two models."""
    model = tiny_model()
    learn(model, bytes_of("docs", "*.md"), PRETRAINING_STEPS, 3e-3)
    torch.save(model.state_dict(), path)


def curve(form: str, pretrained: str) -> list[float]:
    """Losses of the adapters' steps."""
    model = tiny_model()
    model.load_state_dict(torch.load(pretrained))
    model.to(torch.bfloat16)
    request = request_of(form)
    if request.is_quantized:
        {"mxfp8": memory_plan.mxfp8_model.quantize, "nf4": memory_plan.to_nf4}[request.precision](model)
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.finish_loading()
    torch.manual_seed(1)
    return learn(prepare_training(model, request), bytes_of("modeling_minimax_m3", "**/*.py"), CURVE_STEPS, 2e-3)


def tables(record: dict[str, Any]) -> str:
    rows, plain = [], record["speed"].get("bf16")
    for form, found in record["speed"].items():
        share = f"{found['tokens_per_second'] / plain['tokens_per_second']:.2f}" if plain else ""
        figures = [f"{found['ms']:.0f}", f"{found['tokens_per_second']:.0f}", share]
        rows.append([form, *figures, f"{found['weights_gib']:.1f}", f"{found['peak_gib']:.1f}"])
    head = ["base", "ms a step", "tokens/s", "of bf16's", "weights, GiB", "peak, GiB"]
    text = as_table(head, rows)
    steps = [9, 29, 49, CURVE_STEPS - 1]
    if record["curves"]:
        # Means of ten steps, since the batches differ in difficulty.
        def around(losses: list[float], step: int) -> float:
            window = losses[max(0, step - 9) : step + 1]
            return sum(window) / len(window)

        head = ["loss of the tiny model, mean of ten steps up to step", *(str(step + 1) for step in steps)]
        rows = [
            [form, *(f"{around(losses, step):.3f}" for step in steps)] for form, losses in record["curves"].items()
        ]
        text += "\n\n" + as_table(head, rows)
    return text


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to measure (all)")

    arguments = parse_arguments("qlora", "Time LoRA over bases of several precisions.", add)
    run = Run("qlora", arguments, tables)
    run.record["speed"], run.record["curves"] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        pretrained = str(Path(folder) / "pretrained.pt")

        def case(kind: str, form: str) -> None:
            if FORMS[form] == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
                raise Skipped("needs bitsandbytes")
            if kind == "speed":
                run.record[kind][form] = in_own_process(speed, (form,), 120.0)
                return
            if not Path(pretrained).exists():
                in_own_process(pretrain, (pretrained,), 120.0)
            run.record[kind][form] = in_own_process(curve, (form, pretrained), 120.0)

        run.cases([(kind, form) for kind in arguments.kinds for form in FORMS], case)
    run.finish()


if __name__ == "__main__":
    main()
