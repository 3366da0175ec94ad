"""Rows of files, folders and data sets of the Hub, each with its place. Rows may differ in their columns.

Files of JSON and CSV are read row by row, without a common schema, so that a row may hold what no earlier row held.
`datasets` reads everything else.
"""

import bisect
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .faults import Fault, RowFault

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
UTF8_MARK = b"\xef\xbb\xbf"


class RowSource:
    """The rows of one file or data set.

    Attributes:
        name (str): The file or the data set, for messages.
    """

    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> dict[str, Any]:
        """The row at `index`, which counts from 0.

        Raises:
            RowFault: The row cannot be read.
        """
        raise NotImplementedError

    def number(self, index: int) -> int:
        """The number of a row for messages. It counts from 1."""
        return index + 1

    def stream(self) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
        """All rows with their numbers, read as they are needed. A row that cannot be read comes as its fault."""
        for index in range(len(self)):
            yield self.number(index), _or_fault(self.read, index)


class ListRows(RowSource):
    """Rows that are in memory."""

    def __init__(self, name: str, rows: Sequence[Any]):
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> dict[str, Any]:
        """See `RowSource`."""
        return check_row(self._rows[index], self.name, self.number(index))


class JsonLines(RowSource):
    """A file with one JSON object in each line. Memory holds only where lines start.

    Empty lines are no rows, but count in the numbers of rows.
    """

    def __init__(self, name: str, path: str):
        self.name, self._path = name, path
        self._stamp = (os.path.getsize(path), os.stat(path).st_mtime_ns)  # results that are kept depend on the content
        starts, numbers, place = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(place)
                    numbers.append(number)
                place += len(line)
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        """The number of the line."""
        return int(self._numbers[index])

    def read(self, index: int) -> dict[str, Any]:
        """See `RowSource`."""
        if self._file is None or self._file[0] != os.getpid():  # processes that share a file would share its place
            self._file = (os.getpid(), open(self._path, "rb"))  # noqa: SIM115
        file = self._file[1]
        file.seek(self._starts[index])
        return parse_line(file.readline(), self.name, self.number(index))


