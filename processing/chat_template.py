"""Loads the chat template, `chat_template.jinja` beside this file."""

from functools import cache
from importlib.resources import files
from typing import Any

THINKING_MODES = ("adaptive", "enabled", "disabled")
"""Values of the chat template's variable `thinking_mode`. The first is the default."""


@cache
def load_chat_template() -> str:
    """Returns MiniMax-M3's chat template as Jinja source, for a tokenizer or a processor."""
    return files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def check_thinking_mode(mode: Any, name: str) -> None:
    """Raises ValueError for a mode that the chat template does not know. `name` names the mode in the message."""
    if mode not in THINKING_MODES:
        raise ValueError(f"{name} must be one of {', '.join(THINKING_MODES)}, got {mode!r:.100}.")
