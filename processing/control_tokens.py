"""Control tokens that somebody typed into a chat stay text; those that the chat template writes stay tokens.

A tokenizer finds its control tokens in the finished prompt, where nobody knows any more who wrote them. So each
character at which a control token may begin or end gets a wall on both sides in all that the caller gives (a character
that occurs nowhere in it), before the template puts its own text around that. No control token then lies in the
caller's text, even in part, because a wall is in its way. A normaliser takes the walls out again. It comes after the
control tokens are found and before anything else is, so the ids are those of the same text without walls.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from .messages import REASONING_FIELDS, is_list
from .special_tokens import THINK_END_TOKEN, THINK_START_TOKEN

# Code points for private use, in no language's text. Transformers uses the first of the plane before this one: it takes
# a placeholder after that character for a typed one.
PRIVATE_CHARACTERS = range(0x100000, 0x10FFFE)
TRANSFORMERS_MARK = "\U000f0000"


class Walls:
    """Puts walls into what a caller gives, and makes the tokenizer that reads the prompt made of it.

    Args:
        tokenizer: Whose control tokens may not come out of the caller's text. All of its added tokens are meant that
            begin or end with a sign, as all of MiniMax-M3's do; words and spaces that somebody added stay tokens.
        given: All that the caller gives, to find a character that does not occur in it.
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
        # Not normalised: they are to be found while the walls stand.
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
        """A copy with walls in every string, keys too, at any depth of lists and mappings."""
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
                name = self.wall + name  # The template writes <key>, and some control tokens are a word in brackets.
            copied[name] = self.around(item, is_argument or key == "arguments")
        return copied

    def around_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """The same for a message, whose images and videos, and the places where they are, stay as they are."""
        message = with_reasoning_apart(message)
        walled = self.around({name: value for name, value in message.items() if name != "content"})
        content: Any = message.get("content")
        if is_list(content):
            content = [part if part["type"] in ("image", "video") else self.around(part) for part in content]
        return {**walled, "content": self.around(content) if isinstance(content, str) else content}


def with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """An answer whose text holds its reasoning too, `<mm:think>...</mm:think>...`, with both in fields of their own.

    The chat template separates them by the same rule, but could not find the tokens between walls.
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
