"""The data of a run: read, checked, held out, packed, and the collator of their batches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, TrainingArguments

from processing_minimax_m3 import MiniMaxM3VLProcessor, MultimodalChatCollator
from processing_minimax_m3.data import Encoder, Reading, Rows, RowSource, open_rows
from processing_minimax_m3.data.batches import RowCollator
from processing_minimax_m3.data.encoded_rows import encode_rows
from processing_minimax_m3.data.packing import PackedRows, pack_stream
from processing_minimax_m3.data.sources import are_files, stream_rows
from processing_minimax_m3.data.training_rows import Counts, MediaRows, training_rows, training_stream

from .train_arguments import DataArguments

# So many rows of a stream are checked before anything is loaded, and say what kind the data are.
FIRST_ROWS = 100


@dataclass
class RunData:
    """The data of a run.

    Args:
        rows (dict): Data sets for `Trainer`, by "training" and "evaluation".
        collator (Callable): Makes their batches.
        kinds (set of str): "chat", "text", "completion": the kinds of their rows.
        has_media (bool): Whether rows have images or videos. Of a stream, whether the first rows have.
        summary (list of str): What became of the rows, line by line.
        longest (int): The tokens of the longest row of a batch, or `max_length` where the rows are not known yet.
        sources (sequence of tuple): Name of each file or data set, what it is for, and its rows, if they are known.
    """

    rows: dict[str, Any]
    collator: Any
    kinds: set[str]
    has_media: bool
    summary: list[str]
    longest: int
    sources: Sequence[tuple[str, str, int | None]]


def read_data(data: DataArguments, training: TrainingArguments, processor: Any) -> RunData:
    """Reads and checks all rows of a run.

    Raises:
        ValueError: A file is missing, a row has a fault, or no row has anything to learn. The message names it.
    """
    reading = Reading(
        messages_column=data.messages_column,
        text_column=data.text_column,
        chat_template_kwargs={"thinking_mode": data.thinking_mode},
        media_folder=data.media_folder,
    )
    encoder = Encoder(processor, decode_media=data.check_media == "decode")
    return (_stream if data.streaming else _read)(_open(data), data, training, encoder, reading, processor)


def _open(data: DataArguments) -> dict[str, list[RowSource]]:
    """The sources of the training data, and of the evaluation data if they have their own."""
    found = {"training": open_rows(data.dataset, data.train_split, data.dataset_config, data.streaming)}
    if data.eval_dataset or data.eval_split:
        names = data.eval_dataset or data.dataset
        split = data.eval_split or ("train" if are_files(names) else data.train_split)
        found["evaluation"] = open_rows(names, split, data.dataset_config, data.streaming)
    return found


def hold_out(indices: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows at random into those to train on and those to evaluate on, at least one of each.

    Raises:
        ValueError: There are fewer than two rows.
    """
    if len(indices) < 2:
        raise ValueError(f"--eval_fraction needs at least two rows, got {len(indices)}")
    order = np.random.default_rng(seed).permutation(len(indices))
    count = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    return [indices[place] for place in kept], [indices[place] for place in held]


def _read(
    sources: dict[str, list[RowSource]],
    data: DataArguments,
    training: TrainingArguments,
    encoder: Encoder,
    reading: Reading,
    processor: Any,
) -> RunData:
    rows = {name: Rows(found) for name, found in sources.items()}
    for name, found in rows.items():
        if len(found) == 0 or (name == "training" and data.max_rows == 0):
            raise ValueError(f"the {name} data has no rows")
    chosen: dict[str, Sequence[int]] = {name: range(len(found)) for name, found in rows.items()}
    if data.max_rows is not None:
        chosen["training"] = chosen["training"][: data.max_rows]
    if data.eval_fraction:
        seed = training.data_seed if training.data_seed is not None else training.seed
        chosen["training"], chosen["evaluation"] = hold_out(chosen["training"], data.eval_fraction, seed)
        rows["evaluation"] = rows["training"]
    data_sets: dict[str, Any] = {}
    kinds: set[str] = set()
    summary: list[str] = []
    has_media = False
    for name, indices in chosen.items():
        data_sets[name], counts = training_rows(rows[name], indices, encoder, reading, data.max_length, data.num_proc)
        kinds |= set(counts.kinds)
        has_media |= counts.with_media > 0
        if len(data_sets[name]) == 0:
            raise ValueError(nothing_learned(name, data.max_length))
        summary += describe(name, data_sets[name], counts)
    if data.packing and not has_media:
        for name, encoded in data_sets.items():
            data_sets[name] = PackedRows(encoded, data.max_length)
            packing = data_sets[name].packing
            summary.append(
                f"{name} data: {len(encoded)} rows in {len(packing.packs)} packs of {data.max_length} tokens, "
                f"{packing.fill:.1%} full"
            )
    longest = max(lengths_of(data_sets["training"]) or [data.max_length])
    collator = make_collator(data, processor, reading, has_media)
    names = [(source.name, role, len(source)) for role, found in sources.items() for source in found]
    return RunData(data_sets, collator, kinds, has_media, summary, longest, names)


