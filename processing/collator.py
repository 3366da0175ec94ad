"""Batches for fine-tuning on chats with images and videos."""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .chat_template import check_thinking_mode
from .messages import is_list
from .processor import MiniMaxM3VLProcessor

IGNORED = -100  # label of a token that the model does not learn

# Keys of a part that may hold its pixels. A part without any of these keys takes the next item of the row's column.
SOURCES = {"image": ("image", "url", "path", "base64", "image_url"), "video": ("video", "url", "path", "video_url")}

# The processor's outputs per token, and per image or video. The model does not use its other outputs.
TOKEN_PADDING = {"attention_mask": 0, "labels": IGNORED}
MEDIA_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class MultimodalChatCollator:
    """Makes a batch from rows of chats, with or without images and videos. The model learns the assistant's turns.

    A row has `messages` in the form that `processor.apply_chat_template` takes. It may have `tools` and
    `chat_template_kwargs` (variables of the chat template, such as `{"thinking_mode": "disabled"}`). Images and videos
    stand in the messages (`{"type": "image", "image": ...}`) or in columns `images` and `videos` of the row. The items
    of a column go in order to the parts without a source (`{"type": "image"}`). If the messages have no such part at
    all, the items come before the text of the first user message. Columns may hold anything that the processor reads,
    and image files as `datasets` stores them (`{"bytes": ..., "path": ...}`).

    Args:
        processor (`MiniMaxM3VLProcessor`): Decodes, resizes and tokenizes.
        max_length (`int`, *optional*): Greatest length in tokens. Longer rows lose their end, if that is text: see
            `fits`.
        pad_to_multiple_of (`int`, *optional*): The length of the batch is rounded up to a multiple of this number.
        processor_kwargs (`dict`): Options of the processor's call, such as `{"videos_kwargs": {"fps": 1.0}}`.
        chat_template_kwargs (`dict`): Variables of the chat template for rows that do not set them. If neither this
            argument nor the row sets `thinking_mode`, the default of the chat template counts, "adaptive".

    A call with a list of rows returns a `dict` of tensors. `input_ids`, `attention_mask` and `labels` have the shape
    (rows, tokens) and are padded on the right. `pixel_values`, `image_grid_thw`, `pixel_values_videos` and
    `video_grid_thw` are there if the rows have images or videos. Labels are the token ids of what the assistant wrote,
    including its end-of-turn token, and -100 elsewhere.

    Raises:
        ValueError: A row has no messages, its images or videos do not match the parts that need them, its thinking
            mode is unknown, or `max_length` would cut off an image or a video. The message names the row of the batch.
    """

    processor: MiniMaxM3VLProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer or None, got {value!r}.")
        template_variables({}, self.chat_template_kwargs)

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
        output = self.processor.apply_chat_template(
            [self._messages(row)],
            tools=without_none(row.get("tools")) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs=dict(self.processor_kwargs),
            **template_variables(row, self.chat_template_kwargs),
        )
        ids = output["input_ids"][0]
        learned = torch.as_tensor(output["assistant_masks"])[0].bool() & ~self._is_media(ids)
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

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a row, with an image or a video in each part that needs one."""
        if not row.get("messages"):
            raise ValueError(f"a row must have `messages`, a list that is not empty; it has {', '.join(row)}.")
        messages = row["messages"]
        if not is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
            return messages  # the processor refuses them, and names the place
        messages = [_without_empty(message) for message in messages]
        for message in messages:
            if is_list(message.get("content")):
                message["content"] = [_with_sources(_without_empty(part)) for part in message["content"]]
        for kind in SOURCES:
            items = row.get(f"{kind}s")
            items = [] if items is None else list(items) if is_list(items) else [items]
            if any(item is None for item in items):
                raise ValueError(
                    f"`{kind}s` of a row must not hold None: write an empty list, or None instead of the list."
                )
            _distribute(kind, [_as_source(item) for item in items], messages)
        return messages


@contextmanager
def named_in_errors(row: str) -> Iterator[None]:
    """Puts the name of a row before the message of each `ValueError` from its encoding."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


def template_variables(row: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the chat template for a row: `default`, updated by the row's `chat_template_kwargs`.

    Raises:
        ValueError: The variables are not a mapping, or their thinking mode is unknown.
    """
    variables: dict[str, Any] = {}
    for given in (default, row.get("chat_template_kwargs")):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"`chat_template_kwargs` must be a mapping of names and values, got {given!r:.100}.")
        variables |= without_none(given or {})
    if "thinking_mode" in variables:
        check_thinking_mode(variables["thinking_mode"], "`thinking_mode` in `chat_template_kwargs`")
    return variables


def without_none(value: Any) -> Any:
    """Copies a value without the keys that hold None, at any depth (see `_without_empty`)."""
    if isinstance(value, Mapping):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return [without_none(item) for item in value] if is_list(value) else value


def _as_source(item: Any) -> Any:
    """Converts a file as `datasets` stores it (`{"bytes": ..., "path": ...}`), or its bytes, for the processor."""
    if isinstance(item, Mapping) and item.keys() <= {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    return base64.b64encode(item).decode() if isinstance(item, bytes) else item


def _with_sources(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: _as_source(item) if name in ("image", "video") else item for name, item in part.items()}


def _without_empty(mapping: Any) -> Any:
    """Copies a mapping without the keys that hold None, because `datasets` gives every row the keys of all rows."""
    if not isinstance(mapping, Mapping):
        return mapping
    return {name: value for name, value in mapping.items() if value is not None}


def _distribute(kind: str, items: list[Any], messages: list[dict[str, Any]]) -> None:
    """Gives `items` in order to the parts of `messages` that have no source."""
    parts = [
        part
        for message in messages
        if is_list(message.get("content"))
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") in (kind, f"{kind}_url")
    ]
    waiting = [part for part in parts if not any(name in part for name in SOURCES[kind])]
    if items and not parts:
        user = next((message for message in messages if message.get("role") == "user"), None)
        if user is None:
            raise ValueError(f"a row has `{kind}s`, but no user message to which they could belong.")
        content = user.get("content", "")
        text = list(content) if is_list(content) else [{"type": "text", "text": content}]
        user["content"] = [{"type": kind, kind: item} for item in items] + text
        return
    if len(waiting) != len(items):
        raise ValueError(
            f"`{kind}s` of a row must hold one item for each part of type {kind!r} without a source: "
            f"{len(waiting)}, got {len(items)}."
        )
    for part, item in zip(waiting, items):
        part[kind] = item
