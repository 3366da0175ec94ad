"""Fixtures that every package's tests may use."""

import os
import tempfile

# No test reads from a model hub, or what an earlier run kept; set before Transformers is imported anywhere. Processes
# that are started later have the same folder.
os.environ["HF_HUB_OFFLINE"] = "1"
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="minimax-m3-tests-")

import gc
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# No test module is garbage, so nothing is collected while they are imported.
gc.disable()

# The models are so small that a second thread only waits for the first, for very long where the machine is busy.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

# What `kernels` may be, and the value of MINIMAX_M3_MSA_CUDA that it stands for.
KERNELS = {"newest": "auto", "portable": "portable"}


def pytest_unconfigure(config) -> None:
    """Removes the folder, when all worker processes are done with it."""
    folder = Path(os.environ["HF_DATASETS_CACHE"])
    if not hasattr(config, "workerinput") and folder.name.startswith("minimax-m3-tests-"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc) -> None:
    """Tests that take `kernels` run twice; last of the parameters, so that both runs of a test follow each other."""
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", KERNELS, indirect=True)


@pytest.fixture
def kernels(request, monkeypatch) -> str:
    """The compiled kernels that the test runs on, "newest" or "portable": the extension reads the variable at each call.

    Where MINIMAX_M3_MSA_CUDA is set, only its kernels are tested. "newest" needs a GPU whose architecture has kernels of
    its own: a folder of `csrc` such as sm90.
    """
    if os.environ.get("MINIMAX_M3_MSA_CUDA", KERNELS[request.param]) != KERNELS[request.param]:
        pytest.skip(f"MINIMAX_M3_MSA_CUDA is {os.environ['MINIMAX_M3_MSA_CUDA']}")
    if request.param == "newest":
        from modeling_minimax_m3.msa import kernel_build

        capability = torch.cuda.get_device_capability()
        if kernel_build.kernel_family(capability) == kernel_build.PORTABLE_FAMILY:
            pytest.skip(f"there are only portable kernels for compute capability {capability}")
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", KERNELS[request.param])
    return request.param


_once_of: list = [None, {}]  # the test that ran last, whatever its `kernels`, and the values that it computed


@pytest.fixture
def once(request) -> Callable:
    """`once(compute)` is `compute()`, kept for the same call of the same test on the other `kernels`.

    For what a test compares with, where that takes longer than the kernels: it must not depend on them.
    """
    callspec = getattr(request.node, "callspec", None)
    params = {} if callspec is None else {name: at for name, at in callspec.indices.items() if name != "kernels"}
    test = (request.node.path, request.node.originalname, params)
    if _once_of[0] != test:
        _once_of[:] = [test, {}]
    values, count = _once_of[1], iter(range(10**9))

    def compute_once(compute):
        number = next(count)
        if number not in values:
            values[number] = compute()
        return values[number]

    return compute_once


@pytest.fixture
def needs_memory() -> Callable[[int], None]:
    """`needs_memory(gigabytes)` skips the test unless so much of the GPU's memory is free, after what is cached is freed."""

    def check(gigabytes: int) -> None:
        _once_of[:] = [None, {}]
        gc.collect()
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
            pytest.skip(f"needs {gigabytes} GB of free memory")

    return check


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


def pytest_sessionstart(session) -> None:
    """The process that hands tests to others finishes no collection of tests."""
    if getattr(session.config.option, "numprocesses", None):
        gc.enable()


def pytest_collection_finish(session) -> None:
    """Garbage collections leave out all that is there before the first test: a walk through it takes half a second.

    `Trainer` and Accelerate collect in every run. Without a GPU, other collections are rare too, because `torch.compile`
    makes many objects. With one, garbage may hold its memory.
    """
    gc.enable()
    if not torch.cuda.is_available():
        gc.set_threshold(10_000)
    gc.collect()
    gc.freeze()


def pytest_runtest_makereport(item, call) -> None:
    """Stop where a kernel has broken the process's CUDA context: every later test would fail for that alone."""
    if call.excinfo is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        item.session.shouldstop = f"the GPU cannot be used any more after {item.nodeid}: {error}"


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the tables that tests recorded with `record_property("table", text)`: workers' own output is lost."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "table":
                title, _, table = value.partition("\n")
                terminalreporter.section(title)
                terminalreporter.write_line(table)
