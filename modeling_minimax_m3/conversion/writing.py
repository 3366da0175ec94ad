"""Writes a checkpoint shard by shard beside its place. A run that was killed goes on where it stopped."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from .layouts import StoredTensor
from .manifest import MANIFEST, describe_files, manifest_of
from .source import CONFIG, INDEX, SINGLE_FILE, open_checkpoint, read_json
from .tensor_files import TensorFileWriter, TensorSpec, hash_file, in_file_order, write_durably

# They lie in the folder until it has its name and all else is done.
_PLAN = ".conversion_plan.json"
_PROGRESS = ".conversion_progress.json"


class ValueSource(Protocol):
    """Where the values of the tensors come from."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a part, by released name."""

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a part in order, in pieces."""


@dataclass(frozen=True)
class Output:
    """A checkpoint to write.

    Args:
        folder (Path): Where it goes.
        tensors (list[StoredTensor]): Its tensors in order, scales included.
        values (ValueSource): Their values.
        config (dict): Content of `config.json`.
        max_shard_size (int): Bytes of the tensors of a file. A larger tensor has a file of its own.
        metadata (dict[str, str]): Metadata of each file.
        made_by (dict): How it is made, for the manifest.
        inputs (str): A hash of what it is made from. A run goes on only where this and `made_by` are the same.
        companions (list[Path]): Files to copy.
        texts (dict[str, str]): Other files by name.
    """

    folder: Path
    tensors: list[StoredTensor]
    values: ValueSource
    config: dict[str, Any]
    max_shard_size: int
    metadata: dict[str, str]
    made_by: dict[str, Any]
    inputs: str
    companions: list[Path]
    texts: dict[str, str]


def unfinished_folder(folder: Path) -> Path:
    """The folder beside `folder` in which it is written."""
    return folder.with_name(f"{folder.name}.unfinished")


def write_checkpoint(
    output: Output,
    *,
    overwrite: bool = False,
    restart: bool = False,
    show_progress: bool = True,
    before_writing: Callable[[], None] | None = None,
) -> Path:
    """Write a checkpoint. The folder appears under its name when everything is written and checked.

    Args:
        output (Output): The checkpoint.
        overwrite (bool): Whether to replace a folder of this name.
        restart (bool): Whether to throw away what an earlier run left, instead of going on.
        show_progress (bool): Whether to show a bar.
        before_writing (Callable, optional): Called when the place is free, and before anything is written to it.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and `overwrite` is false, or an earlier run with other options left files.
        OSError: The disk has no room for what is still to be written, or a file cannot be written.
    """
    folder = output.folder.resolve()
    unfinished = unfinished_folder(folder)
    plan = {"max_shard_size": output.max_shard_size, "inputs": output.inputs, **output.made_by}
    if restart and unfinished.exists():
        _check_is_unfinished(unfinished)
        shutil.rmtree(unfinished)
    if _has_plan(folder, plan):  # an earlier run was killed after its last rename but one
        return _clean_up(folder)
    _check_place(folder, overwrite)
    shards = _shards(output)
    _check_room(unfinished, shards)
    if before_writing is not None:
        before_writing()
    _begin(unfinished, plan)

    names = _file_names(len(shards))
    progress = unfinished / _PROGRESS
    hashes: dict[str, str] = read_json(progress) if progress.exists() else {}
    total = sum(spec.nbytes for shard in shards for spec, _ in shard)
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            if name in hashes:
                _check_finished(unfinished / name, hashes[name])
                bar.update(sum(spec.nbytes for spec, _ in shard))
                continue
            hashes[name] = _write_shard(unfinished / name, shard, output, bar)
            write_durably(progress, json.dumps(hashes).encode())
    _write_other_files(unfinished, output, shards, names)
    checkpoint = open_checkpoint(unfinished)
    files = {file: entry for file, entry in describe_files(unfinished, hashes).items() if not file.startswith(".conv")}
    write_durably(unfinished / MANIFEST, manifest_of(checkpoint, files, output.made_by))
    if folder.exists():
        folder.rename(_replaced_folder(folder))
    unfinished.rename(folder)
    return _clean_up(folder)


Shard = list[tuple[TensorSpec, StoredTensor]]


def _replaced_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.replaced")


def _clean_up(folder: Path) -> Path:
    if _replaced_folder(folder).exists():
        shutil.rmtree(_replaced_folder(folder))
    for name in (_PROGRESS, _PLAN):
        (folder / name).unlink(missing_ok=True)
    return folder


def _has_plan(folder: Path, plan: dict[str, Any]) -> bool:
    return (folder / _PLAN).is_file() and read_json(folder / _PLAN) == json.loads(json.dumps(plan))


def _check_place(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists. Name another folder, or replace this one (--overwrite).")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is a mount point, which cannot be renamed. Name a folder inside it.")
    inside = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if inside and (not (folder / CONFIG).is_file() or not all(file.is_file() for file in inside)):
        raise FileExistsError(
            f"{folder} holds other things than a checkpoint, so --overwrite does not replace it. Remove it yourself."
        )
    if _replaced_folder(folder).exists():
        raise FileExistsError(f"{_replaced_folder(folder)} is in the way: an earlier run put it there. Remove it.")


def _check_room(unfinished: Path, shards: list[Shard]) -> None:
    """Raises OSError if the disk has less room than the tensors that an earlier run did not write."""
    written = sum(file.stat().st_size for file in unfinished.glob("*.safetensors*"))
    needed = sum(spec.nbytes for shard in shards for spec, _ in shard) - written
    existing = next(place for place in unfinished.parents if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{existing} has {free / 2**30:.2f} GiB free, but {unfinished.name} needs {needed / 2**30:.2f} GiB more",
        )


def _check_is_unfinished(unfinished: Path) -> None:
    if not (unfinished / _PLAN).is_file() and any(unfinished.iterdir()):
        raise FileExistsError(f"{unfinished} holds something else than an unfinished checkpoint. Remove it yourself.")


def _begin(unfinished: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or check that an earlier run wrote the same."""
    unfinished.mkdir(parents=True, exist_ok=True)
    if all(file.name == f"{_PLAN}.tmp" for file in unfinished.iterdir()):
        write_durably(unfinished / _PLAN, json.dumps(plan, sort_keys=True).encode())
        return
    _check_is_unfinished(unfinished)
    if not _has_plan(unfinished, plan):
        earlier = read_json(unfinished / _PLAN)
        changed = sorted(key for key in {*plan, *earlier} if plan.get(key) != earlier.get(key))
        raise FileExistsError(
            f"{unfinished} was begun with other options or from other files (different: {', '.join(changed)}). Use the "
            "same, or start anew (--restart)."
        )


