"""Reads all rows of a data set, in several processes, and reports what training would meet."""

import itertools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from .encoded_rows import encode_rows
from .encoding import Encoder
from .formats import Reading
from .report import DataReport
from .sources import LocatedRow, Rows, RowSource, stream_rows

# Rows of one task of a process.
ROWS_OF_A_TASK = 1024

# Tasks of streamed rows that wait for each process.
WAITING_TASKS = 2

# The rows of a task: where they are, or the rows themselves where they are streamed.
Task = range | list[LocatedRow]
# What the tasks of a process share. There are no `Rows` where rows are streamed.
Shared = tuple[Rows | None, Encoder, Reading, int]
_shared: Shared | None = None


def check_rows(
    rows: Rows | Sequence[RowSource],
    encoder: Encoder,
    reading: Reading,
    max_length: int,
    num_proc: int | None = None,
    shows_progress: bool = True,
) -> DataReport:
    """Reads and encodes all rows, and counts what it finds. A fault ends nothing.

    Args:
        rows (Rows, or a list of RowSource): The rows. Sources alone are streamed: read once, in order.
        encoder (Encoder): The checkpoint's tokens.
        reading (Reading): How rows are read.
        max_length (int): Greatest number of tokens of a row in training.
        num_proc (int, optional): Processes. The default is the number of cores, at most 16.
        shows_progress (bool): Whether a bar on stderr shows how far it is.

    Returns:
        The report, whose faults are in the order of the rows.
    """
    processes = num_proc or min(os.cpu_count() or 1, 16)
    if isinstance(rows, Rows):
        known, total, tasks = rows, len(rows), _located_tasks(len(rows))
        processes = min(processes, -(-total // ROWS_OF_A_TASK))
    else:
        known, total, tasks = None, None, _streamed_tasks(rows)
    report = DataReport(max_length)
    with tqdm(total=total, desc="checking", unit=" rows", disable=not shows_progress, file=sys.stderr) as bar:
        for part in _run(tasks, processes, (known, encoder, reading, max_length)):
            report.merge(part)
            bar.set_postfix(faults=len(report.faults), refresh=False)
            bar.update(part.rows)
    return report


def _located_tasks(count: int) -> Iterator[Task]:
    for start in range(0, count, ROWS_OF_A_TASK):
        yield range(start, min(start + ROWS_OF_A_TASK, count))


def _streamed_tasks(sources: Sequence[RowSource]) -> Iterator[Task]:
    rows = stream_rows(sources)
    while task := list(itertools.islice(rows, ROWS_OF_A_TASK)):
        yield task


def _run(tasks: Iterator[Task], processes: int, shared: Shared) -> Iterator[DataReport]:
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
            # `imap` would read all rows ahead of the processes.
            waiting: deque = deque()
            for task in tasks:
                waiting.append(pool.apply_async(_check, (task,)))
                if len(waiting) > WAITING_TASKS * processes:
                    yield waiting.popleft().get()
            while waiting:
                yield waiting.popleft().get()
    finally:
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _share(rows: Rows | None, encoder: Encoder, reading: Reading, max_length: int) -> None:
    global _shared
    _shared = (rows, encoder, reading, max_length)


def _check(task: Task) -> DataReport:
    assert _shared is not None
    rows, encoder, reading, max_length = _shared
    report = DataReport(max_length)
    if isinstance(task, range):
        assert rows is not None
        located = rows.located(task)
    else:
        located = iter(task)
    for result in encode_rows(located, encoder, reading, finds_all=True):
        report.add(result)
    return report
