"""Block lists that a trained model chose on held-out texts: their file, and how much the lists of neighbours overlap.

`scripts/extract_selections.py` writes the file. `benchmarks.cuda_selections` times attention with its lists.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SELECTIONS = Path(__file__).parent / "selections.npz"
DISTANCES = (1, 16, 64, 128)  # tokens from a query to the one that it is compared with
TILES = (16, 64, 128)  # consecutive queries whose blocks are counted together
FIELDS = ("changes", "shape", "about")


def as_masks(lists: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Which blocks each query chose: bool (tokens, num_blocks), from ids (tokens, topk) with -1 for none."""
    masks = torch.zeros(len(lists), num_blocks + 1, dtype=torch.bool)
    masks.scatter_(1, lists.long().masked_fill(lists < 0, num_blocks), True)
    return masks[:, :num_blocks]


def as_lists(masks: torch.Tensor, topk: int) -> torch.Tensor:
    """The ids int32 (tokens, topk), falling, with -1 behind them."""
    num_blocks = masks.shape[1]
    ids = torch.where(masks, torch.arange(num_blocks), -1)
    ids = torch.nn.functional.pad(ids, (0, max(0, topk - num_blocks)), value=-1)
    return ids.topk(topk, dim=1).values.to(torch.int32)


def save_selections(path: Path, lists: torch.Tensor, block_size: int, about: dict[str, Any]) -> None:
    """Writes lists in few bytes: for each query, in which blocks it differs from the query before it.

    Args:
        path (Path): The file, which ends in .npz.
        lists (int32 (lists, tokens, topk)): Ids of blocks, -1 for none. Their order is not kept.
        block_size (int): Keys of a block.
        about (dict): What the lists are, as plain values.
    """
    count, tokens, topk = lists.shape
    num_blocks = -(-tokens // block_size)
    masks = torch.stack([as_masks(one, num_blocks) for one in lists]).numpy()
    changes = masks ^ np.concatenate([np.zeros_like(masks[:, :1]), masks[:, :-1]], axis=1)
    shape = np.array([count, tokens, topk, block_size])
    with path.open("wb") as file:
        np.savez_compressed(file, changes=np.packbits(changes, axis=-1), shape=shape, about=json.dumps(about))


def load_selections(path: Path = SELECTIONS) -> tuple[torch.Tensor, int, dict[str, Any]]:
    """Reads lists.

    Returns:
        int32 (lists, tokens, topk), falling, -1 behind them; the keys of a block; what the lists are.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no block lists at {path}: `python scripts/extract_selections.py CHECKPOINT {path}`.")
    with np.load(path) as content:
        if missing := [name for name in FIELDS if name not in content]:
            raise ValueError(f"{path} must hold {list(FIELDS)}, but {missing} are missing.")
        tokens, topk, block_size = content["shape"].tolist()[1:]
        num_blocks = -(-tokens // block_size)
        changes = np.unpackbits(content["changes"], axis=-1, count=num_blocks)
        about = json.loads(str(content["about"]))
    masks = torch.from_numpy(np.bitwise_xor.accumulate(changes, axis=1).astype(bool))
    return torch.stack([as_lists(mask, topk) for mask in masks]), block_size, about


def recorded_blocks(heads: int, path: Path = SELECTIONS, tokens: int | None = None) -> torch.Tensor:
    """Lists as `block_sparse_attention` takes them: int32 (tokens, heads, topk).

    The heads get the lists of the file in turn. A text's first tokens do not depend on those behind them, so shorter
    lists are beginnings.

    Raises:
        ValueError: The lists of the file are shorter than `tokens`.
    """
    lists, _, _ = load_selections(path)
    if tokens is not None and tokens > lists.shape[1]:
        raise ValueError(
            f"`tokens` must be at most {lists.shape[1]}, the length of the lists in {path}, got {tokens}."
        )
    return torch.stack([lists[head % len(lists), :tokens] for head in range(heads)], dim=1).contiguous()


def random_blocks(tokens: int, block_size: int, topk: int, seed: int = 0) -> torch.Tensor:
    """Lists (tokens, topk) of the own block and of others, each with the same chance."""
    num_blocks = -(-tokens // block_size)
    own = (torch.arange(tokens) // block_size)[:, None]
    block = torch.arange(num_blocks)
    scores = torch.rand(tokens, num_blocks, generator=torch.Generator().manual_seed(seed))
    scores = scores.masked_fill(block == own, 2.0).masked_fill(block > own, -1.0)
    best = scores.topk(min(topk, num_blocks), dim=1)
    return best.indices.masked_fill(best.values < 0, -1).to(torch.int32)


def overlap(lists: torch.Tensor, block_size: int) -> dict[str, float]:
    """How much the lists of neighbouring queries have in common.

    Queries that see no more blocks than they choose have no choice and do not count.

    Args:
        lists (int32 (tokens, topk)): Ids of blocks, -1 for none.
        block_size (int): Keys of a block.

    Returns:
        `same_after_D`, the share of a query's blocks that the query D tokens behind it has too; `tile_of_N`, the
        different blocks of N consecutive queries, as a multiple of one query's; `most_chosen`, the share of the queries
        that chose the block that was chosen most often.

    Raises:
        ValueError: No two tiles of queries have a choice.
    """
    tokens, topk = lists.shape
    first = topk * block_size
    if tokens - first < 2 * max(TILES):
        raise ValueError(f"lists of {topk} blocks of {block_size} need {first + 2 * max(TILES)} tokens, got {tokens}.")
    masks = as_masks(lists, -(-tokens // block_size))[first:]
    chosen = masks.sum(1).float()
    found = {}
    for distance in DISTANCES:
        both = (masks[:-distance] & masks[distance:]).sum(1)
        found[f"same_after_{distance}"] = float((both / chosen[:-distance]).mean())
    for tile in TILES:
        whole = masks[: len(masks) // tile * tile].unflatten(0, (-1, tile))
        found[f"tile_of_{tile}"] = float(whole.any(1).sum(1).float().mean() / topk)
    found["most_chosen"] = float(masks.float().mean(0).max())
    return {name: round(value, 4) for name, value in found.items()}
