"""Chats as `apply_chat_template` takes them: brought into one form, and checked before any image or video is loaded."""

import dataclasses
from collections.abc import Mapping
from inspect import isfunction, ismethod
from typing import Any

from transformers.utils import get_json_schema

# A part of one of these types is an image or a video; of another name only the address under `image_url` differs.
MEDIA_TYPES = ("image", "image_url", "video", "video_url")
# Where an image or a video of a message may stand.
SOURCES = ("image", "video", "url", "path", "base64")
# What the chat template reads of a message, besides its role and content. Older names of the reasoning are read too.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def is_list(item: Any) -> bool:
    """Whether `item` is a list or a tuple."""
    return isinstance(item, (list, tuple))


def normalize_conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Check one chat or a batch of chats, and copy them in the form that `ProcessorMixin` collects media from.

    Returns:
        A list of chats, each a list of messages without keys that hold None, whose parts are mappings with a type,
        images and videos of the types "image" and "video"; and whether a batch was given.

    Raises:
        ValueError: something is no chat, message, part or tool call; it names the message and the conversation.
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
        raise ValueError(f"conversation {index} must be a list of messages, as the first is, got {chat!r:.100}.")
    if not chat:
        raise ValueError(f"conversation {index} must hold at least one message, got none.")
    return [
        _normalize_message(_as_plain(message), f"message {number} of conversation {index}")
        for number, message in enumerate(chat)
    ]


def _as_plain(value: Any) -> Any:
    """Message objects of client libraries (dataclasses, pydantic) as mappings, at any depth; a copy of the nesting."""
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
    content = message.get("content")  # where a file's name is no text, it may still be its name
    texts = [part for part in content if part["type"] not in MEDIA_TYPES] if is_list(content) else content
    check_text(texts, f"{where}: `content`")
    return message


def _normalize_part(part: Any, role: str, where: str) -> dict[str, Any]:
    """Bring one part of a message's content into the form {"type": ..., ...}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be a string or a mapping with a 'type', got {part!r:.100}.")
    kind = part.get("type")
    if role == "tool":  # a result in the tool's own form, which the chat template writes the same way
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
            raise ValueError(f"{where}: `{source}` must be the {name}, or say where it is, got {part[source]!r:.100}.")
    return {**part, "type": name}


def _is_source(item: Any) -> bool:
    """Whether this may be an image or a video, or say where one is. Loading finds out."""
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
    """What a tool, or a call of one, holds under `function`, or the item itself; it must have a name."""
    function = (item.get("function") or item) if isinstance(item, Mapping) else item
    if not isinstance(function, Mapping):
        raise ValueError(f"{where} must be a mapping with a `name`, alone or under `function`, got {item!r:.100}.")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} must have a `name`, a string that is not empty, got {function!r:.100}.")
    return function


def normalize_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """Tools as mappings, made of functions where such are given.

    Raises:
        ValueError: they are no list of functions and mappings with names.
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
    """Raise ValueError for strings, at any depth of lists and mappings, that no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} must be text, but holds {value[error.start]!r}, one half of a surrogate pair, alone."
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, where)
            check_text(item, where)
    elif is_list(value):
        for item in value:
            check_text(item, where)
