"""Write the model card of a checkpoint that scripts/pretrain.py trained, as the Hub wants it: README.md with metadata.

    python scripts/write_model_card.py examples/minimax-m3-small [--evaluation results.json]

Every figure comes from files: `training.json` and `config.json` of the checkpoint, and the results of an evaluation.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from textwrap import fill
from typing import Any

from card_questions import questions_section
from configuration_minimax_m3 import MiniMaxM3VLConfig
from modeling_minimax_m3.commands.card_examples import examples_of, loading
from modeling_minimax_m3.commands.model_card import CARD, ModelCard, as_table, hide_in_command
from modeling_minimax_m3.conversion.source import read_json
from modeling_minimax_m3.conversion.tensor_files import read_header
from replace_when_done import replace_when_done

RECORD = "training.json"
WEAK = 0.9  # a kind of question with a smaller share of right answers is one of the model's limits
NEEDED = ("command", "seed", "steps", "python", "torch", "device", "heldout")  # of the record


def read_record(folder: Path) -> dict[str, Any]:
    """What `scripts/pretrain.py` wrote about the training.

    Raises:
        FileNotFoundError: The folder has no such record.
        ValueError: The record lacks a field.
    """
    record = read_json(folder / RECORD)
    if missing := [name for name in NEEDED if name not in record]:
        raise ValueError(f"{folder / RECORD} must have the fields {list(NEEDED)}, but {missing} are missing.")
    return record


def runs_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that made a checkpoint, in their order, each with its own record."""
    return [*record.get("earlier_runs", ()), record]


def longest_row(run: dict[str, Any]) -> int:
    """Most tokens of a row of a run."""
    return int(run["options"]["stages"].split(",")[-1].split(":")[0])


def trained(record: dict[str, Any]) -> str:
    """Sentence about the steps of each run, its device and its seed, and the commands of all runs but the last."""
    runs = runs_of(record)
    steps = [f"for {run['steps']:,} steps on {run['device']}, with seed {run['seed']}" for run in runs]
    text = paragraph(
        f"Trained from random weights {', then '.join(steps)}: text, code, recall, tool calls, thinking, pictures and "
        "videos, mixed from the first step. The machine makes all data itself: from Python's standard library and "
        "language reference, drawn scenes and videos, and scikit-learn's handwritten digits. Held-out rows share no file "
        "and no digit with the training rows."
    )
    if len(runs) > 1:
        text += "\n" + paragraph(
            "Each run after the first started with the weights of the one before, which then stood in the folder that "
            f'`--init_from` names. The command of run {len(runs)} stands under "Made by".'
        )
    for number, run in enumerate(runs[:-1], 1):
        text += f"\nRun {number} of {len(runs)}:\n\n"
        text += f"```bash\n{hide_in_command(run['command'])}\n```\n"
    return text


def architecture(folder: Path) -> str:
    """A table of the sizes of a checkpoint."""
    config = MiniMaxM3VLConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    tensors = [region for file in folder.glob("*.safetensors") for region in read_header(file)[0].values()]
    parameters = sum(prod(region.shape) for region in tensors)
    kinds = [f"{text.layer_types.count(kind)} of {kind}" for kind in dict.fromkeys(text.layer_types)]
    rows = [
        ("parameters", f"{parameters:,}"),
        ("layers", ", ".join(kinds)),
        ("hidden size, vocabulary", f"{text.hidden_size}, {text.vocab_size}"),
        ("query heads, key/value heads, channels of a head", f"{text.num_attention_heads}, {text.num_key_value_heads}, {text.head_dim}"),
        ("keys of a block, blocks that a query selects", f"{text.index_block_size}, {text.index_topk_blocks}"),
        ("experts of a layer, experts of a token", f"{text.num_local_experts}, {text.num_experts_per_tok}"),
        ("vision tower", f"{vision.num_hidden_layers} layers of {vision.hidden_size}"),
    ]  # fmt: skip
    return as_table(("part", "size"), rows)


def evaluation_sections(results: dict[str, Any]) -> dict[str, str]:
    """Tables of the parts of `results.json` that are there, by heading."""
    sections: dict[str, str] = {}
    rows: list[tuple[str, ...]]
    if answers := results.get("answers"):
        rows = [(task, *as_share(one), f"{one['answers']:,}") for task, one in answers.items()]
        sections["Right answers to held-out questions"] = as_table(("task", "right", "95% interval", "answers"), rows)
    if recall := results.get("recall"):
        rows = [(f"{one['tokens']:,}", *as_share(one)) for one in recall]
        one_kind = "One kind of question alone: the number of a thing.\n\n"
        sections["Recall by length"] = one_kind + as_table(("tokens", "right", "95% interval"), rows)
    if perplexity := results.get("perplexity"):
        rows = [(f"{one['tokens']:,}", f"{one['perplexity']:.2f}") for one in perplexity]
        sections["Perplexity of held-out code"] = as_table(("tokens of context", "perplexity"), rows)
    if coverage := results.get("coverage"):
        rows = [(f"{one['tokens']:,}", f"{one['share']:.1%}") for one in coverage]
        head = ("tokens", "share of the attention to all keys")
        sections["Attention that the selected blocks hold"] = as_table(head, rows)
    return sections


