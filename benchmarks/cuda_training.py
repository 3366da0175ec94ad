"""Training with the CUDA operators beside baselines on one GPU: `python -m benchmarks.cuda_training [--output NAME]`.

Released head geometry, bf16, batch 1, forward and backward through autograd. A step is what an attention layer does
besides its projections: selection, attention, and the indexer's loss, each with its gradient. One baseline is the
dense causal attention of PyTorch (cuDNN where it supports the call). The other is flash-msa, where `baselines.py`
finds it: its step does what ours does, except that it returns no value of the loss.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from modeling_minimax_m3 import msa

from .baselines import load_flash_msa
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

LENGTHS = (32768, 131072, 8192)
LISTS = ("random", "clustered")
SECONDS = 0.25  # how long each call is repeated
TRAINING_FLOPS = 3.5  # times the FLOPs of the forward: the forward has two matrix products, its gradient has five


def training_ms(function: Callable, leaves: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of forward and backward and of the forward alone, and the GiB that both take beside the inputs."""
    with torch.no_grad():
        outs = function(*leaves)
        grads = [torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else [outs])]
    del outs

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, grads)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both = time_ms(step, SECONDS)
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.no_grad():
        return {"both": both, "gib": gib, "forward": time_ms(partial(function, *leaves), SECONDS)}


class Training:
    """The operands of one length. The trained tensors are leaves."""

    def __init__(self, tokens: int):
        offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": BLOCK, "backend": "cuda"}
        self.index_leaves = [random(tokens, KV_HEADS, DIM).requires_grad_(), random(tokens, DIM).requires_grad_()]
        self.leaves = [random(tokens, heads, DIM).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.attend = partial(msa.block_sparse_attention, **lengths)
        self.loss = partial(msa.indexer_kl_loss, **lengths)
        self.select = partial(msa.select_blocks, *(x.detach() for x in self.index_leaves), topk=TOPK, **lengths)
        self.blocks = {"random": self.select(), "clustered": clustered_blocks(tokens)}

    def measure(self, part: str, flash_msa: Callable | None) -> dict[str, float]:
        if part == "select":
            return {"both": time_ms(self.select, SECONDS)}
        if part in self.blocks:
            return training_ms(partial(self.attend, block_indices=self.blocks[part]), self.leaves)
        if part == "dense":
            return training_ms(dense_attention, [_heads_first(leaf[None]) for leaf in self.leaves])
        if part == "flash-msa":
            return self.measure_flash_msa(flash_msa)
        blocks = self.blocks[part.removesuffix("_loss")]
        query, key, value = (leaf.detach() for leaf in self.leaves)
        lse = self.attend(query, key, value, blocks, return_lse=True)[1]
        loss = partial(self.loss, query=query, key=key, block_indices=blocks, lse=lse)
        return training_ms(loss, self.index_leaves)

    def measure_flash_msa(self, function: Callable) -> dict[str, float]:
        index_query, index_key = self.index_leaves
        states = [index_query[None], index_key[None, :, None], *(leaf[None] for leaf in self.leaves)]
        leaves = [_heads_first(state).detach().contiguous().requires_grad_() for state in states]
        step = partial(function, top_k=TOPK * BLOCK, scale=DIM**-0.5)
        with torch.no_grad():
            # a row is one token and key/value head: the query heads of a row share a selection
            ours = self.attend(*self.leaves, self.blocks["random"]).flatten(1).unflatten(1, (KV_HEADS, -1))
            errors = (step(*leaves)[0].view_as(ours) - ours).norm(dim=-1) / ours.norm(dim=-1)
        same = (errors < 3e-2).float().mean().item()
        # flash-msa rounds its scores to bf16, so some rows select another block, and more of them at longer lengths.
        # Such a row is as much work.
        if not same >= 0.75:
            raise RuntimeError(f"flash-msa is not timed: only {same:.1%} of its rows agree with ours")
        return {**training_ms(step, leaves), "same_rows": same}


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    return states.detach().transpose(1, 2).requires_grad_()


def step_ms(row: dict[str, dict], lists: str) -> float | None:
    """Milliseconds of a step, or None until all of its parts are measured."""
    parts = ("select", lists, f"{lists}_loss")
    return sum(row[part]["both"] for part in parts) if all(part in row for part in parts) else None


def share(record: dict, tokens: int, lists: str) -> float | None:
    """The share of the matmul rate that attention alone reaches on the FLOPs of the selected blocks."""
    row = record["rows"].get(tokens, {})
    flops = TRAINING_FLOPS * selected_flops(tokens)
    return flops / row[lists]["both"] / 1e9 / record["machine"]["matmul_tflops"] if lists in row else None


def times_step(record: dict, tokens: int, lists: str, other: str) -> float | None:
    """How many times as long the step of a baseline takes."""
    row = record["rows"].get(tokens, {})
    step = step_ms(row, lists)
    return row[other]["both"] / step if step and other in row else None


def tables(record: dict) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for tokens, row in sorted(record["rows"].items()):
        for lists in LISTS:
            both = {part: f"{found['both']:.4g}" for part, found in row.items()}
            both |= {part: f"{both[part]} ({found['gib']:.2f})" for part, found in row.items() if "gib" in found}
            parts = [both.get(part, "-") for part in ("select", lists, f"{lists}_loss", "dense", "flash-msa")]
            forward = row[lists]["forward"] if lists in row else None
            own = [number(share(record, tokens, lists), ".1%"), number(forward, ".4g")]
            times = [number(times_step(record, tokens, lists, other), ".3g") for other in ("dense", "flash-msa")]
            step = number(step_ms(row, lists), ".4g")
            rows.append([str(tokens), lists, *parts[:2], *own, parts[2], step, *parts[3:], *times])
    header = ["tokens", "lists", "selection", "attention", "share", "its forward alone", "indexer's loss", "step"]
    header += ["dense", "flash-msa", "dense / step", "flash-msa / step"]
    return (
        "Milliseconds of forward and backward (GiB beside the inputs). The share is attention's share of the matmul "
        "rate on the FLOPs of the selected blocks. A step is selection, attention and the indexer's loss.\n\n"
        + as_table(header, rows)
    )


def main() -> None:
    arguments = parse_arguments("cuda_training", "Time training with the CUDA operators beside baselines.")
    run = Run("cuda_training", arguments, tables)
    flash_msa = load_flash_msa()
    rows = run.record["rows"] = {}
    training = lru_cache(maxsize=1)(Training)

    def measure(tokens: int, part: str) -> None:
        rows.setdefault(tokens, {})[part] = training(tokens).measure(part, flash_msa)

    parts = ["select", *LISTS, *(f"{lists}_loss" for lists in LISTS), "dense"]
    cases = [(tokens, part) for tokens in LENGTHS for part in parts]
    # flash-msa last: it compiles anew for every length
    run.cases(cases + [(tokens, "flash-msa") for tokens in LENGTHS if flash_msa is not None], measure)
    run.finish()


if __name__ == "__main__":
    main()
