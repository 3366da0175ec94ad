"""Draw the curves of a run of `pretrain.py`: losses, held-out losses by modality, and speed, by tokens.

    python scripts/plot_curves.py run/curves.jsonl picture.png
    python scripts/plot_curves.py run/curves.jsonl longer/curves.jsonl picture.png

Several files are runs that follow each other, each from the weights of the one before (`--init_from`).
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from replace_when_done import replace_when_done

MILLION = 1e6
HELD_OUT = "eval_loss_"
DRAWN = ("step", "tokens", "seconds", "loss", "indexer_loss")


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The lines of a curves.jsonl.

    Raises:
        ValueError: A line is no JSON object with `step`, `tokens` and `seconds`, one of its values is no number, or no line
            has a `loss`. The message names it.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}.") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        if not isinstance(row, dict) or not {"step", "tokens", "seconds"} <= row.keys():
            raise ValueError(f"{path}, line {number} must have `step`, `tokens` and `seconds`, got {line[:80]!r}.")
        drawn = [name for name in row if name in DRAWN or name.startswith(HELD_OUT)]
        if wrong := [name for name in drawn if isinstance(row[name], bool) or not isinstance(row[name], (int, float))]:
            raise ValueError(f"{path}, line {number}: `{wrong[0]}` must be a number, got {row[wrong[0]]!r:.80}.")
        rows.append(row)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{path} must have lines with `loss`, got {len(rows)} lines without.")
    return rows


def join_runs(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of runs that follow each other. Their `tokens` count from the first run on, and `run` is the number."""
    joined, before = [], 0
    for number, rows in enumerate(runs):
        joined += [row | {"tokens": row["tokens"] + before, "run": number} for row in rows]
        before = joined[-1]["tokens"]
    return joined


def plot_curves(rows: list[dict[str, Any]], path: Path) -> Path:
    """Writes the picture. Its suffix is the format.

    Args:
        rows (list of dict): Lines as `read_curves` or `join_runs` returns them.
        path (Path): The picture.
    """
    logs = [row for row in rows if "loss" in row]
    scores = [row for row in rows if any(name.startswith(HELD_OUT) for name in row)]
    figure = Figure(figsize=(15.6, 4.2), dpi=100, layout="constrained")
    training, held_out, speed = figure.subplots(1, 3)
    training.plot(*_line(logs, "loss"), label="all losses")
    training.plot(*_line(logs, "indexer_loss"), label="indexers' loss")
    training.set(yscale="log", ylabel="nats", title="training")
    runs = list(dict.fromkeys(row.get("run", 0) for row in scores))  # each has held-out rows of its own
    for number, name in enumerate(sorted({name for row in scores for name in row if name.startswith(HELD_OUT)})):
        for run in runs:
            line = _line([row for row in scores if row.get("run", 0) == run], name)
            label = name.removeprefix(HELD_OUT) if run == runs[0] else None
            held_out.plot(*line, color=f"C{number}", marker="o", label=label)
    held_out.set(yscale="log", ylabel="nats a learned token", title="held out")
    # the clock of a process that resumed starts again
    steps = [(a, b) for a, b in pairwise(logs) if b["seconds"] > a["seconds"]]
    speeds = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) / 1000 for a, b in steps]
    speed.plot([b["tokens"] / MILLION for _, b in steps], speeds)
    speed.set(ylim=(0, None), ylabel="thousand tokens a second", title="speed")
    for panel in (training, held_out, speed):
        panel.set(xlabel="million tokens", xlim=(0, rows[-1]["tokens"] / MILLION * 1.02))
        told: set[str] = set()  # a label for each kind of line
        for before, after in pairwise(logs):
            if before.get("run", 0) != after.get("run", 0):
                label, style = "next run", {"color": "black", "linestyle": "--"}
            elif after["seconds"] < before["seconds"]:
                label, style = "resumed", {"color": "grey", "linestyle": ":"}
            else:
                continue
            panel.axvline(before["tokens"] / MILLION, label=None if label in told else label, **style)
            told.add(label)
    training.legend()
    if scores:
        held_out.legend()
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)
    return path


def _line(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [row for row in rows if name in row]
    return [row["tokens"] / MILLION for row in found], [row[name] for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("curves", type=Path, nargs="+", help="curves.jsonl of pretrain.py, of runs in their order")
    parser.add_argument("picture", type=Path, help="path of the picture")
    arguments = parser.parse_args()
    try:
        print(f"wrote {plot_curves(join_runs([read_curves(path) for path in arguments.curves]), arguments.picture)}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot_curves: {error}") from error


if __name__ == "__main__":
    main()
