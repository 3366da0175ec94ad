"""Finds, builds and loads the extension's binary, and says why where it cannot. Importing this does none of it.

The binary is looked for in this folder, where a wheel and `scripts/build_kernels.py` put it, then in the user's cache.
Building takes minutes, so that only a call that names the `cuda` backend starts it. One process per machine builds,
and the others wait for its result.

Environment variables:
    MINIMAX_M3_MSA_CUDA: "auto" (the default), "off" (never use the extension), or "portable" (use no kernel that needs
        more than an sm_80 GPU).
    MINIMAX_M3_MSA_LIBRARY: path of the binary to load, whatever its name and sources.
    XDG_CACHE_HOME: the user's cache, ~/.cache by default; binaries built on first use go to `minimax_m3_msa` in it.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import torch

from . import kernel_build

MODES = ("auto", "off", "portable")
OLDEST_CAPABILITY = (8, 0)

_FOLDER = Path(__file__).resolve().parent
_lock = threading.Lock()
_outcome: str | None = None  # of the attempt to load: "" where the binary is loaded, else why not; None before it


def mode() -> str:
    """The value of MINIMAX_M3_MSA_CUDA.

    Raises:
        ValueError: It is none of `MODES`.
    """
    value = os.environ.get("MINIMAX_M3_MSA_CUDA", "auto")
    if value not in MODES:
        raise ValueError(
            f"the environment variable MINIMAX_M3_MSA_CUDA must be one of {', '.join(MODES)}, got {value!r}"
        )
    return value


def cache_folder() -> Path:
    """Where binaries that are built on first use go."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimax_m3_msa"


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver runs, as (13, 0); None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


@functools.cache
def device_reason(index: int) -> str | None:
    """Why no kernel runs on the GPU `index`; None where they do."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    return (
        f"the device cuda:{index} has compute capability {capability[0]}.{capability[1]}, "
        f"the extension needs {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer"
    )


def kernel_family(device: torch.device, kinds: Collection[str]) -> str:
    """The newest family of kernels that calls on `device`, a GPU, may run; `kinds` as in `kernel_build.kernel_family`."""
    if mode() == "portable":
        return kernel_build.PORTABLE_FAMILY
    return kernel_build.kernel_family(torch.cuda.get_device_capability(device), kinds)


@functools.cache
def _library_pattern() -> str:
    """The name of a binary of these sources, for any version of CUDA."""
    return kernel_build.library_name(0).replace("-cu0.so", "-cu*.so")


def find_library() -> tuple[Path | None, str]:
    """The binary to load, or None and the reason why there is none. Loads and builds nothing."""
    named = os.environ.get("MINIMAX_M3_MSA_LIBRARY")
    if named:
        path = Path(named)
        return (path, "") if path.is_file() else (None, f"MINIMAX_M3_MSA_LIBRARY names no file: {named}")
    driver = driver_version()
    if driver is None:
        return None, "there is no NVIDIA driver"
    needed = []
    for folder in (_FOLDER, cache_folder()):
        for path in sorted(folder.glob(_library_pattern()), reverse=True):
            major = int(path.stem.rpartition("-cu")[2])
            if major <= driver[0]:
                return path, ""
            needed.append(major)
    if needed:
        return None, f"the driver runs CUDA {driver[0]}.{driver[1]}, the compiled extension needs CUDA {min(needed)}"
    return None, "the extension is not compiled (`make kernels` in a checkout does it, and so does `backend='cuda'`)"


def unavailable() -> str | None:
    """Why no call can run on the extension on this machine now; None where it can. Loads and builds nothing."""
    if mode() == "off":
        return "the extension is switched off by MINIMAX_M3_MSA_CUDA=off"
    if _outcome is not None:
        return _outcome or None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return device_reason(torch.cuda.current_device()) or find_library()[1] or None


def is_loaded() -> bool:
    """Whether the binary is loaded and not switched off."""
    return _outcome == "" and mode() != "off"


def load(build: bool) -> str | None:
    """Loads the binary unless it is loaded.

    Args:
        build (bool): Build it first where there is none. After a failure, later calls do not build again.

    Returns:
        Why the binary is not loaded, or None where it is.
    """
    global _outcome
    if mode() == "off":
        return "the extension is switched off by MINIMAX_M3_MSA_CUDA=off"
    if _outcome is not None:
        return _outcome or None
    with _lock:
        if _outcome is None:
            path, reason = find_library()
            driver = driver_version()
            if path is None and build and driver is not None:
                path, reason = _build(reason, driver)
            if path is not None:
                reason = _load(path)
            # A binary that is missing now may be built later in this process.
            if path is not None or build:
                _outcome = reason
            return reason or None
    return _outcome or None


def _load(path: Path) -> str:
    """Why the binary cannot be loaded, or "" where it is."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the compiled extension {path} cannot be loaded: {error}"
    return ""


def _build(reason: str, driver: tuple[int, int]) -> tuple[Path | None, str]:
    """Builds into the user's cache, one process at a time.

    Args:
        reason (str): Why there is no binary.
        driver (tuple of int): The newest CUDA version that the driver runs.

    Returns:
        The binary and "", or None and why there is still none.
    """
    nvcc = kernel_build.find_nvcc()
    if nvcc is None:
        return None, f"{reason}, and there is no nvcc to build it with"
    try:
        major = kernel_build.toolkit_version(nvcc)[0]
        if major > driver[0]:
            return None, f"{reason}; {nvcc} is of CUDA {major}, but the driver runs CUDA {driver[0]}.{driver[1]}"
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        import fcntl  # not on every system that can import this module

        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            path, _ = find_library()  # another process may have built it meanwhile
            if path is None:
                _say(f"building the CUDA kernels of {__package__} into {folder}, once; this takes some minutes")
                path = kernel_build.build(folder, folder / "objects", say=_say, allow_spills=True)
                _say(f"built {path}")
        return path, ""
    except (kernel_build.BuildError, OSError) as error:
        return None, f"{reason}, and building it failed: {error}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
