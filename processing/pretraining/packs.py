"""Packs of rows with a fixed number of tokens, made as they are needed: pack i depends on the seed and on i alone.

So a run that resumes in the middle reads the same packs as one that was never stopped, with any number of workers.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.encoding import IGNORED
from ..processor import MiniMaxM3VLProcessor
from .encoding import EncodedRow, RowEncoder
from .mixture import LONG_TASKS, WEIGHTS, check_weights, make_row
from .recall import MAX_QUESTIONS, many_facts_row, recall_row
from .rows import check_split, random_numbers

# About how many characters of code a token has, rounded up, so that texts are rather cut than short.
CHARACTERS_PER_TOKEN = 4
SHORT_TOKENS = 1024  # up to where texts and recall are not "long"
TOKENS_PER_FACT = 1000  # of a long row of recall, and no fewer facts than a short one has
LONG_TRIES = 3  # to give a row of recall its length
SHORTEST_SHARE = 0.95  # of that length, which a row may have
LONG_DRAWS = 8  # of facts and text, each with so many tries
JUMP_SHARE = 0.5  # of the long rows, those whose positions jump
MISSES = 4  # rows that do not fit before the rest of a pack is filled with code
MIN_TOKENS = 16  # a shorter rest stays padding


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Args:
        end (float): Share of all packs at which the stage ends.
        max_length (int): Most tokens of a row.
    """

    end: float
    max_length: int


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Reads "2048:0.4,16384:1": rows of up to 2048 tokens in the first 40% of the packs, then of up to 16384.

    Raises:
        ValueError: A stage is no pair of numbers, the shares do not rise to 1, or a length is below 256.
    """
    stages = []
    for part in text.split(","):
        length, _, end = part.partition(":")
        try:
            stages.append(Stage(float(end), int(length)))
        except ValueError as error:
            raise ValueError(f"a stage must be TOKENS:SHARE, such as 2048:0.4, got {part!r} in {text!r}.") from error
    ends = [stage.end for stage in stages]
    if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        raise ValueError(f"the shares of the stages must rise and end with 1, got {ends} in {text!r}.")
    if short := [stage.max_length for stage in stages if stage.max_length < 256]:
        raise ValueError(f"a stage must have at least 256 tokens, got {short[0]} in {text!r}.")
    return tuple(stages)


def check_longest_row(stages: Sequence[Stage], tokens: int) -> None:
    """Raises `ValueError` if a stage has rows that are longer than a pack of so many tokens."""
    longest = max(stage.max_length for stage in stages)
    if longest > tokens:
        raise ValueError(f"a pack of {tokens} tokens cannot hold the rows of {longest} tokens that a stage has.")


@dataclass(frozen=True)
class LongRows:
    """The long rows that packs begin with.

    Args:
        share (float): Of the packs that begin with one.
        spread (float): The longest of a stage has so many times the tokens of the shortest. Lengths are drawn on a
            logarithmic scale.
        most_positions (int): Where this is above 0, half of the long rows that are shorter have a place from which all
            positions are larger, as if tokens were left out there. The length with these is drawn from the length of
            the row to this number, which no position reaches. So a model meets the distances of longer rows than it
            reads.
    """

    share: float = 0.4
    spread: float = 8.0
    most_positions: int = 0


class Packs(Dataset):
    """Packs of encoded rows.

    Args:
        processor (MiniMaxM3VLProcessor): Tokenizer, chat template and sizes of patches.
        split (str): "train" or "heldout".
        num_packs (int): How many packs there are.
        tokens (int): Tokens of a pack, padding at its end included.
        stages (sequence of Stage): The curriculum. No row is longer than a pack.
        weights (mapping): Shares of the tasks among the rows that fill a pack up.
        seed (int): Another seed gives other packs.
        long_rows (LongRows): How many long rows there are, and of which length.

    Raises:
        ValueError: A stage is longer than a pack, or a task is unknown.
    """

    def __init__(
        self,
        processor: MiniMaxM3VLProcessor,
        split: str,
        num_packs: int,
        *,
        tokens: int = 32768,
        stages: Sequence[Stage] = (Stage(1.0, 2048),),
        weights: Mapping[str, float] = WEIGHTS,
        seed: int = 0,
        long_rows: LongRows = LongRows(),
    ):
        check_split(split)
        check_weights(weights)
        check_longest_row(stages, tokens)
        self.encoder = RowEncoder(processor)
        self.split, self.num_packs, self.tokens, self.stages = split, num_packs, tokens, tuple(stages)
        self.weights, self.seed, self.long_rows = dict(weights), seed, long_rows
        self.padding = processor.tokenizer.pad_token_id

    def __len__(self) -> int:
        return self.num_packs

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pack number `index` as `collate_packs` reads it."""
        return join_rows(self.rows(index), self.tokens, self.padding)

    def max_length(self, index: int) -> int:
        """The most tokens of a row of a pack."""
        return next(stage.max_length for stage in self.stages if index < stage.end * self.num_packs)

    def rows(self, index: int) -> list[EncodedRow]:
        """The rows of a pack."""
        if not 0 <= index < self.num_packs:
            raise IndexError(f"there are {self.num_packs} packs, got index {index}.")
        numbers = random_numbers(self.seed, self.split, "pack", index)
        longest = self.max_length(index)
        tasks = list(self.weights)
        long_tasks = [task for task in tasks if task in LONG_TASKS]
        rows: list[EncodedRow] = []
        room, misses = self.tokens, 0
        if long_tasks and longest > SHORT_TOKENS and numbers.random() < self.long_rows.share:
            long_row = self._long_row(numbers, long_tasks, longest)
            if long_row is not None:
                rows.append(long_row)
                room -= len(long_row.ids)
        while room >= MIN_TOKENS and misses < MISSES:
            (task,) = numbers.choices(tasks, [self.weights[name] for name in tasks])
            wanted = min(_between(numbers, 128, min(longest, SHORT_TOKENS)), room)
            row = make_row(
                task, self.split, numbers.getrandbits(62), seed=self.seed, characters=self._characters(task, wanted)
            )
            limit = min(wanted if "text" in row else longest, room)
            encoded = self.encoder.encode(row, limit)
            if encoded is None:
                misses += 1
                continue
            rows.append(encoded)
            room -= len(encoded.ids)
        while room >= MIN_TOKENS and "code" in self.weights:
            wanted = min(room, longest)
            characters = wanted * 2 * CHARACTERS_PER_TOKEN  # so that one row is enough
            row = make_row("code", self.split, numbers.getrandbits(62), seed=self.seed, characters=characters)
            encoded = self.encoder.encode(row, wanted)
            assert encoded is not None  # a text is cut
            rows.append(encoded)
            room -= len(encoded.ids)
        return rows

    def _long_row(self, numbers: random.Random, tasks: Sequence[str], longest: int) -> EncodedRow | None:
        """None if each try of a row of recall was longer than the length that was drawn."""
        (task,) = numbers.choices(tasks, [self.weights[name] for name in tasks])
        wanted = _between(numbers, max(int(longest / self.long_rows.spread), SHORT_TOKENS), longest)
        index = numbers.getrandbits(62)
        if task == "recall":
            encoded = self._long_recall(index, wanted)
        else:
            text = make_row(task, self.split, index, seed=self.seed, characters=self._characters(task, wanted))
            encoded = self.encoder.encode(text, wanted)
        if encoded is None:
            return None
        length, most = len(encoded.ids), self.long_rows.most_positions
        if most > length and numbers.random() < JUMP_SHARE:
            encoded.jump = numbers.randrange(1, length), numbers.randint(0, most - length)
        return encoded

    def _long_recall(self, index: int, tokens: int) -> EncodedRow | None:
        """A row of so many tokens or up to 5% fewer.

        If no try has such a length, it is the longest of those that are short enough, or None. That is rare. The tries
        of one draw may all fail: many questions leave little room for the text, and a text of another length begins
        elsewhere.
        """
        best: EncodedRow | None = None
        facts = tokens // TOKENS_PER_FACT
        for draw in range(LONG_DRAWS):
            characters = self._characters("recall", tokens)
            for _ in range(LONG_TRIES):
                numbers = random_numbers(self.seed, self.split, "long recall", index + draw)
                if facts > MAX_QUESTIONS:
                    row = many_facts_row(numbers, self.split, characters, facts)
                else:
                    row = recall_row(numbers, self.split, characters)
                encoded = self.encoder.encode(row)
                assert encoded is not None  # there is no limit
                length = len(encoded.ids)
                if SHORTEST_SHARE * tokens <= length <= tokens:
                    return encoded
                if length <= tokens and (best is None or length > len(best.ids)):
                    best = encoded
                wanted = tokens * (1 + SHORTEST_SHARE) / 2
                characters = max(1, characters + int((wanted - length) * characters / length))
        return best

    def _characters(self, task: str, tokens: int) -> int:
        # a chat may not be cut, and its prompt and questions need room too
        return max(tokens - 300, 50) * 5 // 2 if task == "recall" else tokens * CHARACTERS_PER_TOKEN


