"""Ask a trained checkpoint held-out questions, and write a page that shows what each answer attended to.

    python scripts/make_gallery.py examples/minimax-m3-small docs/gallery.html

Questions are chosen by their kind and the seed alone. The page says how many answers are right.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Read when Transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minimax_m3  # noqa: F401  (registers the classes)
from answer_question import answer_question
from checkpoint_folder import check_checkpoint
from gallery_page import write_page
from heldout_questions import LONG_KINDS, long_question, short_question
from modeling_minimax_m3.commands.run_checks import check_output_file

QUESTIONS = (
    *("image:colour", "image:shape", "image:count", "image:exists", "image:relation"),
    *("video:direction", "video:at_second", "video:which_second", "video:after"),
    *("tools:call", "thinking:sum", "recall:needle", "recall:key_value"),
)
MOST_TOKENS = 96  # of an answer: a call with two arguments has about 60


def main(argv: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Writes the page, and returns the records of the answers. Errors of arguments end the program."""
    parser = argparse.ArgumentParser(description="Write a page of answers and of what they attended to.")
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint that scripts/pretrain.py made")
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, help="TASK:KIND, such as image:colour")
    parser.add_argument("--seed", type=int, default=0, help="another one asks other questions (0)")
    parser.add_argument("--long-tokens", type=int, default=16384, help="least length of the long prompts (16384)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        check_checkpoint(arguments.checkpoint)
        if wrong := [name for name in arguments.questions if name.count(":") != 1]:
            raise ValueError(f"`--questions` must be TASK:KIND, such as image:colour, got {wrong[0]!r}.")
        processor = AutoProcessor.from_pretrained(arguments.checkpoint)
        check_output_file(arguments.page, "`page`")
        with tempfile.TemporaryDirectory() as folder:
            questions = []
            for name in arguments.questions:
                task, kind = name.split(":")
                if task == "recall" and kind in LONG_KINDS:
                    questions.append(long_question(processor, kind, arguments.long_tokens, arguments.seed))
                else:
                    questions.append(short_question(task, kind, Path(folder), arguments.seed))
            model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto").eval()
            model = model.to("cuda") if torch.cuda.is_available() else model.float()
            records = [answer_question(model, processor, one, MOST_TOKENS) for one in tqdm(questions, unit="question")]
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"make_gallery: {error}") from error
    note = f"The checkpoint is {arguments.checkpoint.resolve().name}, the seed {arguments.seed}."
    page = write_page(records, arguments.page, "What a small MiniMax-M3 attends to", note)
    right = sum(record["right"] for record in records)
    print(f"wrote {page} ({page.stat().st_size / 1024:.0f} KiB): {right} of {len(records)} answers are right")
    return records


if __name__ == "__main__":
    main(sys.argv[1:])
