"""Puts the images and videos of a row's columns into its messages."""

import base64
import os
import re
from collections.abc import Mapping
from typing import Any

from ..downloads import is_address
from ..messages import is_list

# Keys of a part that may hold its pixels. A part without any of these keys takes the next item of the row's column.
SOURCES = {"image": ("image", "url", "path", "base64", "image_url"), "video": ("video", "url", "path", "video_url")}
# Key of a part that says from which column its image or video came.
PLACE = "column"
MARKER = re.compile(r"<(image|video)>")


def place_media(row: Mapping[str, Any], messages: list[dict[str, Any]], folder: str | None = None) -> None:
    """Gives each part of `messages` that needs an image or a video the next item of the row's column.

    Where a column has items, `<image>` and `<video>` in texts of users, systems and tools become such parts. If the
    messages have no part of a kind at all, its items come before the text of the first user message.

    Args:
        row (Mapping): The row with its columns `images` and `videos`, or `image` and `video`.
        messages (list): Its messages, which are changed.
        folder (str, optional): Folder of paths that are not absolute.

    Raises:
        ValueError: The number of items is not the number of parts that need one, or an item is None.
    """
    columns = {kind: _items_of(row, kind) for kind in SOURCES}
    marked = {kind for kind, (_, items) in columns.items() if items}
    for message in messages:
        if marked and "content" in message and message.get("role") != "assistant":
            message["content"] = _split_at_markers(message["content"], marked)
        if is_list(message.get("content")):
            message["content"] = [_with_sources(without_empty(part), folder) for part in message["content"]]
    for kind, (column, items) in columns.items():
        if any(item is None for item in items):
            raise ValueError(f"`{column}` must not hold None: write an empty list, or None instead of the list.")
        _distribute(kind, column, [as_source(item, folder) for item in items], messages)


def without_empty(mapping: Any) -> Any:
    """Copies a mapping without the keys that hold None, because `datasets` gives every row the keys of all rows."""
    if not isinstance(mapping, Mapping):
        return mapping
    return {name: value for name, value in mapping.items() if value is not None}


def as_source(item: Any, folder: str | None = None) -> Any:
    """Converts a file as `datasets` stores it (`{"bytes": ..., "path": ...}`), or its bytes, for the processor."""
    if isinstance(item, Mapping) and item and item.keys() <= {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, bytes):
        return base64.b64encode(item).decode()
    return _in_folder(item, folder)


def _in_folder(item: Any, folder: str | None) -> Any:
    if folder is None or not isinstance(item, str) or is_address(item) or item[:5].lower() in ("data:", "file:"):
        return item
    path = os.path.join(folder, item)
    return path if len(item) < 4096 and os.path.exists(path) else item  # a long text is base64


def _items_of(row: Mapping[str, Any], kind: str) -> tuple[str, list[Any]]:
    """The column of a kind of media, and its items."""
    column = next((name for name in (f"{kind}s", kind) if row.get(name) is not None), f"{kind}s")
    items = row.get(column)
    return column, [] if items is None else list(items) if is_list(items) else [items]


def _split_at_markers(content: Any, kinds: set[str]) -> Any:
    """The content as parts, if its text has markers of these kinds."""
    if isinstance(content, str):
        parts = _split_text(content, kinds)
        return content if len(parts) == 1 and parts[0].get("type") == "text" else parts
    if not is_list(content):
        return content
    split: list[Any] = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        is_text = isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") == "text")
        split += _split_text(text, kinds) if is_text and isinstance(text, str) else [part]
    return split


def _split_text(text: str, kinds: set[str]) -> list[dict[str, Any]]:
    parts, start = [], 0
    for match in MARKER.finditer(text):
        if match[1] in kinds:
            parts += [{"type": "text", "text": text[start : match.start()]}, {"type": match[1]}]
            start = match.end()
    parts.append({"type": "text", "text": text[start:]})
    return [part for part in parts if part.get("text") != ""] or [{"type": "text", "text": ""}]


def _with_sources(part: Any, folder: str | None) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("image", "video"):
        return part
    return {
        name: as_source(item, folder) if name in ("image", "video", "path") else item for name, item in part.items()
    }


def _distribute(kind: str, column: str, items: list[Any], messages: list[dict[str, Any]]) -> None:
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
            raise ValueError(f"`{column}`: a row has {kind}s, but no user message to which they could belong.")
        content = user.get("content", "")
        text = list(content) if is_list(content) else [{"type": "text", "text": content}]
        media = [{"type": kind, kind: item, PLACE: f"{column}[{index}]"} for index, item in enumerate(items)]
        user["content"] = media + text
        return
    if len(waiting) != len(items):
        raise ValueError(
            f"`{column}` must hold one item for each marker <{kind}> and each part of type {kind!r} without a source, "
            f"{len(waiting)} in all, got {len(items)}."
        )
    for index, (part, item) in enumerate(zip(waiting, items)):
        part.update({kind: item, PLACE: f"{column}[{index}]"})
