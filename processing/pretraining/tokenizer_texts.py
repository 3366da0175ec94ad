"""Texts that a small tokenizer learns from: those that a model of this data will read, without their control tokens."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..chat_template import load_chat_template
from ..special_tokens import SPECIAL_TOKENS
from .mixture import WEIGHTS, iterate_rows

CONTROL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
ROWS = 100  # of each task
CHARACTERS = 6000  # of a long row


def tokenizer_texts(weights: Mapping[str, float] = WEIGHTS, seed: int = 0) -> Iterator[str]:
    """Texts of training rows, the chats as the chat template writes them.

    Args:
        weights (mapping): Its names are the tasks.
        seed (int): Seed of the rows.
    """
    template = load_chat_template()
    for task in weights:
        for row in iterate_rows(task, "train", ROWS, seed=seed, characters=CHARACTERS):
            if "text" in row:
                yield row["text"]
                continue
            chats = [row["messages"]]
            variables = row["chat_template_kwargs"]
            rendered: Any = render_jinja_template(chats, tools=row.get("tools"), chat_template=template, **variables)
            yield from CONTROL_TOKENS.split(rendered[0][0])
