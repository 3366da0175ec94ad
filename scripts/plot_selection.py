"""Draw which key blocks each query block of a text selected, one panel for each sparse layer and key/value head.

    python scripts/plot_selection.py CHECKPOINT TEXT_FILE PICTURE.png

Row i, column j of a panel is the share of query block i's tokens that attend to key block j.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoTokenizer

from modeling_minimax_m3.layers.layer_types import attention_type  # registers the model with the Auto classes
from replace_when_done import replace_when_done


class SelectionRecorder(TorchDispatchMode):
    """Records the results of the selection operators while it is active, wherever a model calls them.

        with SelectionRecorder() as recorder:
            model(input_ids)
        recorder.selections  # one int32 (tokens, key/value heads, blocks) for each call, in order

    Args:
        min_tokens (int): Calls with fewer query tokens, such as decoding steps, are not recorded.
    """

    def __init__(self, min_tokens: int = 1):
        super().__init__()
        self.min_tokens = min_tokens
        self.selections: list[torch.Tensor] = []
        namespace = torch.ops.minimax_m3_msa
        self._operators = {
            namespace.select_blocks.default,
            namespace.select_blocks_with_kvcache.default,
            namespace.structured_blocks_of.default,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._operators:
            selection = result.flatten(0, -3)
            if selection.shape[0] >= self.min_tokens:
                self.selections.append(selection.cpu())
        return result


def selection_shares(selection: torch.Tensor, block_size: int) -> torch.Tensor:
    """Computes the share of each query block's tokens that attend to each key block.

    Args:
        selection (int32 (tokens, heads, topk)): The block ids that each token of one sequence selected, -1 for none.
        block_size (int): Tokens in a block.

    Returns:
        float32 (heads, query blocks, key blocks): Shares from 0 to 1.
    """
    num_tokens, num_heads, _ = selection.shape
    num_blocks = -(-num_tokens // block_size)
    query_block = torch.arange(num_tokens)[:, None, None] // block_size
    head = torch.arange(num_heads)[None, :, None]
    cell = (head * num_blocks + query_block) * num_blocks + selection
    counts = torch.bincount(cell[selection >= 0], minlength=num_heads * num_blocks * num_blocks)
    tokens_in_block = torch.bincount(query_block.flatten(), minlength=num_blocks)
    return counts.view(num_heads, num_blocks, num_blocks) / tokens_in_block[:, None]


def plot_selections(
    selections: dict[int, torch.Tensor], block_size: int, path: str | Path, title: str | None = None
) -> Path:
    """Writes the picture.

    Args:
        selections (dict of int32 (tokens, heads, topk)): By the number of each sparse layer, the block ids that its
            tokens selected.
        block_size (int): Tokens in a block.
        path (str or Path): Path of the picture. Its suffix is the format.
        title (str, optional): A line above the panels.

    Returns:
        `path`.
    """
    path = Path(path)
    num_heads = next(iter(selections.values())).shape[1]
    figure = Figure(figsize=(4.2 * num_heads + 1, 4.0 * len(selections) + 0.5), dpi=120, layout="constrained")
    panels = figure.subplots(len(selections), num_heads, squeeze=False, sharex=True, sharey=True)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    scale = PowerNorm(0.5, vmin=0, vmax=1)  # makes small shares distinguishable
    for row, (layer_idx, selection) in zip(panels, selections.items()):
        shares = selection_shares(selection, block_size)
        future = torch.ones(shares.shape[1:], dtype=torch.bool).triu(1)
        for head, panel in enumerate(row):
            image = panel.imshow(
                shares[head].masked_fill(future, torch.nan).numpy(), cmap=colours, norm=scale, interpolation="none"
            )
            panel.set_title(f"layer {layer_idx}, head {head}", fontsize=10)
            panel.set_xlabel("key block")
            panel.set_ylabel("query block")
            panel.label_outer()
    figure.colorbar(image, ax=panels, label="share of the query block's tokens that attend to the key block")
    if title:
        figure.suptitle(title, fontsize=11)
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw which key blocks each query block of a text selected.")
    parser.add_argument("checkpoint", help="folder or name of a MiniMax-M3 checkpoint")
    parser.add_argument("text", type=Path, help="text file to read")
    parser.add_argument("picture", type=Path, help="path of the picture")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto", device_map="auto")
    text_config = model.config.get_text_config()
    inputs = tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt").to(model.device)
    with torch.inference_mode(), SelectionRecorder() as recorder:
        model(**inputs, logits_to_keep=1, use_cache=False)
    selections = dict(zip(sparse_layers(text_config), recorder.selections))
    print(f"wrote {plot_selections(selections, text_config.index_block_size, arguments.picture)}")


def sparse_layers(text_config: Any) -> list[int]:
    """The numbers of the layers that attend to selected blocks, in order."""
    return [i for i, name in enumerate(text_config.layer_types) if not attention_type(name).is_dense]


if __name__ == "__main__":
    main()
