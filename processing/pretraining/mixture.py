"""The tasks of pretraining, their weights, and rows by split, task, seed and index."""

import math
import random
from collections.abc import Callable, Iterator, Mapping

from .digits import digit_row
from .recall import recall_row
from .rows import Row, check_split, random_numbers
from .scenes import image_row
from .text import code_row, english_row
from .tools import thinking_row, tool_row
from .videos import video_row

Builder = Callable[[random.Random, str, int], Row]

TASKS: dict[str, Builder] = {
    "code": code_row,
    "english": english_row,
    "recall": recall_row,
    "image": image_row,
    "digits": digit_row,
    "video": video_row,
    "tools": tool_row,
    "thinking": thinking_row,
}
# Tasks whose rows are as long as asked. The rows of the others have the length that they have.
LONG_TASKS = ("code", "english", "recall")
WEIGHTS = {
    "code": 1.0,
    "english": 0.5,
    "recall": 3.0,
    "image": 4.0,
    "digits": 2.0,
    "video": 4.0,
    "tools": 1.0,
    "thinking": 1.0,
}
"""Shares of the rows of a pack, once they are divided by their sum."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises `ValueError` where a name is no task, or a weight is not a number above 0."""
    if unknown := sorted(set(weights) - set(TASKS)):
        raise ValueError(f"`weights` must name tasks of {sorted(TASKS)}, got {unknown}.")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"`weights[{name!r}]` must be a number above 0, got {weight!r}. Leave a task out to drop it."
            )
    if not weights:
        raise ValueError("`weights` must name at least one task, got none.")


def make_row(task: str, split: str, index: int, *, seed: int = 0, characters: int = 4000) -> Row:
    """Row number `index` of a task: the same for the same arguments.

    Args:
        task (str): A name of `TASKS`.
        split (str): "train" or "heldout". They share no file, no handwritten digit and no random number.
        index (int): Number of the row, from 0. There is no last row.
        seed (int): Another seed gives other rows.
        characters (int): Length of the rows of `LONG_TASKS`.

    Raises:
        ValueError: `task` or `split` is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {sorted(TASKS)}, got {task!r}.")
    check_split(split)
    return TASKS[task](random_numbers(seed, split, task, index), split, characters)


def iterate_rows(task: str, split: str, num_rows: int, *, seed: int = 0, characters: int = 4000) -> Iterator[Row]:
    """The first rows of a task."""
    for index in range(num_rows):
        yield make_row(task, split, index, seed=seed, characters=characters)
