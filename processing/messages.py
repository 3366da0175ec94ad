"""Checks the chats of `apply_chat_template` before any image or video is loaded, and brings them into one form."""

import dataclasses
from collections.abc import Mapping, Sequence
from inspect import isfunction, ismethod
from typing import Any

from transformers.utils import get_json_schema

# Types of parts that are images or videos. `image_url` and `video_url` hold an address under that key.
MEDIA_TYPES = ("image", "image_url", "video", "video_url")
# Keys of a part that may hold an image or a video.
SOURCES = ("image", "video", "url", "path", "base64")
# Keys of a message that may hold its reasoning. The last two are older names.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def is_list(item: Any) -> bool:
    """Whether `item` is a list or a tuple."""
    return isinstance(item, (list, tuple))


def normalize_conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Checks one chat or a batch of chats, and copies them in the form from which `ProcessorMixin` collects media.

    Returns:
        A list of chats, and whether the caller gave a batch. Each chat is a list of messages without keys that hold
        None. The parts of messages are mappings with a type, which is "image" or "video" for media.

    Raises:
        ValueError: A chat, message, part or tool call is malformed. The error names the message and the conversation.
    """
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (str, bytes, Mapping)):
        raise ValueError(f"`conversation` must be a list of messages, got {type(conversation).__name__}.")
    try:
        conversation = list(conversation)
    except TypeError:
        raise ValueError(
            f"`conversation` must be a list of messages, or of such lists, got {conversation!r:.100}."
        ) from None
    if not conversation:
        raise ValueError("`conversation` must hold at least one message, got none.")
    is_batched = is_list(conversation[0]) or hasattr(conversation[0], "messages")
    chats = [getattr(chat, "messages", chat) for chat in conversation] if is_batched else [conversation]
    return [_normalize_chat(chat, index) for index, chat in enumerate(chats)], is_batched


def _normalize_chat(chat: Any, index: int) -> list[dict[str, Any]]:
    if not is_list(chat):
        raise ValueError(f"conversation {index} must be a list of messages, like conversation 0, got {chat!r:.100}.")
    if not chat:
        raise ValueError(f"conversation {index} must hold at least one message, got none.")
    return normalize_messages(chat, [f"message {number} of conversation {index}" for number in range(len(chat))])


def normalize_messages(messages: Sequence[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Checks the messages of one chat, and copies them in the form of `normalize_conversations`.

    Args:
        messages (list): The messages.
        names (list of str): A name for each message, with which the errors about it begin.

    Raises:
        ValueError: A message, part or tool call is malformed.
    """
    return [_normalize_message(_as_plain(message), name) for message, name in zip(messages, names)]


def _as_plain(value: Any) -> Any:
    """Converts message objects of client libraries (dataclasses, pydantic) to mappings, at any depth, in a copy."""
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_as_plain, value))
    if isinstance(value, list):
        return [_as_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _as_plain(value.model_dump())
    return value


def _normalize_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a mapping with `role` and `content`, got {message!r:.100}.")
    message = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"{where}: `role` must be a string such as 'user', got {role!r:.100}.")
    if is_list(content):
        message["content"] = [
            _normalize_part(part, role, f"{where}: `content[{number}]`") for number, part in enumerate(content)
        ]
    elif not isinstance(content, str) and not (content is None and role == "assistant"):
        raise ValueError(f"{where}: `content` must be a string or a list of parts, got {content!r:.100}.")
    if role == "assistant":
        if not isinstance(message.get("reasoning_content", ""), str):
            raise ValueError(
                f"{where}: `reasoning_content` must be a string, got {message['reasoning_content']!r:.100}."
            )
        _check_tool_calls(message.get("tool_calls", []), where)
    for name in ("role", "tool_calls", *REASONING_FIELDS):
        check_text(message.get(name), f"{where}: `{name}`")
    content = message.get("content")  # a file name may be invalid text, so sources are not checked
    texts = [part for part in content if part["type"] not in MEDIA_TYPES] if is_list(content) else content
    check_text(texts, f"{where}: `content`")
    return message


