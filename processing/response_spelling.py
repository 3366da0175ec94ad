"""How the markers of an answer are spelled in the text that the response parser reads.

Text alone does not say whether a marker was a control token or was typed letter by letter. Token ids say it. So text
that was decoded here has a private character in place of each control token, and what was typed stays text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .special_tokens import (
    BEGIN_OF_DOCUMENT_TOKEN,
    BEGIN_OF_TURN_TOKEN,
    END_OF_TURN_TOKEN,
    NAMESPACE_TOKEN,
    THINK_END_TOKEN,
    THINK_START_TOKEN,
    TOOL_CALL_START_TOKEN,
)


@dataclass(frozen=True)
class Spelling:
    """The markers of an answer, each as the string that stands for it."""

    namespace: str
    think_start: str
    think_end: str
    end_of_turn: str
    begin_of_turn: str
    begin_of_document: str
    tool_calls_start: str

    @property
    def ends(self) -> tuple[str, ...]:
        """Markers behind which nothing belongs to the answer."""
        return (self.end_of_turn, self.begin_of_turn, self.begin_of_document)

    def plain(self, text: str) -> str:
        """The text as the tokenizer would write it."""
        return text if self is TEXT else text.translate(_AS_TEXT)


TEXT = Spelling(
    NAMESPACE_TOKEN,
    THINK_START_TOKEN,
    THINK_END_TOKEN,
    END_OF_TURN_TOKEN,
    BEGIN_OF_TURN_TOKEN,
    BEGIN_OF_DOCUMENT_TOKEN,
    TOOL_CALL_START_TOKEN,
)
"""Markers as they are printed."""

TOKENS = Spelling(*(chr(0xFDD0 + number) for number in range(len(fields(Spelling)))))
"""Markers as characters that Unicode reserves for the inside of a program, so that no text holds them."""

_MARKERS = {getattr(TEXT, field.name): getattr(TOKENS, field.name) for field in fields(Spelling)}
_AS_TEXT = {ord(character): marker for marker, character in _MARKERS.items()}


def text_as_tokens(text: str) -> str:
    """Text in which every printed marker counts as a control token."""
    for marker, character in _MARKERS.items():
        if marker != TOOL_CALL_START_TOKEN:  # behind the namespace marker it is a tag like the others
            text = text.replace(marker, character)
    return text


class TokenSpeller:
    """Decodes token ids piece by piece, with a private character for each control token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A byte-level tokenizer that knows the markers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids(list(_MARKERS))
        self._characters = dict(zip(ids, _MARKERS.values()))
        self._namespace = ids[0]
        self._run: list[int] = []  # ordinary tokens, the last of which may end inside a character
        self._previous: int | None = None

    def spell(self, ids: Sequence[int], is_last: bool = False) -> str:
        """The text of further ids. A character waits for its last token, unless `is_last`."""
        pieces = []
        for token_id in _as_list(ids):
            # Behind the namespace marker `<tool_call>` and the like are tags, or names of arguments.
            is_tag = self._previous == self._namespace and token_id != self._namespace
            character = self._characters.get(token_id)
            if character is None or (is_tag and character not in TOKENS.ends):
                self._run.append(token_id)
            else:
                pieces += [self._flush(), character]
            self._previous = token_id
        pieces.append(self._flush(waits=not is_last))
        return "".join(pieces)

    def last_turn(self, ids: Sequence[int]) -> str:
        """The text of a whole prompt from its last turn marker on, which is all that an answer depends on."""
        ids = _as_list(ids)
        marker = next(number for number, character in self._characters.items() if character == TOKENS.begin_of_turn)
        start = len(ids) - 1 - ids[::-1].index(marker) if marker in ids else 0
        return self.spell(ids[start:], is_last=True)

    def _flush(self, waits: bool = False) -> str:
        if not self._run:
            return ""
        text = self._tokenizer.decode(self._run, skip_special_tokens=False)
        if waits and text.endswith("\ufffd"):
            return ""
        self._run = []
        return text


def _as_list(ids: Any) -> list[int]:
    """Ids as numbers, also those of an array or a tensor."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def knows_markers(tokenizer: Any) -> bool:
    """Whether each marker is one token of the tokenizer."""
    markers = list(_MARKERS)
    ids = tokenizer.convert_tokens_to_ids(markers)
    return None not in ids and tokenizer.convert_ids_to_tokens(ids) == markers
