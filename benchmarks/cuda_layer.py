"""One sparse attention layer beside stock's on a GPU: `python -m benchmarks.cuda_layer [--output NAME]`.

Released geometry, projections included, bf16, batch 1, the same weights in both. Stock runs under sdpa.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from modeling_minimax_m3.sequence_layout import build_layout

from .cuda import RESULTS, time_ms
from .implementations import OURS, STOCK, classes, load_same_weights, text_config
from .measure import environment

HIDDEN = 6144
GEOMETRY = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_block_size": 128,
    "index_topk_blocks": 16,
    "num_hidden_layers": 1,
    "layer_types": ["minimax_m3_sparse"],
    "mlp_layer_types": ["dense"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
}
LENGTHS = {STOCK: (8192, 12288), OURS: (8192, 12288, 131072, 1048576)}
PASSES = ("forward", "forward + backward")
MAX_ERROR = 2e-2  # bf16 rounding, and the few tokens whose blocks lie near a tie


def build(implementation: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The attention layer and the rotary embedding, on the GPU."""
    config = text_config(implementation, MiniMaxM3VLTextConfig(**GEOMETRY))
    module = classes(implementation)
    layer = module.MiniMaxM3VLAttention(config, 0)
    load_same_weights(layer)
    return layer.to("cuda", torch.bfloat16), module.MiniMaxM3VLRotaryEmbedding(config).cuda()


def step(implementation: str, layer: torch.nn.Module, rotary: torch.nn.Module, tokens: int, name: str) -> Callable:
    """A call of one pass over `tokens` tokens."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden_states = torch.randn(1, tokens, HIDDEN, generator=generator, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(tokens, device="cuda")[None]
    inputs = {
        "position_embeddings": rotary(hidden_states, positions),
        "attention_mask": build_layout(None, None, None, 1, tokens, "cuda") if implementation == OURS else None,
        "position_ids": positions,
    }

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(hidden_states, **inputs)[0]

    def forward_backward() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = hidden_states.detach().requires_grad_()
        out = layer(leaf, **inputs)[0]
        out.backward(out.detach())

    return forward if name == PASSES[0] else forward_backward


def measure(implementation: str, layer: torch.nn.Module, rotary: torch.nn.Module, tokens: int, name: str) -> dict:
    """Milliseconds and peak extra GiB of one pass, both None where the card's memory ends."""
    try:
        run = step(implementation, layer, rotary, tokens, name)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        milliseconds = time_ms(run, seconds=0.3)
        return {"ms": milliseconds, "gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "gib": None}
    finally:
        layer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def check_agreement(layers: dict) -> float:
    """Relative error of ours against stock on a length of which no token selects among blocks, so that ties do not
    matter; raises where it is larger than rounding."""
    tokens = GEOMETRY["index_topk_blocks"] * GEOMETRY["index_block_size"]
    outs = {name: step(name, *layers[name], tokens, PASSES[0])().float() for name in layers}
    error = ((outs[OURS] - outs[STOCK]).norm() / outs[STOCK].norm()).item()
    if not error < MAX_ERROR:
        raise SystemExit(f"ours and stock's layer differ by {error:.1e}, the limit is {MAX_ERROR:.0e}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a sparse attention layer beside stock's on a GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_layer", help="results go to this .json and .md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    layers = {implementation: build(implementation) for implementation in LENGTHS}
    error = check_agreement(layers)
    rows = {}
    for name in PASSES:
        for implementation, lengths in LENGTHS.items():
            for tokens in tqdm(lengths, desc=f"{implementation}, {name}"):
                rows[f"{implementation}, {name}, {tokens}"] = row = measure(
                    implementation, *layers[implementation], tokens, name
                )
                if row["ms"] is None:
                    break
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda_layer", *sys.argv[1:]]),
        "relative_error": error,
    }
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}; "
        f"relative error against stock {error:.1e}. Milliseconds / peak extra GiB.",
        "",
        "| tokens | pass | stock | ours | times faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in PASSES:
        for tokens in LENGTHS[OURS]:
            stock, ours = (rows.get(f"{which}, {name}, {tokens}") for which in (STOCK, OURS))
            if ours is None:
                continue
            ratio = f"{stock['ms'] / ours['ms']:.1f}" if stock and stock["ms"] and ours["ms"] else "-"
            lines.append(f"| {tokens} | {name} | {_cell(stock)} | {_cell(ours)} | {ratio} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    return "out of memory" if row["ms"] is None else f"{row['ms']:.4g} / {row['gib']:.3g}"


if __name__ == "__main__":
    main()
