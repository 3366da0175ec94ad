"""The check of the folder that a script loads a model from, before it loads anything."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from configuration_minimax_m3 import MiniMaxM3VLConfig
from modeling_minimax_m3.commands.saved_checkpoints import find_fault_of_weights
from modeling_minimax_m3.conversion.source import read_json


def check_checkpoint(folder: Path, name: str = "checkpoint") -> None:
    """Checks that a folder holds a MiniMax-M3 that reads text and pictures.

    Args:
        folder (Path): The folder.
        name (str): The argument that messages name.

    Raises:
        ValueError: There is no config.json, it is no JSON object, it is that of another architecture, or it has values
            that no model can have. Or a file of weights is missing or cut off.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"`{name}` must be the folder of a checkpoint, but {folder} has no config.json.")
    kind = read_json(path).get("model_type")
    if kind != MiniMaxM3VLConfig.model_type:
        raise ValueError(
            f"`{name}` must be a checkpoint of the model type {MiniMaxM3VLConfig.model_type!r}, but {path} has {kind!r}."
        )
    try:
        MiniMaxM3VLConfig.from_pretrained(folder)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"`{name}` has a config.json that no model can have: {error}") from error
    if fault := find_fault_of_weights(folder):
        raise ValueError(f"`{name}` must be a whole checkpoint, but in {folder} {fault}.")
