"""The CUDA operators beside dense attention and vLLM's on one GPU: `python -m benchmarks.cuda [--output NAME]`.

Released head geometry, bf16, batch 1, prefill forward. Ceilings are measured in the same run. Dense is PyTorch's causal
attention (cuDNN where it takes the call); what is timed of vLLM, and where it is found, `rivals.py` says. Calls are
queued one after the other, as in a model, so that a call's work on the host overlaps the GPU's work on the one before.
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
from tqdm import tqdm

from modeling_minimax_m3 import msa

from .measure import environment
from .rivals import VllmKernels, load_vllm

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16
LENGTHS = (8192, 16384, 32768, 131072, 1048576)
LONGEST_DENSE = 131072  # beyond, dense attention takes tens of seconds
LONGEST_STEP = 131072  # beyond, a step of both operators is not timed anew but added up
VLLM_CHUNK = 16384  # queries that vLLM's kernels take at a time: their scores grow with it


def time_ms(function, seconds: float = 0.2) -> float:
    """Median milliseconds of a call of `function`, after one to warm up, by events around runs of 5 ms or one call."""

    def run(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / calls

    function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    times = [run(1)]
    calls = max(1, min(50, int(5 / times[0])))
    if calls > 1:
        times.clear()  # what was timed includes the host's work
    # three runs at least, unless they take long
    while not times or time.perf_counter() - started < (seconds if len(times) >= 3 else 4 * seconds):
        times.append(run(calls))
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


def selection(tokens: int, generator: torch.Generator, lengths: dict) -> partial:
    """A call that selects blocks for random queries and keys, so nearly uniform ones."""
    index_query, index_key = random(generator, tokens, KV_HEADS, DIM), random(generator, tokens, DIM)
    return partial(msa.select_blocks, index_query, index_key, topk=TOPK, **lengths)


def measure_selection(tokens: int, generator: torch.Generator, lengths: dict) -> tuple[float, torch.Tensor]:
    """Milliseconds of a selection, and the lists."""
    select = selection(tokens, generator, lengths)
    return time_ms(select), select()


def measure(
    tokens: int, generator: torch.Generator, vllm: VllmKernels | None, longest_dense: int = LONGEST_DENSE
) -> dict[str, float]:
    """Milliseconds of each part at one length."""
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": BLOCK, "backend": "cuda"}
    select = selection(tokens, generator, lengths)
    query, key, value = (random(generator, tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def attend(blocks: torch.Tensor) -> torch.Tensor:
        return msa.block_sparse_attention(query, key, value, blocks, **lengths)

    selections = {"random": select(), "clustered": clustered_blocks(tokens, generator)}
    row = {"select": time_ms(select)}
    for name, blocks in selections.items():
        row[name] = time_ms(partial(attend, blocks))
    if tokens <= LONGEST_STEP:
        row["step random"] = time_ms(lambda: attend(select()))
        row["step clustered"] = time_ms(lambda: (select(), attend(selections["clustered"])))
    else:
        for name in selections:
            row[f"step {name}"] = row["select"] + row[name]
    if vllm is not None:
        chunk = min(tokens, VLLM_CHUNK)
        row["vLLM select"] = time_ms(vllm.select(*select.args, TOPK, chunk))
        for name, blocks in selections.items():
            ids = [part.transpose(0, 1).contiguous() for part in blocks.split(chunk)]
            row[f"vLLM {name}"] = time_ms(vllm.attend(query, key, value, ids, chunk))
    if tokens <= longest_dense:
        states = [s.transpose(0, 1)[None] for s in (query, key, value)]
        dense = partial(scaled_dot_product_attention, *states, is_causal=True, enable_gqa=True)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            row["dense"] = time_ms(dense) if tokens <= LONGEST_DENSE else _time_once_ms(dense)
    return row


def _time_once_ms(function) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def selected_flops(tokens: int) -> float:
    """Of exact attention over TOPK blocks: the own one up to the token, whole ones before it."""
    token = torch.arange(tokens, dtype=torch.float64)
    keys = token % BLOCK + 1 + (token // BLOCK).floor().clamp(max=TOPK - 1) * BLOCK
    return float(keys.sum()) * 4 * HEADS * DIM


def tables(rows: dict[int, dict[str, float]], ceiling: float) -> str:
    """Ours in milliseconds and as share of the ceiling, then how many times faster than what."""

    def ratio(row: dict[str, float], rival: str, ours: str) -> str:
        return f"{row[rival] / row[ours]:.3g}" if rival in row else "-"

    lines = [
        "| tokens | selection | attention, random | attention, clustered | step, random | step, clustered | dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, row in rows.items():
        shares = {"select": 512.0 * tokens**2, "random": selected_flops(tokens), "clustered": selected_flops(tokens)}
        cells = [f"{row[n]:.4g} ({flops / row[n] / 1e9 / ceiling:.0%})" for n, flops in shares.items()]
        cells += [f"{row[n]:.4g}" if n in row else "-" for n in ("step random", "step clustered", "dense")]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    lines += [
        "",
        "| tokens | step random, than dense | step clustered, than dense | selection, than vLLM | attention random, "
        "than vLLM | attention clustered, than vLLM |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, row in rows.items():
        pairs = [("dense", "step random"), ("dense", "step clustered")]
        pairs += [(f"vLLM {name}", name) for name in ("select", "random", "clustered")]
        lines.append(f"| {tokens} | {' | '.join(ratio(row, *pair) for pair in pairs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CUDA operators beside dense attention and vLLM's kernels.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda", help="results go to this .json and .md")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--long-dense", action="store_true", help="dense at every length: 40 s for one call at 1M")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    generator = torch.Generator("cuda").manual_seed(0)
    ceiling = matmul_tflops(generator)
    vllm = load_vllm()
    longest_dense = max(arguments.lengths) if arguments.long_dense else LONGEST_DENSE
    rows = {}
    for tokens in tqdm(arguments.lengths, desc="lengths"):
        rows[tokens] = measure(tokens, generator, vllm, longest_dense)
        tqdm.write(f"{tokens}: {json.dumps(rows[tokens])}")
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda", *sys.argv[1:]]),
        "matmul_tflops": ceiling,
    }
    table = (
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; an 8192^3 bf16 matmul runs at "
        f"{ceiling:.0f} TFLOP/s. Milliseconds and share of that rate on the FLOPs that are needed; a step is selection "
        f"and attention. Then how many times faster.\n\n{tables(rows, ceiling)}"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "ms": rows}, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
