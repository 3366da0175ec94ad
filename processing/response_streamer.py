"""Streams a parsed answer out of `generate`."""

from collections.abc import Callable, Mapping, Sequence
from queue import Queue
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .response_parser import Event, MiniMaxM3ResponseParser


class MiniMaxM3ResponseStreamer(BaseStreamer):
    """A streamer for `generate` that gives events of a parsed answer where `TextIteratorStreamer` gives text.

    `generate` runs in a thread of its own, and the caller iterates over the streamer. The events are those of
    `MiniMaxM3ResponseParser`. After the last one, `message` holds the whole message.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, or a processor that has one.
        tools (`list`, *optional*): The tools of the prompt, as functions or mappings.
        timeout (`float`, *optional*): Seconds to wait for the next token before `queue.Empty` is raised. By default the
            caller waits as long as `generate` takes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any] | Callable] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.message: dict[str, Any] | None = None
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._tools = tools
        self._timeout = timeout
        self._parser: MiniMaxM3ResponseParser | None = None
        self._events: Queue[Event | None] = Queue()

    def put(self, value: torch.Tensor) -> None:
        """Takes what `generate` gives: the prompt first, then token ids. Raises ValueError for a batch."""
        if value.dim() > 1 and value.shape[0] != 1:
            raise ValueError(f"a streamer follows one answer, got a batch of {value.shape[0]}.")
        ids = value.flatten().tolist()
        if self._parser is None:
            self._parser = MiniMaxM3ResponseParser(ids, tools=self._tools, tokenizer=self._tokenizer)
            events = self._parser.initial_events
        else:
            events = self._parser.feed_tokens(ids)
        for event in events:
            self._events.put(event)

    def end(self) -> None:
        """Ends the answer."""
        events: list[Event] = []
        if self._parser is not None:
            self.message, events = self._parser.finalize()
        for event in [*events, None]:
            self._events.put(event)
        self._parser = None

    def __iter__(self) -> "MiniMaxM3ResponseStreamer":
        return self

    def __next__(self) -> Event:
        event = self._events.get(timeout=self._timeout)
        if event is None:
            raise StopIteration
        return event
