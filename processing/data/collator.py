"""Batches for fine-tuning on chats with images and videos."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..processor import MiniMaxM3VLProcessor
from .encoding import IGNORED, Encoder
from .formats import Example, Reading, read_example, template_variables

# The processor's outputs per token, and per image or video. The model does not use its other outputs.
TOKEN_PADDING = {"attention_mask": 0, "labels": IGNORED}
MEDIA_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class MultimodalChatCollator:
    """Makes a batch from rows of chats, with or without images and videos. The model learns the assistant's turns.

    A row has `messages` in the form that `processor.apply_chat_template` takes, or one of the other formats that
    `read_example` reads. It may have `tools` and `chat_template_kwargs` (variables of the chat template, such as
    `{"thinking_mode": "disabled"}`). Images and videos stand in the messages (`{"type": "image", "image": ...}`) or in
    columns `images` and `videos` of the row. The items of a column go in order to the parts without a source
    (`{"type": "image"}`) and to markers `<image>` in the text. If the messages have no such part at all, the items
    come before the text of the first user message. Columns may hold anything that the processor reads, and image files
    as `datasets` stores them (`{"bytes": ..., "path": ...}`). A row of tokens, with `input_ids` and `labels`, stays as
    it is.

    Args:
        processor (`MiniMaxM3VLProcessor`): Decodes, resizes and tokenizes.
        max_length (`int`, *optional*): Greatest length in tokens. Longer rows lose their end, if that is text: see
            `fits`.
        pad_to_multiple_of (`int`, *optional*): The length of the batch is rounded up to a multiple of this number.
        processor_kwargs (`dict`): Options of the processor's call, such as `{"videos_kwargs": {"fps": 1.0}}`.
        chat_template_kwargs (`dict`): Variables of the chat template for rows that do not set them. If neither this
            argument nor the row sets `thinking_mode`, the default of the chat template counts, "adaptive".
        media_folder (`str`, *optional*): Folder of images and videos whose paths are not absolute.

    A call with a list of rows returns a `dict` of tensors. `input_ids`, `attention_mask` and `labels` have the shape
    (rows, tokens) and are padded on the right. `pixel_values`, `image_grid_thw`, `pixel_values_videos` and
    `video_grid_thw` are there if the rows have images or videos. Labels are the token ids of what the assistant wrote,
    including its end-of-turn token, and -100 elsewhere.

    Raises:
        ValueError: A row fits no format, its images or videos do not match the parts that need them, its thinking
            mode is unknown, or `max_length` would cut off an image or a video. The message names the row of the batch.
    """

    processor: MiniMaxM3VLProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    media_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer or None, got {value!r}.")
        template_variables({}, self.chat_template_kwargs)
        self._reading = Reading(chat_template_kwargs=self.chat_template_kwargs, media_folder=self.media_folder)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Encodes the rows and pads them on the right to the same length."""
        if not rows:
            raise ValueError("`rows` must hold at least one row, got none.")
        encoded = []
        for index, row in enumerate(rows):
            with named_in_errors(f"row {index} of the batch"):
                encoded.append(self._encode(row))
        longest = max(len(row["input_ids"]) for row in encoded)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        batch = {}
        for name, padding in {"input_ids": self.processor.tokenizer.pad_token_id or 0, **TOKEN_PADDING}.items():
            batch[name] = torch.full((len(rows), longest), padding, dtype=torch.long)
            for index, row in enumerate(encoded):
                batch[name][index, : len(row[name])] = row[name]
        for name in MEDIA_INPUTS:
            if parts := [row[name] for row in encoded if name in row]:
                batch[name] = torch.cat(parts)
        return batch

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether all images and videos of a row end before `max_length`, for `dataset.filter(collator.fits)`."""
        return self.max_length is None or self._end_of_media(self._process(row)["input_ids"]) <= self.max_length

    def is_useful(self, row: Mapping[str, Any]) -> bool:
        """Whether a row fits and its first `max_length` tokens hold any to learn. Use it with `dataset.filter`."""
        encoded = self._process(row)
        fits = self.max_length is None or self._end_of_media(encoded["input_ids"]) <= self.max_length
        return fits and bool((encoded["labels"][1 : self.max_length] != IGNORED).any())

    def _encode(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        encoded = self._process(row)
        if self.max_length is not None and (end := self._end_of_media(encoded["input_ids"])) > self.max_length:
            raise ValueError(
                f"`max_length` is {self.max_length}, but the images and videos of a row end at token {end}. Choose a "
                "larger `max_length` or smaller media (`processor_kwargs`), or leave such rows out beforehand with "
                "`dataset.filter(collator.fits)`."
            )
        cut = {name: encoded[name][: self.max_length] for name in ("input_ids", *TOKEN_PADDING)}
        return encoded | cut

    def _process(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if row.get("input_ids") is not None:
            return _as_tensors(row["input_ids"], row["labels"])
        example = read_example(row, self._reading)
        if example.messages is None:
            (tokens,) = Encoder(self.processor)([example])
            if isinstance(tokens, ValueError):
                raise tokens
            return _as_tensors(tokens.ids, np.where(tokens.learned, tokens.ids, IGNORED))
        output = self.processor.apply_chat_template(
            [example.messages],
            tools=example.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs=dict(self.processor_kwargs),
            **example.variables,
        )
        ids = output["input_ids"][0]
        learned = learned_turns(torch.as_tensor(output["assistant_masks"])[0].bool(), example) & ~self._is_media(ids)
        encoded = {name: output[name] for name in MEDIA_INPUTS if name in output}
        labels = ids.where(learned, torch.full_like(ids, IGNORED))
        return encoded | {"input_ids": ids, "labels": labels, "attention_mask": output["attention_mask"][0]}

    def _is_media(self, ids: torch.Tensor) -> torch.Tensor:
        processor = self.processor
        tokens = (
            processor.image_token_id,
            processor.video_token_id,
            processor.vision_start_token_id,
            processor.vision_end_token_id,
        )
        return torch.isin(ids, torch.tensor(tokens))

    def _end_of_media(self, ids: torch.Tensor) -> int:
        places = self._is_media(ids).nonzero()
        return int(places[-1]) + 1 if len(places) else 0


def learned_turns(mask: torch.Tensor, example: Example) -> torch.Tensor:
    """Leaves in a mask of the assistant's tokens, bool (tokens,), the turns that are learned."""
    if all(example.learned):
        return mask
    turns = (mask & ~torch.cat([mask.new_zeros(1), mask[:-1]])).cumsum(0)  # 1 in the first turn and behind it
    is_learned = torch.tensor([False, *example.learned])
    if int(turns[-1]) != len(example.learned):
        raise ValueError(
            f"`messages` has {len(example.learned)} answers, some of which are not learned, but the chat template "
            f"marks {int(turns[-1])} as `generation`."
        )
    return mask & is_learned[turns]


@contextmanager
def named_in_errors(row: str) -> Iterator[None]:
    """Puts the name of a row before the message of each `ValueError` from its encoding."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


def _as_tensors(ids: Any, labels: Any) -> dict[str, torch.Tensor]:
    tokens = {"input_ids": torch.as_tensor(ids), "labels": torch.as_tensor(labels)}
    return {**tokens, "attention_mask": torch.ones_like(tokens["input_ids"])}
