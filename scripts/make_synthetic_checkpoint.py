"""Write a synthetic checkpoint: random weights with the names, shapes, dtypes and files of the released model.

    python scripts/make_synthetic_checkpoint.py OUTPUT_FOLDER --layers 5 --experts 8
    python scripts/make_synthetic_checkpoint.py OUTPUT_FOLDER --precision mxfp8 --geometry tiny

It serves to measure loading, conversion and memory where the released weights cannot be had. Nothing was trained: what
such a model says means nothing. The folder's README.md, its config.json and every file of weights say so. The weights
need a block of memory, not the size of the model. A run that was stopped goes on with the same command. The folder
has no tokenizer; `scripts/make_tiny_checkpoint.py` writes a tiny checkpoint with one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from configuration_minimax_m3 import MiniMaxM3VLConfig, released_config, tiny_config
from convert_checkpoint import fail_by_name, parse_size
from modeling_minimax_m3.conversion.synthetic import MAX_SHARD_SIZE, NOTICE, make_synthetic_checkpoint


def read_geometry(name: str) -> MiniMaxM3VLConfig:
    """The geometry `released` or `tiny`, or that of a config in a file or folder."""
    presets = {"released": released_config, "tiny": tiny_config}
    if name in presets:
        return presets[name]()
    if not Path(name).exists():
        raise FileNotFoundError(f"`--geometry` must be released, tiny, or a path, got {name!r}.")
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, MiniMaxM3VLConfig):
        raise ValueError(f"`--geometry` must be a whole model's config, got a {type(config).__name__}.")
    return config


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--geometry", default="released", help="released, tiny, or a config's file or folder")
    parser.add_argument("--layers", type=int, help="write only the first LAYERS layers")
    parser.add_argument("--experts", type=int, help="write only EXPERTS routed experts in each layer")
    parser.add_argument("--precision", choices=("bf16", "mxfp8"), default="bf16", help="default: bf16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument(
        "--max_shard_size",
        type=parse_size,
        default=MAX_SHARD_SIZE,
        help="greatest size of a file of weights (default: 16.1GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of this name")
    parser.add_argument("--restart", action="store_true", help="throw away what a stopped run left")
    arguments = parser.parse_args(argv)
    with fail_by_name("make_synthetic_checkpoint.py"):
        checkpoint = make_synthetic_checkpoint(
            arguments.folder,
            read_geometry(arguments.geometry),
            layers=arguments.layers,
            experts=arguments.experts,
            precision=arguments.precision,
            seed=arguments.seed,
            max_shard_size=arguments.max_shard_size,
            overwrite=arguments.overwrite,
            restart=arguments.restart,
        )
    size = sum(file.stat().st_size for file in checkpoint.files)
    print(f"wrote {arguments.folder}: {len(checkpoint.tensors)} tensors, {size / 2**30:.2f} GiB, {NOTICE}")


if __name__ == "__main__":
    main()
