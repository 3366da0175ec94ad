"""One row of the pretraining data, and the random numbers that make it.

A row is a plain `dict`, in a format that `processing_minimax_m3.data.read_example` reads:

    task        name of its builder in `mixture.TASKS`
    modality    "text", "code", "recall", "tools", "image" or "video"
    text        a document; or else
    messages    a chat, whose images are PIL images and whose videos are uint8 arrays (frames, height, width, 3)
    tools, chat_template_kwargs     where the chat has them
    questions   for each answer of the chat, what kind of question it answers
    answers     for each answer of the chat, the one right text; of a tool call, its name and arguments as JSON
    scene       what was drawn or hidden, as plain values from which the answers follow
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Question = tuple[str, str, str]  # its kind, its text and its answer
Section = tuple[Sequence[dict[str, Any]], Sequence[Question]]  # content parts, and the questions about them
SPLITS = ("train", "heldout")


def random_numbers(*key: Any) -> random.Random:
    """Random numbers that depend on `key` alone: on any machine, in any process, the same."""
    return random.Random("/".join(map(str, key)))


def check_split(split: str) -> None:
    """Raises `ValueError` where `split` is unknown."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}.")


def chat_row(
    task: str, modality: str, numbers: random.Random, sections: Iterable[Section], scene: dict[str, Any]
) -> Row:
    """A row of questions whose answers need no thinking; half of the prompts allow it, half forbid it.

    Args:
        task (str): Name of the builder.
        modality (str): What the loss on the row says something about.
        numbers (random.Random): Source of the choice of the thinking mode.
        sections: Parts of the chat: what comes before its first question, such as an image, and its questions.
        scene (dict): What the answers follow from.
    """
    messages: list[dict[str, Any]] = []
    kinds, answers = [], []
    for opening, questions in sections:
        parts = list(opening)
        for kind, question, answer in questions:
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
            kinds.append(kind)
            answers.append(answer)
            parts = []
    return {
        "task": task,
        "modality": modality,
        "messages": messages,
        "chat_template_kwargs": {"thinking_mode": numbers.choice(("adaptive", "disabled"))},
        "questions": kinds,
        "answers": answers,
        "scene": scene,
    }
