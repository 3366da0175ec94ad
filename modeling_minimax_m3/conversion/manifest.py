"""The manifest of a checkpoint: sizes and hashes of its files, and the check of a folder against it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .source import Checkpoint, open_checkpoint, read_json
from .tensor_files import hash_file

MANIFEST = "conversion_manifest.json"
FORMAT = 1


def describe_files(folder: Path, known: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a folder except the manifest.

    Args:
        folder (Path): The folder.
        known (dict): Hashes by file name that need no reading.
    """
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": known.get(file.name) or hash_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }


def manifest_of(checkpoint: Checkpoint, files: dict[str, dict[str, Any]], made_by: dict[str, Any]) -> bytes:
    """The manifest of a written checkpoint.

    Args:
        checkpoint (Checkpoint): The checkpoint.
        files (dict): Its files, from `describe_files`.
        made_by (dict): How it was made.
    """
    content = {
        "format": FORMAT,
        "layout": checkpoint.layout,
        "precision": checkpoint.precision,
        "weights": len(checkpoint.tensors),
        "made_by": made_by,
        "files": files,
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def verify(folder: Path, *, hashes: bool = True, show_progress: bool = True) -> tuple[Checkpoint, bool]:
    """Check a checkpoint: names, shapes, dtypes, counts, sizes, and hashes where it has a manifest.

    Args:
        folder (Path): Its folder.
        hashes (bool): Whether to read all files and compare their hashes.
        show_progress (bool): Whether to show a bar.

    Returns:
        The checkpoint, and whether there was a manifest.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Something is not as the config, the index or the manifest says. The message names the file.
    """
    file = folder / MANIFEST
    files = None
    if file.is_file():
        content = read_json(file)
        files = content.get("files")
        if content.get("format") != FORMAT or not isinstance(files, dict):
            raise ValueError(f"{file} must be a manifest of format {FORMAT}, got {content.get('format')!r}.")
        for name, entry in files.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing, which {MANIFEST} names.")
            if (size := (folder / name).stat().st_size) != entry["bytes"]:
                raise ValueError(f"{folder / name} must have {entry['bytes']} bytes by {MANIFEST}, got {size}.")
    checkpoint = open_checkpoint(folder)
    if files is not None:
        if unlisted := sorted(weights.name for weights in checkpoint.files if weights.name not in files):
            raise ValueError(f"{folder / unlisted[0]} is not in {MANIFEST}: it was renamed or added.")
        if content.get("weights") != len(checkpoint.tensors):
            raise ValueError(
                f"{file} lists {content.get('weights')} weights, but {folder} holds {len(checkpoint.tensors)}."
            )
        if hashes:
            _check_hashes(folder, files, show_progress)
    return checkpoint, files is not None


def _check_hashes(folder: Path, files: dict[str, dict[str, Any]], show_progress: bool) -> None:
    total = sum(entry["bytes"] for entry in files.values())
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for name, entry in files.items():
            if hash_file(folder / name) != entry["sha256"]:
                raise ValueError(f"{folder / name} was changed: its SHA-256 is not the one of {MANIFEST}.")
            bar.update(entry["bytes"])


def companions(folder: Path, written: Iterable[str]) -> list[Path]:
    """The other files of a checkpoint's folder, such as the tokenizer's, which are copied as they are."""
    own = set(written)
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix != ".safetensors" and file.name not in own and file.name != MANIFEST
    ]
