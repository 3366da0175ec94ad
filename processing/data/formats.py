"""Rows as people have them, in one form: chats in several formats, texts, and prompts with completions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat_template import check_thinking_mode
from ..messages import check_text, is_list, normalize_messages, normalize_tools
from .media_columns import PLACE, place_media, without_empty

# Authors of the messages of ShareGPT, as roles. Two more of them mean a call of a tool.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
SHAREGPT_CALLS = ("function_call", "tool_call")
# Names in `chat_template_kwargs` that would be ignored, or would change what a row says.
OTHER_NAMES = {
    **dict.fromkeys(("messages", "conversations", "tools"), "It is a column of its own."),
    **dict.fromkeys(("enable_thinking", "thinking"), "Write thinking_mode: adaptive, enabled or disabled."),
    **dict.fromkeys(
        (
            *("add_generation_prompt", "continue_final_message", "chat_template", "documents", "tokenize"),
            "return_assistant_tokens_mask",
        ),
        "Leave it out.",
    ),
}
# Columns that belong to no format of their own.
SHARED_COLUMNS = ("tools", "chat_template_kwargs", "images", "videos", "image", "video", "system")
INSTRUCTION_COLUMNS = ("instruction", "input", "output", "history")


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        messages_column (str): Column of chats.
        text_column (str): Column of texts.
        chat_template_kwargs (dict): Variables of the chat template for rows that do not set them.
        media_folder (str, optional): Folder of the images and videos whose paths are not absolute. By default it is
            the current folder.
    """

    messages_column: str = "messages"
    text_column: str = "text"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    media_folder: str | None = None


@dataclass
class Example:
    """One row in the form that every reader of this package takes: a chat, or a text behind a prompt.

    Args:
        messages (list of dict, optional): The chat, checked, with its images and videos. None for a text.
        names (list of str): The place of each message in the row, in backticks, for errors.
        learned (list of bool): For each message of the assistant whether it is learned.
        tools (list, optional): The tools of the chat.
        variables (dict): Variables of the chat template.
        prompt (str): Text that is read and not learned.
        text (str): Text that is learned.
        unused (tuple of str): Columns that hold something which nothing reads.
    """

    messages: list[dict[str, Any]] | None = None
    names: list[str] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    text: str = ""
    unused: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it is: "chat", "text", or "completion" for a text behind a prompt."""
        return "chat" if self.messages is not None else "completion" if self.prompt else "text"

    def media(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The images and videos in order, as parts of messages, each behind its place in the row."""
        for message, name in zip(self.messages or (), self.names):
            content = message.get("content")
            parts: Sequence[Any] = content if isinstance(content, (list, tuple)) else ()
            for index, part in enumerate(parts):
                if part.get("type") in ("image", "video"):
                    yield part.get(PLACE, f"{name.strip('`')}.content[{index}]"), part


def read_example(row: Mapping[str, Any], reading: Reading = Reading()) -> Example:
    """Reads a row of any known format. `docs/data.md` lists the formats.

    Raises:
        ValueError: The row fits no format, or a field is malformed. The message begins with the field.
    """
    row = without_empty(row)
    messages_column, text_column = reading.messages_column, reading.text_column
    used: tuple[str, ...]
    if messages_column in row:
        used, example = (messages_column,), _read_chat(row, messages_column, reading)
    elif "conversations" in row:
        used, example = ("conversations",), _read_chat(row, "conversations", reading)
    elif "prompt" in row or "completion" in row:
        used, example = ("prompt", "completion"), _read_completion(row, reading)
    elif text_column in row:
        used, example = (text_column,), Example(text=_text_of(row, text_column))
    elif "instruction" in row or "output" in row:
        used, example = INSTRUCTION_COLUMNS, _read_instruction(row, reading)
    else:
        columns = f"has the columns {', '.join(map(str, row))}" if row else "has no columns"
        raise ValueError(
            f"the row {columns}, but needs {messages_column!r} or 'conversations' (chats), {text_column!r} (texts), "
            "'prompt' and 'completion', or 'instruction' and 'output'; --messages_column and --text_column name other "
            "columns"
        )
    shared = SHARED_COLUMNS if example.messages is not None else ()
    example.unused = tuple(str(name) for name in row if name not in (*used, *shared))
    return example


