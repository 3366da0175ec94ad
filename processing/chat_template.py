"""The chat template as a string; the template itself is `chat_template.jinja` beside this file."""

from functools import cache
from importlib.resources import files


@cache
def load_chat_template() -> str:
    """Return MiniMax-M3's chat template (Jinja source), to be given to a tokenizer or a processor."""
    return files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")
