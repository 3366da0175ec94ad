"""Keeps control tokens in users' text ordinary text, while control tokens of the chat template stay tokens.

A tokenizer finds control tokens in the finished prompt, which does not say who wrote them. So this module puts a
"wall" into the caller's text before the template adds its own text. A wall is a character that occurs nowhere in the
caller's text. It stands on both sides of each character with which a control token begins or ends. A control token
then cannot match in the caller's text, not even a part of one, because a wall interrupts it. A normaliser removes the
walls again. It runs after the tokenizer has found the control tokens and before any other step, so the ids are the
same as without walls.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from .messages import REASONING_FIELDS, is_list
from .special_tokens import THINK_END_TOKEN, THINK_START_TOKEN

# Code points for private use, which no language uses. Transformers uses the first one of the plane before: it treats a
# placeholder after that character as typed by a user.
PRIVATE_CHARACTERS = range(0x100000, 0x10FFFE)
TRANSFORMERS_MARK = "\U000f0000"


class Walls:
    """Puts walls into the caller's text, and makes a tokenizer that reads a prompt with walls.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer whose control tokens must not match in the caller's text.
            Control tokens are all added tokens that begin or end with a sign, as all of MiniMax-M3's do. Added words
            and spaces stay tokens.
        given (any): All of the caller's text. The wall is a character that does not occur in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: Any) -> None:
        if not tokenizer.is_fast:
            raise ValueError("`sanitize_control_tokens=True` needs a tokenizer of the tokenizers library.")
        used = set().union(*_strings(given))
        self.wall = next(chr(code) for code in PRIVATE_CHARACTERS if chr(code) not in used)
        edges = {TRANSFORMERS_MARK} | {sign for token in tokenizer.get_added_vocab() for sign in (token[0], token[-1])}
        self._table = {
            ord(sign): self.wall + sign + self.wall for sign in edges if not sign.isalnum() and not sign.isspace()
        }
        self.tokenizer = self._without_walls(tokenizer)

    def _without_walls(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        given = tokenizer.backend_tokenizer
        backend = Tokenizer(given.model)  # shared, so this costs nothing
        steps = [normalizers.Replace(self.wall, "")] + ([given.normalizer] if given.normalizer else [])
        backend.normalizer = normalizers.Sequence(steps)
        for part in ("pre_tokenizer", "post_processor", "decoder"):
            if getattr(given, part) is not None:
                setattr(backend, part, getattr(given, part))
        added = given.get_added_tokens_decoder()
        # Not normalised, because the tokenizer has to find them while the walls stand.
        flags = ("single_word", "lstrip", "rstrip", "special")
        backend.add_tokens(
            [
                AddedToken(token.content, normalized=False, **{flag: getattr(token, flag) for flag in flags})
                for _, token in sorted(added.items())
            ]
        )
        copied = copy.copy(tokenizer)
        copied._tokenizer = backend
        return copied

    def around(self, value: Any, is_argument: bool = False) -> Any:
        """Copies a value with walls in every string, keys included, at any depth of lists and mappings."""
        if isinstance(value, str):
            return value.translate(self._table)
        if is_list(value):
            return [self.around(item, is_argument) for item in value]
        if not isinstance(value, Mapping):
            return value
        copied = {}
        for key, item in value.items():
            name = self.around(key)
            if is_argument and isinstance(key, str):
                name = self.wall + name  # the template writes <key>, and some control tokens are a word in brackets
            copied[name] = self.around(item, is_argument or key == "arguments")
        return copied

    def around_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Copies a message with walls in its text. Images, videos and their sources stay as they are."""
        message = with_reasoning_apart(message)
        walled = self.around({name: value for name, value in message.items() if name != "content"})
        content: Any = message.get("content")
        if is_list(content):
            content = [part if part["type"] in ("image", "video") else self.around(part) for part in content]
        return {**walled, "content": self.around(content) if isinstance(content, str) else content}


def with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """Separates an answer of the form `<mm:think>reasoning</mm:think>text` into two fields.

    The chat template does the same by the same rule, but it could not find these tokens between walls.
    """
    content: Any = message.get("content")
    if message["role"] != "assistant" or any(isinstance(message.get(name), str) for name in REASONING_FIELDS):
        return message
    if is_list(content):
        if any(part["type"] != "text" for part in content):
            return message
        content = "".join(part["text"] for part in content)
    if THINK_END_TOKEN not in (content or ""):
        return message
    parts = content.split(THINK_END_TOKEN)
    reasoning = parts[0].strip("\n").split(THINK_START_TOKEN)[-1].strip("\n")
    return {**message, "reasoning_content": reasoning, "content": parts[-1].strip("\n")}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif is_list(value):
        for item in value:
            yield from _strings(item)