def _stream(
    sources: dict[str, list[RowSource]],
    data: DataArguments,
    training: TrainingArguments,
    encoder: Encoder,
    reading: Reading,
    processor: Any,
) -> RunData:
    found: dict[str, Any] = {}
    kinds: set[str] = set()
    has_media = False
    for name, given in sources.items():
        limit = data.max_rows if name == "training" else None
        first = itertools.islice(stream_rows(given), FIRST_ROWS if limit is None else min(limit, FIRST_ROWS))
        for result in encode_rows(first, encoder, reading):
            example, encoded = result.checked()
            kinds.add(example.kind)
            has_media |= bool(encoded.media)
        found[name] = training_stream(given, encoder, reading, data.max_length, limit)
        if next(iter(found[name]), None) is None:
            raise ValueError(nothing_learned(name, data.max_length))
        if data.packing and not has_media:
            found[name] = IterableDataset.from_generator(
                pack_stream, gen_kwargs={"rows": found[name], "budget": data.max_length}
            )
    collator = make_collator(data, processor, reading, has_media)
    summary = [f"{name} data: a stream of rows" for name in found]
    names = [(source.name, role, None) for role, given in sources.items() for source in given]
    return RunData(found, collator, kinds, has_media, summary, data.max_length, names)


def nothing_learned(name: str, max_length: int) -> str:
    """The error of data without anything to learn."""
    return (
        f"no row of the {name} data has anything to learn, and all of its images and videos, within its first "
        f"{max_length} tokens (--max_length): chats need turns of the role 'assistant'"
    )


def make_collator(data: DataArguments, processor: Any, reading: Reading, has_media: bool) -> Any:
    """Makes batches of rows: padded where they have images or videos, and else by `--padding_free` and `--packing`."""
    media = None
    if isinstance(processor, MiniMaxM3VLProcessor):
        media = MultimodalChatCollator(
            processor,
            max_length=data.max_length,
            chat_template_kwargs=reading.chat_template_kwargs,
            media_folder=data.media_folder,
        )
        if has_media:
            return media
    tokenizer = getattr(processor, "tokenizer", processor)
    is_flat = data.padding_free or data.packing
    return RowCollator(DataCollatorWithFlattening() if is_flat else DataCollatorForSeq2Seq(tokenizer), media)


def lengths_of(rows: Any) -> list[int] | None:
    """The tokens of each row of a data set, if they are known."""
    if isinstance(rows, Dataset):
        return list(rows["length"]) if "length" in rows.column_names else list(map(len, rows["input_ids"]))
    return getattr(rows, "lengths", None)


def describe(name: str, found: Dataset | MediaRows, counts: Counts) -> list[str]:
    """What became of the rows of a data set."""
    media = f", {counts.with_media} with images or videos" if isinstance(found, MediaRows) else ""
    tokens = f"{sum(lengths_of(found) or ())} tokens, {counts.learned} of them learned"
    lines = [f"{name} data: {len(found)} rows{media}, {tokens}"]
    if counts.cut:
        lines.append(f"{name} data: {counts.cut} rows lose their end, which lies beyond --max_length")
    lines += [f"{name} data: left out {count} rows, which {reason}" for reason, count in counts.left_out.items()]
    return lines