def template_variables(row: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the chat template for a row: `default`, updated by the row's `chat_template_kwargs`.

    Raises:
        ValueError: The variables are not a mapping, their thinking mode is unknown, or one of them has the name of an
            argument of `apply_chat_template`, or of another model's switch.
    """
    variables: dict[str, Any] = {}
    for given in (default, row.get("chat_template_kwargs")):
        given = _parse(given, "chat_template_kwargs", "{") if isinstance(given, str) else given
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"`chat_template_kwargs` must be a mapping of names and values, got {given!r:.100}.")
        variables |= without_none(given or {})
    for name in variables:
        if name in OTHER_NAMES:
            raise ValueError(
                f"`chat_template_kwargs.{name}` is no variable of the chat template, whose variables are thinking_mode "
                f"and model_identity. {OTHER_NAMES[name]}"
            )
    if "thinking_mode" in variables:
        check_thinking_mode(variables["thinking_mode"], "`chat_template_kwargs.thinking_mode`")
    return variables


def without_none(value: Any) -> Any:
    """Copies a value without the keys that hold None, at any depth (see `without_empty`)."""
    if isinstance(value, Mapping):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return [without_none(item) for item in value] if is_list(value) else value


def _parse(text: str, name: str, opening: str) -> Any:
    """Parses a field that holds JSON text."""
    wanted = {"[": "a list", "{": "an object"}[opening]
    if not text.lstrip().startswith(opening):
        raise ValueError(f"`{name}` must be {wanted}, or {wanted} as JSON text, got {text!r:.100}.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{name}` must be {wanted} as JSON text, got {text!r:.100}, which is not JSON: {error}."
        ) from None


def _text_of(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"`{name}` must be a text, got {row.get(name)!r:.100}.")
    check_text(row[name], f"`{name}`")
    return row[name]


def _read_chat(row: Mapping[str, Any], column: str, reading: Reading) -> Example:
    messages = row[column]
    if isinstance(messages, str):
        messages = _parse(messages, column, "[")
    if not is_list(messages):
        raise ValueError(f"`{column}` must be a list of messages, got {type(messages).__name__}: {messages!r:.100}.")
    if not messages:
        raise ValueError(f"`{column}` must hold at least one message, got none.")
    return _finish_chat(row, messages, _numbered(column, messages), reading)


def _numbered(column: str, messages: Sequence[Any]) -> list[str]:
    return [f"`{column}[{index}]`" for index in range(len(messages))]


def _finish_chat(
    row: Mapping[str, Any], messages: Sequence[Any], names: list[str], reading: Reading, not_learned: int = 0
) -> Example:
    """Checks a chat and its columns.

    Args:
        row (Mapping): The row.
        messages (list): Its messages.
        names (list of str): The place of each message, for errors.
        reading (Reading): How rows are read.
        not_learned (int): So many messages at the start are not learned.
    """
    messages = [_read_message(message, name) for message, name in zip(messages, names)]
    if "system" in row and messages[0].get("role") not in ("system", "root", "developer"):
        messages, names = [{"role": "system", "content": row["system"]}, *messages], ["`system`", *names]
        not_learned += 1
    place_media(row, messages, reading.media_folder)
    messages = normalize_messages(messages, names)
    learned = []
    for index, (message, name) in enumerate(zip(messages, names)):
        if message["role"] == "assistant":
            weight = message.pop("weight", 1)
            if weight not in (0, 1):
                raise ValueError(f"{name}: `weight` must be 0 (not learned) or 1, got {weight!r:.100}.")
            learned.append(bool(weight) and index >= not_learned)
    return Example(
        messages=messages,
        names=names,
        learned=learned,
        tools=_read_tools(row.get("tools")),
        variables=template_variables(row, reading.chat_template_kwargs),
    )


def _read_tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _parse(tools, "tools", "[") if tools.strip() else None
    return normalize_tools(without_none(tools)) or None


def _read_message(message: Any, where: str) -> Any:
    """A message of any format in the form {"role": ..., "content": ...}. Tool arguments become mappings."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a message with `role` and `content`, got {message!r:.100}.")
    message = without_empty(message)
    if "from" in message and "role" not in message:
        message = _read_sharegpt(message, where)
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parse(calls, f"{where.strip('`')}.tool_calls", "[")
    if is_list(calls):
        message["tool_calls"] = [
            _read_call(call, f"{where}: `tool_calls[{index}]`") for index, call in enumerate(calls)
        ]
        if not calls:
            del message["tool_calls"]
    return message