def limits(record: dict[str, Any], results: dict[str, Any]) -> str:
    """Sentences about the kinds of questions and the lengths of texts that go wrong, with their figures."""
    found = []
    questions = [
        (f"{task}: {name.replace('_', ' ')}", one["accuracy"])
        for task, scores in results.get("answers", {}).items()
        for name, one in scores.get("questions", {}).items()
        if one["accuracy"] < WEAK
    ]
    if questions:
        listed = ", ".join(f"{name} ({share:.1%})" for name, share in sorted(questions, key=lambda one: one[1]))
        found.append(f"Fewer than {WEAK:.0%} of its answers are right to these kinds of questions: {listed}.")
    if record.get("options", {}).get("stages") and (recall := results.get("recall")):
        longest = max(map(longest_row, runs_of(record)))
        listed = ", ".join(f"{one['accuracy']:.1%} at {one['tokens']:,}" for one in recall if one["tokens"] >= longest)
        found.append(f"Its training rows had up to {longest:,} tokens. Recall from this length on: {listed}.")
    return " ".join(found)


def paragraph(text: str) -> str:
    """The text in lines of the repository's width."""
    return fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def as_share(scores: dict[str, Any]) -> tuple[str, str]:
    """The share of right answers and its interval, as text."""
    low, high = scores["interval"]
    return f"{scores['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of the first evaluation, and of the others their recall in longer texts.

    Raises:
        ValueError: A file has no scores.
    """
    results: dict[str, Any] = {}
    for path in paths:
        found = read_json(path)
        if not evaluation_sections(found):
            raise ValueError(f"`--evaluation` must be results of evaluate_pretraining.py, but {path} has no scores.")
        longest = results["recall"][-1]["tokens"] if results.get("recall") else 0
        recall = [*results.get("recall", []), *(one for one in found.get("recall", []) if one["tokens"] > longest)]
        results = (results or found) | ({"recall": recall} if recall else {})
    return results


def make_card(folder: Path, evaluations: Sequence[Path] = (), load_as: str | None = None) -> ModelCard:
    """The card of a trained checkpoint.

    Args:
        folder (Path): The checkpoint.
        evaluations (sequence of Path): JSON files of evaluations, as `read_results` takes them. Their scores stand in
            place of the training's.
        load_as (str, optional): What the examples load: a name on the Hub or a folder. Default: `folder`.
    """
    record = read_record(folder)
    title = folder.resolve().name
    scores = {name: value for name, value in record["heldout"].items() if name != "eval_runtime"}
    note = (
        "The scores are those of the last evaluation of the run. An accuracy is the share of right answers. A loss is "
        "in nats of a learned token."
    )
    tasks = record.get("options", {}).get("tasks", "")
    sections = {"Questions that it knows": questions_section(tasks), "Architecture": architecture(folder)}
    results = read_results(evaluations)
    sections |= evaluation_sections(results)
    if answers := results.get("answers"):
        scores = {f"eval_accuracy_{task}": one["accuracy"] for task, one in answers.items()}
        note = ""
    sections["Training"] = trained(record) + (f"\n{paragraph(note)}" if note else "")
    sections["Limits"] = paragraph(
        "The model is made to show and test the architecture. It knows nothing about the world. The scores hold for the "
        f"questions, pictures, videos and tools above, and for nothing else. {limits(record, results)}"
    )
    return ModelCard(
        title=title,
        base=None,
        is_adapter=False,
        is_composite=True,
        usage=loading(load_as or str(folder)),
        command=record["command"],
        scores=scores,
        lists_scores="answers" not in results,  # a table with intervals has them otherwise
        examples=examples_of(load_as or str(folder)),
        opening=paragraph(
            "A small MiniMax-M3 with every part of the released one: dense and sparse attention, experts, and a vision "
            "tower for pictures and videos. The examples need the package of this repository. Run these commands in the "
            "folder of the repository, and Python too:"
        )
        + "\n```bash\n"
        'pip install ".[train,video]"\n'
        "python scripts/example_media.py   # draws photo.png and clip.mp4, which the examples read\n"
        "```",
        sections=sections,
        made_with={"python": record["python"], "torch": record["torch"], "device": record["device"]},
        license="apache-2.0",
    )


def main(argv: Iterable[str] | None = None) -> Path:
    """Writes the card. Errors of files end the program with their message."""
    parser = argparse.ArgumentParser(
        description="Write the model card of a checkpoint that scripts/pretrain.py trained."
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint, with training.json")
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=(),
        help="JSON files with the results of an evaluation, and then of recall in longer texts",
    )
    parser.add_argument("--load_as", help="name on the Hub or folder that the examples load (the folder)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    path = arguments.checkpoint / CARD
    try:
        card = str(make_card(arguments.checkpoint, arguments.evaluation, arguments.load_as))
    except (ValueError, OSError, KeyError) as error:
        raise SystemExit(f"write_model_card: {error}") from error
    with replace_when_done(path) as unfinished:
        unfinished.write_text(card, encoding="utf-8")
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
