"""Reads what the model writes, piece by piece, into an assistant message: reasoning, content and tool calls."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex  # it can say that a text is the beginning of a match

from .argument_types import ArgumentType
from .messages import normalize_tools
from .response_spelling import TEXT, TOKENS, Spelling, TokenSpeller, text_as_tokens
from .tool_arguments import MalformedCall, UnfinishedCall, read_arguments

Event = dict[str, Any]

# A beginning of a marker at the end of a text that was cut is left out from this length on. Shorter ones may well be
# content: a closing bracket, a sign for "less than".
_SHORTEST_CUT_MARKER = 3
_LONGEST_NAME = 256  # characters of the name of a tool
_MOST_SPACES = 64  # between the tags in front of a first call


class MiniMaxM3ResponseParser:
    """Parses an answer in the chat format of MiniMax-M3 while it arrives, in pieces of any size.

    It is used as `transformers.utils.chat_parsing.ResponseParser` is, and its events have the same form: `region_open`,
    `region_chunk` (with a `text`) and `region_close` (with a `value`), each with a `field`. The fields are
    `reasoning_content`, `content`, `tool_calls` and `invalid_tool_calls`. Chunks of a tool call are raw text and have
    `dirty=True`: they show progress, and the call itself comes with `region_close`. A call that turns out to be invalid
    closes the region under the field `invalid_tool_calls`.

    No text raises an error. What looks like part of a tool call and is not one never becomes content. It goes to
    `invalid_tool_calls`, each with `name` (None if there is none), `arguments` (the text) and `error`.

    Args:
        prefix (`str` or token ids, defaults to `""`): The prompt. The template may have begun the answer there.
        tools (`list`, *optional*): The tools of the prompt, as functions or mappings. Their JSON schemas give the
            arguments their types. Without a schema, values are strings, lists and mappings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed for `feed_tokens`, in place of `feed`. Token ids tell
            control tokens from the same letters in a text, so that any text can be part of an answer.
    """

    def __init__(
        self,
        prefix: str | Sequence[int] = "",
        *,
        tools: Sequence[Mapping[str, Any] | Callable] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._spelling = TEXT if tokenizer is None else TOKENS
        self._speller = None if tokenizer is None else TokenSpeller(tokenizer)
        self._syntax = _syntax(self._spelling)
        self._schemas = _schemas_by_name(tools)
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}
        self._buffer = ""
        self._place = 0
        self._read: Callable[[bool], bool] = self._read_content  # what the text at `_place` belongs to
        self._field: str | None = None  # the open region of text
        self._body: list[str] = []
        self._is_behind_calls = False
        self._block_is_empty = False
        self._spaces = ""
        self._searched = 0  # how many characters of stray text hold no tag
        self._call: _Call | None = None
        self._finalized = False
        self.initial_events: list[Event] = []
        self._events = self.initial_events
        if isinstance(prefix, str):
            prompt = prefix if tokenizer is None else text_as_tokens(prefix)
        elif tokenizer is None:
            raise ValueError("`prefix` must be a string if there is no `tokenizer`, got token ids.")
        else:
            prompt = TokenSpeller(tokenizer).last_turn(prefix)
        self._take(_begun_answer(prompt, self._spelling))

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of text, control tokens included. Returns what it adds, as events."""
        if self._speller is not None:
            raise ValueError("a parser with a `tokenizer` reads token ids: call `feed_tokens`.")
        return self._add(text)

    def feed_tokens(self, ids: Sequence[int]) -> list[Event]:
        """Takes the next token ids. Returns what they add, as events."""
        if self._speller is None:
            raise ValueError("`feed_tokens` needs a parser with a `tokenizer`.")
        return self._add(self._speller.spell(ids))

    def finalize(self) -> tuple[dict[str, Any], list[Event]]:
        """Ends the answer. Returns the message and the last events.

        The message has `role` and `content`, and `reasoning_content`, `tool_calls` and `invalid_tool_calls` where the
        answer has them.
        """
        events = self._add(self._speller.spell([], is_last=True) if self._speller else "")
        while self._read(True):
            pass
        self._close()
        self._finalized = True
        return self._message, events

    def _add(self, text: str) -> list[Event]:
        if self._finalized:
            raise RuntimeError("the answer has ended: `finalize` was called before.")
        self._events = []
        self._take(text)
        return self._events

    def _take(self, text: str) -> None:
        if self._call is None:
            self._buffer, self._place = self._buffer[self._place :], 0
        self._buffer += text
        while self._read(False):
            pass

    # Each of these reads from `_place` on and returns whether there is more to read now. `is_last` says that no text
    # follows.

    def _read_content(self, is_last: bool) -> bool:
        syntax, spelling = self._syntax, self._spelling
        marker = syntax.in_content.search(self._buffer, self._place)
        if marker is None:
            return self._rest("content", syntax.content_markers, is_last)
        self._text_up_to("content", marker.start())
        if marker[0] == spelling.tool_calls_start:  # a tag that other models use too, unless a call follows
            call = syntax.bare_calls.match(self._buffer, self._place, partial=True)
            if call and call.partial:
                return self._begun_call(is_last)
            if call:
                return self._enter_calls(marker.end())
            self._text_up_to("content", marker.end())
            return True
        if marker[0] == spelling.namespace:
            tag = syntax.tag.match(self._buffer, self._place, partial=True)
            if tag and tag.partial:
                return self._begun_call(is_last)
            if tag and tag["start"]:
                return self._enter_calls(tag.end())
            if tag and tag["call"]:
                return self._enter_calls(tag.start())
            self._stray(tag.end() if tag else marker.end(), "this markup stands outside of a tool call")
            return True
        self._close()
        self._place = marker.end()
        if marker[0] == spelling.think_start:
            self._read = self._read_reasoning
        elif marker[0] in spelling.ends:
            self._read = self._read_nothing
        return True

    def _read_reasoning(self, is_last: bool) -> bool:
        syntax, spelling = self._syntax, self._spelling
        marker = syntax.in_reasoning.search(self._buffer, self._place)
        if marker is None:
            return self._rest("reasoning_content", syntax.reasoning_markers, is_last)
        self._text_up_to("reasoning_content", marker.start())
        if marker[0] == spelling.namespace:  # a call ends the reasoning; the marker alone does not
            calls = syntax.calls.match(self._buffer, self._place, partial=True)
            if calls and calls.partial:
                return self._begun_call(is_last)
            if calls:
                return self._enter_calls(calls.end("start"))
            self._text_up_to("reasoning_content", marker.end())
            return True
        self._place = marker.end()
        if marker[0] != spelling.think_start:
            self._close()
            self._read = self._read_content if marker[0] == spelling.think_end else self._read_nothing
        return True

    def _begun_call(self, is_last: bool) -> bool:
        """Waits for the rest of a tag, or reports it if there is none."""
        if is_last:
            self._stray(len(self._buffer), "the answer ends before the tool call does")
        return is_last

    def _enter_calls(self, place: int) -> bool:
        self._close()
        self._place = place
        self._is_behind_calls = self._block_is_empty = True
        self._read = self._read_calls
        return True

    def _read_calls(self, is_last: bool) -> bool:
        """Reads between the calls of a block."""
        syntax = self._syntax
        self._place = syntax.spaces.match(self._buffer, self._place).end()
        if self._place == len(self._buffer):
            return is_last and self._block_is_empty and self._begun_call(is_last)
        tag = syntax.tag.match(self._buffer, self._place, partial=True)
        if tag and tag.partial:
            return self._begun_call(is_last)
        if tag and tag["call"]:
            self._block_is_empty = False
            self._call = _Call(self._spelling.plain(tag["name"]), tag.end(), tag.end())
            self._events.append({"type": "region_open", "field": "tool_calls"})
            self._place = tag.end()
            self._read = self._read_call
        elif tag and not tag["call_end"]:
            self._place = tag.end()
            self._read = self._read_content if tag["end"] else self._read_calls
        elif syntax.end.match(self._buffer, self._place):
            self._read = self._read_content
        else:
            start = max(self._place + 1, syntax.stray_tag.match(self._buffer, self._place).end())
            after = syntax.after_stray.search(self._buffer, max(start, self._place + self._searched))
            if after is None and not is_last:
                self._searched = max(0, len(self._buffer) - self._place - syntax.longest_tag)
                return False
            self._stray(after.start() if after else len(self._buffer), "this text stands between tool calls")
        return True

    def _read_call(self, is_last: bool) -> bool:
        call, syntax = self._call, self._syntax
        assert call is not None
        closing = self._buffer.find(syntax.call_closing, call.searched)
        if closing == -1 and not is_last:
            call.searched = max(call.start, len(self._buffer) - len(syntax.call_closing) + 1)
            self._raw(len(self._buffer) - _length_of_begun(self._buffer, self._place, (syntax.call_closing,)))
            return False
        try:
            kind = self._schemas.get(call.name) or ArgumentType([], {})
            arguments, end = read_arguments(self._buffer, call.start, kind, self._spelling)
        except UnfinishedCall as error:
            if not is_last:  # what looked like the closing tag is part of an argument
                call.searched = self._buffer.rfind(syntax.call_closing) + len(syntax.call_closing)
                return True
            # What follows may be the text of an argument, so nothing of it can be content or another call.
            self._give_up_call(call, syntax.end.search(self._buffer, call.start), str(error))
        except MalformedCall as error:
            limit = syntax.call_limit.search(self._buffer, error.place)
            if limit is None and not is_last:
                call.searched = max(call.start, len(self._buffer) - len(syntax.call_closing) + 1)
                return False
            self._give_up_call(call, limit, str(error))
        else:
            self._raw(end)
            if call.name.strip():
                function = {"name": call.name, "arguments": arguments}
                self._end_call("tool_calls", {"type": "function", "function": function}, end)
            else:
                raw = self._spelling.plain(self._buffer[call.start : end].removesuffix(syntax.call_closing))
                invalid = {"name": call.name, "arguments": raw, "error": "the tool call has no name"}
                self._end_call("invalid_tool_calls", invalid, end)
        return True

    def _give_up_call(self, call: "_Call", limit: Any, error: str) -> None:
        """Ends a call that cannot be read at `limit`, the match of a marker, or else at the end of the text."""
        end = limit.start() if limit else len(self._buffer)
        raw = self._spelling.plain(self._buffer[call.start : end])
        if limit and limit[0] == self._syntax.call_closing:
            end = limit.end()
        self._raw(end)
        self._end_call("invalid_tool_calls", {"name": call.name, "arguments": raw, "error": error}, end)

    def _end_call(self, field: str, value: dict[str, Any], end: int) -> None:
        self._message.setdefault(field, []).append(value)
        self._events.append({"type": "region_close", "field": field, "value": value})
        self._call = None
        self._place = end
        self._read = self._read_calls

    def _read_nothing(self, is_last: bool) -> bool:
        """Reads what follows the end of the answer, such as padding."""
        self._place = len(self._buffer)
        return False

    def _rest(self, field: str, markers: tuple[str, ...], is_last: bool) -> bool:
        """Reads the rest of the buffer as text, but for what may be the beginning of a marker."""
        begun = _length_of_begun(self._buffer, self._place, markers)
        if is_last and begun < _SHORTEST_CUT_MARKER:
            begun = 0
        self._text_up_to(field, len(self._buffer) - begun)
        if is_last:
            self._place = len(self._buffer)
        return False

    def _text_up_to(self, field: str, end: int) -> None:
        text = self._spelling.plain(self._buffer[self._place : end])
        self._place = end
        if field == "content" and self._is_behind_calls:
            # Spaces between the calls and the end of the turn are no content, unless there is text behind them.
            self._spaces += text
            if not text.strip():
                return
            text, self._spaces, self._is_behind_calls = self._spaces, "", False
        if not text:
            return
        if self._field is None:
            if field == "reasoning_content" and field in self._message:
                text = "\n" + text  # the model thinks for a second time
            self._field = field
            self._events.append({"type": "region_open", "field": field})
        self._message[field] = self._message.get(field, "") + text
        self._body.append(text)
        self._events.append({"type": "region_chunk", "field": field, "text": text, "dirty": False})

    def _raw(self, end: int) -> None:
        """Shows the raw text of a call up to `end`."""
        if end > self._place:
            text = self._spelling.plain(self._buffer[self._place : end])
            self._events.append({"type": "region_chunk", "field": "tool_calls", "text": text, "dirty": True})
            self._place = end

    def _stray(self, end: int, error: str) -> None:
        """Reports text up to `end` that is markup and part of no call."""
        self._close()
        self._block_is_empty = False
        self._searched = 0
        text = self._spelling.plain(self._buffer[self._place : end]).rstrip()
        value = {"name": None, "arguments": text, "error": error}
        self._message.setdefault("invalid_tool_calls", []).append(value)
        self._events.append({"type": "region_open", "field": "invalid_tool_calls"})
        self._events.append({"type": "region_close", "field": "invalid_tool_calls", "value": value})
        self._place = end

    def _close(self) -> None:
        """Closes the open region of text."""
        if self._field is not None:
            self._events.append({"type": "region_close", "field": self._field, "value": "".join(self._body)})
            self._field, self._body = None, []


