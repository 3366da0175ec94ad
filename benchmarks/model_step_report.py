"""Floors, tables and picture of a record of `model_step`. Nothing here needs a GPU."""

import textwrap
from pathlib import Path
from typing import Any

from . import model_step_floors as floors
from .gpu import selected_flops
from .implementations import OURS, STOCK
from .kernel_parts import PARTS
from .model_step_workloads import CHUNK, MODELS
from .report import as_table

BEGIN, END = "<!-- tables of benchmarks.model_step -->", "<!-- end of tables -->"
PICTURE = "images/model_step.svg"
Row = dict[str, Any]


def key_of(row: Row) -> tuple:
    """What identifies a row of a record."""
    return tuple(row[name] for name in ("implementation", "group", "model", "work", "new", "past", "batch"))


def with_floor(row: Row, machine: dict[str, Any]) -> Row:
    """The row with its floors, at the rates that the same run measured."""
    if "failed" in row or row["group"] == "leak":
        return row
    if row["group"] == "sharing":
        return row | {"floor_ms": selected_flops(row["new"]) / machine["matmul_tflops"] / 1e9}
    config = floors.layers_config(*MODELS[row["model"]])
    rates = floors.Rates(machine["matmul_tflops"], machine["read_bytes_per_second"])
    new, past, batch = row["new"], row["past"], row["batch"]
    if row["group"] == "breakdown":
        is_training = row["model"] == "training"
        costs = floors.training_costs(config, new) if is_training else floors.pass_costs(config, new, past)
        return row | {"floor_parts_ms": {part: rates.ms(cost) for part, cost in costs.items()}}
    if row["work"].startswith("output head"):
        return row | {"floor_ms": rates.ms(floors.pass_costs(config, 1, 0)["head"])}
    if "experts_hit" in row:
        floor = floors.experts_ms(config, rates, batch, row["experts_hit"])
        return row | {"floor_ms": floor + floors.router_and_shared_ms(config, rates, batch)}
    if row["group"] == "million":
        return row | {"floor_ms": floors.chunks_ms(config, rates, min(new, row["chunks"] * CHUNK), CHUNK)}
    if row["group"] == "training":
        share = floors.model_flops_utilization(config, rates, new, row["ms"])
        return row | {"floor_ms": floors.training_ms(config, rates, new), "share_by_6n": share}
    if row["group"] == "memory":
        row |= {"floor_gib": floors.cache_gib(config, new)}
    return row | {"floor_ms": floors.pass_ms(config, rates, new, past, batch)}


def merge(records: list[dict], expected: list[tuple]) -> dict:
    """One record of several runs on the same kind of card. Of a row that two have, the later record's counts."""
    cards = {record["machine"]["gpu"] for record in records}
    if len(cards) > 1:
        raise ValueError(f"the records come from different cards: {', '.join(sorted(cards))}")
    rows = {key_of(row): row for record in records for row in record["rows"]}
    # What a run could not do is missing, unless another run did it.
    missing = [
        ", ".join(map(str, key)) for key in expected if "ms" not in rows.get(key, {}) | _wall(rows.get(key, {}))
    ]
    order = {key: position for position, key in enumerate(expected)}
    return {
        "machine": records[-1]["machine"],
        "machines": [record["machine"] for record in records],
        "state": f"partial, without: {'; '.join(missing)}" if missing else "complete",
        "failed": {", ".join(map(str, key)): row["failed"] for key, row in rows.items() if "failed" in row},
        "rows": sorted(rows.values(), key=lambda row: order.get(key_of(row), len(order))),
    }


def _wall(row: Row) -> Row:
    return {"ms": row["wall_ms"]} if "wall_ms" in row else {}


# --- tables ------------------------------------------------------------------------------------------------------


def length(tokens: int) -> str:
    return f"{tokens // 1024}k" if 1024 <= tokens < 2**20 else "1M" if tokens == 2**20 else str(tokens)


def label(row: Row) -> str:
    """A row in words: its work, and the tokens and rows of it."""
    text = row["work"] + (f", {row['batch']} rows" if row["batch"] > 1 else "")
    if row["new"] > 1:
        text += f", {length(row['new'])} new tokens" if row["past"] else f", {length(row['new'])}"
    return text + (f", {length(row['past'])} cached" if row["past"] else "")


def size(row: Row) -> str:
    dense, sparse, experts = MODELS[row["model"]]
    return f"{dense + sparse} layers" + (f" with {experts} experts" if experts else "")


