"""Further faults of a row: what is wrong is replaced by something harmless, and the row is read again."""

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..messages import is_list
from .encoding import Encoder
from .faults import Fault, as_fault
from .formats import Reading, read_example
from .sources import LocatedRow

MAX_FAULTS = 20  # of one row
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
CHATS = ("conversations", "prompt", "completion")
# Columns whose number of items, and chats whose order, may be wrong only because a message was replaced.
COUNTED = ("images", "videos", "image", "video")
ORDER = "does not fit the chat template"
HARMLESS_CALL = {"type": "function", "function": {"name": "unknown", "arguments": {}}}


def further_faults(first: Fault, located: LocatedRow, encoder: Encoder, reading: Reading) -> list[Fault]:
    """The faults of a row behind its first one.

    A message, a part, a tool call, a tool, an image or a video that has a fault is replaced. What can only be wrong
    because of that is no fault. The search ends at a fault of the whole row or of a whole column.
    """
    if not isinstance(located.row, Mapping):
        return []
    row, fault = dict(located.row), first
    found: list[Fault] = []
    replaces_message = False
    while len(found) < MAX_FAULTS:
        steps = [name or int(index) for name, index in STEP.findall(fault.field)]
        if not steps or not _repair(row, steps, reading.messages_column):
            break
        replaces_message |= steps[0] in (reading.messages_column, *CHATS)
        following = _first_fault(row, located, encoder, reading)
        if following is None or following.field in {first.field, *(other.field for other in found)}:
            break
        if replaces_message and (following.field in COUNTED or ORDER in following.problem):
            break
        fault = following
        found.append(fault)
    return found


def _first_fault(row: dict[str, Any], located: LocatedRow, encoder: Encoder, reading: Reading) -> Fault | None:
    try:
        (encoded,) = encoder([read_example(row, reading)])
        if isinstance(encoded, ValueError):
            raise encoded
    except ValueError as error:
        return as_fault(error, located.file, located.number)
    return None


def _repair(row: dict[str, Any], steps: list[str | int], messages_column: str) -> bool:
    """Replaces in `row` what the path `steps` leads to, without changing lists and messages of the given row.

    Returns:
        Whether it could.
    """
    column, *inside = steps
    if column == "chat_template_kwargs":
        del row[column]
        return True
    if len(inside) == 0 or not isinstance(inside[0], int):
        return False
    items = _as_list(row.get(str(column)))
    if items is None or inside[0] >= len(items):
        return False
    items = row[str(column)] = list(items)
    if column in COUNTED:
        if str(column).startswith("video"):
            return False  # nothing small stands for a video
        items[inside[0]] = _harmless_image()
    elif column == "tools":
        items[inside[0]] = HARMLESS_CALL
    elif column in (messages_column, *CHATS):
        items[inside[0]] = _harmless_message(items[inside[0]], inside[1:])
    else:
        return False
    return True


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if is_list(value) else None


def _harmless_message(message: Any, inside: list[str | int]) -> dict[str, Any]:
    """The message without the fault at `inside`, and otherwise as it is."""
    if not isinstance(message, Mapping):
        return {"role": "user", "content": ""}
    message = dict(message)
    name = inside[0] if inside else "content"
    if name in ("content", "tool_calls") and len(inside) > 1:
        items = _as_list(message.get(name))
        if items is not None and isinstance(inside[1], int) and inside[1] < len(items):
            items = message[name] = list(items)
            is_image = isinstance(items[inside[1]], Mapping) and items[inside[1]].get("type") in ("image", "image_url")
            part = {"type": "image", "image": _harmless_image()} if is_image else {"type": "text", "text": ""}
            items[inside[1]] = part if name == "content" else HARMLESS_CALL
            return message
    harmless = {"role": "user", "from": "human", "content": "", "value": "", "tool_calls": [HARMLESS_CALL]}
    if name in harmless:
        message[name] = harmless[name]
    else:
        message.pop(name, None)
    return message


def _harmless_image() -> Image.Image:
    return Image.new("RGB", (28, 28))
