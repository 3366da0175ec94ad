"""Data sets for `Trainer` from rows: tokens of texts and text chats, and rows with images or videos as they are.

Every row is read and checked. The first fault ends it, with an error that names the file, the row and the field.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError

from .encoded_rows import encode_rows
from .encoding import IGNORED, Encoder
from .faults import RowFault
from .formats import Reading
from .media_sizes import media_paths
from .sources import LocatedRow, Rows, RowSource, stream_rows

FEATURES = {
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    "length": Value("int64"),  # in the model's input, images and videos included
    "learned": Value("int64"),  # tokens
    "row": Value("int64"),
    "kind": Value("string"),
    "has_media": Value("bool"),
    "files": List(Value("string")),  # of images and videos: size, time of the last change, path
    "is_cut": Value("bool"),
    "left_out": Value("string"),  # why, or empty
}


@dataclass
class Counts:
    """What became of the rows of a data set.

    Args:
        rows (int): Rows that were read.
        kinds (Counter): Rows by kind: "chat", "text", "completion".
        with_media (int): Rows with images or videos.
        learned (int): Tokens that are learned.
        cut (int): Chats and completions that lose their end.
        left_out (Counter): Rows that are left out, by the reason.
    """

    rows: int = 0
    kinds: Counter = field(default_factory=Counter)
    with_media: int = 0
    learned: int = 0
    cut: int = 0
    left_out: Counter = field(default_factory=Counter)


def _records(
    shards: Sequence[tuple[int, int]],
    indices: Sequence[int],
    rows: Rows,
    encoder: Encoder,
    reading: Reading,
    max_length: int,
    kept_for: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    """Rows of `FEATURES`. `kept_for` is what else results that are kept for later runs depend on."""
    chosen = (indices[place] for start, stop in shards for place in range(start, stop))
    for result in encode_rows(rows.located(chosen), encoder, reading):
        example, encoded = result.checked()
        left_out = encoded.why_left_out(max_length)
        common = {
            "row": result.located.index,
            "kind": example.kind,
            "has_media": bool(encoded.media),
            "files": [_state(path) for path in media_paths(example)],
            "is_cut": not encoded.is_text and encoded.length > max_length,
            "left_out": left_out,
        }
        if left_out or encoded.media:
            learned = 0 if left_out else encoded.num_learned(max_length)
            length = min(encoded.length, max_length)
            yield {**common, "input_ids": [], "labels": [], "length": length, "learned": learned}
        else:
            for row in encoded.rows(max_length):
                learned = sum(label != IGNORED for label in row["labels"])
                yield {**common, **row, "length": len(row["input_ids"]), "learned": learned}


def training_rows(
    rows: Rows,
    indices: Sequence[int],
    encoder: Encoder,
    reading: Reading,
    max_length: int,
    num_proc: int | None = None,
) -> tuple["Dataset | MediaRows", Counts]:
    """Reads, checks and encodes the rows at `indices`.

    `datasets` keeps the result for later runs on the same files with the same version of this package. If an image or a
    video has changed since, all rows are read again.

    Returns:
        The rows that have anything to learn, and the counts of all.

    Raises:
        RowFault: A row has a fault.
    """
    pieces = min(max(num_proc or 1, 1), max(len(indices), 1))
    bounds = [len(indices) * piece // pieces for piece in range(pieces + 1)]
    options = {
        "shards": list(itertools.pairwise(bounds)),
        "indices": tuple(indices) if not isinstance(indices, range) else indices,
        "rows": rows,
        "encoder": encoder,
        "reading": reading,
        "max_length": max_length,
    }
    kept_for = (os.getcwd(), metadata.version("minimax-m3-transformers"))
    found = _kept_or_made(options, pieces, kept_for)
    files = set(itertools.chain.from_iterable(found["files"]))
    if changed := sorted(state for file in files if (state := _state(_path(file))) != file):
        found = _kept_or_made(options, pieces, (*kept_for, *changed))
    of_row = dict(zip(found["row"], zip(found["kind"], found["has_media"], found["is_cut"], found["left_out"])))
    counts = Counts(
        rows=len(of_row),
        kinds=Counter(kind for kind, *_ in of_row.values()),
        learned=sum(found["learned"]),
        with_media=sum(has_media for _, has_media, *_ in of_row.values()),
        cut=sum(is_cut and not left_out for *_, is_cut, left_out in of_row.values()),
        left_out=Counter(left_out for *_, left_out in of_row.values() if left_out),
    )
    if counts.left_out:
        found = found.select([place for place, left_out in enumerate(found["left_out"]) if not left_out])
    if counts.with_media:
        return MediaRows(found, rows, reading), counts
    return found.select_columns(["input_ids", "labels", "length"]), counts


def _kept_or_made(options: dict[str, Any], pieces: int, kept_for: tuple[str, ...]) -> Dataset:
    """The records of an earlier run with equal options, or new ones."""
    try:
        return Dataset.from_generator(
            _records,
            Features(FEATURES),
            gen_kwargs=options | {"kept_for": kept_for},
            num_proc=pieces if pieces > 1 else None,
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise cause if isinstance(cause, RowFault) else ValueError(f"the data cannot be read: {cause}") from error


def _state(path: str) -> str:
    """What tells whether a file has changed, before its path."""
    try:
        found = os.stat(path)
    except OSError:
        return f"none none {path}"
    return f"{found.st_size} {found.st_mtime_ns} {path}"


def _path(state: str) -> str:
    return state.split(" ", 2)[2]


def for_collator(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The row with its chat in the column in which `MultimodalChatCollator` looks for it."""
    if reading.messages_column == "messages":
        return row
    row = {name: value for name, value in row.items() if name != "messages"}
    if reading.messages_column in row:
        row["messages"] = row.pop(reading.messages_column)
    return row


class MediaRows:
    """Rows of which some have images or videos: those come as the file has them, all others as tokens.

    `MultimodalChatCollator` makes batches of them.

    Attributes:
        lengths (list of int): Tokens of each row in the model's input.
    """

    def __init__(self, found: Dataset, rows: Rows, reading: Reading):
        self._found, self._rows, self._reading = found, rows, reading
        self.lengths: list[int] = list(found["length"])

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._found[index]
        if record["has_media"]:
            return for_collator(self._rows.read(record["row"]), self._reading)
        return {name: record[name] for name in ("input_ids", "labels")}


def _stream_records(
    sources: Sequence[RowSource], encoder: Encoder, reading: Reading, max_length: int, max_rows: int | None
) -> Iterator[dict[str, Any]]:
    rows: Iterator[LocatedRow] = stream_rows(sources)
    if max_rows is not None:
        rows = itertools.islice(rows, max_rows)
    for result in encode_rows(rows, encoder, reading):
        _, encoded = result.checked()
        if encoded.why_left_out(max_length):
            continue
        if encoded.media:
            assert isinstance(result.located.row, dict)
            yield for_collator(result.located.row, reading)
        else:
            yield from encoded.rows(max_length)


def training_stream(
    sources: Sequence[RowSource], encoder: Encoder, reading: Reading, max_length: int, max_rows: int | None = None
) -> IterableDataset:
    """The same as `training_rows`, read as it is needed. A fault ends the iteration with a `RowFault`."""
    options = {
        # lists are spread over the workers of a data loader; a number of rows counts over all sources
        "sources": list(sources) if max_rows is None else tuple(sources),
        "encoder": encoder,
        "reading": reading,
        "max_length": max_length,
        "max_rows": max_rows,
    }
    return IterableDataset.from_generator(_stream_records, gen_kwargs=options)
