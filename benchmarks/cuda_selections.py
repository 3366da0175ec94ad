"""Block attention with lists that a trained model chose, beside random and clustered ones, on one GPU.

    python -m benchmarks.cuda_selections [--selections FILE] [--output NAME]

Released head geometry, bf16, batch 1, forward and backward. `selections.py` explains the file and the overlap.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_minimax_m3 import msa

from .cuda_training import training_ms
from .gpu import BLOCK, DIM, HEADS, KV_HEADS, TOPK, Run, clustered_blocks, parse_arguments, random
from .report import as_table
from .selections import SELECTIONS, load_selections, overlap, random_blocks, recorded_blocks

LISTS = ("random", "clustered", "recorded")


def make_lists(kind: str, tokens: int, path: Path = SELECTIONS) -> torch.Tensor:
    """Lists int32 (tokens, KV_HEADS, TOPK) on the host."""
    if kind == "recorded":
        return recorded_blocks(KV_HEADS, path, tokens)
    if kind == "clustered":
        return clustered_blocks(tokens, device="cpu")
    return torch.stack([random_blocks(tokens, BLOCK, TOPK, seed) for seed in range(KV_HEADS)], dim=1)


def check_file(path: Path) -> int:
    """The tokens of the lists of a file. Raises `ValueError` where their blocks are not those of the benchmark."""
    lists, block_size, _ = load_selections(path)
    if (block_size, lists.shape[2]) != (BLOCK, TOPK):
        raise ValueError(
            f"{path} must hold lists of {TOPK} blocks of {BLOCK} keys, got {lists.shape[2]} of {block_size}."
        )
    return lists.shape[1]


def mean_overlap(lists: torch.Tensor) -> dict[str, float]:
    """The overlap of neighbours, the mean over the heads."""
    by_head = [overlap(lists[:, head], BLOCK) for head in range(lists.shape[1])]
    return {name: sum(one[name] for one in by_head) / len(by_head) for name in by_head[0]}


def tables(record: dict) -> str:
    """Milliseconds of each kind of lists, and the overlap of its neighbours."""
    names = ("same_after_1", "same_after_64", "tile_of_64", "most_chosen")
    rows = []
    for tokens, row in sorted(record["rows"].items()):
        for kind in LISTS:
            if kind in row:
                found = row[kind]
                times = [f"{found[name]:.4g}" for name in ("forward", "both")]
                rows.append([str(tokens), kind, *times, *(f"{found[name]:.3g}" for name in names)])
    head = ["tokens", "lists", "forward, ms", "forward and backward, ms", "same after 1 token", "same after 64"]
    return as_table([*head, "blocks of 64 queries / blocks of one", "chose the most chosen block"], rows)


def main() -> None:
    def add(parser) -> None:
        parser.add_argument(
            "--selections", type=Path, default=SELECTIONS, help="file of scripts/extract_selections.py"
        )

    arguments = parse_arguments("cuda_selections", "Time block attention with recorded block lists.", add)
    try:
        longest = check_file(arguments.selections)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cuda_selections: {error}") from error
    run = Run("cuda_selections", arguments, tables)
    rows = run.record["rows"] = {}

    def measure(tokens: int, kind: str) -> None:
        lists = make_lists(kind, tokens, arguments.selections)
        offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        lengths: dict[str, Any] = {
            "cu_seqlens_q": offsets,
            "cu_seqlens_k": offsets,
            "block_size": BLOCK,
            "backend": "cuda",
        }
        leaves = [random(tokens, heads, DIM).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
        attend = partial(msa.block_sparse_attention, block_indices=lists.cuda(), **lengths)
        rows.setdefault(tokens, {})[kind] = {**training_ms(attend, leaves), **mean_overlap(lists)}

    lengths = [tokens for tokens in (8192, 16384, 32768, 65536, 131072) if tokens <= longest] or [longest]
    run.cases([(tokens, kind) for tokens in lengths for kind in LISTS], measure)
    run.finish()


if __name__ == "__main__":
    main()
