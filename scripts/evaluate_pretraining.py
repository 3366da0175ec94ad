"""Score a model of `pretrain.py` on held-out data: answers, recall by length, perplexity, experts, selected blocks.

    python scripts/evaluate_pretraining.py examples/minimax-m3-small scores
    python scripts/evaluate_pretraining.py examples/minimax-m3-small scores --quick    # on a CPU
    python scripts/evaluate_pretraining.py examples/minimax-m3-small scores --parts recall --longest 1048576

The folder gets `results.json` and a picture of it, `results.png`. `minimax-m3 evaluate` is another command: it scores
files of your own. docs/pretraining.md explains the parts and the figures.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# Everything is on this machine; both are read when Transformers and its tokenizers are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minimax_m3  # noqa: F401 - registers the classes
from checkpoint_folder import check_checkpoint
from evaluation_answers import answer_batch, answer_in_turn, batches, by_question, share
from evaluation_probes import CodeDocuments, code_perplexity, coverage, expert_loads, loaded_rows
from evaluation_prompts import Job, Prompt, PromptData, judge
from modeling_minimax_m3.commands.run_checks import check_output
from name_lists import read_names
from plot_evaluation import plot_evaluation
from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.pretraining import TASKS, RowEncoder, make_row
from replace_when_done import replace_when_done

FILE_TASKS = ("image", "digits", "video")
QUESTION_TASKS = tuple(task for task in TASKS if task not in ("code", "english"))
TASKS_OF_PART = {"answers": QUESTION_TASKS, "files": FILE_TASKS}  # of the others, which measure any task or none: all
PARTS = ("answers", "files", "recall", "perplexity", "coverage", "experts")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST = 1024  # tokens, of recall and perplexity
LONGEST_BATCHED = 16384  # tokens of the prompts that a GPU answers all at once
LONGEST_COVERED = 65536  # tokens of a text whose attention is measured
LEAST_ANSWERS = 3  # of a row, about: how many rows are made for a number of answers


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the model, tokenizer and processor")
    parser.add_argument("output", type=Path, help="folder for results.json and results.png")
    parser.add_argument("--quick", action="store_true", help="few answers and short texts, for a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to measure, of {','.join(PARTS)} (all)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"tasks with questions, of {','.join(TASKS)} (all)")
    parser.add_argument("--answers", type=int, help="least answers of a task (600; quick: 10)")
    parser.add_argument("--file_answers", type=int, help="least answers of a task that reads files (150; quick: 5)")
    parser.add_argument("--longest", type=int, help="tokens of the longest text (262144; quick: 2048)")
    parser.add_argument("--recall_rows", type=int, help="texts of each length, five questions each (12; quick: 1)")
    parser.add_argument("--documents", type=int, help="of perplexity and coverage (8; quick: 2)")
    parser.add_argument("--batch_tokens", type=int, help="of the prompts of a batch (262144; on a CPU 8192)")
    parser.add_argument("--workers", type=int, help="processes that make prompts (one a core, at most 14)")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out rows (1)")
    arguments = parser.parse_args(argv)
    sizes = {"answers": (600, 10), "file_answers": (150, 5), "longest": (262144, 2048), "recall_rows": (12, 1)}
    sizes |= {"documents": (8, 2)}
    for name, (size, quick) in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else size)
    if arguments.batch_tokens is None:
        arguments.batch_tokens = 262144 if torch.cuda.is_available() else 8192
    if arguments.workers is None:
        arguments.workers = max(0, min(14, (os.cpu_count() or 1) - 1))
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` or `ImportError` for an option that cannot work, before the model is loaded."""
    check_checkpoint(arguments.checkpoint)
    for name, known in (("parts", PARTS), ("tasks", tuple(TASKS))):
        setattr(arguments, name, read_names(getattr(arguments, name), f"--{name}", known))
    if not any(set(TASKS_OF_PART.get(part, arguments.tasks)) & set(arguments.tasks) for part in arguments.parts):
        raise ValueError(
            f"`--tasks` must have one of {', '.join(TASKS_OF_PART[arguments.parts[-1]])} for the part "
            f"{arguments.parts[-1]!r}, got {', '.join(arguments.tasks)}."
        )
    for name in ("answers", "file_answers", "recall_rows", "documents", "batch_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(arguments, name)}.")
    if arguments.workers < 0:
        raise ValueError(f"`--workers` must be at least 0, got {arguments.workers}.")
    if arguments.longest < SHORTEST:
        raise ValueError(f"`--longest` must be at least {SHORTEST} tokens, got {arguments.longest}.")
    if "digits" in arguments.tasks and {"answers", "files", "experts"} & set(arguments.parts):
        make_row("digits", "heldout", 0)  # without scikit-learn this fails, and here nothing has been measured yet
    if "files" in arguments.parts and "video" in arguments.tasks:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "the part 'files' writes and reads videos with PyAV, which is not installed: `pip install av`, or leave "
                "the part out with `--parts`."
            ) from error
    check_output(arguments.output, "`output`")


