"""The CUDA operators beside dense attention and others' kernels on one GPU: `python -m benchmarks.cuda [--output NAME]`.

Released head geometry, bf16, batch 1, prefill forward. Dense is PyTorch's causal attention (cuDNN where it takes the
call); what is timed of vLLM and SGLang, and where it is found, `rivals.py` says. Their outputs are compared with ours
before they are timed. Calls are queued one after the other, as in a model, so that a call's work on the host overlaps the
GPU's work on the one before.
"""

from functools import lru_cache, partial

import torch

from modeling_minimax_m3 import msa

from .gpu import (
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    TOPK,
    Run,
    clustered_blocks,
    dense_attention,
    parse_arguments,
    random,
    selected_flops,
    time_ms,
)
from .report import as_table
from .rivals import check_output, check_selection, load_triton_rivals

LENGTHS = (131072, 1048576, 8192, 16384, 32768)
LONGEST_DENSE = 131072  # beyond, dense attention takes tens of seconds
PARTS = ("select", "random", "clustered", "step random", "step clustered")
RIVAL_CHUNK = 16384  # queries that others' kernels take at a time: their scores grow with it
CHECKED_ROWS = 4096


class Prefill:
    """The operands of one length: random ones, so that the selection is nearly uniform."""

    def __init__(self, tokens: int):
        offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        self.tokens = tokens
        self.lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": BLOCK, "backend": "cuda"}
        self.index_query, self.index_key = random(tokens, KV_HEADS, DIM), random(tokens, DIM)
        self.query, self.key, self.value = (random(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.blocks = {"random": self.select(), "clustered": clustered_blocks(tokens)}

    def select(self) -> torch.Tensor:
        return msa.select_blocks(self.index_query, self.index_key, topk=TOPK, **self.lengths)

    def attend(self, blocks: torch.Tensor) -> torch.Tensor:
        return msa.block_sparse_attention(self.query, self.key, self.value, blocks, **self.lengths)

    def call(self, part: str) -> partial:
        """A call of one of `PARTS`."""
        if part == "select":
            return partial(self.select)
        blocks = self.blocks[part.removeprefix("step ")]
        if part == "step random":
            return partial(lambda: self.attend(self.select()))
        if part == "step clustered":
            return partial(lambda: (self.select(), self.attend(blocks)))
        return partial(self.attend, blocks)

    def rival_call(self, name: str, rival, part: str) -> partial:
        """The same part on a rival's kernels, whose output was compared with ours."""
        chunk = min(self.tokens, RIVAL_CHUNK)
        if part == "select":
            run = rival.select(self.index_query, self.index_key, TOPK, chunk)
            check_selection(name, torch.cat(run(), dim=1).transpose(0, 1), self.blocks["random"])
            return run
        blocks = self.blocks[part]
        every = max(1, self.tokens // CHECKED_ROWS)
        expected = self.attend(blocks)[::every].clone()
        ids = [part.transpose(0, 1).contiguous() for part in blocks.split(chunk)]
        run = rival.attend(self.query, self.key, self.value, ids, chunk)
        check_output(name, torch.cat([out[::every] for out in run()]), expected)
        return run

    def dense(self) -> torch.Tensor:
        return dense_attention(*(states.transpose(0, 1)[None] for states in (self.query, self.key, self.value)))


def _ratio(row: dict[str, float], above: str, below: str) -> float | None:
    return row[above] / row[below] if above in row and below in row else None


def best_rival(row: dict[str, float], part: str) -> float | None:
    """How many times as long the fastest of the others takes as ours."""
    times = [ms for name, ms in row.items() if name.endswith(f" {part}") and not name.startswith("step")]
    return min(times) / row[part] if times and part in row else None


def shares(tokens: int, row: dict[str, float], ceiling: float) -> dict[str, float]:
    """Shares of the matmul rate on the FLOPs that are needed."""
    flops = {"select": 512.0 * tokens**2, "random": selected_flops(tokens), "clustered": selected_flops(tokens)}
    return {part: count / row[part] / 1e9 / ceiling for part, count in flops.items() if part in row}


def asked(record: dict) -> list[tuple]:
    rows, ceiling = record["ms"], record["machine"]["matmul_tflops"]
    figures = []
    for tokens, label in ((131072, "128k"), (1048576, "1M")):
        row = rows.get(tokens, {})
        share = shares(tokens, row, ceiling)
        for part, least, times in (("select", 0.55, 1.4), ("clustered", 0.45, 2), ("random", 0.25, 2)):
            figures += [
                (f"{label}, {part}: share of the matmul rate", share.get(part), ">=", least),
                (f"{label}, {part}: times faster than the best other kernel", best_rival(row, part), ">=", times),
            ]
    at = {tokens: rows.get(tokens, {}) for tokens in LENGTHS}
    return [
        *figures,
        ("1M, step random: times faster than dense", _ratio(at[1048576], "dense", "step random"), ">=", 20),
        ("8k, step clustered: times faster than dense", _ratio(at[8192], "dense", "step clustered"), ">=", 1),
        ("16k, step random: times faster than dense", _ratio(at[16384], "dense", "step random"), ">=", 1),
        ("128k, step random: ms", at[131072].get("step random"), "<=", 54),
    ]


def tables(record: dict) -> str:
    """Ours in milliseconds and as share of the ceiling, then how many times faster than what."""
    rivals = sorted({name.split()[0] for row in record["ms"].values() for name in {*row} - {*PARTS, "dense"}})
    pairs = [("dense", step) for step in ("step random", "step clustered")]
    pairs += [(f"{rival} {part}", part) for rival in rivals for part in PARTS[:3]]
    times, faster = [], []
    for tokens, row in sorted(record["ms"].items()):
        share = shares(tokens, row, record["machine"]["matmul_tflops"])
        cells = [
            f"{row[part]:.4g}" + (f" ({share[part]:.0%})" if part in share else "") if part in row else "-"
            for part in (*PARTS, "dense")
        ]
        times.append([str(tokens), *cells])
        ratios = [_ratio(row, *pair) for pair in pairs]
        faster.append([str(tokens), *("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios)])
    return "\n\n".join(
        [
            "Milliseconds and share of the matmul rate on the FLOPs that are needed; a step is selection and attention.",
            as_table(["tokens", "selection", "random", "clustered", *PARTS[3:], "dense"], times),
            "How many times faster, than what:",
            as_table(
                ["tokens", *(f"{ours}, than {rival.removesuffix(ours).strip()}" for rival, ours in pairs)], faster
            ),
        ]
    )


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
        parser.add_argument("--long-dense", action="store_true", help="dense at every length: 40 s for one call at 1M")

    arguments = parse_arguments("cuda", "Time the CUDA operators beside dense attention and others' kernels.", add)
    run = Run("cuda", arguments, tables, asked)
    longest_dense = max(arguments.lengths) if arguments.long_dense else LONGEST_DENSE
    rivals = load_triton_rivals()
    rows = run.record["ms"] = {}
    prefill = lru_cache(maxsize=1)(Prefill)

    def measure(tokens: int, name: str) -> None:
        operands = prefill(tokens)
        rival, _, part = name.partition(" ")
        if name == "dense":
            milliseconds = time_ms(operands.dense, once=tokens > LONGEST_DENSE)
        elif rival in rivals:
            milliseconds = time_ms(operands.rival_call(rival, rivals[rival], part))
        else:
            milliseconds = time_ms(operands.call(name))
        rows.setdefault(tokens, {})[name] = milliseconds

    of_rivals = {rival: [f"{rival} {part}" for part in PARTS[:3]] for rival in rivals}
    # SGLang last: its kernels are slower than vLLM's, and are tuned when first called
    groups = ([*PARTS, *of_rivals.get("vLLM", []), "dense"], of_rivals.get("SGLang", []))
    cases = [(tokens, name) for names in groups for tokens in arguments.lengths for name in names]
    run.cases([case for case in cases if case[1] != "dense" or case[0] <= longest_dense], measure)
    run.finish()


if __name__ == "__main__":
    main()
