"""Finding, building and loading the extension's binary: the choice, the reasons, and what happens only once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from modeling_minimax_m3.msa import extension, kernel_build


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a driver for CUDA 13.0, nvcc of CUDA 13.0, and no binary; nothing loaded yet."""
    monkeypatch.delenv("MINIMAX_M3_MSA_LIBRARY", raising=False)
    monkeypatch.delenv("MINIMAX_M3_MSA_CUDA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "_FOLDER", tmp_path / "package")
    monkeypatch.setattr(extension, "_outcome", None)
    monkeypatch.setattr(extension, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(kernel_build, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(kernel_build, "toolkit_version", lambda nvcc: (13, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(extension, "device_reason", lambda index: None)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """Paths that were loaded, by a stand-in that takes any file."""
    paths = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: paths.append(Path(path)))
    return paths


@pytest.fixture
def built(monkeypatch):
    """Folders that were built into, by a stand-in for the compiler."""
    folders = []

    def build(folder, cache, say, allow_spills):
        assert allow_spills, "a user's compiler may spill where ours does not"
        folders.append(folder)
        return place(folder)

    monkeypatch.setattr(kernel_build, "build", build)
    return folders


def place(folder, cuda_major=13):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / kernel_build.library_name(cuda_major)
    path.write_bytes(b"a binary")
    return path


def test_the_installed_binary_is_taken_before_the_cached_one(machine, loaded):
    cached = place(machine / "cache" / "minimax_m3_msa")
    assert extension.find_library() == (cached, "")
    installed = place(machine / "package")
    assert extension.load(build=False) is None
    assert loaded == [installed]


def test_it_is_loaded_once(machine, loaded):
    place(machine / "package")
    assert extension.unavailable() is None
    assert not loaded, "asking does not load"
    for _ in range(3):
        assert extension.load(build=False) is None
    assert extension.unavailable() is None
    assert len(loaded) == 1


def test_a_binary_of_other_sources_is_not_taken(machine, loaded):
    path = place(machine / "package")
    path.rename(path.with_name("kernels-000000000000-cu13.so"))
    assert "not compiled" in extension.load(build=False)
    assert not loaded


def test_without_a_binary_only_build_true_builds(machine, loaded, built):
    for _ in range(2):
        assert "not compiled" in extension.load(build=False)
    assert "not compiled" in extension.unavailable()
    assert not built
    assert extension.load(build=True) is None, "an earlier look does not forbid building"
    assert built == [machine / "cache" / "minimax_m3_msa"]
    assert loaded == [machine / "cache" / "minimax_m3_msa" / kernel_build.library_name(13)]


def test_threads_build_once(machine, loaded, built):
    threads = [threading.Thread(target=extension.load, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == len(loaded) == 1


def test_processes_build_once(machine, loaded, built, monkeypatch):
    """Another process that holds the lock has built it by the time this one gets the lock."""
    look = extension.find_library
    looks = []

    def found_on_the_second_look():
        looks.append(None)
        if len(looks) == 2:
            place(machine / "cache" / "minimax_m3_msa")
        return look()

    monkeypatch.setattr(extension, "find_library", found_on_the_second_look)
    assert extension.load(build=True) is None
    assert len(looks) == 2
    assert not built


def test_building_says_so(machine, loaded, built, capsys):
    extension.load(build=True)
    said = capsys.readouterr().err
    assert "building the CUDA kernels" in said
    assert str(machine / "cache") in said


def test_without_nvcc_it_says_so(machine, monkeypatch, built):
    monkeypatch.setattr(kernel_build, "find_nvcc", lambda: None)
    assert "no nvcc" in extension.load(build=True)
    assert not built


def test_a_failed_build_is_not_tried_again(machine, monkeypatch):
    tries = []

    def fail(folder, cache, say, allow_spills):
        tries.append(folder)
        raise kernel_build.BuildError("the compiler said no")

    monkeypatch.setattr(kernel_build, "build", fail)
    for _ in range(2):
        assert "the compiler said no" in extension.load(build=True)
    assert "the compiler said no" in extension.unavailable()
    assert len(tries) == 1


def test_a_broken_binary_says_so(machine):
    path = place(machine / "package")
    for _ in range(2):
        reason = extension.load(build=False)
        assert str(path) in reason
        assert "cannot be loaded" in reason
    assert "cannot be loaded" in extension.unavailable()


def test_a_named_binary_is_taken(machine, loaded, monkeypatch):
    place(machine / "package")
    named = machine / "mine.so"
    monkeypatch.setenv("MINIMAX_M3_MSA_LIBRARY", str(named))
    assert "MINIMAX_M3_MSA_LIBRARY names no file" in extension.load(build=False)
    named.write_bytes(b"a binary")
    assert extension.load(build=False) is None
    assert loaded == [named]


def test_an_old_driver_is_the_reason(machine, loaded, built, monkeypatch):
    monkeypatch.setattr(extension, "driver_version", lambda: (12, 4))
    place(machine / "package", cuda_major=13)
    assert "the driver runs CUDA 12.4, the compiled extension needs CUDA 13" in extension.load(build=False)
    assert "CUDA 13, but the driver runs CUDA 12.4" in extension.load(build=True)
    assert not loaded
    assert not built


def test_an_old_driver_takes_an_older_binary(machine, loaded, monkeypatch):
    monkeypatch.setattr(extension, "driver_version", lambda: (12, 4))
    place(machine / "package", cuda_major=13)
    older = place(machine / "cache" / "minimax_m3_msa", cuda_major=12)
    assert extension.load(build=False) is None
    assert loaded == [older]


def test_without_a_driver_nothing_is_built(machine, built, monkeypatch):
    monkeypatch.setattr(extension, "driver_version", lambda: None)
    assert "no NVIDIA driver" in extension.load(build=True)
    assert not built


def test_without_a_device_it_is_unavailable(machine, monkeypatch):
    place(machine / "package")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.unavailable() == "there is no CUDA device"


def test_the_switch(machine, loaded, monkeypatch):
    place(machine / "package")
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "off")
    assert "MINIMAX_M3_MSA_CUDA=off" in extension.load(build=True)
    assert "MINIMAX_M3_MSA_CUDA=off" in extension.unavailable()
    assert not loaded
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "yes")
    with pytest.raises(ValueError, match="MINIMAX_M3_MSA_CUDA must be one of auto, off, portable, got 'yes'"):
        extension.load(build=False)
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "portable")
    assert extension.load(build=False) is None


def test_importing_loads_and_builds_nothing(tmp_path):
    """Even where there is a binary, and one that cannot be loaded."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    package = Path(extension.__file__).resolve().parent
    code = "import msa; assert msa.extension._outcome is None; assert msa.extension.load(False)"
    environment = {**os.environ, "MINIMAX_M3_MSA_LIBRARY": str(broken), "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
