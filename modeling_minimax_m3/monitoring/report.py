"""A run as one HTML page that needs no other file and no script."""

import html
import math
from collections.abc import Sequence
from typing import Any

from .console import format_count

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 190, 56, 22  # pixels of a chart, and of its margins
MOST_POINTS = 500  # of a curve; more would only make the page slow
COLOURS = ("#1f6feb", "#d1495b", "#2a9d4a", "#b5831a")

# Title of a chart, the values that it shows by their names in the log, and what these are called.
CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "training", "language_loss": "language alone", "eval_loss": "evaluation"}),
    ("Loss of the experts' balance", {"balance_loss": "training", "eval_balance_loss": "evaluation"}),
    ("Loss of the indexers, nats", {"indexer_loss": "training", "eval_indexer_loss": "evaluation"}),
    ("Norm of the gradient", {"grad_norm": "norm"}),
    ("Learning rate", {"learning_rate": "rate"}),
    ("Tokens per second", {"tokens_per_second": "all", "learned_tokens_per_second": "learned"}),
    ("Model FLOP/s of a device", {"flops_per_second": "FLOP/s"}),
    ("MFU", {"mfu": "share of the device's peak"}),
    ("Peak memory, GiB", {"peak_memory_gib": "peak"}),
    ("Entropy of the experts' load, 1 is even", {"expert_entropy": "mean of the layers"}),
    ("Share of the tokens of an expert", {"expert_most_used": "most used", "expert_least_used": "least used"}),
    ("Attention that the selected blocks hold", {"selected_mass": "training", "eval_selected_mass": "evaluation"}),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #1b1f24; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2em; } h3 { margin: 0 0 .3em; font-size: 1em; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 1.5em; }
svg text { font: 11px system-ui, sans-serif; fill: #57606a; } svg .grid { stroke: #e2e5e9; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2em 1.2em .2em 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; } .sample { border-top: 1px solid #d0d7de; }
.key { display: inline-block; margin-right: 1em; } .key i { display: inline-block; width: 1em; height: .25em;
  margin-right: .4em; vertical-align: middle; }
"""


def points_of(history: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Step and value of each log that has a finite value of this name."""
    found = [
        (float(entry["step"]), float(entry[name]))
        for entry in history
        if isinstance(entry.get(name), (int, float)) and math.isfinite(entry[name]) and "step" in entry
    ]
    stride = -(-len(found) // MOST_POINTS)
    return found if stride <= 1 else [*found[:-1:stride], found[-1]]


def tick(value: float) -> str:
    """A number beside a line of the grid."""
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else format_count(value) if value else "0"


def chart(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Curves over steps as inline SVG, with a legend that holds the last values."""
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if low == high:
        low, high = low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12
    across, up = WIDTH - LEFT - 8, HEIGHT - BOTTOM - 8

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + across * (0.5 if first == last else (step - first) / (last - first))
        return x, 8 + up * (1 - (value - low) / (high - low))

    parts = []
    for number in range(4):
        value = low + (high - low) * number / 3
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}</text>')
    for step, anchor in {first: "start", last: "end"}.items():
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">step {step:.0f}</text>')
    legend = []
    for colour, (name, points) in zip(COLOURS, curves.items()):
        placed = [place(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{line}"/>')
        if len(placed) <= 60:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"><title>step {step:.0f}: {value:.6g}</title>'
                "</circle>"
                for (x, y), (step, value) in zip(placed, points)
            ]
        legend.append(
            f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)} {points[-1][1]:.4g}</span>'
        )
    return (
        f'<figure style="margin:0"><h3>{html.escape(title)}</h3><div>{"".join(legend)}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def layer_table(layers: dict[int, dict[str, float]]) -> str:
    """The last values of each layer."""
    names = {
        "entropy": "entropy of the experts' load",
        "most_used": "most used expert",
        "least_used": "least used expert",
        "selected_mass": "attention that the selected blocks hold",
    }
    names = {name: text for name, text in names.items() if any(name in values for values in layers.values())}
    if not names:
        return ""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("layer", *names.values()))
    rows = "".join(
        f'<tr><td class="number">{layer}</td>'
        + "".join(f'<td class="number">{"" if name not in values else f"{values[name]:.4f}"}</td>' for name in names)
        + "</tr>"
        for layer, values in sorted(layers.items())
    )
    return f"<h2>Layers, at the last log</h2><table><tr>{head}</tr>{rows}</table>"


def sample_list(samples: Sequence[dict[str, Any]]) -> str:
    """What the model wrote at each evaluation."""
    if not samples:
        return ""
    blocks = "".join(
        f'<tr class="sample"><td>step {sample["step"]}</td><td><table>'
        + "".join(
            f"<tr><th>{name}</th><td><pre>{html.escape(sample[name])}</pre></td></tr>"
            for name in ("prompt", "answer", "reference")
        )
        + "</table></td></tr>"
        for sample in samples
    )
    return f"<h2>Samples</h2><table>{blocks}</table>"


def report_page(
    title: str,
    facts: dict[str, str],
    history: Sequence[dict[str, Any]],
    layers: dict[int, dict[str, float]],
    samples: Sequence[dict[str, Any]],
) -> str:
    """The page.

    Args:
        title (str): Its heading.
        facts (dict): What to say of the run in a table, by name.
        history (sequence of dict): The logs, with `step`, as in `TrainerState.log_history`.
        layers (dict): The last values of each layer, by its number.
        samples (sequence of dict): `step`, `prompt`, `answer` and `reference` of generations.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(value)}</pre></td></tr>"
        for name, value in facts.items()
    )
    charts = "".join(
        chart(heading, {text: points_of(history, name) for name, text in curves.items()}) for heading, curves in CHARTS
    )
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f'<h1>{name}</h1><table>{rows}</table><h2>Curves</h2><div class="charts">{charts}</div>'
        f"{layer_table(layers)}{sample_list(samples)}</html>\n"
    )