def _read_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    author, value = message["from"], message.get("value")
    rest = {name: item for name, item in message.items() if name not in ("from", "value")}
    if author in SHAREGPT_CALLS:
        if not isinstance(value, str):
            raise ValueError(f"{where}: `value` must be a tool call as JSON text, got {value!r:.100}.")
        calls = _parse(value, f"{where.strip('`')}.value", "[" if value.lstrip().startswith("[") else "{")
        return {**rest, "role": "assistant", "tool_calls": calls if is_list(calls) else [calls]}
    if not isinstance(author, str) or author not in SHAREGPT_ROLES:
        known = ", ".join((*SHAREGPT_ROLES, *SHAREGPT_CALLS))
        raise ValueError(f"{where}: `from` must be one of {known}, got {author!r:.100}.")
    if not isinstance(value, str):
        raise ValueError(f"{where}: `value` must be a text, got {value!r:.100}.")
    return {**rest, "role": SHAREGPT_ROLES[author], "content": value}


def _read_call(call: Any, where: str) -> Any:
    """A tool call whose arguments are a mapping, also if they came as JSON text."""
    if not isinstance(call, Mapping):
        return call  # refused later, with its place
    call = without_empty(call)
    function = call.get("function")
    inner = without_empty(function) if isinstance(function, Mapping) else call
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        name = f"{where.replace('`: `', '.').strip('`')}.{'function.' if inner is not call else ''}arguments"
        inner["arguments"] = _parse(arguments, name, "{") if arguments.strip() else {}
    elif isinstance(arguments, Mapping):
        inner["arguments"] = without_none(arguments)
    return {**call, "function": inner} if inner is not call else call


def _read_completion(row: Mapping[str, Any], reading: Reading) -> Example:
    for name in ("prompt", "completion"):
        if name not in row:
            raise ValueError(f"`{name}` is missing: a row has both `prompt` and `completion`.")
    prompt, completion = row["prompt"], row["completion"]
    if is_list(prompt) and is_list(completion):
        if not completion:
            raise ValueError("`completion` must hold at least one message, got none.")
        names = _numbered("prompt", prompt) + _numbered("completion", completion)
        return _finish_chat(row, [*prompt, *completion], names, reading, not_learned=len(prompt))
    if is_list(prompt) or is_list(completion):
        kind = "a list of messages" if is_list(prompt) else "a text"
        raise ValueError(f"`completion` must be {kind}, as `prompt` is, got {completion!r:.100}.")
    return Example(prompt=_text_of(row, "prompt"), text=_text_of(row, "completion"))


def _read_instruction(row: Mapping[str, Any], reading: Reading) -> Example:
    """The format of Alpaca: `instruction`, an optional `input` below it, `output`, and earlier turns in `history`."""
    messages, names = [], []
    history = row.get("history", [])
    for index, turn in enumerate(history if is_list(history) else [history]):
        if not is_list(turn) or len(turn) != 2 or not all(isinstance(item, str) for item in turn):
            raise ValueError(
                f"`history[{index}]` must be a pair of texts, a question and its answer, got {turn!r:.100}."
            )
        messages += [{"role": role, "content": item} for role, item in zip(("user", "assistant"), turn)]
        names += 2 * [f"`history[{index}]`"]
    question = "\n".join(filter(None, [_text_of({"input": "", **row}, name) for name in ("instruction", "input")]))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text_of(row, "output")}]
    return _finish_chat(row, messages, [*names, "`instruction`", "`output`"], reading)
