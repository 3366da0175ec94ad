"""Ask a small MiniMax-M3 about a picture, a video and a fact in a text of 32k tokens, on any machine.

    python scripts/demo.py [CHECKPOINT] [--output FOLDER] [--seed N] [--long-tokens N]

The questions are held out: the model did not see them when it was trained. The seed alone chooses them. Below each
answer stands the right one, how often the model is right about such questions, and what the answer attended to. Another
seed asks other questions. Without the trained checkpoint, the demonstration builds one with random weights, whose
answers mean nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Everything is on this machine; read when Transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__":
    # Threads that wait sleep, which PyTorch reads when it is imported. Where they spin, a machine that does other work
    # too is slower with two threads than with one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from answer_question import answer_question, mean_blocks, mean_cells, mean_shares
from checkpoint_folder import check_checkpoint
from configuration_minimax_m3 import small_config
from gallery_page import write_page
from heldout_questions import Question, long_question, short_question
from make_tiny_checkpoint import make_tiny_checkpoint
from modeling_minimax_m3.commands.run_checks import check_output
from modeling_minimax_m3.msa import available_backends

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "minimax-m3-small"
SCORES = ROOT / "benchmarks" / "results" / "pretraining_scores.json"  # of this checkpoint
SHADES = " ·░▒▓█"
BAR = 30  # characters of the largest bar


def announce(step: int, text: str) -> None:
    print(f"\n[{step}/4] {text}", flush=True)


def open_checkpoint(folder: Path | None, output: Path) -> Path:
    """The folder of the checkpoint: the given one, the trained one, or a random one that is built.

    Raises:
        ValueError: `folder` holds no checkpoint of a MiniMax-M3.
    """
    if folder is not None:
        check_checkpoint(folder)
        return folder
    if (CHECKPOINT / "config.json").is_file():
        return CHECKPOINT
    print("  there is no trained checkpoint: building one with random weights, whose answers mean nothing")
    return make_tiny_checkpoint(output / "checkpoint", config=small_config(), dtype=torch.bfloat16)


def describe(model: Any) -> str:
    text = model.config.text_config
    backend = available_backends()[0] if text.msa_backend == "auto" else text.msa_backend
    return (
        f"  {model.num_parameters() / 1e6:.1f}M parameters, {model.dtype} on {model.device}, "
        f"{torch.get_num_threads()} threads\n"
        f"  attention of the layers: {', '.join(text.layer_types)}\n"
        f"  sparse attention: backend {backend}, blocks of {text.index_block_size}, "
        f"{text.index_topk_blocks} of them for each query"
    )


def shade(value: float, largest: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(value / largest * len(SHADES)))] if largest > 0 else SHADES[0]


def usual_share(scores: dict[str, Any], record: dict[str, Any]) -> str:
    """How many held-out questions of this kind, or in texts of this length, were answered right."""
    if record["task"] == "recall":
        found = min(scores["recall"], key=lambda one: abs(one["mean_tokens"] - record["prompt_tokens"]))
        about = f"about texts of {found['tokens']:,} tokens"
    else:
        found = scores["answers"][record["task"]]["questions"][record["kind"]]
        about = "of this kind"
    return f"{found['right']} of {found['answers']} held-out questions {about} are answered right"


def show_regions(record: dict[str, Any]) -> None:
    """Prints the regions of a picture, or of the seconds of a video side by side."""
    cells = mean_cells(record, record["answer_token"])
    largest = max(float(grid.max()) for grid in cells)
    seconds = [medium["second"] for medium in record["media"]]
    if seconds[0] is not None:
        width = 2 * cells[0].shape[1] + 1
        print("  " + " ".join(f"{second:g} s".ljust(width) for second in seconds))
    for row in range(cells[0].shape[0]):
        drawn = ("".join(shade(float(value), largest) * 2 for value in grid[row]) for grid in cells)
        print("  " + " ".join(f"|{line}|" for line in drawn))


def show_blocks(record: dict[str, Any]) -> None:
    """Prints the blocks of a text that got the most."""
    token = record["answer_token"]
    shares = mean_blocks(record, token)
    blocks = record["blocks"]
    print(f"  the fact stands in block {', '.join(map(str, blocks['fact']))} of {len(shares)}: {blocks['fact_text']}")
    for value, block in zip(*(found.tolist() for found in shares.topk(min(5, len(shares))))):
        mark = "  <- the fact" if block in blocks["fact"] else ""
        print(f"  block {block:>4} {value:>6.1%} {'█' * round(BAR * value / float(shares.max()))}{mark}")
    for layer, by_head in zip(record["layers"], record["chosen"][token]):
        number = sum(bool(set(blocks["fact"]) & set(chosen)) for chosen in by_head)
        print(f"  layer {layer}: {number} of {len(by_head)} key/value heads chose the block of the fact")


def ask(model: Any, processor: Any, question: Question, scores: dict[str, Any] | None) -> dict[str, Any]:
    """Asks one question, and prints the answer beside the right one and what it attended to."""
    print(f"  question: {question.text}", flush=True)
    record = answer_question(model, processor, question, max_new_tokens=16)
    print(f"  answer:   {record['given']}")
    print(f"  right is: {record['expected']}   ({'right' if record['right'] else 'WRONG'})")
    if scores is not None:
        print(f"  usually:  {usual_share(scores, record)}")
    print(
        f"  {record['prompt_tokens']:,} tokens read and {len(record['tokens'])} written in {record['seconds']:.1f} s"
    )
    token = record["answer_token"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mean_shares(record, token).items())
    print(f"  attention of the answer's first token, mean over the sparse layers and heads: {shares}")
    if "media" in record:
        show_regions(record)
    if record.get("blocks", {}).get("fact"):
        show_blocks(record)
    return record


def main(argv: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Runs the demonstration, and returns the records of its answers."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description="Ask a small MiniMax-M3 about a picture, a video and a long text.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder (examples/minimax-m3-small, or a random one)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where files go (demo_output)")
    parser.add_argument("--seed", type=int, default=0, help="another one asks other questions (0)")
    parser.add_argument("--long-tokens", type=int, default=32000, help="least length of the long prompt (32000)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    logging.disable_progress_bar()

    announce(1, "loading the checkpoint with AutoProcessor and AutoModelForImageTextToText")
    try:
        check_output(arguments.output, "`--output`")
        folder = open_checkpoint(arguments.checkpoint, arguments.output)
        processor = AutoProcessor.from_pretrained(folder)
        long = long_question(processor, "key_value", arguments.long_tokens, arguments.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error
    print(f"  {folder}")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    model = model.to("cuda") if torch.cuda.is_available() else model.float()  # many CPUs are slow in bfloat16
    print(describe(model))
    scores = json.loads(SCORES.read_text()) if folder == CHECKPOINT else None

    announce(2, "a picture")
    records = [ask(model, processor, short_question("image", "colour", arguments.output, arguments.seed), scores)]
    announce(3, "a video")
    question = short_question("video", "direction", arguments.output, arguments.seed)
    records.append(ask(model, processor, question, scores))
    wait = "" if torch.cuda.is_available() else ", which takes less than a minute on two CPU cores"
    announce(4, f"a fact in a text of {arguments.long_tokens:,} tokens{wait}")
    records.append(ask(model, processor, long, scores))

    page = write_page(records, arguments.output / "answers.html", "What the answers attended to")
    right = sum(record["right"] for record in records)
    print(f"\n{right} of {len(records)} answers are right. {time.perf_counter() - started:.0f} s in all.")
    print(f"Each token, layer and head: open {page} in a browser.")
    return records


if __name__ == "__main__":
    main(sys.argv[1:])
