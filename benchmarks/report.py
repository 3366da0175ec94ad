"""Tables, and figures asked for beside figures reached."""

from typing import Any

_MEETS = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__}


def as_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)


def judged(figures: list[tuple[str, float | None, str, float]]) -> list[dict[str, Any]]:
    """Which of the figures (what, measured or None, sign, bound) were reached; without those that were not measured."""
    return [
        {"what": what, "measured": value, "target": f"{sign} {bound}", "met": _MEETS[sign](float(value), float(bound))}
        for what, value, sign, bound in figures
        if value is not None
    ]


def judged_table(targets: list[dict[str, Any]]) -> str:
    return as_table(
        ["figure to reach", "measured", "target", "met"],
        [[t["what"], f"{t['measured']:.3g}", t["target"], "yes" if t["met"] else "no"] for t in targets],
    )
