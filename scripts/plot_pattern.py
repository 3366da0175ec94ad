"""Draw which key blocks structured attention lists, by position alone, at several context lengths.

    python scripts/plot_pattern.py PICTURE.png [--tokens 4096 65536 1048576]

The upper panels show one key/value head: row i, column j is the share of query blocks near i whose list holds a key
block near j. The lower panels show the list of a context's last token, one line for each key/value head.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from modeling_minimax_m3 import msa
from plot_selection import selection_shares
from replace_when_done import replace_when_done

CELLS = 256  # greatest number of rows and columns; with more blocks, each stands for several blocks
COLOURS = {"local": "tab:red", "anchor": "tab:blue", "random": "tab:green"}


def merge_blocks(lists: torch.Tensor, count: int) -> torch.Tensor:
    """Converts lists of blocks to lists of groups of `count` blocks, with each group once.

    Args:
        lists (int32 (queries, heads, width)): Block ids, -1 for none.
        count (int): Blocks in a group.

    Returns:
        int32 (queries, heads, width): Group ids, -1 for none and for repetitions.
    """
    groups = torch.div(lists, count, rounding_mode="floor").sort(dim=-1).values
    repeated = torch.nn.functional.pad(groups.diff(dim=-1) == 0, (1, 0))
    return groups.masked_fill(repeated, -1)


def kinds(ids: list[int], block: int, pattern: msa.StructuredPattern) -> list[str]:
    """The kind of each id in the list of a query in `block`: "local", "anchor" or "random"."""
    stride = pattern.anchor_stride
    while pattern.anchor_blocks and block // stride + 1 > pattern.anchor_blocks:
        stride *= 2
    is_anchor = [pattern.anchor_blocks > 0 and i % stride == 0 for i in ids]
    return [
        "local" if i > block - pattern.local_blocks else "anchor" if anchor else "random"
        for i, anchor in zip(ids, is_anchor)
    ]


def plot_pattern(
    path: str | Path, pattern: msa.StructuredPattern, lengths: list[int], block_size: int, heads: int, layer_idx: int
) -> Path:
    """Writes the picture.

    Args:
        path (str or Path): Path of the picture. Its suffix is the format.
        pattern (msa.StructuredPattern): The pattern of the lists.
        lengths (list[int]): Context lengths in tokens, one column each.
        block_size (int): Tokens in a block.
        heads (int): Number of key/value heads.
        layer_idx (int): The layer whose random blocks are drawn.

    Returns:
        `path`.
    """
    path = Path(path)
    figure = Figure(figsize=(4.2 * len(lengths), 5.8), dpi=90, layout="constrained")
    columns = figure.subplots(2, len(lengths), squeeze=False, height_ratios=[3, 1])
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    for column, tokens in enumerate(lengths):
        above, below = columns[:, column]
        num_blocks = -(-tokens // block_size)
        lists = msa.structured_blocks_of(torch.arange(num_blocks), heads, layer_idx, pattern)
        count = -(-num_blocks // CELLS)
        shares = selection_shares(merge_blocks(lists[:, :1], count), count)[0]
        future = torch.ones_like(shares, dtype=torch.bool).triu(1)
        image = above.imshow(
            shares.masked_fill(future, torch.nan).numpy(),
            cmap=colours,
            norm=PowerNorm(0.5, vmin=0, vmax=1),
            interpolation="none",
            extent=(0, num_blocks, num_blocks, 0),
        )
        above.set(title=f"{tokens} tokens, {num_blocks} blocks", xlabel="key block", ylabel="query block")
        for head, row in enumerate(lists[-1].tolist()):
            ids = [i for i in row if i >= 0]
            below.scatter(ids, [head] * len(ids), c=[COLOURS[k] for k in kinds(ids, num_blocks - 1, pattern)], s=14)
        below.set(xlabel="key block of the last token", ylabel="head", yticks=range(heads))
        below.set_xlim(-0.02 * num_blocks, 1.02 * num_blocks)
        below.invert_yaxis()
    figure.colorbar(image, ax=columns[0], label="share of the query blocks")
    for name, colour in COLOURS.items():
        columns[1, 0].scatter([], [], c=colour, s=14, label=name)
    figure.legend(loc="outside lower center", ncols=len(COLOURS))
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)
    return path


def main() -> None:
    default = MiniMaxM3VLTextConfig()
    parser = argparse.ArgumentParser(description="Draw which key blocks structured attention lists.")
    parser.add_argument("picture", type=Path, help="path of the picture")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 65536, 1048576], help="context lengths")
    parser.add_argument("--block-size", type=int, default=default.index_block_size, help="tokens in a block")
    parser.add_argument("--heads", type=int, default=default.num_key_value_heads, help="key/value heads")
    parser.add_argument("--layer", type=int, default=3)
    names = [field.name for field in fields(msa.StructuredPattern)]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, f"structured_{name}"))
    arguments = parser.parse_args()
    pattern = msa.StructuredPattern(**{name: getattr(arguments, name) for name in names})
    path = plot_pattern(
        arguments.picture, pattern, arguments.tokens, arguments.block_size, arguments.heads, arguments.layer
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