@dataclass
class _Call:
    name: str
    start: int  # of the arguments, in the buffer
    searched: int  # up to where the closing tag was looked for


class _Syntax:
    """The patterns of an answer in one spelling. Those that are matched at a place may match in part."""

    def __init__(self, spelling: Spelling) -> None:
        namespace = regex.escape(spelling.namespace)
        ends = "|".join(map(regex.escape, spelling.ends))
        bare = regex.escape(spelling.tool_calls_start)
        # Bounded, so that a stream of spaces or of one long name is not read again with every piece.
        call = rf'<invoke name="(?P<name>[^\n]{{0,{_LONGEST_NAME}}}?)">'
        spaces = rf"\s{{0,{_MOST_SPACES}}}"
        self.content_markers = (
            spelling.namespace,
            spelling.think_start,
            spelling.think_end,
            spelling.tool_calls_start,
            *spelling.ends,
        )
        self.reasoning_markers = (spelling.namespace, spelling.think_start, spelling.think_end, *spelling.ends)
        self.in_content = regex.compile("|".join(map(regex.escape, self.content_markers)))
        self.in_reasoning = regex.compile("|".join(map(regex.escape, self.reasoning_markers)))
        self.spaces = regex.compile(r"\s*")
        self.end = regex.compile(ends)
        # Models drop the namespace marker now and then in front of these tags.
        self.tag = regex.compile(
            rf"(?:{namespace})?(?:(?P<start><tool_call>)|(?P<call>{call})|(?P<call_end></invoke>)|(?P<end></tool_call>))"
        )
        self.calls = regex.compile(rf"(?P<start>{namespace}<tool_call>){spaces}(?:{namespace})?{call}")
        self.bare_calls = regex.compile(rf"{bare}{spaces}(?:{namespace})?{call}")
        self.stray_tag = regex.compile(rf'(?:{namespace})?(?:<invoke name=")?')
        self.after_stray = regex.compile(rf"{namespace}|<invoke name=\"|{ends}")
        self.longest_tag = len(f'{spelling.namespace}<invoke name="')
        self.call_closing = f"{spelling.namespace}</invoke>"
        self.call_limit = regex.compile(
            rf"{regex.escape(self.call_closing)}|{namespace}</tool_call>|{namespace}<invoke name=\"|{ends}"
        )


_syntax = functools.cache(_Syntax)


def _length_of_begun(text: str, start: int, markers: Sequence[str]) -> int:
    """How many of the last characters, from `start` on, are the beginning of a marker."""
    longest = min(max(map(len, markers)) - 1, len(text) - start)
    for length in range(longest, 0, -1):
        if any(len(marker) > length and marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def _begun_answer(prompt: str, spelling: Spelling) -> str:
    """What the prompt holds of the answer: all behind the last turn marker, if that turn is the model's and open."""
    _, marker, turn = prompt.rpartition(spelling.begin_of_turn)
    answer = turn.removeprefix("ai\n") if marker else prompt
    is_begun = not marker or answer != turn
    return answer if is_begun and spelling.end_of_turn not in answer else ""


def _schemas_by_name(tools: Sequence[Mapping[str, Any] | Callable] | None) -> dict[str, ArgumentType]:
    """The types of the arguments of each tool."""
    schemas = {}
    for tool in normalize_tools(tools) or []:
        function = tool.get("function") or tool
        schema = function.get("parameters") or {}
        schemas[function["name"]] = ArgumentType([schema], schema if isinstance(schema, Mapping) else {})
    return schemas
