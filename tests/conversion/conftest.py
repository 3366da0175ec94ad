"""Fixtures of the tests of conversion: synthetic checkpoints, and how they are read without the code under test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.conversion.convert import Conversion, convert
from modeling_minimax_m3.conversion.synthetic import make_synthetic_checkpoint

SHARD = 200_000  # bytes: a tiny checkpoint has several files


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> dict[str, Path]:
    """A tiny synthetic checkpoint in each precision, in several files. Tests must not change them."""
    folders = {}
    for precision in ("bf16", "mxfp8"):
        folders[precision] = tmp_path_factory.mktemp("synthetic") / precision
        options = {"precision": precision, "max_shard_size": SHARD, "show_progress": False}
        make_synthetic_checkpoint(folders[precision], tiny_config(), **options)
    return folders


@pytest.fixture(scope="session")
def converted() -> Callable[..., Path]:
    """`converted(source, target, **options)` converts quietly into small files and returns the target."""

    def run(source: Path, target: Path, *, overwrite: bool = False, restart: bool = False, **options) -> Path:
        conversion = Conversion(**{"max_shard_size": SHARD, **options})
        convert(source, target, conversion, overwrite=overwrite, restart=restart, show_progress=False)
        return target

    return run


@pytest.fixture(scope="session")
def read() -> Callable[[Path], dict[str, torch.Tensor]]:
    """`read(folder)` gives all tensors of a checkpoint, read by the safetensors library."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}

    return tensors


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`contents(folder)` gives the bytes of each file."""
    return lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