def _check_finished(file: Path, expected: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, which an earlier run wrote. Start anew (--restart).")
    if hash_file(file) != expected:
        raise ValueError(f"{file} was changed since an earlier run wrote it. Start anew (--restart).")


def _shards(output: Output) -> list[Shard]:
    """Fill one file after the other."""
    shards: list[Shard] = []
    filled = math.inf
    for tensor in output.tensors:
        spec = TensorSpec(tensor.name, output.values.dtype(tensor.parts[0]), tensor.shape)
        if filled + spec.nbytes > output.max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append((spec, tensor))
        filled += spec.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(file: Path, shard: Shard, output: Output, bar: tqdm) -> str:
    tensors = {spec.name: tensor for spec, tensor in shard}
    specs = in_file_order(spec for spec, _ in shard)
    beside = file.with_name(f"{file.name}.tmp")
    writer = TensorFileWriter(beside, specs, {"format": "pt"} | output.metadata)
    for spec in specs:
        for part in tensors[spec.name].parts:
            for block in output.values.blocks(part):
                writer.write(block)
                bar.update(block.nbytes)
    digest = writer.close()
    beside.replace(file)
    return digest


def _write_other_files(unfinished: Path, output: Output, shards: list[Shard], names: list[str]) -> None:
    for file in output.companions:
        shutil.copyfile(file, unfinished / file.name)
    for name, text in output.texts.items():
        (unfinished / name).write_text(text, encoding="utf-8")
    write_durably(unfinished / CONFIG, (json.dumps(output.config, indent=2) + "\n").encode())
    if len(names) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec, _ in shard}
        total = sum(spec.nbytes for shard in shards for spec, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(unfinished / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    for name in (MANIFEST, f"{MANIFEST}.tmp", f"{_PROGRESS}.tmp", f"{_PLAN}.tmp"):
        (unfinished / name).unlink(missing_ok=True)