def lengths_up_to(longest: int) -> list[int]:
    """Each doubling of `SHORTEST`, up to `longest`."""
    doublings = (SHORTEST * 2**number for number in range(longest.bit_length()))
    return [length for length in doublings if length <= longest]


class Evaluation:
    """A model on its device, with what the parts share.

    Args:
        model, processor: Of the checkpoint.
        arguments (argparse.Namespace): The options of the script.
    """

    def __init__(self, model: Any, processor: MiniMaxM3VLProcessor, arguments: argparse.Namespace):
        self.model, self.processor, self.options = model, processor, arguments
        self.encoder = RowEncoder(processor)

    def run(self) -> dict[str, Any]:
        """All wanted parts, each with the seconds that it took."""
        found: dict[str, Any] = {}
        for name in self.options.parts:
            started = time.perf_counter()
            found[name] = getattr(self, name)()
            seconds = time.perf_counter() - started
            found.setdefault("seconds", {})[name] = round(seconds, 1)
            print(f"{name}: measured in {seconds:.1f} s", flush=True)
        return found

    def _made(self, data: Dataset, size: int) -> DataLoader:
        """The items of a data set, which workers make ahead."""
        return DataLoader(data, batch_size=None, num_workers=min(self.options.workers, size), collate_fn=_as_it_is)

    def _prompts(self, jobs: Sequence[Job]) -> Iterator[list[Prompt]]:
        yield from self._made(PromptData(self.processor, jobs, self.options.seed), len(jobs))

    def answers(self) -> dict[str, Any]:
        """Accuracy of each task, over all of its questions."""
        tasks = [task for task in self.options.tasks if task in QUESTION_TASKS]
        return {task: self._task("row", task, self.options.answers) for task in tasks}

    def files(self) -> dict[str, Any]:
        """The same for tasks with pictures or videos, read from png and mp4 files by the processor."""
        tasks = [task for task in self.options.tasks if task in FILE_TASKS]
        return {task: self._task("files", task, self.options.file_answers) for task in tasks}

    def _task(self, kind: str, task: str, least: int) -> dict[str, Any]:
        jobs = [Job(kind, task, index) for index in range(-(-least // LEAST_ANSWERS))]
        rows: list[list[Prompt]] = []
        for prompts in self._prompts(jobs):
            rows.append(prompts)
            if sum(map(len, rows)) >= least:
                break
        verdicts = self._verdicts(rows, f"{task}{' from files' if kind == 'files' else ''}")
        return by_question([prompt for row in rows for prompt in row], verdicts)

    def _verdicts(self, rows: list[list[Prompt]], name: str) -> list[tuple[bool, bool, str]]:
        """What `judge` says about the answer to each prompt.

        A GPU answers all prompts at once, and reads the beginning of a row again for each of its questions. On a CPU,
        or in a long text, that would take longer than one question after the other.
        """
        prompts = [prompt for row in rows for prompt in row]
        is_in_turn = self.model.device.type == "cpu" or max(len(prompt.ids) for prompt in prompts) > LONGEST_BATCHED
        written: dict[int, Any] = {}
        with tqdm(total=len(prompts), desc=name, unit="answer", disable=None) as progress:
            if is_in_turn:
                for row in rows:
                    written |= enumerate(answer_in_turn(self.model, row), len(written))
                    progress.update(len(row))
            else:
                for numbers in batches(prompts, self.options.batch_tokens):
                    written |= zip(numbers, answer_batch(self.model, [prompts[number] for number in numbers]))
                    progress.update(len(numbers))
        return [judge(self.processor, prompt, written[number]) for number, prompt in enumerate(prompts)]

    def recall(self) -> list[dict[str, Any]]:
        """The share of right numbers by length of the text and depth of the fact in it."""
        found = []
        lengths, count = lengths_up_to(self.options.longest), self.options.recall_rows
        made = self._prompts(
            [Job("recall", "recall", row, length, DEPTHS) for length in lengths for row in range(count)]
        )
        for length in lengths:
            rows = [next(made) for _ in range(count)]
            prompts = [prompt for row in rows for prompt in row]
            outcomes = [right for right, _, _ in self._verdicts(rows, f"recall in {length:,} tokens")]
            found.append(
                {"tokens": length, "mean_tokens": round(sum(len(prompt.ids) for prompt in prompts) / len(prompts))}
                | share(outcomes)
                | {
                    "depths": {
                        str(depth): share(right for prompt, right in zip(prompts, outcomes) if prompt.depth == depth)
                        for depth in DEPTHS
                    }
                }
            )
        return found

    @cached_property
    def _documents(self) -> list[Any]:
        """Held-out code, as long as the longest context or the longest text whose coverage is measured."""
        longest = max(*self._context_lengths(), *self._coverage_lengths())
        data = CodeDocuments(self.encoder, self.options.documents, longest, self.options.seed)
        return list(tqdm(self._made(data, len(data)), desc="documents", unit="text", disable=None))

    def _context_lengths(self) -> list[int]:
        return [SHORTEST // 2, *lengths_up_to(self.options.longest)]

    def _coverage_lengths(self) -> list[int]:
        """From twice what a query selects."""
        text = self.model.config.get_text_config()
        shortest = 2 * text.index_topk_blocks * text.index_block_size
        lengths = [shortest * 4**number for number in range(4)]
        return [length for length in lengths if length <= min(self.options.longest, LONGEST_COVERED)] or [shortest]

    def perplexity(self) -> list[dict[str, Any]]:
        """Perplexity of held-out code behind contexts of different lengths."""
        documents, lengths = self._documents, self._context_lengths()
        with tqdm(desc="perplexity", unit="pass", disable=None) as progress:
            return code_perplexity(self.model, documents, lengths, self.options.batch_tokens, progress.update)

    def coverage(self) -> list[dict[str, Any]]:
        """The share of the attention to all keys that the selected blocks hold, on held-out code."""
        documents = self._documents
        with tqdm(desc="coverage", unit="text", disable=None) as progress:
            return coverage(self.model, documents, self._coverage_lengths(), progress.update)

    def experts(self) -> dict[str, Any]:
        """How the experts share the tokens of each task, by layer."""
        rows = loaded_rows(self.encoder, self.options.tasks, 4 if self.options.quick else 24, self.options.seed)
        with tqdm(desc="experts", total=len(rows), unit="task", disable=None) as progress:
            return expert_loads(self.model, rows, self.options.batch_tokens, progress.update)


def _as_it_is(item: Any) -> Any:
    return item


def print_summary(found: dict[str, Any]) -> None:
    """One line for each figure."""
    for part in ("answers", "files"):
        for task, scores in found.get(part, {}).items():
            low, high = scores["interval"]
            name = f"{task} from files" if part == "files" else task
            print(f"{name}: {scores['accuracy']:.1%} right ({low:.1%} to {high:.1%}) of {scores['answers']} answers")
    for scores in found.get("recall", ()):
        low, high = scores["interval"]
        print(f"recall in {scores['tokens']:,} tokens: {scores['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    for scores in found.get("perplexity", ()):
        print(f"code behind {scores['tokens']:,} tokens: perplexity {scores['perplexity']:.2f}")
    for scores in found.get("coverage", ()):
        low, high = scores["interval"]
        print(
            f"selected blocks, {scores['tokens']:,} tokens: {scores['share']:.1%} of the attention ({low:.1%} to "
            f"{high:.1%}); the best choice holds {scores['best']:.1%}"
        )
    if layers := found.get("experts", {}).get("all"):
        most = max(layer["most_used"] * len(layer["shares"]) for layer in layers)
        print(f"experts: the most used one of a layer has {most:.2f} times its even share")


def main(argv: Iterable[str] | None = None) -> dict[str, Any]:
    """Evaluates. Errors of arguments end the program with their message."""
    arguments = read_arguments(None if argv is None else list(argv))
    try:
        check_arguments(arguments)
        processor: Any = AutoProcessor.from_pretrained(arguments.checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto").eval()
        if torch.cuda.is_available():
            model.to("cuda")
        else:
            model.float()  # CPUs are slow in bfloat16
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"evaluate_pretraining: {error}") from error
    started = time.perf_counter()
    found = Evaluation(model, processor, arguments).run()
    record = {
        "checkpoint": arguments.checkpoint.name,
        "command": ["python", "scripts/evaluate_pretraining.py", *(sys.argv[1:] if argv is None else list(argv))],
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],  # the texts are those of this release
        "total_seconds": round(time.perf_counter() - started, 1),
    } | found
    with replace_when_done(arguments.output / "results.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
    print_summary(found)
    print(f"wrote {plot_evaluation(record, arguments.output / 'results.png')}, and results.json beside it")
    return record


if __name__ == "__main__":
    main()
