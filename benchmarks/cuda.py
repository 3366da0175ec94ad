"""The CUDA operators beside dense attention, vLLM and SGLang on one GPU: `python -m benchmarks.cuda [--output NAME]`.

Released head geometry, bf16, batch 1, prefill forward. Dense is PyTorch's causal attention (cuDNN where it supports
the call). `baselines.py` says which kernels of vLLM and SGLang are timed and where it finds them. Their outputs are
compared with ours before they are timed. Calls are queued one after the other, as in a model, so that the host
prepares a call while the GPU runs the call before it.
"""

from functools import lru_cache, partial

import torch

from modeling_minimax_m3 import msa

from .baselines import check_output, check_selection, load_triton_baselines
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

LENGTHS = (131072, 1048576, 8192, 16384, 32768)
LONGEST_DENSE = 131072  # beyond, dense attention takes tens of seconds
PARTS = ("select", "random", "clustered", "step random", "step clustered")
BASELINE_CHUNK = 16384  # queries that a baseline takes at a time: the memory of its scores grows with this number
CHECKED_ROWS = 4096


class Prefill:
    """The operands of one length. They are random, so the selection is nearly uniform."""

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

    def baseline_call(self, name: str, baseline, part: str) -> partial:
        """A call of the same part on a baseline's kernels, whose output was compared with ours."""
        chunk = min(self.tokens, BASELINE_CHUNK)
        if part == "select":
            run = baseline.select(self.index_query, self.index_key, TOPK, chunk)
            check_selection(name, torch.cat(run(), dim=1).transpose(0, 1), self.blocks["random"])
            return run
        blocks = self.blocks[part]
        every = max(1, self.tokens // CHECKED_ROWS)
        expected = self.attend(blocks)[::every].clone()
        ids = [part.transpose(0, 1).contiguous() for part in blocks.split(chunk)]
        run = baseline.attend(self.query, self.key, self.value, ids, chunk)
        check_output(name, torch.cat([out[::every] for out in run()]), expected)
        return run

    def dense(self) -> torch.Tensor:
        return dense_attention(*(states.transpose(0, 1)[None] for states in (self.query, self.key, self.value)))


def _ratio(row: dict[str, float], above: str, below: str) -> float | None:
    return row[above] / row[below] if above in row and below in row else None


def shares(tokens: int, row: dict[str, float], ceiling: float) -> dict[str, float]:
    """Shares of the matmul rate, counting only the needed FLOPs."""
    flops = {"select": 512.0 * tokens**2, "random": selected_flops(tokens), "clustered": selected_flops(tokens)}
    return {part: count / row[part] / 1e9 / ceiling for part, count in flops.items() if part in row}


def tables(record: dict) -> str:
    """Our milliseconds and shares of the matmul rate, then how many times as long each baseline takes."""
    baselines = sorted({name.split()[0] for row in record["ms"].values() for name in {*row} - {*PARTS, "dense"}})
    pairs = [("dense", step) for step in ("step random", "step clustered")]
    pairs += [(f"{baseline} {part}", part) for baseline in baselines for part in PARTS[:3]]
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
            "Milliseconds, and the share of the matmul rate on the needed FLOPs. A step is selection and attention.",
            as_table(["tokens", "selection", "random", "clustered", *PARTS[3:], "dense"], times),
            "Time of the baseline / time of ours:",
            as_table(["tokens", *(f"{other.removesuffix(ours).strip()} / {ours}" for other, ours in pairs)], faster),
        ]
    )


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
        parser.add_argument(
            "--long-dense", action="store_true", help="time dense attention at every length; one call at 1M takes 40 s"
        )

    arguments = parse_arguments("cuda", "Time the CUDA operators beside dense attention, vLLM and SGLang.", add)
    run = Run("cuda", arguments, tables)
    longest_dense = max(arguments.lengths) if arguments.long_dense else LONGEST_DENSE
    baselines = load_triton_baselines()
    rows = run.record["ms"] = {}
    prefill = lru_cache(maxsize=1)(Prefill)

    def measure(tokens: int, name: str) -> None:
        operands = prefill(tokens)
        baseline, _, part = name.partition(" ")
        if name == "dense":
            milliseconds = time_ms(operands.dense, once=tokens > LONGEST_DENSE)
        elif baseline in baselines:
            milliseconds = time_ms(operands.baseline_call(baseline, baselines[baseline], part))
        else:
            milliseconds = time_ms(operands.call(name))
        rows.setdefault(tokens, {})[name] = milliseconds

    of_baselines = {baseline: [f"{baseline} {part}" for part in PARTS[:3]] for baseline in baselines}
    # SGLang last: its kernels are slower than vLLM's, and the first call tunes them
    groups = ([*PARTS, *of_baselines.get("vLLM", []), "dense"], of_baselines.get("SGLang", []))
    cases = [(tokens, name) for names in groups for tokens in arguments.lengths for name in names]
    run.cases([case for case in cases if case[1] != "dense" or case[0] <= longest_dense], measure)
    run.finish()


if __name__ == "__main__":
    main()
