"""Convert a checkpoint without loading a model: layout, precision, adapters, fewer layers and experts.

    python scripts/convert_checkpoint.py SOURCE TARGET --layout modules     # fused experts, names of the modules
    python scripts/convert_checkpoint.py SOURCE TARGET --layout released    # and back
    python scripts/convert_checkpoint.py SOURCE TARGET --precision mxfp8    # or bf16
    python scripts/convert_checkpoint.py SOURCE TARGET --adapter LORA       # merged into the weights
    python scripts/convert_checkpoint.py SOURCE TARGET --layers 4 --experts 8
    python scripts/convert_checkpoint.py SOURCE TARGET --adapter LORA --export_adapter sglang
    python scripts/convert_checkpoint.py SOURCE --verify

The memory that a conversion needs does not depend on the size of the checkpoint. TARGET appears when all of it is
written and checked; until then its files are in TARGET.unfinished. A run that was stopped, by kill -9 too, goes on with
the same command and writes the same bytes. docs/conversion.md explains the options.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from modeling_minimax_m3 import checkpoint_conversion as conversion

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, KB, MB, GB, KiB, MiB or GiB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


@contextmanager
def fail_by_name(script: str) -> Iterator[None]:
    """Turn errors that name their cause into the message of the command."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"{script}: {error}") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="folder to write")
    parser.add_argument("--verify", action="store_true", help="only check SOURCE, hashes included")
    parser.add_argument(
        "--layout",
        choices=conversion.LAYOUTS,
        help="of the result; text is the language model alone (default: that of SOURCE)",
    )
    parser.add_argument("--precision", choices=conversion.PRECISIONS, help="of the result (default: that of SOURCE)")
    parser.add_argument("--layers", type=int, help="keep only the first LAYERS layers")
    parser.add_argument("--experts", type=int, help="keep only the first EXPERTS routed experts of each layer")
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="a LoRA adapter to merge; repeatable"
    )
    parser.add_argument(
        "--export_adapter", choices=conversion.ENGINES, help="write the adapter alone, for this engine"
    )
    parser.add_argument(
        "--vision_from",
        type=Path,
        help="folder of a whole model, whose vision tower completes a SOURCE of layout text",
    )
    parser.add_argument(
        "--max_shard_size",
        type=parse_size,
        default=conversion.MAX_SHARD_SIZE,
        help="greatest size of a file of weights (default: 5GB)",
    )
    parser.add_argument(
        "--skip_source_hashes",
        action="store_true",
        help=f"do not compare SOURCE with the hashes in its {conversion.MANIFEST}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at TARGET")
    parser.add_argument("--restart", action="store_true", help="throw away what a stopped run left")
    arguments = parser.parse_args(argv)
    if arguments.verify == (arguments.target is not None):
        parser.error("give TARGET, or --verify without it")
    if arguments.export_adapter and len(arguments.adapter) != 1:
        parser.error("--export_adapter needs one --adapter")
    if arguments.export_adapter or arguments.verify:
        used = {"source", "target", "export_adapter", "adapter"} if arguments.export_adapter else {"source", "verify"}
        idle = [
            name for name, value in vars(arguments).items() if name not in used and value != parser.get_default(name)
        ]
        if idle:
            kind = "--export_adapter" if arguments.export_adapter else "--verify"
            parser.error(f"--{idle[0]} has no effect with {kind}: leave it out")
    return arguments


def describe(checkpoint: conversion.Checkpoint) -> str:
    size = sum(file.stat().st_size for file in checkpoint.files)
    text = checkpoint.config.text_config
    note = f", {checkpoint.config_file['synthetic']}" if "synthetic" in checkpoint.config_file else ""
    return (
        f"{checkpoint.folder}: layout {checkpoint.layout}, {checkpoint.precision}, {text.num_hidden_layers} layers, "
        f"{text.num_local_experts} experts, {len(checkpoint.files)} files, {size / 2**30:.2f} GiB{note}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with fail_by_name("convert_checkpoint.py"):
        if arguments.verify:
            checkpoint, has_manifest = conversion.verify(arguments.source)
            print(f"complete: {describe(checkpoint)}")
            print(
                "hashes are right"
                if has_manifest
                else f"there is no {conversion.MANIFEST}, so hashes were not compared"
            )
            return
        if arguments.export_adapter:
            config = conversion.open_checkpoint(arguments.source).config
            conversion.export_adapter(arguments.adapter[0], arguments.target, config, arguments.export_adapter)
            print(f"wrote {arguments.target} for {arguments.export_adapter}")
            return
        wanted = conversion.Conversion(
            layout=arguments.layout,
            precision=arguments.precision,
            layers=arguments.layers,
            experts=arguments.experts,
            adapters=tuple(arguments.adapter),
            vision_from=arguments.vision_from,
            max_shard_size=arguments.max_shard_size,
            check_source=not arguments.skip_source_hashes,
        )
        options = {"overwrite": arguments.overwrite, "restart": arguments.restart}
        checkpoint = conversion.convert(arguments.source, arguments.target, wanted, **options)
    print(f"wrote {describe(checkpoint)}")
    if checkpoint.precision == "mxfp8" and checkpoint.layout != "released":
        print(
            "Stock Transformers loads wrong weights from it, because it does not find the scales of stacked experts."
        )
    for obstacle in conversion.serving_report(checkpoint):
        print(f"vLLM and SGLang cannot serve it. {obstacle}")


if __name__ == "__main__":
    main()
