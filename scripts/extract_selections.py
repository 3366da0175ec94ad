"""Write the block lists that a checkpoint chooses on held-out long texts, as inputs of the kernels' benchmarks.

    python scripts/extract_selections.py examples/minimax-m3-small [benchmarks/selections.npz] [--tokens 32768]

The script prints how much the lists of neighbouring queries overlap, beside random and clustered lists.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Read when Transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer

import modeling_minimax_m3  # noqa: F401  (registers the classes)
from checkpoint_folder import check_checkpoint
from modeling_minimax_m3.commands.run_checks import check_output_file
from plot_selection import SelectionRecorder, sparse_layers
from processing_minimax_m3.pretraining import make_row
from replace_when_done import replace_when_done

# The benchmarks are no installed package: they are run from the root of the repository.
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.gpu import BLOCK, TOPK, clustered_blocks  # noqa: E402
from benchmarks.selections import SELECTIONS, overlap, random_blocks, save_selections  # noqa: E402

TASKS = ("code", "english")  # one document of each
CHARACTERS_PER_TOKEN = 8  # more than a token has, so that one row is long enough


def document(tokenizer: Any, task: str, tokens: int, seed: int) -> torch.Tensor:
    """The first tokens of a held-out text: int64 (1, tokens).

    Raises:
        ValueError: The text is shorter.
    """
    row = make_row(task, "heldout", 0, seed=seed, characters=tokens * CHARACTERS_PER_TOKEN)
    ids = tokenizer(row["text"], return_tensors="pt", verbose=False)["input_ids"][:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"the held-out text of task {task!r} has {ids.shape[1]} tokens, fewer than {tokens}.")
    return ids


def record_selections(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The block lists int32 (tokens, topk) of every sparse layer and key/value head, by "layer L, head H"."""
    with torch.inference_mode(), SelectionRecorder(min_tokens=ids.shape[1]) as recorder:
        model(input_ids=ids.to(model.device), logits_to_keep=1, use_cache=False)
    found = {}
    for layer, selection in zip(sparse_layers(model.config.get_text_config()), recorder.selections, strict=True):
        for head in range(selection.shape[1]):
            found[f"layer {layer}, head {head}"] = selection[:, head].cpu()
    return found


def print_overlap(named: dict[str, dict[str, float]]) -> None:
    """A line for each kind of lists."""
    names = list(next(iter(named.values())))
    width = max(map(len, named))
    print(" " * width, *(name.rjust(15) for name in names))
    for name, values in named.items():
        print(name.ljust(width), *(f"{values[column]:15.3f}" for column in names))


def main(argv: Iterable[str] | None = None) -> dict[str, dict[str, float]]:
    """Writes the file, and returns the overlap of each list. Errors of arguments end the program."""
    parser = argparse.ArgumentParser(description="Write the block lists that a checkpoint chooses on held-out texts.")
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint that scripts/pretrain.py made")
    parser.add_argument("output", type=Path, nargs="?", default=SELECTIONS, help="benchmarks/selections.npz")
    parser.add_argument("--tokens", type=int, default=32768, help="of each text (32768)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other texts (0)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        check_checkpoint(arguments.checkpoint)
        if arguments.output.suffix != ".npz":
            raise ValueError(f"`output` must end in .npz, got {arguments.output}.")
        check_output_file(arguments.output, "`output`")
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
        documents = {task: document(tokenizer, task, arguments.tokens, arguments.seed) for task in TASKS}
        model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto").eval()
        model = model.to("cuda") if torch.cuda.is_available() else model.float()
        text = model.config.get_text_config()
        lists, found = {}, {}
        for task, ids in tqdm(documents.items(), desc="texts", unit="text"):
            for name, one in record_selections(model, ids).items():
                lists[f"{task}, {name}"] = one
                found[f"{task}, {name}"] = overlap(one, text.index_block_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extract_selections: {error}") from error
    about = {
        "checkpoint": arguments.checkpoint.resolve().name,
        "seed": arguments.seed,
        "lists": list(lists),
        "overlap": found,
    }
    with replace_when_done(arguments.output) as unfinished:
        save_selections(unfinished, torch.stack(list(lists.values())), text.index_block_size, about)
    size, topk = text.index_block_size, text.index_topk_blocks
    compared = {"random": overlap(random_blocks(arguments.tokens, size, topk), size)}
    if (size, topk) == (BLOCK, TOPK):
        torch.manual_seed(arguments.seed)
        compared["clustered"] = overlap(clustered_blocks(arguments.tokens, device="cpu")[:, 0], size)
    print_overlap(found | compared)
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1024:.0f} KiB)")
    return found | compared


if __name__ == "__main__":
    main(sys.argv[1:])
