"""A checkpoint on disk: which tensor lies where, and whether all of it is there."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

from ..mxfp8 import SCALE_DTYPE, VALUE_DTYPE
from .layouts import SCALE_SUFFIX, TEXT_PREFIX, is_quantized, released_shapes, scale_of, stored_tensors
from .tensor_files import Region, read_header

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG = "config.json"

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes are as its config says.

    Args:
        folder (Path): Its folder.
        config_file (dict): Content of `config.json`.
        config (MiniMaxM3VLConfig): Config of the whole model. In the layout "text" the vision tower is the default's.
        layout (str): One of `layouts.LAYOUTS`.
        precision (str): "bf16" for plain dtypes, or "mxfp8".
        tensors (dict[str, Region]): Where each tensor is, by released name, scales included.
        files (tuple[Path, ...]): The safetensors files.
        metadata (dict[str, str]): Metadata of the first file.
    """

    folder: Path
    config_file: dict[str, Any]
    config: MiniMaxM3VLConfig
    layout: str
    precision: str
    tensors: dict[str, Region]
    files: tuple[Path, ...]
    metadata: dict[str, str]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint and check them. Values are not read.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is cut off, has another name than the index says, or holds other tensors than the config
            describes; or the checkpoint is in a format that is not known here. The message names file and tensor.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder} must be the folder of a checkpoint on this machine, but it {what}. A checkpoint of the Hub comes "
            "there by `hf download NAME --local-dir FOLDER`."
        )
    config_file = read_json(folder / CONFIG)
    config, is_text = read_config(config_file, folder)
    precision = _precision(config_file, folder)
    stored, files, metadata = _read_headers(folder)
    layout = "text" if is_text else "released" if any(name.startswith(TEXT_PREFIX) for name in stored) else "modules"
    tensors = _by_released_names(stored, config, layout, precision, folder)
    return Checkpoint(folder, config_file, config, layout, precision, tensors, files, metadata)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}.")
    return content


def read_config(content: dict[str, Any], folder: Path) -> tuple[MiniMaxM3VLConfig, bool]:
    """The config of the whole model that the content of `config.json` describes, and whether it is the text's alone.

    A language model gets the default's vision tower, of which nothing is used.
    """
    model_type = content.get("model_type")
    try:
        if model_type == MiniMaxM3VLConfig.model_type:
            return MiniMaxM3VLConfig.from_dict(content), False
        if model_type == MiniMaxM3VLTextConfig.model_type:
            text = MiniMaxM3VLTextConfig.from_dict(content)
            # A small vocabulary has no place for the defaults of the two tokens.
            return MiniMaxM3VLConfig(text_config=text, image_token_index=0, video_token_index=1), True
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    raise ValueError(
        f"{folder / CONFIG}: `model_type` must be {MiniMaxM3VLConfig.model_type!r} or "
        f"{MiniMaxM3VLTextConfig.model_type!r}, got {model_type!r}."
    )


def _precision(content: dict[str, Any], folder: Path) -> str:
    quantization = content.get("quantization_config")
    if quantization is None:
        return "bf16"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "mxfp8":
        raise ValueError(f"{folder / CONFIG}: only the `quant_method` 'mxfp8' can be converted, got {method!r}.")
    return "mxfp8"


def _read_headers(folder: Path) -> tuple[dict[str, Region], tuple[Path, ...], dict[str, str]]:
    present = {file.name for file in folder.glob("*.safetensors")}
    index_file = folder / INDEX
    if index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index_file}: `weight_map` must be an object of names of files.")
    elif present == {SINGLE_FILE}:
        weight_map = None
    else:
        found = ", ".join(sorted(present)[:3]) or "none"
        raise FileNotFoundError(f"{folder} must hold {INDEX} or {SINGLE_FILE} alone, got these files: {found}.")
    names = {SINGLE_FILE} if weight_map is None else set(weight_map.values())
    if missing := sorted(names - present):
        raise FileNotFoundError(f"{folder / missing[0]} is missing, which {INDEX} names.")
    if extra := sorted(present - names):
        raise ValueError(f"{folder / extra[0]} is not in {INDEX}: it was renamed or belongs to something else.")

    stored: dict[str, Region] = {}
    metadata: dict[str, str] = {}
    files = tuple(folder / name for name in sorted(names))
    for file in files:
        tensors, of_file = read_header(file)
        metadata = metadata or of_file
        for name, region in tensors.items():
            if weight_map is not None and weight_map.get(name) != file.name:
                raise ValueError(
                    f"{file} holds {name}, which {INDEX} expects in {weight_map.get(name, 'no file')}: the file was "
                    "renamed or changed."
                )
            stored[name] = region
    if weight_map is not None and (missing := sorted(set(weight_map) - set(stored))):
        raise ValueError(f"{folder / weight_map[missing[0]]} does not hold {missing[0]}, which {INDEX} expects there.")
    return stored, files, metadata


def _by_released_names(
    stored: dict[str, Region], config: MiniMaxM3VLConfig, layout: str, precision: str, folder: Path
) -> dict[str, Region]:
    """Check every tensor, and split fused ones."""
    shapes = released_shapes(config)
    quantized = {name for name, shape in shapes.items() if precision == "mxfp8" and is_quantized(name, shape)}
    expected = []
    for tensor in stored_tensors(config, layout):
        expected.append(tensor)
        if scale := scale_of(tensor, quantized.__contains__):
            expected.append(scale)
    names = {tensor.name for tensor in expected}
    if missing := [name for name in names if name not in stored]:
        raise ValueError(
            f"{folder} has no {min(missing)}, and lacks {len(missing)} of the {len(names)} tensors that its config "
            f"describes in the layout {layout!r} in {precision}."
        )
    if extra := sorted(set(stored) - names):
        raise ValueError(
            f"{stored[extra[0]].file} holds {extra[0]}, which its config does not describe ({len(extra)} such tensors)."
        )

    tensors: dict[str, Region] = {}
    for tensor in expected:
        region, is_scale = stored[tensor.name], tensor.parts[0].endswith(SCALE_SUFFIX)
        if region.shape != tensor.shape:
            raise ValueError(
                f"{region.file}: {tensor.name} must have the shape {tensor.shape} by the config, got {region.shape}."
            )
        allowed: tuple[torch.dtype, ...] = _PLAIN_DTYPES
        if is_scale or tensor.parts[0] in quantized:
            allowed = (SCALE_DTYPE,) if is_scale else (VALUE_DTYPE,)
        if region.dtype not in allowed:
            expected_dtypes = " or ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"{region.file}: {tensor.name} must be in {expected_dtypes}, got {region.dtype}.")
        start = 0
        for part in tensor.parts:
            shape = shapes[part.removesuffix(SCALE_SUFFIX)]
            if is_scale:
                shape = (*shape[:-1], region.shape[-1])
            tensors[part] = region.part(start, shape)
            start += math.prod(shape)
    return tensors
