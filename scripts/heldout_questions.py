"""Held-out questions with their right answers, for the demonstration and the gallery: the first question of a row.

Which rows are taken depends on the seed and the kind of question alone, never on what a model answers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature

from processing_minimax_m3.pretraining import make_row
from processing_minimax_m3.pretraining.rows import Row
from processing_minimax_m3.pretraining.videos import encode_mp4

LONG_KINDS = ("key_value", "needle")  # whose facts and first question do not depend on the length of the text
MOST_ROWS = 1000  # that are looked at for a kind of question
LONG_MARGIN = 1.02  # most tokens of a long prompt, as a multiple of the least
LONG_TRIES = 40  # lengths in characters, until a long prompt has its tokens: another length is another text


@dataclass
class Question:
    """One question, everything that the model reads before it answers, and the right answer.

    Args:
        task, kind (str): Task of the row, and kind of its first question.
        index (int): Number of the row.
        messages (list): The chat up to the question, with paths of files in place of pictures and videos.
        text (str): The question itself.
        answer (str): The right answer. Of a tool call, its name and arguments as JSON.
        options (mapping): Variables of the chat template.
        tools (list, optional): The tools on offer.
        picture (PIL image, optional), frames (uint8 (frames, height, width, 3), optional): What `messages` shows.
        document (str, optional): The long text before the question.
        fact (str, optional): The sentence of the document that has the answer.
    """

    task: str
    kind: str
    index: int
    messages: list[dict[str, Any]]
    text: str
    answer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    picture: Image.Image | None = None
    frames: np.ndarray | None = None
    document: str | None = None
    fact: str | None = None

    def inputs(self, processor: Any) -> BatchFeature:
        """The prompt as the processor makes it: token ids and, where there are media, patches."""
        return processor.apply_chat_template(
            self.messages,
            tools=self.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.options,
        )


def find_row(task: str, kind: str, seed: int, characters: int = 4000) -> tuple[int, Row]:
    """The first held-out row of a task whose first question is of a kind, and its number.

    Raises:
        ValueError: None of the first `MOST_ROWS` rows begins with such a question.
    """
    seen = set()
    for index in range(MOST_ROWS):
        row = make_row(task, "heldout", index, seed=seed, characters=characters)
        if row["questions"][0] == kind:
            return index, row
        seen.add(row["questions"][0])
    raise ValueError(f"no row of {task!r} begins with a question of kind {kind!r}; rows begin with {sorted(seen)}.")


def short_question(task: str, kind: str, folder: Path, seed: int = 0) -> Question:
    """A question about a picture, a video or a request.

    Args:
        task (str): A task of chats, such as "image".
        kind (str): Kind of the question, such as "colour".
        folder (Path): Where the picture (png) or the video (mp4) goes.
        seed (int): Seed of the rows.
    """
    index, row = find_row(task, kind, seed)
    message = row["messages"][0]
    question = Question(task, kind, index, [], "", row["answers"][0], row["chat_template_kwargs"], row.get("tools"))
    if isinstance(message["content"], str):
        question.messages, question.text = [message], message["content"]
        return question
    parts = []
    for part in message["content"]:
        path = folder / f"{task}-{kind}-{index}"
        if part["type"] == "image":
            question.picture, path = part["image"], path.with_suffix(".png")
            part["image"].save(path)
            part = {"type": "image", "path": str(path)}
        elif part["type"] == "video":
            question.frames, path = part["video"], path.with_suffix(".mp4")
            path.write_bytes(encode_mp4(part["video"]))
            part = {"type": "video", "path": str(path)}
        parts.append(part)
    question.messages, question.text = [{"role": "user", "content": parts}], parts[-1]["text"]
    return question


def long_question(processor: Any, kind: str, tokens: int, seed: int = 0) -> Question:
    """A question about a fact in a long text.

    Args:
        processor (MiniMaxM3VLProcessor): Its tokenizer counts.
        kind (str): Kind of the question: one of `LONG_KINDS`.
        tokens (int): Least length of the prompt; it is at most 2% or 128 tokens longer.
        seed (int): Seed of the rows.

    Raises:
        ValueError: The kind is another one, or none of the texts that were tried has such a length.
    """
    if kind not in LONG_KINDS:
        raise ValueError(f"`kind` must be one of {LONG_KINDS}, got {kind!r}.")
    index, _ = find_row("recall", kind, seed, characters=200)
    characters, length = tokens * 3, 0
    for _ in range(LONG_TRIES):
        row = make_row("recall", "heldout", index, seed=seed, characters=characters)
        opening, asked = (part["text"] for part in row["messages"][0]["content"])
        question = Question(
            *("recall", kind, index, row["messages"][:1], asked, row["answers"][0], row["chat_template_kwargs"]),
            document=opening,
            fact=fact_of(row),
        )
        length = question.inputs(processor)["input_ids"].shape[1]
        if tokens <= length <= max(tokens * LONG_MARGIN, tokens + 128):
            return question
        characters = max(1, int(characters + (tokens * (1 + LONG_MARGIN) / 2 - length) * len(opening) / length))
    raise ValueError(f"no held-out text of {tokens} tokens was found: the last one that was tried has {length}.")


def fact_of(row: Row) -> str:
    """The line of a recall row of `LONG_KINDS` that has the answer of its first question."""
    scene, kind = row["scene"], row["questions"][0]
    if kind == "needle":
        return f"The secret meeting is in {scene['city']} at {scene['hour']} o'clock."
    key = scene["keys"][0]
    return f"The number of the {key} is {scene['facts'][key]}."


def read_answer(processor: Any, question: Question, prompt: list[int], written: list[int]) -> tuple[str, bool]:
    """What an answer says, read by the parser of the chat format, and whether it is right.

    Args:
        processor (MiniMaxM3VLProcessor): Its tokenizer wrote the prompt.
        question (Question): What was asked.
        prompt (list of int), written (list of int): Token ids of the prompt, and of the answer up to its end.
    """
    message = processor.parse_response(written, prefix=prompt, tools=question.tools)
    if calls := message.get("tool_calls"):
        said = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        is_right = question.kind == "call" and said == [json.loads(question.answer)]
        return json.dumps(said[0] if len(said) == 1 else said), is_right
    text = (message.get("content") or "").strip()
    ended = bool(written) and written[-1] == processor.tokenizer.eos_token_id
    return text, text == question.answer and ended and question.kind != "call"
