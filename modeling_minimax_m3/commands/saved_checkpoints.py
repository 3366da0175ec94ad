"""The checkpoints that a run has saved, and which of them are complete.

A run that is stopped while it saves leaves a folder that looks like a checkpoint.
"""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = re.compile(r".*\.safetensors|(pytorch|adapter)_model.*\.bin")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the latest first."""
    found = (
        [path for path in folder.iterdir() if path.is_dir() and NAME.fullmatch(path.name)] if folder.is_dir() else []
    )
    return sorted(found, key=lambda path: -int(path.name.split("-")[1]))


def find_fault(checkpoint: Path) -> str | None:
    """Says what is missing or cut off in a checkpoint of `Trainer`, or returns None."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # is written last
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    # engines that shard weights save them in folders
    if not any(path.is_dir() or WEIGHTS.fullmatch(path.name) for path in checkpoint.iterdir()):
        return "the weights are missing"
    if fault := find_fault_of_weights(checkpoint):
        return fault
    for file in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def find_fault_of_weights(checkpoint: Path) -> str | None:
    """Says which safetensors file of a folder is missing or cut off, or returns None. Reads no weights."""
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{index.name} is cut off"
        if missing := sorted(name for name in names if not (checkpoint / name).is_file()):
            return f"{missing[0]} is missing"
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is cut off"
    return None


def last_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The latest complete checkpoint of a run, and what is wrong with those after it."""
    faults: list[str] = []
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} is incomplete ({fault})")
    return None, faults


def checkpoint_to_resume(given: str | bool | None, folder: Path) -> str | None:
    """The checkpoint to continue from.

    Args:
        given (str or bool, optional): Value of `--resume_from_checkpoint`: a folder, or whether to take the last
            complete checkpoint of the run.
        folder (Path): Folder of the run.

    Raises:
        ValueError: There is no such folder or no complete checkpoint, the given one is incomplete, or the folder holds
            checkpoints but the run is not to continue from any.
    """
    complete, faults = last_complete(folder)
    incomplete = "".join(f"; {fault}" for fault in faults)
    if given is None or str(given).lower() in ("false", "none"):
        if complete is None and not faults:
            return None
        if complete is None:
            raise ValueError(
                f"{folder} holds a run without a complete checkpoint{incomplete}. Name another --output_dir"
            )
        raise ValueError(
            f"{folder} holds {complete.name} of an earlier run{incomplete}. Continue it with --resume_from_checkpoint "
            "true, or name another --output_dir"
        )
    if str(given).lower() == "true":
        if complete is None:
            raise ValueError(f"--resume_from_checkpoint true: there is no complete checkpoint in {folder}{incomplete}")
        if faults:
            logger.warning(f"{'; '.join(faults)}: the run continues from {complete.name}")
        return str(complete)
    chosen = Path(str(given))
    if not chosen.is_dir():
        raise ValueError(f"--resume_from_checkpoint: there is no folder {chosen}")
    if fault := find_fault(chosen):
        last = f"; the last complete checkpoint is {complete}" if complete is not None else ""
        raise ValueError(f"--resume_from_checkpoint: {given} is incomplete ({fault}){last}")
    return str(chosen)


def check_unfinished(checkpoint: Path, max_steps: int) -> None:
    """Raises ValueError if a checkpoint has all steps of a run already: `Trainer` might take one more."""
    done = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if 0 < max_steps <= done:
        raise ValueError(
            f"--max_steps {max_steps}: the run is finished, {checkpoint} is at step {done} and holds its result. Give more "
            "steps to train it further"
        )
