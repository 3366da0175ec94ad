"""Perplexity of code by context length, load of the experts, and how much attention the selected blocks hold."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from evaluation_prompts import SPLIT
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention
from modeling_minimax_m3.monitoring.selected_mass import selected_mass
from modeling_minimax_m3.monitoring.tallies import expert_load
from pretraining_run import expert_choices
from processing_minimax_m3.data.encoding import IGNORED
from processing_minimax_m3.pretraining import TASKS, RowEncoder, collate_packs, make_row
from processing_minimax_m3.pretraining.encoding import EncodedRow
from processing_minimax_m3.pretraining.packs import join_rows

CHARACTERS_PER_TOKEN = 5  # more than a token of code has, so that one row is long enough
TARGETS = 256  # tokens at the end of a document, whose loss counts
QUERIES = 64  # of a document, whose attention is measured
MOST_SCORES = 2**28  # of queries, heads and keys at a time
Progress = Callable[[], None]


def code_tokens(encoder: RowEncoder, index: int, tokens: int, seed: int) -> np.ndarray:
    """Held-out code, int64 (at most `tokens`,). It is shorter where all held-out files together are shorter."""
    row = make_row("code", SPLIT, index, seed=seed, characters=tokens * CHARACTERS_PER_TOKEN)
    encoded = encoder.encode(row, tokens)
    assert encoded is not None  # a text is cut
    return encoded.ids


class CodeDocuments(Dataset):
    """The first held-out documents of code, so that the workers of a loader make them: see `code_tokens`."""

    def __init__(self, encoder: RowEncoder, count: int, tokens: int, seed: int):
        self.encoder, self.count, self.tokens, self.seed = encoder, count, tokens, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return code_tokens(self.encoder, index, self.tokens, self.seed)


def to_inputs(rows: Sequence[EncodedRow], padding: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The model's inputs for rows in one line without padding, with `labels`."""
    pack = join_rows(rows, sum(len(row.ids) for row in rows), padding)
    return {name: value.to(device) for name, value in collate_packs([pack]).items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and normal 95% interval of a few values; without a width for one value."""
    mean = float(np.mean(values))
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


@torch.no_grad()
def code_perplexity(
    model: Any, documents: Sequence[np.ndarray], lengths: Sequence[int], most_tokens: int, progress: Progress
) -> list[dict[str, Any]]:
    """The loss of the same tokens, the last of each document, behind contexts of different lengths.

    Args:
        model: The model.
        documents (sequence of int64 (tokens,)): Texts, each as long as the greatest length.
        lengths (sequence of int): Tokens of the context together with the tokens that count.
        most_tokens (int): Documents go together into a pass up to so many tokens.
        progress (callable): Called after each pass.

    Returns:
        For each length `tokens`, mean `loss` in nats with its 95% `interval` over documents, `perplexity`, and the
        number of `documents`.
    """
    padding = model.config.get_text_config().pad_token_id
    found = []
    for length in lengths:
        losses: list[float] = []
        size = max(1, most_tokens // length)
        fitting = [ids for ids in documents if len(ids) >= length]
        for start in range(0, len(fitting), size):
            rows = []
            for ids in fitting[start : start + size]:
                ids = ids[-length:]
                learned = np.full(length, IGNORED)
                learned[-TARGETS:] = ids[-TARGETS:]
                rows.append(EncodedRow(ids, learned, "code"))
            inputs = to_inputs(rows, padding, model.device)
            labels = inputs.pop("labels")[0]
            places = (labels != IGNORED).nonzero().flatten()
            logits = model(**inputs, logits_to_keep=places - 1, use_cache=False).logits[0].float()
            values = torch.nn.functional.cross_entropy(logits, labels[places], reduction="none")
            losses += values.view(len(rows), -1).mean(1).tolist()
            progress()
        if not losses:
            continue
        mean, low, high = mean_interval(losses)
        found.append(
            {
                "tokens": length,
                "loss": round(mean, 5),
                "interval": [round(low, 5), round(high, 5)],
                "perplexity": round(math.exp(mean), 4),
                "documents": len(losses),
            }
        )
    return found


@torch.no_grad()
def expert_loads(
    model: Any, rows_of: Mapping[str, Sequence[EncodedRow]], most_tokens: int, progress: Progress
) -> dict[str, Any]:
    """How the experts share the tokens of each task and of all together, by layer.

    Returns:
        For each task and for "all", a list with an entry for each layer with experts: `entropy`, `most_used` and
        `least_used` as `monitoring.tallies.expert_load` gives them, and `shares` of the experts.
    """
    padding = model.config.get_text_config().pad_token_id
    counts: dict[str, torch.Tensor] = {}
    for task, rows in rows_of.items():
        kept: list[EncodedRow] = []
        for row in rows:
            if not kept or sum(len(other.ids) for other in kept) + len(row.ids) <= most_tokens:
                kept.append(row)
        inputs = to_inputs(kept, padding, model.device)
        inputs.pop("labels")
        outputs = model(**inputs, logits_to_keep=1, use_cache=False, output_router_logits=True)
        counts[task] = expert_choices(model, outputs.router_logits).cpu()
        progress()
    counts["all"] = torch.stack([count / count.sum(-1, keepdim=True) for count in counts.values()]).mean(0)
    return {
        task: [
            {name: round(value, 5) for name, value in expert_load(layer).items()}
            | {"shares": [round(value / sum(layer), 5) for value in layer]}
            for layer in count.tolist()
        ]
        for task, count in counts.items()
    }


class CoverageObserver:
    """Measures, while a model reads one document, how much of the attention to all keys the selected blocks hold.

    It uses queries all over the document, of those that cannot select all blocks that they see.
    """

    def __init__(self, model: Any):
        self.block_size = model.config.get_text_config().index_block_size
        self.layers = [
            module for module in model.modules() if isinstance(module, MiniMaxM3VLAttention) and module.selector
        ]
        self.shares: defaultdict[int, list[float]] = defaultdict(list)
        self.best: defaultdict[int, list[float]] = defaultdict(list)

    def __enter__(self) -> "CoverageObserver":
        for layer in self.layers:
            layer.selection_observer = self.observe
        return self

    def __exit__(self, *exception: Any) -> None:
        for layer in self.layers:
            layer.__dict__.pop("selection_observer", None)

    def observe(self, layer: Any, query: torch.Tensor, key: torch.Tensor, blocks: torch.Tensor, layout: Any) -> None:
        num_tokens, first = query.shape[1], blocks.shape[-1] * self.block_size
        if num_tokens <= first:
            return
        places = torch.linspace(first, num_tokens - 1, min(QUERIES, num_tokens - first), device=query.device).long()
        size = max(1, MOST_SCORES // (num_tokens * query.shape[2]))
        total = torch.zeros(3, device=query.device)
        for chosen in places.split(size):
            parts = selected_mass(query, key, blocks, layout, None, self.block_size, layer.scaling, chosen)
            total += torch.stack(parts)
        mass, best, count = total.tolist()
        self.shares[layer.layer_idx].append(mass / count)
        self.best[layer.layer_idx].append(best / count)


@torch.no_grad()
def coverage(
    model: Any, documents: Sequence[np.ndarray], lengths: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    """The share of the attention to all keys that the selected blocks hold, on held-out documents.

    Returns:
        For each length `tokens`, the number of `documents`, the mean `share` over layers, its 95% `interval` over
        documents, the share of each of the `layers`, `best`: the share that the best choice of as many blocks would
        hold, and `blocks_share`: the mean share of the visible keys that are in selected blocks, which is what even
        attention would give. Empty where a query can select all blocks.
    """
    text = model.config.get_text_config()
    padding, found = text.pad_token_id, []
    for length in lengths:
        by_document: list[float] = []
        best: list[float] = []
        layers: defaultdict[int, list[float]] = defaultdict(list)
        for ids in documents:
            if len(ids) < length:
                continue
            row = EncodedRow(ids[-length:], np.full(length, IGNORED), "code")
            inputs = to_inputs([row], padding, model.device)
            inputs.pop("labels")
            with CoverageObserver(model) as observer:
                model(**inputs, logits_to_keep=1, use_cache=False)
            progress()
            if observer.shares:
                by_document.append(float(np.mean(list(observer.shares.values()))))
                best.append(float(np.mean(list(observer.best.values()))))
                for number, values in observer.shares.items():
                    layers[number] += values
        if not by_document:
            continue
        selected = text.index_topk_blocks * text.index_block_size
        mean, low, high = mean_interval(by_document)
        found.append(
            {
                "tokens": length,
                "documents": len(by_document),
                "share": round(mean, 5),
                "interval": [round(low, 5), round(high, 5)],
                "best": round(float(np.mean(best)), 5),
                "layers": {str(number): round(float(np.mean(values)), 5) for number, values in sorted(layers.items())},
                "blocks_share": round(float(np.mean(selected / np.linspace(selected, length, QUERIES))), 5),
            }
        )
    return found


def loaded_rows(encoder: RowEncoder, tasks: Sequence[str], count: int, seed: int) -> dict[str, list[EncodedRow]]:
    """Held-out rows of each task, for the load of the experts."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"`tasks` must be names of {sorted(TASKS)}, got {unknown}.")
    rows: dict[str, list[EncodedRow]] = {}
    for task in tasks:
        found = [encoder.encode(make_row(task, SPLIT, index, seed=seed, characters=8000)) for index in range(count)]
        rows[task] = [row for row in found if row is not None]
    return rows
