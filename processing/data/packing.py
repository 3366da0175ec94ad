"""Packs rows into rows of a fixed budget of tokens. No row is cut."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Packing:
    """Which rows share a pack.

    Args:
        packs (list of list of int): The indices of the rows of each pack.
        too_long (list of int): The indices of rows that are longer than the budget. They are in no pack.
        tokens (int): The tokens of all packs.
        budget (int): The tokens that a pack may have.
    """

    packs: list[list[int]]
    too_long: list[int]
    tokens: int
    budget: int

    @property
    def fill(self) -> float:
        """The share of the packs' budgets that holds tokens."""
        return self.tokens / (len(self.packs) * self.budget) if self.packs else 0.0


def pack_lengths(lengths: Sequence[int], budget: int) -> Packing:
    """Packs rows by best fit: the longest first, each into the fullest pack that has room for it.

    Args:
        lengths (sequence of int): Tokens of each row.
        budget (int): Tokens that a pack may have.

    Raises:
        ValueError: The budget is below 1.
    """
    if budget < 1:
        raise ValueError(f"`budget` must be at least 1 token, got {budget}.")
    result = Packing([], [], 0, budget)
    packs_with: dict[int, list[int]] = {}  # the packs that have exactly so much room
    rooms: list[int] = []  # the keys, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = int(lengths[index])
        if length > budget:
            result.too_long.append(index)
            continue
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(result.packs), budget
            result.packs.append([])
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[at]
        result.packs[pack].append(index)
        result.tokens += length
        if (room := room - length) > 0:
            if room not in packs_with:
                bisect.insort(rooms, room)
            packs_with.setdefault(room, []).append(pack)
    return result


class PackedRows:
    """Rows of tokens, several at a time. An item holds lists of `input_ids` and `labels`, one for each row.

    Args:
        rows (sequence): Rows with `input_ids` and `labels`, such as a data set.
        budget (int): Tokens that a pack may have.

    Attributes:
        packing (Packing): Which rows share a pack.
        lengths (list of int): Tokens of each pack.

    Raises:
        ValueError: A row is longer than the budget.
    """

    def __init__(self, rows: Any, budget: int):
        self._rows = rows
        lengths = [len(ids) for ids in rows["input_ids"]]
        self.packing = pack_lengths(lengths, budget)
        self.lengths = [sum(lengths[index] for index in pack) for pack in self.packing.packs]
        if self.packing.too_long:
            index = self.packing.too_long[0]
            raise ValueError(
                f"a row may have at most {budget} tokens, got {len(rows[index]['input_ids'])} in row {index}."
            )

    def __len__(self) -> int:
        return len(self.packing.packs)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        rows = self._rows[self.packing.packs[index]]
        return {name: rows[name] for name in ("input_ids", "labels")}


def pack_stream(
    rows: Iterable[dict[str, list[int]]], budget: int, buffer_size: int = 1000
) -> Iterator[dict[str, list[list[int]]]]:
    """Packs a stream of rows in the form of `PackedRows`. It reads `buffer_size` rows ahead and yields the fullest packs.

    The emptier half of the packs waits for further rows.
    """
    waiting: list[dict[str, list[int]]] = []

    def packs(last: bool) -> Iterator[dict[str, list[list[int]]]]:
        packing = pack_lengths([len(row["input_ids"]) for row in waiting], budget)
        by_fill = sorted(packing.packs, key=lambda pack: -sum(len(waiting[index]["input_ids"]) for index in pack))
        ready = by_fill if last else by_fill[: (len(by_fill) + 1) // 2]
        for pack in ready:
            yield {name: [waiting[index][name] for index in pack] for name in ("input_ids", "labels")}
        done = {index for pack in ready for index in pack}
        waiting[:] = [row for index, row in enumerate(waiting) if index not in done]

    for row in rows:
        waiting.append(row)
        if len(waiting) >= buffer_size:
            yield from packs(last=False)
    yield from packs(last=True)