class StreamedLines(RowSource):
    """A file or an address with one JSON object in each line, read from its start."""

    def __init__(self, name: str):
        self.name = name

    def stream(self) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
        """See `RowSource`."""
        import fsspec

        with fsspec.open(self.name, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _or_fault(parse_line, line, self.name, number)


class TableRows(RowSource):
    """The rows of a data set of `datasets`, whose image files stay encoded."""

    def __init__(self, name: str, rows: Any):
        self.name = name
        self._rows = without_decoding(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> dict[str, Any]:
        """See `RowSource`."""
        return self._rows[index]

    def stream(self) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
        """See `RowSource`."""
        return enumerate(self._rows, 1)


@dataclass
class LocatedRow:
    """A row, or the fault that it cannot be read, with its place.

    Args:
        index (int): Place among the rows of all sources, counted from 0.
        file (str): Name of its source.
        number (int): Number in its source, counted from 1.
        row (dict or RowFault): The row.
    """

    index: int
    file: str
    number: int
    row: dict[str, Any] | RowFault


def stream_rows(sources: Iterable[RowSource]) -> Iterator[LocatedRow]:
    """The rows of all sources, read as they are needed."""
    places = ((source.name, number, row) for source in sources for number, row in source.stream())
    for index, (file, number, row) in enumerate(places):
        yield LocatedRow(index, file, number, row)


class Rows:
    """The rows of several sources, one after the other."""

    def __init__(self, sources: Sequence[RowSource]):
        self.sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def located(self, indices: Iterable[int]) -> Iterator["LocatedRow"]:
        """The rows at these indices, each with its place."""
        for index in indices:
            source, inside = self._find(index)
            yield LocatedRow(index, source.name, source.number(inside), _or_fault(source.read, inside))

    def read(self, index: int) -> dict[str, Any]:
        """See `RowSource`."""
        source, inside = self._find(index)
        return source.read(inside)

    def _find(self, index: int) -> tuple[RowSource, int]:
        at = bisect.bisect_right(self._ends, index)
        return self.sources[at], int(index) - (self._ends[at - 1] if at else 0)


def _or_fault(read: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | RowFault:
    try:
        return read(*arguments)
    except RowFault as fault:
        return fault


def check_row(row: Any, name: str, number: int) -> dict[str, Any]:
    """Returns a row that is a mapping.

    Raises:
        RowFault: The row is something else.
    """
    if not isinstance(row, dict):
        problem = f"a row must be an object of columns and values, got {type(row).__name__}: {row!r:.80}"
        raise RowFault(Fault(name, number, "", problem))
    if None in row:  # what the CSV reader makes of it
        raise RowFault(
            Fault(name, number, "", f"the row has more cells than the header has columns: {row[None]!r:.80}")
        )
    return row


def parse_line(line: bytes, name: str, number: int) -> dict[str, Any]:
    """Parses one line of JSON.

    Raises:
        RowFault: The line is not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.removeprefix(UTF8_MARK).decode("utf-8") if number == 1 else line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(Fault(name, number, "", describe_bytes(line, error.start))) from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 20, 0) : error.pos + 20].strip()
        problem = f"the line is not JSON: {error.msg} at character {error.pos + 1}, near {near!r}"
        raise RowFault(Fault(name, number, "", problem)) from None
    return check_row(row, name, number)


def describe_bytes(content: bytes, start: int) -> str:
    """Says where bytes are not UTF-8."""
    near = content[max(start - 12, 0) : start + 12].decode("latin-1")
    return (
        f"the text must be UTF-8, but byte {start + 1} is 0x{content[start]:02x}. As Latin-1 it reads {near!r}: "
        "convert the file, for example with `iconv -f latin1 -t utf8`"
    )


def without_decoding(rows: Any) -> Any:
    """The same data set, whose columns of images give the files and not their pixels."""
    from datasets import Image, List

    for name, kind in (rows.features or {}).items():
        if isinstance(kind, Image) and kind.decode:
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image) and kind.feature.decode:
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def are_files(names: Sequence[str]) -> bool:
    """Whether all names are those of files of data."""
    return all(Path(name).suffix in FILE_TYPES for name in names)


def is_saved(name: str) -> bool:
    """Whether `name` is a folder that `save_to_disk` wrote."""
    return any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def open_rows(
    names: Sequence[str], split: str = "train", config: str | None = None, streaming: bool = False
) -> list[RowSource]:
    """Opens one split of a data set.

    Args:
        names (list of str): Files of any types in `FILE_TYPES`, or one folder, or one name on the Hub.
        split (str): The split. Files have only "train".
        config (str, optional): Configuration of a data set on the Hub.
        streaming (bool): Whether rows are only read in order, as they are needed. Then the sources have no length.

    Raises:
        ValueError: A file or a split is missing, or a file is empty or cannot be read. The message names it.
    """
    if not are_files(names):
        if len(names) > 1:
            raise ValueError(
                f"a data set of several names must consist of files ({', '.join(FILE_TYPES)}), got {list(names)}"
            )
        if Path(names[0]).is_file():
            raise ValueError(f"files of data end in {', '.join(FILE_TYPES)}, got {names[0]}")
        return [TableRows(names[0], _load_split(names[0], split, config, streaming))]
    if split != "train":
        raise ValueError(
            f"files have only the split 'train', got {split!r}; --eval_dataset names other files to evaluate on"
        )
    if missing := [name for name in names if "://" not in name and not Path(name).is_file()]:
        raise ValueError(f"there is no file {', '.join(missing)}")
    if empty := [name for name in names if Path(name).is_file() and not Path(name).stat().st_size]:
        raise ValueError(f"the file {', '.join(empty)} is empty")
    return [_open_file(name, streaming) for name in names]


def _load_split(name: str, split: str, config: str | None, streaming: bool) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    if is_saved(name):
        found = load_from_disk(name)
        found = DatasetDict({"train": found}) if isinstance(found, Dataset) else found
    else:
        try:
            found = load_dataset(name, config, streaming=streaming)
        except (DatasetGenerationError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            if Path(name).is_dir():
                raise ValueError(f"the folder {name} cannot be read as data: {cause}") from error
            raise ValueError(f"{name} is no folder here, and no data set that the Hub gives: {cause}") from error
    if split not in found:
        raise ValueError(f"the split of {name} must be one of {', '.join(found)}, got {split!r}")
    return found[split]


def _open_file(name: str, streaming: bool) -> RowSource:
    kind = FILE_TYPES[Path(name).suffix]
    if kind in ("parquet", "arrow"):
        return TableRows(name, _load_table(kind, name, streaming))
    if "://" in name:
        if streaming and kind == "json":
            return StreamedLines(name)
        from datasets import DownloadManager

        path = DownloadManager().download(name)
    else:
        path = name
    return ListRows(name, _read_csv(path)) if kind == "csv" else _open_json(name, path, streaming)


def _load_table(kind: str, name: str, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(kind, data_files=[name], split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error


def _open_json(name: str, path: str, streaming: bool) -> RowSource:
    """A list of objects, one object over several lines, or an object in each line."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(UTF8_MARK).strip()
    spans_lines = first in (b"{", b"[") or first.startswith((b"[{", b"[ "))
    if not spans_lines:
        return StreamedLines(path) if streaming else JsonLines(name, path)
    with open(path, "rb") as file:
        content = file.read()
    try:
        rows = json.loads(content.removeprefix(UTF8_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {describe_bytes(content, error.start)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    return ListRows(name, rows if isinstance(rows, list) else [rows])


def _read_csv(path: str) -> list[dict[str, Any]]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the usual limit is shorter than many texts
    try:
        # Bytes that are not UTF-8 become halves of surrogate pairs, which the checks of the row name.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            return [{name: value for name, value in row.items() if value not in ("", None)} for row in reader]
    finally:
        csv.field_size_limit(limit)
