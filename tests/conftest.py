"""Fixtures that every package's tests may use."""

import os

# No test reads from a model hub; set before Transformers is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# The models are so small that a second thread only waits for the first, for very long where the machine is busy.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of `scripts/` by its name, as Python does when it runs one of them."""
    scripts = str(ROOT / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module
    sys.path.remove(scripts)


@pytest.fixture(scope="session")
def tiny_checkpoint(load_script, tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint: model, processor, tokenizer, chat template. Do not write to it."""
    return load_script("make_tiny_checkpoint").make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_checkpoint"))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the tables that tests recorded with `record_property("table", text)`: workers' own output is lost."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "table":
                title, _, table = value.partition("\n")
                terminalreporter.section(title)
                terminalreporter.write_line(table)
