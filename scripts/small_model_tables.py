"""Write the figures of the small checkpoint and of the ablation into docs/pretraining.md and benchmarks/README.md.

    python scripts/small_model_tables.py            # print the tables
    python scripts/small_model_tables.py --write    # put them into the pages

Every figure comes from files: the checkpoint's training.json, and `pretraining_*` in benchmarks/results.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ablation_report import ablation_tables
from modeling_minimax_m3.commands.model_card import as_table
from replace_when_done import replace_when_done
from write_model_card import as_share, longest_row, paragraph, runs_of

# The benchmarks are no installed package.
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.gpu import clustered_blocks  # noqa: E402
from benchmarks.selections import SELECTIONS, load_selections, overlap, random_blocks  # noqa: E402

CHECKPOINT = ROOT / "examples" / "minimax-m3-small"
RESULTS = ROOT / "benchmarks" / "results"
CURVES = (
    "pretraining_curves.jsonl",
    "pretraining_curves_2.jsonl",
    "pretraining_curves_3.jsonl",
)  # of the runs, in their order
# Around the tables of each part of a page.
STARTS = {
    "checkpoint": "<!-- tables of scripts/small_model_tables.py -->\n",
    "ablation": "<!-- tables of scripts/small_model_tables.py: ablation -->\n",
    "ablation from a checkpoint": "<!-- tables of scripts/small_model_tables.py: ablation from a checkpoint -->\n",
}
END = "<!-- end of tables -->\n"
COLUMNS = ("same_after_1", "same_after_64", "tile_of_16", "tile_of_64", "most_chosen")


def run_sentences(record: dict[str, Any], curves: Sequence[list[dict[str, Any]]]) -> str:
    """What the runs were: steps, tokens, rows, device and seconds of each. `curves` has the lines of each run."""
    told = []
    for run, rows in zip(runs_of(record), curves, strict=True):
        pieces = [f"{row['train_runtime']:.0f} s" for row in rows if "train_runtime" in row]
        resumed = {1: "", 2: ", resumed once"}.get(len(pieces), f", resumed {len(pieces) - 1} times")
        told.append(
            f"{run['steps']:,} steps with {rows[-1]['tokens'] / 1e6:.0f}M tokens, in rows of up to {longest_row(run):,}, "
            f"on one {run['device']} with PyTorch {run['torch']}: {' + '.join(pieces)}{resumed}"
        )
    return paragraph(f"The checkpoint comes from {'. Then came '.join(told)}.")


def score_tables(scores: dict[str, Any], longer: dict[str, Any]) -> str:
    """Right answers by task and question, recall and the rest by length."""
    answers = []
    for task, of_task in scores["answers"].items():
        answers.append((f"**{task}**", *as_share(of_task), of_task["answers"]))
        if len(of_task["questions"]) > 1:
            answers += [
                (f"{task}: {name.replace('_', ' ')}", *as_share(one), one["answers"])
                for name, one in of_task["questions"].items()
            ]
    more = {one["tokens"]: one for one in longer["recall"] if one["tokens"] > scores["recall"][-1]["tokens"]}
    recall = {one["tokens"]: one for one in scores["recall"]} | more
    perplexity = {one["tokens"]: f"{one['perplexity']:.2f}" for one in scores["perplexity"]}
    coverage = {one["tokens"]: f"{one['share']:.1%}{_best(one)}" for one in scores["coverage"]}
    lengths = []
    for tokens in sorted({*recall, *perplexity, *coverage}):
        right = (*as_share(recall[tokens]), recall[tokens]["answers"]) if tokens in recall else ("", "", "")
        lengths.append((f"{tokens:,}", *right, perplexity.get(tokens, ""), coverage.get(tokens, "")))
    head = ("tokens", "recall", "95% interval", "answers", "perplexity of code", "attention in the selected blocks")
    measured = f"Scores were measured on {scores['device']} with PyTorch {scores['torch']}."
    return "\n".join(
        [
            paragraph(measured),
            as_table(("task, question", "right", "95% interval", "answers"), answers),
            as_table(head, lengths),
        ]
    )


def _best(coverage: dict[str, Any]) -> str:
    """What the best choice of blocks would hold, which older results lack."""
    return f" (at best {coverage['best']:.1%})" if "best" in coverage else ""


def overlap_table(path: Path = SELECTIONS) -> str:
    """The overlap of the recorded lists, beside random and clustered ones of the same length."""
    lists, block_size, about = load_selections(path)
    tokens, topk = lists.shape[1:]
    torch.manual_seed(0)
    rows = dict(about["overlap"])
    rows["random"] = overlap(random_blocks(tokens, block_size, topk), block_size)
    rows["clustered"] = overlap(clustered_blocks(tokens, device="cpu")[:, 0], block_size)
    cells = [(name, *(f"{found[column]:.2f}" for column in COLUMNS)) for name, found in rows.items()]
    return as_table((f"lists of {tokens:,} queries", *(f"`{column}`" for column in COLUMNS)), cells)


def pages() -> list[tuple[Path, str, str]]:
    """The tables: their page, the part of it as `STARTS` has it, and their text."""
    scores, longer, ablation, recall = (
        json.loads((RESULTS / f"pretraining_{name}.json").read_text())
        for name in ("scores", "recall_1m", "ablation", "ablation_recall")
    )
    curves = [[json.loads(line) for line in (RESULTS / name).read_text().splitlines()] for name in CURVES]
    record = json.loads((CHECKPOINT / "training.json").read_text())
    page = ROOT / "docs" / "pretraining.md"
    return [
        (page, "checkpoint", run_sentences(record, curves) + "\n" + score_tables(scores, longer)),
        (page, "ablation", ablation_tables(ablation)),
        (page, "ablation from a checkpoint", ablation_tables(recall)),
        (ROOT / "benchmarks" / "README.md", "checkpoint", overlap_table()),
    ]


def replace_tables(text: str, tables: str, part: str = "checkpoint") -> str:
    """A page with other tables between the marks of a part."""
    start = STARTS[part]
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"the page must have the lines {start.strip()!r} and {END.strip()!r}.")
    return f"{before}{start}\n{tables}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures of the small checkpoint and the ablation.")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    arguments = parser.parse_args()
    for page, part, tables in pages():
        if arguments.write:
            with replace_when_done(page) as unfinished:
                unfinished.write_text(replace_tables(page.read_text(encoding="utf-8"), tables, part), encoding="utf-8")
            print(f"wrote {part} of {page}")
        else:
            print(tables)


if __name__ == "__main__":
    main()