def figure(number: float) -> str:
    """Three digits, and all digits before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _measured(record: dict, implementation: str, *groups: str) -> dict[tuple, Row]:
    """The rows of an implementation that have a time, by what `key_of` names beside it."""
    return {
        key_of(row)[1:]: row
        for row in record["rows"]
        if row["implementation"] == implementation and row.get("ms") and (not groups or row["group"] in groups)
    }


def tables(record: dict) -> str:
    """All tables of a record. A table without a row is left out."""
    makers = (times_table, figures_table, breakdown_table, released_table)
    return "\n\n".join(text for text in (make(record) for make in makers) if text)


def times_table(record: dict) -> str:
    ours, stock = _measured(record, OURS), _measured(record, STOCK)
    rows = []
    for key in {**ours, **stock}:
        row = ours.get(key) or stock[key]
        if row["group"] in ("leak", "breakdown"):
            continue
        kernels = str(row["kernels"]) if "kernels" in row else ""
        floor = row["floor_ms"]
        of = "" if row["group"] == "sharing" else size(row)
        rows.append([label(row), of, *_cells(ours.get(key), stock.get(key), floor), kernels])
        layer = _sparse_layer(ours, key)
        if layer is not None:
            rows.append(["one sparse layer of it: a third of the difference to 4 layers", "", *layer, ""])
    header = ["", "model", "ours, ms", "stock, ms", "floor, ms", "stock / ours", "ours / floor", "kernels"]
    return "Milliseconds.\n\n" + as_table(header, rows)


def _cells(ours: Row | None, stock: Row | None, floor: float) -> list[str]:
    times = [row and row["ms"] for row in (ours, stock)]
    figures = [figure(ms) if ms else "-" for ms in times]
    ratio = figure(times[1] / times[0]) if times[0] and times[1] else "-"
    return [*figures, figure(floor), ratio, f"{times[0] / floor:.2f}" if times[0] else "-"]


def _both_sizes(ours: dict[tuple, Row], key: tuple) -> dict[int, Row] | None:
    """The rows of 4 and 7 layers with the work of `key`, which is one of 7 layers."""
    group, model, *work = key
    smaller = ours.get((group, "4 layers", *work))
    return {4: smaller, 7: ours[key]} if model == "7 layers" and smaller and key in ours else None


def _sparse_layer(ours: dict[tuple, Row], key: tuple) -> list[str] | None:
    pair = _both_sizes(ours, key)
    if pair is None or "kernels" not in pair[7]:
        return None
    ms, floor = (
        floors.sparse_layer_ms({layers: row[name] for layers, row in pair.items()}) for name in ("ms", "floor_ms")
    )
    return _cells({"ms": ms}, None, floor)


def figures_table(record: dict) -> str:
    """What is no time: memory, shares of a rate, and counts."""
    rows = []
    for key, row in _measured(record, OURS).items():
        other = _measured(record, STOCK).get(key, {})
        name = f"{label(row)}, {size(row)}"
        if "extra_gib" in row:
            gib = figure(row["extra_gib"]), "-", figure(row["floor_gib"])
            rows.append([f"{name}: GiB beyond the weights", *gib])
        if "share_by_6n" in row:
            shares = (f"{of['share_by_6n']:.0%}" if of else "-" for of in (row, other))
            rows.append([f"{name}: share of the matmul rate by 6N", *shares, ""])
            peaks = (figure(of["peak_gib"]) if of else "-" for of in (row, other))
            rows.append([f"{name}: peak GiB", *peaks, ""])
        if "captures" in row:
            before, after = row["before_mib"], row["after_mib"]
            growth = ", ".join(f"{part} {after[part] - before[part]:+.0f}" for part in before)
            rows.append([f"{row['calls']} calls of generate, {row['captures']} captures: MiB more", growth, "-", "0"])
        if "chunks" in row and row["chunks"] * CHUNK < row["new"]:
            rows.append([f"{name}: chunks done before the time limit", str(row["chunks"]), "-", ""])
        if "ms_by_setting" in other:
            with_cudnn, without = (figure(ms) for ms in other["ms_by_setting"].values())
            rows.append([f"{name}: ms with cuDNN's attention / without", "", f"{with_cudnn} / {without}", ""])
        if "static" in row["work"] and "first_run_s" in row:
            waits = (f"{of['first_run_s'] - of['second_run_s']:.1f}" if of else "-" for of in (row, other))
            rows.append([f"{name}: seconds that the first run takes longer", *waits, ""])
    return as_table(["", "ours", "stock", "floor"], rows) if rows else ""


def _breakdowns(record: dict) -> list[Row]:
    return [row for row in record["rows"] if row["group"] == "breakdown" and "parts_ms" in row]


def breakdown_table(record: dict) -> str:
    found = _breakdowns(record)
    if not found:
        return ""
    rows = []
    for part in PARTS:
        cells = [_with_floor(row["parts_ms"].get(part, 0.0), row["floor_parts_ms"].get(part)) for row in found]
        rows.append([part, *cells])
    rows.append(["gaps", *(figure(row["gaps_ms"]) for row in found)])
    rows.append(["all", *(figure(row["wall_ms"]) for row in found)])
    rows.append(["kernels", *(str(row["kernels"]) for row in found)])
    text = "Milliseconds by part, with the floor of the part in brackets. In a gap, no kernel runs.\n\n"
    return text + as_table(["", *(f"{label(row)}, {size(row)}" for row in found)], rows)


def _with_floor(ms: float, floor: float | None) -> str:
    return f"{figure(ms)} ({figure(floor)})" if floor else figure(ms)


def released_table(record: dict) -> str:
    """An extrapolation to 60 layers."""
    ours = _measured(record, OURS)
    head = next((row["ms"] for row in ours.values() if row["work"].startswith("output head")), None)
    if head is None:
        return ""
    rows = []
    for key, row in ours.items():
        pair = _both_sizes(ours, key)
        # The loop of `generate` is no layer, so its tokens are left out.
        if pair is not None and row["work"] in ("decode step in a CUDA graph", "later turn", "prefill"):
            ms = floors.released_ms({layers: of["ms"] for layers, of in pair.items()}, head)
            sparse = floors.sparse_layer_ms({layers: of["ms"] for layers, of in pair.items()})
            rows.append([label(row), figure(ms), figure(sparse), figure(pair[4]["ms"] - 3 * sparse - head)])
    text = (
        "An extrapolation, not a measurement: milliseconds of the released 60 layers, of which 3 are dense, on a card "
        f"with enough memory. It adds up the times of the layers and of the output head ({head:.2f}).\n\n"
    )
    return text + as_table(["", "60 layers", "a sparse layer", "a dense layer"], rows) if rows else ""


def docs_text(record: dict) -> str:
    machine = record["machine"]
    parts = [
        BEGIN,
        f"{machine['gpu']}, torch {machine['torch']}, Transformers {machine['transformers']}, "
        f"{machine['date'].split()[0]}; {machine['matmul_tflops']:.0f} TFLOP/s matmul, "
        f"{machine['read_bytes_per_second'] / 1e12:.2f} TB/s read.",
        _wrapped(tables(record)),
    ]
    if _breakdowns(record):
        parts.append(f"![Share of each part in the time of a pass]({PICTURE})")
    return "\n\n".join([*parts, END])


def _wrapped(text: str) -> str:
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 120) for line in text.splitlines())


def write_docs(record: dict, page: Path) -> None:
    """Replaces the tables of a page that stand between the two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"{page} lacks the marks {BEGIN!r} and {END!r}")
    page.write_text(before + docs_text(record) + after, encoding="utf-8")


