"""What the runs of `ablation.py` say together: means over seeds with intervals, ratios of losses, tables, a picture."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ablation_runs import ARMS, EVERYTHING, JOINT
from modeling_minimax_m3.commands.model_card import as_table
from replace_when_done import replace_when_done

# 97.5% quantiles of Student's distribution by the number of values: an interval from three seeds is wide.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
BASE = "dense"  # the arm whose loss those of the other attention types are divided by
ATTENTION = [name for name, arm in ARMS.items() if arm.modalities == EVERYTHING and name != BASE]
MODALITIES = {name: arm.modalities for name, arm in ARMS.items() if arm.modalities != EVERYTHING}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the values of some seeds, its 95% interval by Student's distribution, and the values."""
    mean = float(np.mean(values))
    found: dict[str, Any] = {"mean": round(mean, 5), "values": [round(value, 5) for value in values]}
    if len(values) > 1:
        quantile = STUDENT.get(len(values), 2.0 if len(values) > 8 else math.nan)
        half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        found["interval"] = [round(mean - half, 5), round(mean + half, 5)]
    return found


def common_step(records: Sequence[dict[str, Any]]) -> int:
    """The last step at which all runs were evaluated.

    Raises:
        ValueError: There is none.
    """
    steps = [{evaluation["step"] for evaluation in record["evaluations"]} for record in records]
    common = set.intersection(*steps)
    if not common:
        reached = {f"{record['arm']}/{record['seed']}": max(found, default=0) for record, found in zip(records, steps)}
        raise ValueError(f"no step has an evaluation of all runs. The last one of each: {reached}.")
    return max(common)


