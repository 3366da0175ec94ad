"""Add an adapter to the weights of its checkpoint, or export it for a serving engine. No model is loaded.

    minimax-m3 merge run merged                                # base: the one that the adapter names
    minimax-m3 merge run merged --model CHECKPOINT --precision mxfp8
    minimax-m3 merge run exported --export sglang              # the adapter alone

The memory that this needs does not depend on the size of the checkpoint. The result loads in Transformers, with this
package or without it. A run that was stopped goes on with the same command. README.md and conversion_manifest.json of
the result say what it was made of.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint_conversion import ENGINES, LAYOUTS, PRECISIONS, Conversion, convert, export_adapter, serving_report
from ..conversion.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from ..conversion.source import CONFIG, read_config, read_json
from ..conversion.tensor_files import hash_file
from .model_card import CARD, ModelCard, usage_of


def find_base(adapter: Path, model: Path | None) -> Path:
    """The folder of the checkpoint that an adapter is for.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The checkpoint is no folder.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{adapter} holds no {ADAPTER_CONFIG}: the first folder must be an adapter, the second is written"
        )
    name = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") if model is None else model
    if name is None:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} does not name its checkpoint: pass --model")
    if not Path(name).is_dir():
        raise ValueError(
            f"the checkpoint must be a folder, got {str(name)!r}"
            f"{'' if model else f' from {adapter / ADAPTER_CONFIG}'}: download it first, and pass its folder as --model"
        )
    return Path(name)


def merge_card(base: Path, adapters: Sequence[Path], target: Path, is_composite: bool, command: list[str]) -> str:
    """The README of a merged checkpoint."""
    hashes = {str(folder): hash_file(folder / ADAPTER_FILE) for folder in adapters}
    card = ModelCard(
        title=target.name,
        base=str(base),
        is_adapter=False,
        is_composite=is_composite,
        **usage_of(is_composite, target.name),
        command=command,
        adapters=hashes,
    )
    text = str(card)
    for folder in adapters:
        if (folder / CARD).is_file():
            body = (folder / CARD).read_text(encoding="utf-8")
            if body.startswith("---\n"):
                body = body.split("\n---\n", 1)[-1]
            text += f"\n<details><summary>Card of {folder}</summary>\n\n{body.strip()}\n\n</details>\n"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "minimax-m3 merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="folder of an adapter, as `train` writes it")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--model", type=Path, help="folder of the checkpoint (default: the one the adapter names)")
    parser.add_argument(
        "--adapter", dest="more", type=Path, action="append", default=[], help="one more adapter; repeatable"
    )
    parser.add_argument("--export", choices=ENGINES, help="write the adapter alone, for this engine")
    parser.add_argument("--layout", choices=LAYOUTS, help="of the result (as the checkpoint)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the result (as the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at TARGET")
    parser.add_argument("--restart", action="store_true", help="throw away what a stopped run left")
    given = list(sys.argv[2:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if arguments.export:
        names = ("layout", "precision", "overwrite", "restart", "more")
        if idle := [f"--{'adapter' if name == 'more' else name}" for name in names if getattr(arguments, name)]:
            parser.error(f"{', '.join(idle)} would do nothing with --export")
    try:
        base = find_base(arguments.adapter, arguments.model)
        if arguments.export:
            config, _ = read_config(read_json(base / CONFIG), base)
            export_adapter(arguments.adapter, arguments.target, config, arguments.export)
            print(f"wrote the adapter for {arguments.export} to {arguments.target}")
            return
        adapters = (arguments.adapter, *arguments.more)
        for folder in adapters:
            if not (folder / ADAPTER_FILE).is_file():
                raise FileNotFoundError(f"{folder / ADAPTER_FILE} is missing.")
        _, is_text = read_config(read_json(base / CONFIG), base)
        is_composite = not is_text and arguments.layout != "text"
        card = merge_card(base, adapters, arguments.target, is_composite, ["minimax-m3", "merge", *given])
        checkpoint = convert(
            base,
            arguments.target,
            Conversion(layout=arguments.layout, precision=arguments.precision, adapters=adapters),
            overwrite=arguments.overwrite,
            restart=arguments.restart,
            texts={CARD: card},
        )
    except (ValueError, OSError) as error:
        sys.exit(f"merge: {error}")
    print(
        f"merged {', '.join(map(str, adapters))} into {arguments.target}: {checkpoint.precision}, {checkpoint.layout}"
    )
    for obstacle in serving_report(checkpoint):
        print(f"vLLM and SGLang cannot serve it: {obstacle}")


if __name__ == "__main__":
    main()
