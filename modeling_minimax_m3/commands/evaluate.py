"""Measure loss, perplexity and accuracy on files, with an adapter or without.

    minimax-m3 evaluate held-out.jsonl --model CHECKPOINT
    minimax-m3 evaluate a.jsonl b.jsonl --model CHECKPOINT --adapter run --output scores.json

Rows are read as `train` reads them, and only learned tokens count: the answers of chats, completions, and texts. Each
file has its own scores. The accuracy is the share of learned tokens that are the model's first choice.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DataCollatorWithFlattening

from processing_minimax_m3 import MiniMaxM3VLProcessor, MultimodalChatCollator
from processing_minimax_m3.data import Encoder, Rows
from processing_minimax_m3.data.batches import RowCollator
from processing_minimax_m3.data.training_rows import training_rows

from .checkpoint import read_config
from .data_options import add_data_options, open_data, output_file
from .running_model import add_model_options, check_model_options, load_running_model

IGNORED = -100
CHUNK = 1024  # learned tokens whose logits exist at a time


@dataclass
class Scores:
    """The scores of one file.

    Args:
        rows (int): Rows with anything to learn.
        left_out (int): Rows that were left out.
        tokens (int): Tokens that count.
        loss (float): Mean over these tokens, in nats.
        perplexity (float): Its exponential.
        accuracy (float): Share of these tokens that are the model's first choice, from 0 to 1.
    """

    rows: int
    left_out: int
    tokens: int
    loss: float
    perplexity: float
    accuracy: float


@torch.no_grad()
def score_batch(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """The summed loss in nats, the correct tokens and the learned tokens of a batch with `labels`."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = inputs.pop("labels")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = inner.model(**inputs, use_cache=False).last_hidden_state
    targets = labels[:, 1:].to(states.device)
    is_learned = targets != IGNORED
    states, targets = states[:, :-1][is_learned], targets[is_learned]
    loss, correct = 0.0, 0
    for start in range(0, len(targets), CHUNK):
        logits = inner.lm_head(states[start : start + CHUNK]).float()
        chunk = targets[start : start + CHUNK].to(logits.device)
        loss += F.cross_entropy(logits, chunk, reduction="sum").item()
        correct += int((logits.argmax(-1) == chunk).sum())
    return loss, correct, len(targets)


def make_collator(processor: Any, arguments: argparse.Namespace, reading: Any) -> RowCollator:
    """Puts rows of tokens in line, and pads rows with images or videos."""
    media = None
    if isinstance(processor, MiniMaxM3VLProcessor):
        media = MultimodalChatCollator(
            processor,
            max_length=arguments.max_length,
            chat_template_kwargs=reading.chat_template_kwargs,
            media_folder=arguments.media_folder,
        )
    return RowCollator(DataCollatorWithFlattening(), media)


def score_rows(model: Any, rows: Any, collator: RowCollator, batch_size: int, name: str) -> tuple[float, int, int]:
    """As `score_batch`, for all rows of a data set."""
    total = [0.0, 0, 0]
    for start in tqdm(range(0, len(rows), batch_size), desc=name, unit="batch", disable=None):
        batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        total = [one + other for one, other in zip(total, score_batch(model, batch))]
    return total[0], int(total[1]), int(total[2])


def main(argv: Sequence[str] | None = None) -> dict[str, Scores]:
    parser = argparse.ArgumentParser(
        "minimax-m3 evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser, "checkpoint to measure: a folder, or its name on the Hub")
    add_model_options(parser)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a batch (4)")
    parser.add_argument("--output", type=output_file, help="write the scores to this JSON file")
    arguments = parser.parse_args(argv)
    try:
        return evaluate(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: {error}")


def evaluate(arguments: argparse.Namespace) -> dict[str, Scores]:
    """Scores each file, and prints and writes the scores.

    Raises:
        ValueError: An option, a row or the adapter is wrong. Rows are checked before the weights are loaded.
    """
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {arguments.batch_size}")
    config = read_config(arguments.model)
    check_model_options(arguments, config)
    all_rows, _, reading, processor = open_data(arguments)
    encoder = Encoder(processor, decode_media=False)
    found = {}
    for source in all_rows.sources:
        rows = Rows([source])
        if len(rows) == 0:
            raise ValueError(f"{source.name} has no rows")
        data, counts = training_rows(rows, range(len(rows)), encoder, reading, arguments.max_length)
        if len(data) == 0:
            raise ValueError(f"{source.name}: no row has anything to learn within --max_length {arguments.max_length}")
        found[source.name] = data, sum(counts.left_out.values())

    model = load_running_model(arguments.model, arguments, config)
    collator = make_collator(processor, arguments, reading)
    scores = {}
    for name, (data, left_out) in found.items():
        loss, correct, tokens = score_rows(model, data, collator, arguments.batch_size, name)
        mean = loss / tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        scores[name] = Scores(len(data), left_out, tokens, mean, perplexity, correct / tokens)
        print(
            f"{name}: loss {mean:.4f}, perplexity {perplexity:.4g}, accuracy {correct / tokens:.2%} of {tokens:,} learned "
            f"tokens in {len(data):,} rows" + (f", {left_out:,} rows left out" if left_out else "")
        )
    if arguments.output is not None:
        content = {
            "model": arguments.model,
            "adapter": arguments.adapter,
            "max_length": arguments.max_length,
            "files": {name: asdict(one) for name, one in scores.items()},
        }
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return scores


if __name__ == "__main__":
    main()
