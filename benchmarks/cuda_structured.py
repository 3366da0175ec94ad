"""Structured attention on one GPU, from 64k to 1M tokens: `python -m benchmarks.cuda_structured [--output NAME]`.

Released head geometry and default pattern, bf16, batch 1, prefill forward: the block lists, then attention over them.
Dense attention is the baseline at 128k tokens. With `--long-dense` one call is timed at the longest length too, which
takes more than half a minute.
"""

from functools import partial

import torch

from modeling_minimax_m3 import msa

from .gpu import (
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    TOPK,
    Run,
    dense_attention,
    parse_arguments,
    random,
    selected_flops,
    time_ms,
)
from .report import as_table

LENGTHS = (65536, 131072, 262144, 524288, 1048576)
DENSE_LENGTH = 131072  # dense attention over more tokens is called only once
PATTERN = msa.StructuredPattern(local_blocks=2, anchor_blocks=6, anchor_stride=8, random_blocks=8, seed=0)
assert PATTERN.width == TOPK


def lists_of(own_block: torch.Tensor, backend: str) -> torch.Tensor:
    num_blocks = -(-len(own_block) // BLOCK)
    return msa.structured_blocks_of(own_block, KV_HEADS, 3, PATTERN, num_blocks=num_blocks, backend=backend)


def measure(tokens: int) -> dict[str, float]:
    """Milliseconds of each part at one length."""
    own_block = torch.arange(tokens, device="cuda") // BLOCK
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    blocks = lists_of(own_block, "cuda")
    if not torch.equal(blocks, lists_of(own_block, "torch")):
        raise RuntimeError("the kernel and the `torch` backend list different blocks")
    attend = partial(
        msa.block_sparse_attention, *(random(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)), blocks,
        cu_seqlens_q=offsets, cu_seqlens_k=offsets, block_size=BLOCK, backend="cuda",
    )  # fmt: skip
    return {
        "lists": time_ms(partial(lists_of, own_block, "cuda"), 0.1),
        "lists_torch": time_ms(partial(lists_of, own_block, "torch"), 0.1),
        "attention": time_ms(attend, 1.0),
    }


def measure_dense(tokens: int) -> float:
    """Milliseconds of causal attention over all keys: the median of a few calls, or one call above `DENSE_LENGTH`."""
    states = [random(tokens, heads, DIM).transpose(0, 1)[None] for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return time_ms(partial(dense_attention, *states), once=tokens > DENSE_LENGTH)


def growth(record: dict) -> float | None:
    """The largest time per token over the smallest, or None until two lengths are measured."""
    per_token = [row["total"] / tokens for tokens, row in record["ms"].items()]
    return max(per_token) / min(per_token) if len(per_token) > 1 else None


def times_dense(record: dict) -> dict[int, float]:
    """How many times as long dense attention takes, at each length where both are measured."""
    rows = record["ms"]
    return {tokens: ms / rows[tokens]["total"] for tokens, ms in record["dense_ms"].items() if tokens in rows}


def tables(record: dict) -> str:
    rows = [
        [
            str(tokens),
            *(f"{row[part]:.4g}" for part in ("lists", "lists_torch", "attention")),
            f"{row['share']:.0%}",
            f"{1e6 * row['total'] / tokens:.4g}",
        ]
        for tokens, row in record["ms"].items()
    ]
    header = ["tokens", "lists", "lists in PyTorch", "attention", "share of the matmul rate", "us per 1k tokens"]
    dense = [
        f"Dense attention over {tokens} tokens: {record['dense_ms'][tokens]:.5g} ms, {times:.4g} times as long."
        for tokens, times in times_dense(record).items()
    ]
    ratio = growth(record)
    constancy = [] if ratio is None else [f"The largest time per token is {ratio:.3g} times the smallest."]
    return "\n\n".join(["Milliseconds.", as_table(header, rows), *constancy, *dense])


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--long-dense", action="store_true", help="time dense attention at the longest length too")

    arguments = parse_arguments("cuda_structured", "Time structured attention from 64k to 1M tokens.", add)
    run = Run("cuda_structured", arguments, tables)
    rows, dense = run.record["ms"], run.record["dense_ms"] = {}, {}

    def case(tokens: int, name: str) -> None:
        if name == "dense":
            dense[tokens] = measure_dense(tokens)
            return
        row = measure(tokens)
        row["total"] = row["lists"] + row["attention"]
        row["share"] = selected_flops(tokens) / row["attention"] / 1e9 / run.record["machine"]["matmul_tflops"]
        rows[tokens] = row

    cases = [(tokens, "structured") for tokens in LENGTHS]
    run.cases([*cases, (DENSE_LENGTH, "dense"), *[(LENGTHS[-1], "dense")] * arguments.long_dense], case)
    run.finish()


if __name__ == "__main__":
    main()