def _between(numbers: random.Random, low: int, high: int) -> int:
    """A number on a logarithmic scale."""
    return int(low * (high / low) ** numbers.random())


def join_rows(rows: Sequence[EncodedRow], tokens: int, padding: int) -> dict[str, Any]:
    """One line of `tokens` tokens.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 (1, tokens); `lengths` of the rows and of the padding;
        `modalities` of the rows; `answers`, a list of (task, kind, first token, token after the last); and pixels as the
        processor returns them. Positions start with 0 in each row and in the padding.
    """
    ids, labels = np.full(tokens, padding, np.int64), np.full(tokens, IGNORED, np.int64)
    positions = np.arange(tokens)
    answers, lengths, place = [], [], 0
    for row in rows:
        stop = place + len(row.ids)
        ids[place:stop], labels[place:stop] = row.ids, row.labels
        labels[place] = IGNORED  # the token before it belongs to another row
        positions[place:] -= positions[place]
        if row.jump is not None:
            start, size = row.jump
            positions[place + start : stop] += size
        answers += [(answer.task, answer.question, place + answer.start, place + answer.end) for answer in row.answers]
        lengths.append(len(row.ids))
        place = stop
    if place < tokens:
        lengths.append(tokens - place)
        positions[place:] -= positions[place]
    pack: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "lengths": lengths,
        "modalities": [row.modality for row in rows],
        "answers": answers,
    }
    for pixels, grids, name in (
        ("pixel_values", "image_grid_thw", "images"),
        ("pixel_values_videos", "video_grid_thw", "videos"),
    ):
        if media := [medium for row in rows for medium in getattr(row, name)]:
            pack[pixels] = torch.cat([patches for patches, _ in media])
            pack[grids] = torch.cat([grid for _, grid in media])
    return pack


def collate_packs(
    packs: Sequence[dict[str, Any]], pixel_dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The model's inputs: several packs in one line, with the offsets of all rows and positions that start again.

    Args:
        packs (sequence of dict): Items of `Packs`.
        pixel_dtype (torch.dtype): Of the patches, which are most of a batch. A model that computes in bfloat16 makes the
            same of bfloat16 as of float32.
    """
    lengths = torch.tensor([length for pack in packs for length in pack["lengths"]])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    names = ("input_ids", "labels", "position_ids")
    batch = {name: torch.cat([pack[name] for pack in packs], dim=1) for name in names}
    batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if parts := [pack[name] for pack in packs if name in pack]:
            batch[name] = torch.cat(parts)
            if batch[name].is_floating_point():
                batch[name] = batch[name].to(pixel_dtype)
    return batch
