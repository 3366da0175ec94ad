"""Reads the arguments of a tool call: nested tags, each behind the namespace marker."""

from typing import Any, cast

from .argument_types import ArgumentType
from .response_spelling import Spelling

_MAX_DEPTH = 100
_SPACES = " \t\r\n"


class UnfinishedCall(ValueError):
    """The text ends before the call does. More text may complete it."""


class MalformedCall(ValueError):
    """The text is not a call, whatever follows. `place` is where it goes wrong."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def read_arguments(text: str, start: int, kind: ArgumentType, spelling: Spelling) -> tuple[dict[str, Any], int]:
    """Reads the arguments of one call.

    What is read of a text does not change when more text follows, except that an unfinished call may become complete.

    Args:
        text (`str`): The answer.
        start (`int`): Where the arguments begin, behind the opening tag of the call.
        kind (`ArgumentType`): The type of the arguments.
        spelling (`Spelling`): How the markers are spelled in `text`.

    Returns:
        The arguments, and the place behind the closing tag of the call.

    Raises:
        UnfinishedCall: The text ends before the call does.
        MalformedCall: The tags do not fit.
    """
    arguments, end = _Reader(text, spelling).children(start, kind, "invoke", 0)
    return cast(dict, arguments), end


class _Reader:
    def __init__(self, text: str, spelling: Spelling) -> None:
        self.text = text
        self.spelling = spelling
        self.opening = spelling.namespace + "<"

    def children(self, place: int, kind: ArgumentType, tag: str, depth: int) -> tuple[dict | list, int]:
        """The tags up to the closing tag of `tag`, and the place behind it. A list is a row of tags named item."""
        may_be_list = depth > 0 and kind.allows("array")
        may_be_mapping = depth == 0 or kind.allows("object")
        items: list[Any] = []
        mapping: dict[str, Any] = {}
        while not self._at(place := self._skip_spaces(place), self._closing(tag)):
            name, place = self._open(place)
            key = self.spelling.plain(name)
            is_item = may_be_list and key == "item"
            if not is_item and not may_be_mapping:
                raise MalformedCall(f"a list holds the tag <{key:.50}> where <item> was expected", place)
            child = kind.of_item(len(items)) if is_item else kind.of_property(key)
            value, place = self.value(place, child, name, depth + 1)
            if is_item:
                items.append(value)
            mapping[key] = value
        end = place + len(self._closing(tag))
        if items and mapping.keys() == {"item"}:
            return items, end
        for key in kind.omitted(mapping):
            mapping[key] = None
        return mapping, end

    def value(self, place: int, kind: ArgumentType, tag: str, depth: int) -> tuple[Any, int]:
        """The value of an open tag, and the place behind its closing tag.

        Text may hold anything but the closing tag of its own argument.
        """
        closing = self._closing(tag)
        inside = self._skip_spaces(place)
        has_parts = kind.allows("array") or kind.allows("object")
        if has_parts and not self._at(inside, closing) and self._at(inside, self.opening):
            if depth > _MAX_DEPTH:
                raise MalformedCall(f"arguments are nested more than {_MAX_DEPTH} levels deep", place)
            try:
                return self.children(place, kind, tag, depth)
            except MalformedCall:
                if not kind.allows("string"):
                    raise
        end = self.text.find(closing, place)
        if end == -1:
            raise UnfinishedCall(f"the argument <{self.spelling.plain(tag):.50}> is not closed")
        return kind.value_of(self.spelling.plain(self.text[place:end])), end + len(closing)

    def _closing(self, tag: str) -> str:
        return f"{self.spelling.namespace}</{tag}>"

    def _open(self, place: int) -> tuple[str, int]:
        """The name of the tag that opens here, and the place behind it."""
        if not self._at(place, self.opening):
            raise MalformedCall("text stands between arguments", place)
        start = place + len(self.opening)
        end = self.text.find(">", start)
        if end == -1:
            raise UnfinishedCall("the name of an argument is not complete")
        name = self.text[start:end]
        if not name or name[0] == "/" or self.spelling.namespace in name:
            raise MalformedCall(f"the tag <{self.spelling.plain(name):.50}> opens no argument", place)
        return name, end + 1

    def _at(self, place: int, tag: str) -> bool:
        """Whether the tag stands here. Raises UnfinishedCall if the text ends inside of it."""
        if self.text.startswith(tag, place):
            return True
        if len(self.text) - place < len(tag) and tag.startswith(self.text[place:]):
            raise UnfinishedCall("the text ends before the call does")
        return False

    def _skip_spaces(self, place: int) -> int:
        while place < len(self.text) and self.text[place] in _SPACES:
            place += 1
        return place
