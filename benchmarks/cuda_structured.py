"""Structured attention on one GPU, from 64k to 1M tokens: `python -m benchmarks.cuda_structured [--output NAME]`.

Released head geometry and default pattern, bf16, batch 1, prefill forward: the block lists, then attention over them.
Dense attention is timed at 128k tokens, and with `--dense` once at the longest, which takes more than half a minute.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from modeling_minimax_m3 import msa

from .cuda import BLOCK, DIM, HEADS, KV_HEADS, RESULTS, TOPK, matmul_tflops, random, selected_flops, time_ms
from .measure import environment

LENGTHS = (65536, 131072, 262144, 524288, 1048576)
DENSE_LENGTH = 131072
PATTERN = msa.StructuredPattern(local_blocks=2, anchor_blocks=6, anchor_stride=8, random_blocks=8, seed=0)
assert PATTERN.width == TOPK


def lists_of(own_block: torch.Tensor, backend: str) -> torch.Tensor:
    num_blocks = -(-len(own_block) // BLOCK)
    return msa.structured_blocks_of(own_block, KV_HEADS, 3, PATTERN, num_blocks=num_blocks, backend=backend)


def measure(tokens: int, generator: torch.Generator) -> dict[str, float]:
    """Milliseconds of each part at one length."""
    own_block = torch.arange(tokens, device="cuda") // BLOCK
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    query, key, value = (random(generator, tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    blocks = lists_of(own_block, "cuda")
    attend = partial(
        msa.block_sparse_attention, query, key, value, blocks, cu_seqlens_q=offsets, cu_seqlens_k=offsets,
        block_size=BLOCK, backend="cuda",
    )  # fmt: skip
    return {
        "lists": time_ms(partial(lists_of, own_block, "cuda"), 0.1),
        "lists_torch": time_ms(partial(lists_of, own_block, "torch"), 0.1),
        "attention": time_ms(attend, 1.0),
    }


def measure_dense(tokens: int, generator: torch.Generator) -> float:
    """Milliseconds of causal attention over all keys: the median of a few calls, or one call above `DENSE_LENGTH`."""
    states = [random(generator, tokens, heads, DIM).transpose(0, 1)[None] for heads in (HEADS, KV_HEADS, KV_HEADS)]
    attend = partial(scaled_dot_product_attention, *states, is_causal=True, enable_gqa=True)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        if tokens <= DENSE_LENGTH:
            return time_ms(attend)
        started = time.perf_counter()
        attend()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time structured attention from 64k to 1M tokens.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_structured", help="this .json and .md")
    parser.add_argument("--dense", action="store_true", help="time dense attention at the longest length as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    generator = torch.Generator("cuda").manual_seed(0)
    ceiling = matmul_tflops(generator)
    lines = [
        "| tokens | lists | lists in PyTorch | attention | share of the matmul rate | us per 1k tokens |",
        "| --- " * 6 + "|",
    ]
    rows, dense = {}, {}
    for tokens in LENGTHS:
        rows[tokens] = row = measure(tokens, generator)
        row["total"] = row["lists"] + row["attention"]
        row["share"] = selected_flops(tokens) / row["attention"] / 1e9 / ceiling
        cells = [f"{row[name]:.4g}" for name in ("lists", "lists_torch", "attention")]
        lines.append(f"| {tokens} | {' | '.join(cells)} | {row['share']:.0%} | {1e6 * row['total'] / tokens:.4g} |")
        print(lines[-1], flush=True)
    for tokens in (DENSE_LENGTH, *([LENGTHS[-1]] if arguments.dense else [])):
        dense[tokens] = measure_dense(tokens, generator)
    per_token = [row["total"] / tokens for tokens, row in rows.items()]
    lines += ["", f"Milliseconds. Time per token, largest over smallest: {max(per_token) / min(per_token):.3f}."]
    lines += [
        f"Dense attention over {tokens} tokens: {ms:.5g} ms, {ms / rows[tokens]['total']:.4g} times as long."
        for tokens, ms in dense.items()
    ]
    if not arguments.dense:
        growth = (LENGTHS[-1] / DENSE_LENGTH) ** 2
        scaled = dense[DENSE_LENGTH] * growth
        lines.append(
            f"Dense attention over {LENGTHS[-1]} tokens was not run; {growth:g} times the work of {DENSE_LENGTH} tokens at "
            f"the same rate would take {scaled:.5g} ms, {scaled / rows[LENGTHS[-1]]['total']:.4g} times as long."
        )
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda_structured", *sys.argv[1:]]),
        "matmul_tflops": ceiling,
    }
    heading = (
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; an 8192^3 bf16 matmul runs at "
        f"{ceiling:.0f} TFLOP/s."
    )
    table = "\n".join([heading, "", *lines])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "ms": rows, "dense_ms": dense}
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
