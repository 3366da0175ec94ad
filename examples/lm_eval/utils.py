"""Documents of the tasks: the first question of each held-out row of the pretraining data, and its one right answer."""

import json
import tempfile
from typing import Any

from datasets import Dataset

from processing_minimax_m3.pretraining.dataset import build_dataset

END_OF_THOUGHTS = "</mm:think>"
IMAGE = "<image>"  # the harness puts a picture here


def load(task: str, rows: int, seed: int = 1, characters: int = 4000, **_: Any) -> dict[str, Dataset]:
    """The held-out rows of a task of `processing_minimax_m3.pretraining`, under "test".

    Args:
        task (str): A name of `TASKS`.
        rows (int): How many rows.
        seed (int), characters (int): See `make_row`.
    """
    with tempfile.TemporaryDirectory() as videos:
        data = build_dataset(task, "heldout", rows, videos=videos, seed=seed, characters=characters)
        return {"test": data if task in ("code", "english") else data.map(_first_question)}


def _first_question(row: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(row["messages"])[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [IMAGE if part["type"] == "image" else part["text"] for part in parts]
    return {"prompt": "".join(texts), "answer": row["answers"][0], "num_images": texts.count(IMAGE)}


def pictures(row: dict[str, Any]) -> list[Any]:
    """The pictures that stand before the first question."""
    return [picture.convert("RGB") for picture in row["images"][: row["num_images"]]]


def score(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer behind the thoughts is the right one."""
    said = results[0].rpartition(END_OF_THOUGHTS)[2].strip()
    return {"exact_match": float(said == row["answer"])}
