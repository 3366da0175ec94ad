"""Rows as a data set of `datasets`, with pictures as columns and videos as mp4 files: for other trainers, to look at."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mixture import make_row
from .rows import Row, check_split
from .videos import encode_mp4

if TYPE_CHECKING:
    from datasets import Dataset


def as_columns(row: Row, videos: Path, name: str) -> dict[str, Any]:
    """One row with its media in columns `images` and `videos`, and nested values as JSON text.

    Args:
        row (dict): A row of `make_row`. It stays as it is.
        videos (Path): Folder of the mp4 files.
        name (str): How the names of the row's files begin.
    """
    columns: dict[str, Any] = {name: row[name] for name in ("task", "modality")}
    columns |= {"text": row.get("text"), "scene": json.dumps(row["scene"]), "images": [], "videos": []}
    columns |= {name: row.get(name, []) for name in ("questions", "answers")}
    columns |= dict.fromkeys(("messages", "tools", "chat_template_kwargs"))
    if "messages" not in row:
        return columns
    messages = []
    for message in row["messages"]:
        parts = message["content"]
        if isinstance(parts, list):
            parts = [_placed(part, columns, videos, name) for part in parts]
        messages.append({**message, "content": parts})
    columns |= {"messages": json.dumps(messages), "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}
    columns["tools"] = json.dumps(row["tools"]) if "tools" in row else None
    return columns


def _placed(part: dict[str, Any], columns: dict[str, Any], videos: Path, name: str) -> dict[str, Any]:
    if part["type"] == "image":
        columns["images"].append(part["image"])
    elif part["type"] == "video":
        path = videos / f"{name}-{len(columns['videos'])}.mp4"
        path.write_bytes(encode_mp4(part["video"]))
        columns["videos"].append(str(path))
    else:
        return part
    return {"type": part["type"]}


def _columns(
    task: str, split: str, num_rows: int, seed: int, characters: int, videos: str
) -> Iterator[dict[str, Any]]:
    for index in range(num_rows):
        row = make_row(task, split, index, seed=seed, characters=characters)
        yield as_columns(row, Path(videos), f"{task}-{split}-{seed}-{index}")


def build_dataset(
    task: str, split: str, num_rows: int, *, videos: str | Path, seed: int = 0, characters: int = 4000
) -> "Dataset":
    """The first rows of a task as `datasets.Dataset`, which `minimax-m3 train`, `check` and `show` read once it is saved.

    Until then its rows are in a temporary folder, which is removed when the process ends.

    Args:
        task (str): A name of `TASKS`.
        split (str): "train" or "heldout".
        num_rows (int): How many rows.
        videos (str or Path): Folder for the videos, made if it does not exist. They need PyAV.
        seed (int), characters (int): See `make_row`.

    Raises:
        ValueError: `task` or `split` is unknown, or `num_rows` is below 1.
    """
    from datasets import Dataset, Features, Image, List, Value

    check_split(split)
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}.")
    make_row(task, split, 0, seed=seed, characters=characters)  # its errors, without the wrapping of `datasets`
    folder = Path(videos).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = ("task", "modality", "text", "messages", "tools", "chat_template_kwargs", "scene")
    features: dict[str, Any] = dict.fromkeys(names, Value("string"))
    features |= dict.fromkeys(("questions", "answers", "videos"), List(Value("string")))
    options = {"task": task, "split": split, "num_rows": num_rows, "seed": seed, "characters": characters}
    # `datasets` would keep the rows for later runs, in which their videos may be gone or this code may have changed.
    cache = tempfile.mkdtemp(prefix="minimax-m3-rows-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    return Dataset.from_generator(
        _columns,
        Features(features | {"images": List(Image())}),
        cache_dir=cache,
        gen_kwargs=options | {"videos": str(folder)},
    )
