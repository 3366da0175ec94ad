"""Fixtures of the tests of data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

import processing_minimax_m3  # noqa: F401  (registers the processor)
from processing_minimax_m3.data import Encoder


@pytest.fixture(scope="session")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def encoder(processor):
    return Encoder(processor)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "grey.png"
    Image.linear_gradient("L").resize((112, 84)).convert("RGB").save(path)
    return path


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """`write_rows(row, ...)` writes rows, or lines as they are, to a file of JSON lines."""

    def write(*rows, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
