"""Gives a tokenizer what it needs to parse answers: a response template, and the parser of this package.

The template is what stock Transformers reads from `tokenizer_config.json`. It finds reasoning, content and tool calls,
and arguments that are strings, numbers or booleans. It cannot express arguments that are lists or mappings: their tags
are nested to any depth, and the template language has no recursion, so they stay text. Nor does it know a call that was
cut off. So here the same methods run the parser of `response_parser`.
"""

import functools
import re
from collections.abc import Callable
from numbers import Integral
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from .messages import is_list
from .response_parser import MiniMaxM3ResponseParser
from .response_spelling import knows_markers
from .special_tokens import (
    BEGIN_OF_TURN_TOKEN,
    END_OF_TURN_TOKEN,
    NAMESPACE_TOKEN,
    THINK_END_TOKEN,
    THINK_START_TOKEN,
)

_NAMESPACE = re.escape(NAMESPACE_TOKEN)
_TAG = rf"{_NAMESPACE}<(?P<key>[^/>][^>]*)>(?P<value>.*?){_NAMESPACE}</(?P=key)>"

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": f"{BEGIN_OF_TURN_TOKEN}ai\n",
    "fields": {
        "reasoning_content": {
            # An answer without reasoning begins with the closing tag.
            "open_pattern": rf"{THINK_START_TOKEN}|(?={THINK_END_TOKEN})",
            "close": THINK_END_TOKEN,
            "content": "text",
            "content_args": {"strip": False},
        },
        "tool_calls": {
            "open_pattern": rf'(?:{_NAMESPACE}<tool_call>\s*)?{_NAMESPACE}<invoke name="(?P<name>[^\n]*?)">',
            "close_pattern": rf"{_NAMESPACE}</invoke>\s*",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": _TAG},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "close_pattern": rf"{_NAMESPACE}</tool_call>\s*|{re.escape(END_OF_TURN_TOKEN)}.*",
            "content": "text",
            "content_args": {"strip": False},
        },
    },
}
"""The response template of MiniMax-M3, for `tokenizer.response_template`."""


def add_response_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Lets a tokenizer parse answers of MiniMax-M3. `MiniMaxM3VLProcessor` does it for its own tokenizer.

    Afterwards `tokenizer.parse_response` and `tokenizer.get_response_parser` run the parser of this package, also for
    programs that call them on the tokenizer, such as TRL's `GRPOTrainer`. `save_pretrained` saves the template alone. A
    tokenizer that has another response template keeps it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of a MiniMax-M3 checkpoint. It is changed in place.

    Returns:
        The same tokenizer.

    Raises:
        ValueError: The tokenizer lacks a marker of the format.
    """
    if not knows_markers(tokenizer):
        raise ValueError("`tokenizer` must know the markers of MiniMax-M3's chat format as one token each.")
    if getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = RESPONSE_TEMPLATE
    if tokenizer.response_template == RESPONSE_TEMPLATE:
        # On the object and not in a class of our own: the saved folder names the class of its tokenizer.
        vars(tokenizer)["parse_response"] = functools.partial(_parse_response, tokenizer)
        vars(tokenizer)["get_response_parser"] = functools.partial(_get_response_parser, tokenizer)
    return tokenizer


def _parse_response(
    tokenizer: PreTrainedTokenizerBase,
    response: Any,
    schema: dict | None = None,
    *,
    prefix: Any = None,
    tools: list[dict | Callable] | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """`PreTrainedTokenizerBase.parse_response`, with the parser of this package."""
    if schema is not None and schema != RESPONSE_TEMPLATE:
        return type(tokenizer).parse_response(tokenizer, response, schema, prefix=prefix, tools=tools)
    if prefix is None:
        raise ValueError(
            "`parse_response` needs the prompt as `prefix`, because the chat template may begin the answer there. Pass "
            '`prefix=""` if the response is the whole answer.'
        )
    responses, is_batched = _rows(response, "response")
    prefixes, has_several = _rows(prefix, "prefix")
    if not has_several:
        prefixes *= len(responses)
    if len(prefixes) != len(responses):
        raise ValueError(
            f"`prefix` must be one prompt or one for each response, got {len(prefixes)} for {len(responses)}."
        )
    parsed = []
    for row, prompt in zip(responses, prefixes):
        if isinstance(row, str):
            parser = MiniMaxM3ResponseParser(_as_text(tokenizer, prompt), tools=tools)
            parser.feed(row)
        else:
            parser = MiniMaxM3ResponseParser(prompt, tools=tools, tokenizer=tokenizer)
            parser.feed_tokens(row)
        parsed.append(parser.finalize()[0])
    return parsed if is_batched else parsed[0]


def _get_response_parser(
    tokenizer: PreTrainedTokenizerBase,
    response_template: dict | None = None,
    *,
    prefix: Any = None,
    tools: list[dict | Callable] | None = None,
) -> Any:
    """`PreTrainedTokenizerBase.get_response_parser`, with the parser of this package. It reads text."""
    if response_template is not None and response_template != RESPONSE_TEMPLATE:
        return type(tokenizer).get_response_parser(tokenizer, response_template, prefix=prefix, tools=tools)
    if prefix is None:
        raise ValueError('`prefix` must be the prompt, or `""` if the stream is the whole answer.')
    prefixes, _ = _rows(prefix, "prefix")
    if len(prefixes) != 1:
        raise ValueError(f"`prefix` must be one prompt, got {len(prefixes)}.")
    return MiniMaxM3ResponseParser(_as_text(tokenizer, prefixes[0]), tools=tools)


def _as_text(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else cast(str, tokenizer.decode(prompt))


def _rows(value: Any, name: str) -> tuple[list[str | list[int]], bool]:
    """A list of texts or of lists of ids, and whether the caller gave several."""
    if isinstance(value, str):
        return [value], False
    value = value.tolist() if hasattr(value, "tolist") else value
    if is_list(value) and not value:
        return ([""], False) if name == "prefix" else ([], True)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in value] if is_list(value) else []
    if rows and all(isinstance(row, Integral) for row in rows):
        return [rows], False
    if not rows or not all(
        isinstance(row, str) or (is_list(row) and all(isinstance(number, Integral) for number in row)) for row in rows
    ):
        raise ValueError(f"`{name}` must be text, token ids, or a list of one of these, got {value!r:.100}.")
    return rows, True
