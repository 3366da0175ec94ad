"""Tokens of examples, and which of them are learned. Images and videos count by their headers: no pixel is needed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from ..processor import MiniMaxM3VLProcessor
from ..special_tokens import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN
from .formats import Example
from .media_sizes import MediaMeter

IGNORED = -100  # label of a token that the model does not learn
MEDIA_TOKENS = (IMAGE_TOKEN, VIDEO_TOKEN, VISION_START_TOKEN, VISION_END_TOKEN)
PLACEHOLDER = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")
# The chat template names the message at the end of its errors.
TEMPLATE_PLACE = re.compile(r"^(?P<problem>.*) \(message (?P<index>\d+)\)$", re.DOTALL)


# Why an example is left out.
NOTHING_LEARNED = "have nothing to learn within --max_length: chats need turns of the role 'assistant'"
MEDIA_CUT = "have images or videos that end after --max_length"
MISSING = re.compile("no such file|existing file")
FOLDER_HINT = "Paths start from the current folder, or from --media_folder."
NO_BRACKETS = np.zeros(0, np.int64)


@dataclass
class Encoded:
    """The tokens of an example.

    Args:
        ids (int64 (tokens,)): Token ids, with one placeholder for each bracket of an image or a video.
        learned (bool (tokens,)): Whether the model learns a token. Nothing predicts the first one.
        is_text (bool): Whether it is a text, which may be cut into several rows.
        holders (int64 (brackets,)): Where the placeholders are.
        counts (int64 (brackets,)): How many placeholders each of them stands for in the model's input.
        media (dict): The numbers of images and of videos, by "image" and "video".
    """

    ids: np.ndarray
    learned: np.ndarray
    is_text: bool = False
    holders: np.ndarray = field(default_factory=lambda: NO_BRACKETS)
    counts: np.ndarray = field(default_factory=lambda: NO_BRACKETS)
    media: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.learned[:1] = False

    @property
    def length(self) -> int:
        """The tokens of the example in the model's input."""
        return len(self.ids) + self.media_tokens - len(self.holders)

    @property
    def media_tokens(self) -> int:
        """The placeholders of images and videos in the model's input."""
        return int(self.counts.sum())

    def ends(self) -> np.ndarray:
        """How many tokens the model's input has up to the end of each token."""
        widths = np.ones(len(self.ids), np.int64)
        widths[self.holders] = self.counts
        return np.cumsum(widths)

    @property
    def end_of_media(self) -> int:
        """How many tokens the model's input has up to the end of the last image or video."""
        # the end token of a bracket follows its placeholders
        return int(self.ends()[self.holders[-1]]) + 1 if len(self.holders) else 0

    def num_learned(self, max_length: int | None = None) -> int:
        """The learned tokens among the first `max_length`."""
        if max_length is None or max_length >= self.length:
            return int(self.learned.sum())
        return int((self.learned & (self.ends() <= max_length)).sum())

    def why_left_out(self, max_length: int) -> str:
        """Why the example is left out of training, or an empty string."""
        if self.end_of_media > max_length:
            return MEDIA_CUT
        return "" if self.num_learned(None if self.is_text else max_length) else NOTHING_LEARNED

    def rows(self, max_length: int) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of at most `max_length` tokens, for examples without images and videos.

        A text becomes several rows. A chat is cut. A row without anything to learn is left out.
        """
        rows = []
        for start in range(0, len(self.ids), max_length) if self.is_text else [0]:
            ids, learned = self.ids[start : start + max_length], self.learned[start : start + max_length].copy()
            # `Trainer` would count the label of a first token if padding stands before it.
            learned[:1] = False
            if learned.any():
                rows.append({"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORED).tolist()})
        return rows


@dataclass
class _Draft:
    """The text of an example before it becomes tokens.

    Args:
        text (str): The text, with one placeholder for each bracket.
        spans (list): The learned characters.
        is_chat (bool): Whether the chat template wrote it.
        is_text (bool): Whether it may be cut into several rows.
        counts (list of int): How many placeholders each bracket has.
        media (dict): The numbers of images and videos.
    """

    text: str
    spans: list[tuple[int, int]]
    is_chat: bool = True
    is_text: bool = False
    counts: list[int] = field(default_factory=list)
    media: dict[str, int] = field(default_factory=dict)


class Encoder:
    """Converts examples to tokens, as the chat template and the tokenizer of a checkpoint do.

    Args:
        processor (MiniMaxM3VLProcessor or tokenizer): A tokenizer reads text only.
        decode_media (bool): Whether images and videos are decoded too. See `MediaMeter`.
    """

    def __init__(self, processor: Any, decode_media: bool = False):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        is_joint = isinstance(processor, MiniMaxM3VLProcessor)
        self._meter = MediaMeter(processor, decode_media) if is_joint else None
        self._template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template

    def __call__(self, examples: Sequence[Example]) -> list[Encoded | ValueError]:
        """The tokens of each example, or the error of an example that has none."""
        drafts: list[_Draft | ValueError] = []
        for example in examples:
            try:
                drafts.append(self._draft(example))
            except ValueError as error:
                drafts.append(error)
        texts = [draft.text for draft in drafts if isinstance(draft, _Draft)]
        if not texts:
            return drafts  # type: ignore[return-value]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encoded = iter(zip(tokens["input_ids"], tokens["offset_mapping"]))
        return [draft if isinstance(draft, ValueError) else self._finish(draft, *next(encoded)) for draft in drafts]

    def _draft(self, example: Example) -> _Draft:
        if example.messages is None:
            text = example.prompt + example.text
            return _Draft(text, [(len(example.prompt), len(text))], is_chat=False, is_text=not example.prompt)
        text, spans = self._render(example)
        parts = list(example.media())
        if parts and self._meter is None:
            raise ValueError(f"`{parts[0][0]}` is an image or a video, but the checkpoint reads text only.")
        if len(found := PLACEHOLDER.findall(text)) != len(parts):
            raise ValueError(
                f"{_column(example)} has {len(parts)} images and videos, but its prompt has {len(found)} placeholders "
                f"such as {IMAGE_TOKEN}. Texts must hold none; the chat template writes one for each."
            )
        if not parts:
            return _Draft(text, spans)
        return self._with_media(text, spans, parts)

    def _render(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """The prompt of a chat, and the learned spans of its characters."""
        if not self._template:
            raise ValueError(f"{_column(example)} is a chat, but the checkpoint's tokenizer has no chat template.")
        chats: list[Any] = [example.messages]
        try:
            rendered: Any = render_jinja_template(
                chats,
                tools=example.tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **example.variables},
            )
        except (jinja2.TemplateError, TypeError) as error:  # templates of others may not check types
            match = TEMPLATE_PLACE.match(str(error))
            if match is None or int(match["index"]) >= len(example.names):
                raise ValueError(f"{_column(example)} does not fit the chat template: {error}") from error
            name, problem = example.names[int(match["index"])], match["problem"]
            raise ValueError(f"{name} does not fit the chat template: {problem}") from error
        (text,), (spans,) = rendered
        if not all(example.learned) and len(spans) != len(example.learned):
            raise ValueError(
                f"{_column(example)} has {len(example.learned)} answers, some of which are not learned, but the chat "
                f"template marks {len(spans)} as `generation`."
            )
        if len(spans) == len(example.learned):
            spans = [span for span, is_learned in zip(spans, example.learned) if is_learned]
        return text, [(first, last) for first, last in spans]

    def _with_media(self, text: str, spans: list[tuple[int, int]], parts: list[tuple[str, Any]]) -> _Draft:
        """Puts the short text of each image and video in the place of its placeholder, and moves the spans along."""
        assert self._meter is not None
        pieces: list[str] = []
        moves: list[tuple[int, int]] = []  # the end of each placeholder, and by how much the text behind it moves
        draft = _Draft("", [])
        start = shift = 0
        for match, (name, part) in zip(PLACEHOLDER.finditer(text), parts):
            try:
                short, counts = self._meter.measure(part, name)
            except ValueError as error:
                hint = f" {FOLDER_HINT}" if MISSING.search(str(error)) else ""
                place = "" if str(error).startswith(f"`{name}`") else f"`{name}`: "
                raise ValueError(f"{place}{error}{hint}") from error
            pieces += [text[start : match.start()], short]
            start = match.end()
            shift += len(short) - len(match[0])
            moves.append((start, shift))
            draft.counts += counts
            draft.media[part["type"]] = draft.media.get(part["type"], 0) + 1

        def moved(place: int) -> int:
            return place + next((shift for end, shift in reversed(moves) if end <= place), 0)

        draft.text = "".join([*pieces, text[start:]])
        draft.spans = [(moved(first), moved(last)) for first, last in spans]
        return draft

    def _finish(self, draft: _Draft, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        tokens, places = np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)
        learned = np.zeros(len(tokens), bool)
        for first, last in draft.spans:
            learned |= (places[:, 1] > first) & (places[:, 0] < last)
        if not draft.is_chat:  # it ends as a turn does
            return Encoded(np.append(tokens, self.tokenizer.eos_token_id), np.append(learned, True), draft.is_text)
        if not draft.counts:
            return Encoded(tokens, learned)
        learned &= ~np.isin(tokens, self.tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS)))
        holders = np.flatnonzero(np.isin(tokens, self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])))
        return Encoded(tokens, learned, False, holders, np.array(draft.counts, np.int64), draft.media)


def _column(example: Example) -> str:
    """The column of a chat, in backticks."""
    return f"`{example.names[0].strip('`').partition('[')[0]}`"
