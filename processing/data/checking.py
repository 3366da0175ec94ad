"""Reads all rows of a data set, in several processes, and reports what training would meet."""

import multiprocessing
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm

from .encoded_rows import encode_rows
from .encoding import Encoder
from .formats import Reading
from .report import DataReport
from .sources import Rows

# Rows of one task of a process.
ROWS_OF_A_TASK = 1024

# What the tasks of a process share.
_shared: tuple[Rows, Encoder, Reading, int] | None = None


def check_rows(
    rows: Rows,
    encoder: Encoder,
    reading: Reading,
    max_length: int,
    num_proc: int | None = None,
    shows_progress: bool = True,
) -> DataReport:
    """Reads and encodes all rows, and counts what it finds. A fault ends nothing.

    Args:
        rows (Rows): The rows.
        encoder (Encoder): The checkpoint's tokens.
        reading (Reading): How rows are read.
        max_length (int): Greatest number of tokens of a row in training.
        num_proc (int, optional): Processes. The default is the number of cores, at most 16.
        shows_progress (bool): Whether a bar on stderr shows how far it is.

    Returns:
        The report, whose faults are in the order of the rows.
    """
    starts = range(0, len(rows), ROWS_OF_A_TASK)
    tasks = [range(start, min(start + ROWS_OF_A_TASK, len(rows))) for start in starts]
    processes = min(num_proc or min(os.cpu_count() or 1, 16), len(tasks))
    report = DataReport(max_length)
    with tqdm(total=len(rows), desc="checking", unit=" rows", disable=not shows_progress, file=sys.stderr) as bar:
        for part in _run(tasks, processes, (rows, encoder, reading, max_length)):
            report.merge(part)
            bar.set_postfix(faults=len(report.faults), refresh=False)
            bar.update(part.rows)
    return report


def _run(tasks: list[range], processes: int, shared: tuple[Rows, Encoder, Reading, int]) -> Iterator[DataReport]:
    if processes < 2:
        _share(*shared)
        yield from map(_check, tasks)
        return
    # The threads of the tokenizer would compete with the processes. Forking saves the imports of each process.
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(
            processes, _share, shared
        ) as pool:
            yield from pool.imap(_check, tasks)
    finally:
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _share(rows: Rows, encoder: Encoder, reading: Reading, max_length: int) -> None:
    global _shared
    _shared = (rows, encoder, reading, max_length)


def _check(indices: range) -> DataReport:
    assert _shared is not None
    rows, encoder, reading, max_length = _shared
    report = DataReport(max_length)
    for result in encode_rows(rows.located(indices), encoder, reading):
        report.add(result)
    return report
