"""The chat template as a string; the template itself is `chat_template.jinja` beside this file."""

from functools import cache
from importlib.resources import files
from typing import Any

THINKING_MODES = ("adaptive", "enabled", "disabled")
"""What the chat template's variable `thinking_mode` may be; the first is its default."""


@cache
def load_chat_template() -> str:
    """Return MiniMax-M3's chat template (Jinja source), to be given to a tokenizer or a processor."""
    return files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def check_thinking_mode(mode: Any, name: str) -> None:
    """Raise ValueError, with the name of what holds it, for a mode that the chat template does not know."""
    if mode not in THINKING_MODES:
        raise ValueError(f"{name} must be one of {', '.join(THINKING_MODES)}, got {mode!r:.100}.")
