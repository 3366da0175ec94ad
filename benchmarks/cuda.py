"""The CUDA operators beside dense attention on one GPU: `python -m benchmarks.cuda [--output NAME]`.

Released head geometry, bf16, batch 1, prefill forward. Ceilings are measured in the same run. The rival here is the
dense causal attention of PyTorch (cuDNN where it takes the call); serving engines' kernels are not part of it.
"""

import argparse
import json
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from modeling_minimax_m3 import msa

from .measure import environment

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16
LENGTHS = (8192, 16384, 32768, 131072, 1048576)
LONGEST_DENSE = 131072  # beyond, dense attention takes tens of seconds


def time_ms(function, seconds: float = 0.5) -> float:
    """Median milliseconds of `function`, by events around each call, after one call to warm up."""
    function()
    torch.cuda.synchronize()
    times, started = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < seconds and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def clustered_blocks(tokens: int, generator: torch.Generator, stay: int = 16) -> torch.Tensor:
    """Block lists (tokens, KV_HEADS, TOPK) in which each place keeps its block for `stay` tokens."""
    step = torch.arange(tokens, device="cuda") // stay
    lists = torch.rand(int(step[-1]) + 1, KV_HEADS, TOPK, generator=generator, device="cuda")
    own = torch.arange(tokens, device="cuda") // BLOCK
    # The p-th place draws from the p-th part of the visible blocks, so that no block is listed twice.
    place = torch.arange(TOPK, device="cuda")
    bounds = (own[:, None] * (place + 1)) // TOPK, (own[:, None] * place) // TOPK
    ids = bounds[1][:, None] + (lists[step] * (bounds[0] - bounds[1])[:, None]).long()
    ids = torch.where((bounds[0] > bounds[1])[:, None], ids, -1)
    ids[..., -1] = own[:, None]
    return ids.sort(dim=-1, descending=True).values.to(torch.int32)


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def matmul_tflops(generator: torch.Generator) -> float:
    """What an 8192^3 bf16 matmul reaches."""
    a, b = random(generator, 8192, 8192), random(generator, 8192, 8192)
    return 2 * 8192**3 / time_ms(lambda: a @ b) / 1e9


def measure_selection(tokens: int, generator: torch.Generator, lengths: dict) -> tuple[float, torch.Tensor]:
    """Milliseconds, and the lists: of random queries and keys, so nearly uniform."""
    index_query, index_key = random(generator, tokens, KV_HEADS, DIM), random(generator, tokens, DIM)
    select = partial(msa.select_blocks, index_query, index_key, topk=TOPK, **lengths)
    return time_ms(select), select()


def measure(tokens: int, generator: torch.Generator) -> dict[str, float | None]:
    """Milliseconds of each part at one length."""
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": BLOCK, "backend": "cuda"}
    selection_ms, selected = measure_selection(tokens, generator, lengths)
    query, key, value = (random(generator, tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    row = {"select": selection_ms, "dense": None}
    for name, blocks in (("random", selected), ("clustered", clustered_blocks(tokens, generator))):
        row[name] = time_ms(partial(msa.block_sparse_attention, query, key, value, blocks, **lengths))
    if tokens <= LONGEST_DENSE:
        states = [s.transpose(0, 1)[None] for s in (query, key, value)]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            row["dense"] = time_ms(partial(scaled_dot_product_attention, *states, is_causal=True, enable_gqa=True))
    return row


def selected_flops(tokens: int) -> float:
    """Of exact attention over TOPK blocks: the own one up to the token, whole ones before it."""
    token = torch.arange(tokens, dtype=torch.float64)
    keys = token % BLOCK + 1 + (token // BLOCK).floor().clamp(max=TOPK - 1) * BLOCK
    return float(keys.sum()) * 4 * HEADS * DIM


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CUDA operators beside dense attention.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda", help="results go to this .json and .md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    generator = torch.Generator("cuda").manual_seed(0)
    ceiling = matmul_tflops(generator)
    rows = {tokens: measure(tokens, generator) for tokens in tqdm(LENGTHS, desc="lengths")}
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda", *sys.argv[1:]]),
        "matmul_tflops": ceiling,
    }
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; an 8192^3 bf16 matmul runs at "
        f"{ceiling:.0f} TFLOP/s. Milliseconds, and share of that rate on the FLOPs that are needed.",
        "",
        "| tokens | selection | attention, random | attention, clustered | selection + random | dense | times dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, row in rows.items():
        shares = {"select": 512.0 * tokens**2, "random": selected_flops(tokens), "clustered": selected_flops(tokens)}
        cells = [f"{row[n]:.4g} ({flops / row[n] / 1e9 / ceiling:.0%})" for n, flops in shares.items()]
        step = row["select"] + row["random"]
        dense = row["dense"] or math.nan
        cells += [f"{step:.4g}", f"{dense:.4g}", f"{dense / step:.2g}"]
        lines.append(f"| {tokens} | {' | '.join(cells)} |".replace("nan", "-"))
    table = "\n".join(lines)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "ms": rows}, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
