"""What the answer of a model attended to: weights of its sparse layers by part of the prompt, region, second and block.

    with AttentionRecorder(model) as recorder:
        output = model.generate(**inputs)
    recorder.passes[-1][3]      # of the last token, in layer 3: weights (heads, keys), and the blocks that were chosen

A layer with dense attention attends to everything and chooses nothing, so it is left out.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from decoding_graphs import decoding_graphs


@dataclass
class Attended:
    """What the last token of a pass attended to in one layer.

    Attributes:
        weights (float32 (H_q, S)): Shares of the keys, which add up to 1 for each head.
        blocks (list of lists of int): For each key/value head, the chosen blocks, rising.
    """

    weights: torch.Tensor
    blocks: list[list[int]]


def attention_to_blocks(
    query: torch.Tensor, key: torch.Tensor, blocks: torch.Tensor, block_size: int, scale: float
) -> torch.Tensor:
    """The softmax of one query over the keys of its blocks: float32 (H_q, S).

    Args:
        query (H_q, D): The query, which sees all keys.
        key (S, H_kv, D): All keys.
        blocks (int (H_kv, W)): Chosen blocks, -1 for none.
        block_size (int): Keys of a block.
        scale (float): Factor of the scores.
    """
    num_keys, num_heads = key.shape[:2]
    num_blocks = -(-num_keys // block_size)
    chosen = torch.zeros(num_heads, num_blocks + 1, dtype=torch.bool, device=key.device)
    chosen.scatter_(1, blocks.long().masked_fill(blocks < 0, num_blocks), True)
    is_seen = chosen[:, torch.arange(num_keys, device=key.device) // block_size]  # (H_kv, S)
    grouped = query.float().unflatten(0, (num_heads, -1))
    scores = torch.einsum("hgd,shd->hgs", grouped, key.float()) * scale
    return scores.masked_fill(~is_seen[:, None], -torch.inf).softmax(-1).flatten(0, 1)


class AttentionRecorder:
    """Records, for the last token of each pass over one sequence without padding, what the sparse layers attended to.

    Meanwhile `generate` captures no decoding step: a step that is replayed calls no layer.

    Attributes:
        passes (list of dict of Attended): For each pass, by the number of the layer.
    """

    def __init__(self, model: Any):
        self.layers = [m for m in model.modules() if getattr(m, "selector", None) is not None]
        self.passes: list[dict[int, Attended]] = []

    def __enter__(self) -> "AttentionRecorder":
        self._no_graphs = decoding_graphs(allowed=False)
        self._no_graphs.__enter__()
        for layer in self.layers:
            layer.selection_observer = self._observe
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            layer.selection_observer = None
        self._no_graphs.__exit__(None, None, None)

    def _observe(self, layer: Any, query: Any, key: Any, block_indices: Any, layout: Any) -> None:
        if query.shape[0] != 1:
            raise ValueError(f"`AttentionRecorder` reads one sequence at a time, got a batch of {query.shape[0]}.")
        if layer is self.layers[0]:
            self.passes.append({})
        blocks = block_indices[0, -1]
        weights = attention_to_blocks(query[0, -1], key[0], blocks, layer.config.index_block_size, layer.scaling)
        chosen = [sorted(block for block in row if block >= 0) for row in blocks.tolist()]
        self.passes[-1][layer.layer_idx] = Attended(weights.cpu(), chosen)


@dataclass
class Medium:
    """A picture, or a second of a video, in a prompt.

    Attributes:
        start, end (int): Its tokens, row by row.
        rows, columns (int): Its regions, one for each token.
        second (float, optional): Time of a video's frames.
    """

    start: int
    end: int
    rows: int
    columns: int
    second: float | None = None


def find_media(processor: Any, inputs: dict[str, Any]) -> list[Medium]:
    """The pictures and the seconds of videos in a prompt of one row, in order."""
    ids = inputs["input_ids"][0].tolist()
    found = []
    for token, grids, part in (
        (processor.image_token_id, "image_grid_thw", "image_processor"),
        (processor.video_token_id, "video_grid_thw", "video_processor"),
    ):
        merge = getattr(processor, part).merge_size
        is_video = part == "video_processor"
        shapes = [grid for grid in inputs.get(grids, torch.zeros(0, 3)).tolist() for _ in range(int(grid[0]))]
        place = 0
        for _, height, width in shapes:
            place = ids.index(token, place)
            rows, columns = int(height) // merge, int(width) // merge
            medium = Medium(place, place + rows * columns, rows, columns)
            if set(ids[medium.start : medium.end]) != {token}:
                raise ValueError(f"the placeholders at token {place} do not fit a grid of {rows} x {columns} regions.")
            if is_video:
                before = processor.tokenizer.decode(ids[max(0, place - 16) : place])
                times = re.findall(r"(\d+(?:\.\d+)?) seconds", before)
                medium.second = float(times[-1]) if times else None
            found.append(medium)
            place = medium.end
    return sorted(found, key=lambda medium: medium.start)


Part = tuple[str, list[tuple[int, int]]]  # its name, and its tokens (start, end)


def prompt_parts(ids: list[int], media: list[Medium], question: int | None) -> list[Part]:
    """The parts of a prompt, which have each token once.

    Args:
        ids (list of int): The prompt.
        media (list of Medium): What it shows.
        question (int, optional): First token behind a long text.
    """
    if media:
        spans = [(medium.start, medium.end) for medium in media]
        start, end = spans[0][0], spans[-1][1]
        shown: list[Part] = [("picture" if media[0].second is None else "video", spans)]
        if between := [(first[1], second[0]) for first, second in pairwise(spans)]:
            shown.append(("time marks", between))
        return [("instructions", [(0, start)]), *shown, ("question", [(end, len(ids))])]
    if question is not None:
        return [("text", [(0, question)]), ("question", [(question, len(ids))])]
    return [("prompt", [(0, len(ids))])]


def place_of(tokenizer: Any, ids: list[int], text: str, before: int | None = None) -> tuple[int, int]:
    """The tokens (start, end) of `ids` that hold the last copy of `text`.

    Args:
        tokenizer: Wrote the ids.
        ids (list of int): Tokens.
        text (str): What is looked for.
        before (int, optional): Only the tokens before this one count.

    Raises:
        ValueError: The ids do not contain it.
    """
    pieces = [tokenizer.decode([token]) for token in ids[:before]]
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    place = "".join(pieces).rfind(text)
    if place < 0:
        raise ValueError(f"the prompt of {len(ids)} tokens does not contain {text!r}.")
    first, last = torch.searchsorted(ends, torch.tensor([place + 1, place + len(text)])).tolist()
    return first, last + 1
