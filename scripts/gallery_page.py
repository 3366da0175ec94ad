"""Writes a page that shows answers and what they attended to: one HTML file that needs no server and no network."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replace_when_done import replace_when_done

TEMPLATE = Path(__file__).with_name("gallery_template.html")
NAMES = {
    "image": "picture",
    "digits": "digits",
    "video": "video",
    "recall": "long text",
    "tools": "tool call",
    "thinking": "thinking",
}


def write_page(records: Sequence[dict[str, Any]], path: Path, title: str, note: str = "") -> Path:
    """Writes the page.

    Args:
        records (sequence of dict): Results of `answer_question.answer_question`.
        path (Path): The HTML file.
        title (str): Heading of the page.
        note (str): A sentence below it, such as which checkpoint answered.

    Returns:
        `path`.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("`records` must hold at least one answer, got none.")
    named = [{**record, "name": name_of(record)} for record in records]
    # nothing in the data may end the element that holds it
    data = json.dumps(named, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title))
    page = page.replace("{{note}}", json.dumps(note)[1:-1].replace("`", "").replace("$", "").replace("<", "\\u003c"))
    page = page.replace("{{data}}", data)  # last, so that what it contains is not replaced
    with replace_when_done(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def name_of(record: dict[str, Any]) -> str:
    """What the page calls a question, in a word or two."""
    name, kind = NAMES.get(record["task"], record["task"]), record["kind"].replace("_", " ")
    return name if kind in (record["task"], "call", "sum") else f"{name}: {kind}"
