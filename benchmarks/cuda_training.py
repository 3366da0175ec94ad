"""Training with the CUDA operators beside dense attention on one GPU: `python -m benchmarks.cuda_training [--output NAME]`.

Released head geometry, bf16, batch 1, forward and backward through autograd. A step is what an attention layer does
besides its projections: selection, attention, and the indexer's loss, each with its gradient. Ceilings are measured in
the same run. The rival here is the dense causal attention of PyTorch (cuDNN where it takes the call).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from modeling_minimax_m3 import msa

from .cuda import (
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    RESULTS,
    TOPK,
    clustered_blocks,
    matmul_tflops,
    random,
    selected_flops,
    time_ms,
)
from .measure import environment

LENGTHS = (8192, 32768, 131072)
SECONDS = 0.25  # of repetitions of each call
TRAINING_FLOPS = 3.5  # of those of the forward: it has two products, its gradient five


def training_ms(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of forward and backward, and GiB that they take beside the inputs."""
    with torch.no_grad():
        grad_out = torch.randn_like(function(*leaves))

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return {
        "both": time_ms(step, SECONDS),
        "gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
    }


def measure(tokens: int, generator: torch.Generator) -> dict[str, dict]:
    """Milliseconds of each part at one length."""
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": BLOCK, "backend": "cuda"}
    index_query, index_key = random(generator, tokens, KV_HEADS, DIM), random(generator, tokens, DIM)
    select = partial(msa.select_blocks, index_query, index_key, topk=TOPK, **lengths)
    row = {"select": {"both": time_ms(select, SECONDS)}}
    leaves = [random(generator, tokens, heads, DIM).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (leaf.detach() for leaf in leaves)
    index_leaves = [index_query.detach().requires_grad_(), index_key.detach().requires_grad_()]
    for name, blocks in (("random", select()), ("clustered", clustered_blocks(tokens, generator))):
        attend = partial(msa.block_sparse_attention, block_indices=blocks, **lengths)
        row[name] = training_ms(attend, leaves)
        row[name]["forward"] = time_ms(partial(attend, query, key, value), SECONDS)
        lse = attend(query, key, value, return_lse=True)[1]
        loss = partial(msa.indexer_kl_loss, query=query, key=key, block_indices=blocks, lse=lse, **lengths)
        row[f"{name}_loss"] = training_ms(loss, index_leaves)
    states = [leaf.detach().transpose(0, 1)[None].requires_grad_() for leaf in leaves]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        row["dense"] = training_ms(partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True), states)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training with the CUDA operators beside dense attention.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_training", help="for a .json and a .md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    generator = torch.Generator("cuda").manual_seed(0)
    ceiling = matmul_tflops(generator)
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda_training", *sys.argv[1:]]),
        "matmul_tflops": ceiling,
    }
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; an 8192^3 bf16 matmul runs at "
        f"{ceiling:.0f} TFLOP/s. Milliseconds of forward + backward (GiB beside the inputs); share of that rate on the "
        "FLOPs of the selected blocks. A step: selection, attention and indexer's loss.",
        "",
        "| tokens | lists | selection | attention | share | its forward alone | indexer's loss | step | dense | dense / step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[int, dict[str, dict]] = {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for tokens in tqdm(LENGTHS, desc="lengths"):
        rows[tokens] = row = measure(tokens, generator)
        parts = {name: f"{p['both']:.4g} ({p['gib']:.2f})" for name, p in row.items() if "gib" in p}
        for name in ("random", "clustered"):
            share = TRAINING_FLOPS * selected_flops(tokens) / row[name]["both"] / 1e9 / ceiling
            step = sum(row[part]["both"] for part in ("select", name, f"{name}_loss"))
            lines.append(
                f"| {tokens} | {name} | {row['select']['both']:.4g} | {parts[name]} | {share:.1%} | "
                f"{row[name]['forward']:.4g} | {parts[f'{name}_loss']} | {step:.4g} | {parts['dense']} | {row['dense']['both'] / step:.3g} |"
            )
        # After each length: the longest takes most of the time.
        written = {"machine": machine, "rows": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(written, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