def compare(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares the runs at the last step that all reached.

    Returns:
        `step`; `scores`, for each score and arm as `over_seeds` has it; `loss_ratios`, the loss of an arm divided by
        that of another on the same held-out rows, of each seed; `coverage` of the selected blocks by arm; and,
        where runs measured it, `recall`: the share of right numbers by arm and length of the text.
    """
    step = common_step(records)
    scores: defaultdict[str, defaultdict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        (found,) = (evaluation for evaluation in record["evaluations"] if evaluation["step"] == step)
        for name, value in found.items():
            if name.startswith(("loss", "accuracy_", "expert_load", "answers_")):
                scores[name][record["arm"]][record["seed"]] = value
    ratios: dict[str, Any] = {}
    for arm in ATTENTION:
        for name in ("loss", *(f"loss_{modality}" for parts in MODALITIES.values() for modality in parts)):
            _add_ratio(ratios, scores[name], arm, BASE, name)
    for arm, modalities in MODALITIES.items():
        for modality in modalities:
            _add_ratio(ratios, scores[f"loss_{modality}"], JOINT, arm, f"loss_{modality}")
    covered: defaultdict[str, list[float]] = defaultdict(list)
    recalled: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        covered[record["arm"]] += [found["share"] for found in record["coverage"]]
        for found in record.get("recall", ()):
            recalled[record["arm"]][str(found["tokens"])].append(found["accuracy"])
    result = {
        "step": step,
        "scores": {
            name: {arm: over_seeds(list(values.values())) for arm, values in arms.items()}
            for name, arms in sorted(scores.items())
        },
        "loss_ratios": ratios,
        "coverage": {arm: over_seeds(values) for arm, values in covered.items() if values},
    }
    if recalled:
        result["recall"] = {
            arm: {tokens: over_seeds(values) for tokens, values in lengths.items()}
            for arm, lengths in recalled.items()
        }
    return result


def _add_ratio(ratios: dict, losses: dict[str, dict[int, float]], arm: str, base: str, name: str) -> None:
    seeds = sorted(set(losses.get(arm, ())) & set(losses.get(base, ())))
    if seeds:
        values = [losses[arm][seed] / losses[base][seed] for seed in seeds]
        ratios[f"{name}: {arm} / {base}"] = over_seeds(values)


def print_comparison(comparison: dict[str, Any]) -> None:
    """Ratios of losses, the coverage, and the recall by length."""
    print(f"after {comparison['step']:,} steps, mean over seeds [95% interval]:")
    named = [(name, found) for name, found in comparison["loss_ratios"].items()]
    named += [(f"coverage of {arm}", found) for arm, found in comparison["coverage"].items()]
    for arm, lengths in comparison.get("recall", {}).items():
        named += [(f"recall of {arm} in {int(tokens):,} tokens", found) for tokens, found in lengths.items()]
    for name, found in named:
        interval = found.get("interval")
        print(f"  {name}: {found['mean']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))


def ablation_tables(result: dict[str, Any]) -> str:
    """Markdown of the content of ablation.json: ratios of losses, right answers by task, coverage, recall by length."""
    comparison, arms = result["comparison"], result["budget"]["arms"]
    ratios = []
    for name, found in comparison["loss_ratios"].items():
        low, high = found["interval"]
        loss, _, pair = name.partition(": ")
        shown = (
            f"{found['mean']:.3f}",
            f"{low:.3f} to {high:.3f}",
            ", ".join(f"{one:.3f}" for one in found["values"]),
        )
        ratios.append((pair, loss.removeprefix("loss_") if "_" in loss else "all", *shown))
    answers = []
    for name, found in comparison["scores"].items():
        if name.startswith("accuracy_") and name.count("_") == 1:
            cells = (f"{found[arm]['mean']:.1%}" if arm in found else "" for arm in arms)
            answers.append((name.removeprefix("accuracy_"), *cells))
    covered: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for record in result["runs"]:
        covered[record["arm"]] += record["coverage"]
    coverage = []
    for arm, values in covered.items():
        if values:
            columns = ([one[name] for one in values] for name in ("share", "best", "blocks_share"))
            coverage.append((arm, *(f"{float(np.mean(column)):.1%}" for column in columns)))
    recall = []
    by_arm = comparison.get("recall", {})
    for tokens in next(iter(by_arm.values()), {}):
        cells = (
            f"{by_arm[arm][tokens]['mean']:.1%} ({', '.join(f'{one:.0%}' for one in by_arm[arm][tokens]['values'])})"
            for arm in arms
        )
        recall.append((f"{int(tokens):,}", *cells))
    tables = (
        (("held-out loss of", "rows", "mean ratio", "95% interval", "each seed"), ratios),
        (("right answers, mean over seeds", *arms), answers),
        (("arm", "attention in the selected blocks", "at best", "share of the blocks"), coverage),
        (("tokens of the text", *(f"recall, {arm}" for arm in arms)), recall),
    )
    return "\n".join(as_table(head, rows) for head, rows in tables if rows)


def plot_ablation(result: dict[str, Any], path: str | Path) -> Path:
    """Draws held-out losses over steps, losses relative to each other, accuracies, and recall where it was measured.

    Args:
        result (dict): The content of ablation.json.
        path (str or Path): Path of the picture. Its suffix is the format.

    Returns:
        `path`.
    """
    path = Path(path)
    recall = result["comparison"].get("recall", {})
    figure = Figure(figsize=(22 if recall else 17, 4.8), dpi=110, layout="constrained")
    losses, ratios, accuracies, *more = figure.subplots(
        1, 4 if recall else 3, width_ratios=(1, 1.1, 1.1, 1)[: 4 if recall else 3]
    )
    runs: defaultdict[str, list] = defaultdict(list)
    for record in result["runs"]:
        runs[record["arm"]].append(record["evaluations"])
    for number, arm in enumerate(arm for arm in runs if arm not in MODALITIES):
        for i, evaluations in enumerate(runs[arm]):
            places, values = [e["step"] for e in evaluations], [e["loss"] for e in evaluations]
            losses.plot(places, values, color=f"C{number}", label=arm if i == 0 else None, alpha=0.8)
    losses.set(xlabel="step", ylabel="nats a token", title="held-out loss, a line for each seed")
    losses.legend()

    comparison = result["comparison"]
    _bars(ratios, {"": comparison["loss_ratios"]}, "held-out loss of one arm / of the other")
    ratios.axvline(1.0, color="grey", linewidth=1)
    ratios.autoscale(axis="x")
    tasks = [name for name in comparison["scores"] if name.startswith("accuracy_") and name.count("_") == 1]
    by_arm = {
        arm: {
            task.removeprefix("accuracy_"): comparison["scores"][task][arm]
            for task in tasks
            if arm in comparison["scores"][task]
        }
        for arm in runs
    }
    _bars(accuracies, by_arm, "share of right answers, 95% interval over seeds")
    accuracies.set_xlim(0, 1.02)
    accuracies.legend(fontsize=8)
    for panel in more:
        for number, (arm, lengths) in enumerate(recall.items()):
            tokens, means = [int(length) for length in lengths], [found["mean"] for found in lengths.values()]
            style = ("-", "--", ":")[number % 3]  # arms that are equally good lie on each other
            (line,) = panel.plot(tokens, means, style, marker="o", label=arm)
            for place, found in zip(tokens, lengths.values()):
                panel.plot([place] * len(found["values"]), found["values"], ".", color=line.get_color(), markersize=4)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="tokens of the text", ylim=(-0.02, 1.02), title="right numbers, mean and each seed")
        panel.legend(fontsize=8)
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)
    return path


def _bars(panel: Any, groups: dict[str, dict[str, dict[str, Any]]], title: str) -> None:
    """A point with its interval for each name of each group."""
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    height = 0.8 / max(1, len(groups))
    for number, (label, found) in enumerate(groups.items()):
        places = [names.index(name) + height * (number - (len(groups) - 1) / 2) for name in found]
        means = [value["mean"] for value in found.values()]
        halves = [value["interval"][1] - value["mean"] if "interval" in value else 0.0 for value in found.values()]
        panel.errorbar(means, places, xerr=halves, fmt="o", capsize=3, markersize=4, label=label or None)
    panel.set_yticks(range(len(names)), [name.removeprefix("loss_") for name in names], fontsize=8)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
