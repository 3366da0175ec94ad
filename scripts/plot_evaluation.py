"""Draw the results of `evaluate_pretraining.py`: accuracy, recall, perplexity, coverage and load of the experts.

python scripts/plot_evaluation.py scores/results.json docs/images/small_model_scores.png
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modeling_minimax_m3.conversion.source import read_json
from replace_when_done import replace_when_done


def plot_evaluation(record: dict[str, Any], path: str | Path) -> Path:
    """Writes the picture. Parts that the record lacks get no panel.

    Args:
        record (dict): The content of results.json.
        path (str or Path): Path of the picture. Its suffix is the format.

    Returns:
        `path`.

    Raises:
        ValueError: The record has none of the parts.
    """
    drawers = {
        "answers": _answers,
        "recall": _recall,
        "perplexity": _perplexity,
        "coverage": _coverage,
        "experts": _experts,
    }
    parts = [part for part in drawers if record.get(part) or (part == "answers" and record.get("files"))]
    if not parts:
        raise ValueError(
            f"the results must have one of {', '.join(drawers)} to draw, got {', '.join(record) or 'none'}."
        )
    path = Path(path)
    columns = min(len(parts), 3)
    lines = -(-len(parts) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), dpi=100, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for part, panel in zip(parts, panels):
        drawers[part](panel, record)
    for panel in panels[len(parts) :]:
        panel.remove()
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)
    return path


def _answers(panel: Any, record: dict[str, Any]) -> None:
    bars = [(task, scores) for task, scores in record.get("answers", {}).items()]
    bars += [(f"{task}, files", scores) for task, scores in record.get("files", {}).items()]
    values = [scores["accuracy"] for _, scores in bars]
    errors = [
        [max(0.0, scores["accuracy"] - scores["interval"][0]) for _, scores in bars],
        [max(0.0, scores["interval"][1] - scores["accuracy"]) for _, scores in bars],
    ]
    panel.barh(range(len(bars)), values, xerr=errors, capsize=3, color="tab:blue", ecolor="black")
    panel.set_yticks(range(len(bars)), [name for name, _ in bars])
    panel.invert_yaxis()
    panel.set(xlim=(0, 1.02), xlabel="share of right answers, 95% interval", title="held-out questions")


def _recall(panel: Any, record: dict[str, Any]) -> None:
    rows = record["recall"]
    depths = list(rows[0]["depths"])
    grid = [[row["depths"][depth]["accuracy"] for row in rows] for depth in depths]
    image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            panel.text(
                x, y, f"{value:.0%}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black"
            )
    panel.set_xticks(range(len(rows)), [short(row["tokens"]) for row in rows])
    panel.set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths])
    panel.set(xlabel="tokens of the text", ylabel="depth of the fact", title="recall, share of right answers")
    panel.figure.colorbar(image, ax=panel, shrink=0.8)


def _perplexity(panel: Any, record: dict[str, Any]) -> None:
    rows = record["perplexity"]
    places = [row["tokens"] for row in rows]
    panel.plot(places, [row["loss"] for row in rows], marker="o")
    low, high = zip(*(row["interval"] for row in rows))
    panel.fill_between(places, low, high, alpha=0.2)
    _lengths(panel, places)
    panel.set(ylabel="loss, nats a token", title="the same code behind more context")


def _coverage(panel: Any, record: dict[str, Any]) -> None:
    rows = record["coverage"]
    places = [row["tokens"] for row in rows]
    for number in rows[0]["layers"]:
        panel.plot(places, [row["layers"][number] for row in rows], marker="o", label=f"layer {number}")
    if "best" in rows[0]:  # which older results lack
        panel.plot(
            places, [row["best"] for row in rows], color="black", marker=".", linestyle="--", label="best choice"
        )
    panel.plot(
        places, [row["blocks_share"] for row in rows], color="grey", marker=".", linestyle=":", label="even attention"
    )
    _lengths(panel, places)
    panel.set(ylim=(0, 1.02), ylabel="share of the attention to all keys", title="held by the selected blocks")
    panel.legend()


def _experts(panel: Any, record: dict[str, Any]) -> None:
    tasks = record["experts"]
    grid = [
        [share * len(layer["shares"]) for layer in layers for share in layer["shares"]] for layers in tasks.values()
    ]
    image = panel.imshow(grid, vmin=0, vmax=3, cmap="viridis", aspect="auto")
    panel.set_yticks(range(len(tasks)), list(tasks))
    panel.set(xlabel="experts, layer by layer", title="load of the experts, 1 is even")
    panel.figure.colorbar(image, ax=panel, shrink=0.8)


def _lengths(panel: Any, places: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(places, [short(place) for place in places])
    panel.set_xlabel("tokens")


def short(tokens: int) -> str:
    """512 or 16k or 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of evaluate_pretraining.py")
    parser.add_argument("picture", type=Path, help="path of the picture")
    arguments = parser.parse_args()
    try:
        print(f"wrote {plot_evaluation(read_json(arguments.results), arguments.picture)}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot_evaluation: {error}") from error


if __name__ == "__main__":
    main()
