"""Turn a checkpoint with dense or learned-sparse attention into one with structured attention.

    python scripts/convert_to_structured.py INPUT_DIRECTORY OUTPUT_DIRECTORY [--layers 3-59] [--random-blocks 8] ...

Structured layers choose key blocks by position alone, so the script drops the indexer weights of the converted layers.
All other weights stay as they are. The script holds one file in memory at a time. The output folder appears only when
all files are written, so a run that stops early leaves nothing that loads as a model. Stock Transformers cannot load
the result. The result needs training before it is useful.
"""

import argparse
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from configuration_minimax_m3.layer_types import LEARNED_SPARSE, STRUCTURED
from modeling_minimax_m3 import msa  # importing the package registers the configuration
from replace_when_done import replace_when_done

# The indexer's names on disk, in composite checkpoints and in text-only checkpoints.
INDEXER_WEIGHT = re.compile(r"layers\.(\d+)\.self_attn\.(?:index_[qk]_(?:proj|norm)|indexer\.[qk]_(?:proj|norm))\.")
PATTERN_FIELDS = tuple(field.name for field in fields(msa.StructuredPattern))


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Parses layer numbers from a text such as "3-59" or "0,4,7-9"."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < num_layers:
            raise ValueError(
                f"`--layers` must list layers or ranges between 0 and {num_layers - 1}, like 3-{num_layers - 1}, "
                f"got {part!r}."
            )
        layers.update(range(first, last + 1))
    return sorted(layers)


def convert(
    source: Path, target: Path, layers: str | None = None, pattern: dict[str, int] | None = None
) -> dict[str, list]:
    """Writes the converted checkpoint to `target`.

    Args:
        source (Path): Folder of the checkpoint, with safetensors files.
        target (Path): Folder to write. It must be empty or not exist.
        layers (str, optional): The layers to convert, in the form of `parse_layers`. The default is all learned-sparse
            layers.
        pattern (dict, optional): `structured_*` fields of the text config, without this prefix. The config keeps its
            value of missing fields.

    Returns:
        `{"layers": converted layers, "dropped": names of dropped weights}`.

    Raises:
        FileNotFoundError: `source` has no safetensors files.
        FileExistsError: `target` holds files.
        ValueError: There is no layer to convert, or the list of layers is malformed.
    """
    weight_files = sorted(source.glob("*.safetensors"))
    if not weight_files:
        raise FileNotFoundError(f"the input directory must hold *.safetensors files, but {source} has none.")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"the output directory must be empty, but {target} holds files.")
    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    if layers is None:
        chosen = [i for i, name in enumerate(text.layer_types) if name == LEARNED_SPARSE.name]
    else:
        chosen = parse_layers(layers, text.num_hidden_layers)
    if not chosen:
        raise ValueError("the checkpoint has no learned-sparse layer: name the layers to convert with `--layers`.")

    text.layer_types = [STRUCTURED.name if i in chosen else name for i, name in enumerate(text.layer_types)]
    for name, value in (pattern or {}).items():
        setattr(text, f"structured_{name}", value)
    text.validate()
    dropped, dropped_bytes = [], 0
    with replace_when_done(target) as unfinished:
        unfinished.mkdir()
        for file in tqdm(weight_files, desc="converting", unit="file"):
            kept = {}
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    match = INDEXER_WEIGHT.search(name)
                    if match and int(match[1]) in chosen:
                        dropped.append(name)
                        dropped_bytes += weights.get_tensor(name).nbytes
                    else:
                        kept[name] = weights.get_tensor(name)
                metadata = weights.metadata()
            save_file(kept, unfinished / file.name, metadata=metadata)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy2(file, unfinished / file.name)
        index_file = unfinished / "model.safetensors.index.json"
        if index_file.exists():
            index = json.loads(index_file.read_text())
            for name in dropped:
                index["weight_map"].pop(name)
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] -= dropped_bytes
            index_file.write_text(json.dumps(index, indent=2) + "\n")
        config.save_pretrained(unfinished)
    return {"layers": chosen, "dropped": sorted(dropped)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint to structured attention.")
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--layers", help="layers to convert, such as 3-59 (default: all learned-sparse layers)")
    for name in PATTERN_FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"`structured_{name}` of the config")
    arguments = parser.parse_args()
    pattern = {name: value for name in PATTERN_FIELDS if (value := getattr(arguments, name)) is not None}
    report = convert(arguments.source, arguments.target, arguments.layers, pattern)
    print(f"converted these layers to structured attention: {report['layers']}")
    print(f"dropped {len(report['dropped'])} weights of their indexers:")
    for name in report["dropped"]:
        print(f"  {name}")


if __name__ == "__main__":
    main()