# --- picture -----------------------------------------------------------------------------------------------------


def plot(record: dict, path: Path) -> None:
    """Draws a bar for each breakdown: the share of each part in the time of the pass."""
    import matplotlib
    from matplotlib.figure import Figure

    found = _breakdowns(record)
    if not found:
        raise ValueError("the record has no breakdown")
    with matplotlib.rc_context({"svg.hashsalt": "model_step"}):  # the same record gives the same file
        picture = Figure(figsize=(10, 1.6 + 0.7 * len(found)), layout="constrained")
        axes = picture.subplots()
        names = [f"{label(row)}\n{size(row)}, {figure(row['wall_ms'])} ms" for row in found]
        left = [0.0] * len(found)
        colours = matplotlib.colormaps["tab20"]
        for number, part in enumerate((*PARTS, "gaps")):
            # A profiled pass may take longer than the whole time, which is measured without a profiler.
            shares = [
                100 * (row["gaps_ms"] if part == "gaps" else row["parts_ms"].get(part, 0.0)) / row["wall_ms"]
                for row in found
            ]
            colour = "0.85" if part == "gaps" else colours(number)
            bars = axes.barh(names, shares, left=left, color=colour, label=part, height=0.7)
            axes.bar_label(bars, [f"{share:.0f}" if share >= 3 else "" for share in shares], label_type="center")
            left = [start + share for start, share in zip(left, shares)]
        axes.set(xlabel="percent of the time", xlim=(0, max(100.0, *left)))
        axes.invert_yaxis()
        picture.legend(loc="outside lower center", ncols=5, fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, metadata={"Date": None})
        text = path.read_text(encoding="utf-8")
        path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