def _normalize_part(part: Any, role: str, where: str) -> dict[str, Any]:
    """Brings one part of a message's content into the form {"type": ..., ...}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be a string or a mapping with a 'type', got {part!r:.100}.")
    kind = part.get("type")
    if role == "tool":  # a tool may return a form of its own; the chat template writes it the same way
        if "output" in part and kind not in ("image", "video"):
            return {"type": "text", "text": str(part["output"])}
        if kind not in ("text", *MEDIA_TYPES):
            return {"type": "text", "text": str(part)}
    if not isinstance(kind, str):
        raise ValueError(f"{where} must be a string or a mapping with a 'type', got {part!r:.100}.")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: `text` must be a string, got {part.get('text')!r:.100}.")
    if kind == "audio":
        raise ValueError(f"{where} must be a text, an image or a video, got one of type 'audio'.")
    return _normalize_media(part, kind, where) if kind in MEDIA_TYPES else part


def _normalize_media(part: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    name = kind.removesuffix("_url")
    if kind in part and kind != name:  # {"type": "image_url", "image_url": {"url": ...}}
        address = part[kind]["url"] if isinstance(part[kind], dict) and "url" in part[kind] else part[kind]
        if address is None or not _is_source(address):
            raise ValueError(
                f"{where}: `{kind}` must be an address, or a mapping with one as 'url', got {part[kind]!r:.100}."
            )
        return {"type": name, "url": address}
    part = {key: value for key, value in part.items() if value is not None}
    for source in SOURCES:
        if source in part and not _is_source(part[source]):
            raise ValueError(f"{where}: `{source}` must hold the {name} or its source, got {part[source]!r:.100}.")
    return {**part, "type": name}


def _is_source(item: Any) -> bool:
    """Whether this may be an image, a video or the source of one. Only loading tells for sure."""
    if isinstance(item, (str, list, tuple)):
        return len(item) > 0
    if isinstance(item, Mapping):  # a file as `datasets` stores it
        return bool(item) and item.keys() <= {"bytes", "path"}
    return not isinstance(item, (int, float))


def _check_tool_calls(calls: Any, where: str) -> None:
    if not is_list(calls):
        raise ValueError(f"{where}: `tool_calls` must be a list, got {calls!r:.100}.")
    for number, call in enumerate(calls):
        place = f"{where}: `tool_calls[{number}]`"
        function = _check_function(call, place)
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(
                f"{place}: `arguments` must be a mapping (parse JSON text first), got {arguments!r:.100}."
            )


def _check_function(item: Any, where: str) -> Mapping[str, Any]:
    """The function of a tool or of a tool call: the value of `function`, or the item itself. It must have a name."""
    function = (item.get("function") or item) if isinstance(item, Mapping) else item
    if not isinstance(function, Mapping):
        raise ValueError(f"{where} must be a mapping with a `name`, alone or under `function`, got {item!r:.100}.")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} must have a `name`, a string that is not empty, got {function!r:.100}.")
    return function


def normalize_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """Converts tools that are functions to mappings, and checks all tools.

    Raises:
        ValueError: The tools are not a list of functions and of mappings with names.
    """
    if tools is None:
        return None
    if not is_list(tools):
        raise ValueError(f"`tools` must be a list of functions or mappings, got {tools!r:.100}.")
    tools = [get_json_schema(tool) if isfunction(tool) or ismethod(tool) else tool for tool in tools]
    for number, tool in enumerate(tools):
        _check_function(tool, f"`tools[{number}]`")
        check_text(tool, f"`tools[{number}]`")
    return tools


def check_text(value: Any, where: str) -> None:
    """Raises ValueError for strings that no tokenizer can read, at any depth of lists and mappings."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} must be text, but holds {value[error.start]!r}, one half of a surrogate pair alone."
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, where)
            check_text(item, where)
    elif is_list(value):
        for item in value:
            check_text(item, where)
