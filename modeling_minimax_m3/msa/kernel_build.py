"""Compiles `csrc/` into the extension's binary, on a machine with or without a GPU.

One shared library serves every torch from 2.10 on and every Python, because it is written against torch's stable ABI;
the CUDA runtime is linked in, so that it needs nothing but a driver. Its name carries a hash of the sources and flags
it was made from, and the CUDA version whose driver it needs: a binary of other sources is never taken for this one.

Uses the standard library only, so that `scripts/build_kernels.py` can run it without installing the package.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"

COMMON_FLAGS = (
    "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10
)  # fmt: skip
DEVICE_FLAGS = ("--expt-relaxed-constexpr", "-Xptxas", "-v")
# Machine code of sm_80 runs on every 8.x GPU; newer ones compile the PTX. Hopper gets its own machine code: the first
# call then compiles nothing, and kernels can use sm_90 features.
PORTABLE_TARGETS = (
    "-gencode", "arch=compute_80,code=[sm_80,compute_80]", "-gencode", "arch=compute_90,code=sm_90",
)  # fmt: skip
# The folders of kernels for every GPU. Any other folder of kernels is named after the one architecture it is for.
PORTABLE_FOLDERS = ("smxx", "sm80")
PORTABLE_FAMILY = "sm80"
LINK_FLAGS = (
    "-shared", "-cudart", "static", "-ltorch_cpu", "-ltorch_cuda", "-Xlinker", "--no-undefined",
    "-Xlinker", "--allow-shlib-undefined", "-Xlinker", "--exclude-libs,ALL",
)  # fmt: skip

_SOURCES = (".cu", ".cpp")
_SPILLS_ALLOWED = re.compile(r"^// spills: \S", re.MULTILINE)


class BuildError(RuntimeError):
    """The binary cannot be built; the message says why."""


# --- the tools ---------------------------------------------------------------------------------------------------


def find_nvcc() -> Path | None:
    """The path of nvcc: that of CUDA_HOME or CUDA_PATH, else the one on the PATH, else that of the usual folder."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            named = Path(os.environ[variable], "bin", "nvcc")
            if named.is_file():
                return named
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if usual.is_file() else None


def parse_toolkit_version(output: str) -> tuple[int, int]:
    """(13, 0) from what `nvcc --version` prints."""
    found = re.search(r"release (\d+)\.(\d+)", output)
    if not found:
        raise BuildError(f"`nvcc --version` names no release: {output.strip()!r}")
    return int(found[1]), int(found[2])


def toolkit_version(nvcc: Path) -> tuple[int, int]:
    """Major and minor release of the CUDA toolkit."""
    return parse_toolkit_version(_run([str(nvcc), "--version"]))


def torch_folder() -> Path:
    """Where torch's headers and libraries are; found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"torch is not installed for {sys.executable}: its headers are needed")
    return Path(spec.submodule_search_locations[0])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{output}")
    return output


# --- the sources -------------------------------------------------------------------------------------------------


def source_hash(csrc: Path = CSRC) -> str:
    """12 hexadecimal digits that change with any file of `csrc` and any flag."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, DEVICE_FLAGS, LINK_FLAGS)).encode())
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (*_SOURCES, ".h", ".cuh"):
            digest.update(f"{path.relative_to(csrc)}\0{_targets(path, csrc)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def library_name(cuda_major: int, csrc: Path = CSRC) -> str:
    """Name of the binary that these sources give with that CUDA release."""
    return f"kernels-{source_hash(csrc)}-cu{cuda_major}.so"


def units(csrc: Path = CSRC, one_of_each: bool = False) -> list[Path]:
    """The files to compile; `one_of_each` takes a single instantiation of every kernel, the first by name."""
    found = sorted(path for path in csrc.rglob("*") if path.suffix in _SOURCES)
    if not one_of_each:
        return found
    chosen: dict[Path, Path] = {}
    for path in found:
        # instantiations/<kernel>_<dtype>_d<head_dim>.cu; everything else is one of its kind
        kernel = re.sub(r"_(bf16|fp16)_\w+$", "", path.stem) if path.parent.name == "instantiations" else path.name
        chosen.setdefault(path.parent / kernel, path)
    return list(chosen.values())


def _with_includes(path: Path, csrc: Path) -> list[Path]:
    """A source and, transitively, the files of `csrc` that it includes."""
    files, pending = {path}, [path]
    while pending:
        current = pending.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', current.read_text(), re.MULTILINE):
            for folder in (current.parent, csrc):
                header = (folder / name).resolve()
                if header.is_file():
                    if header not in files:
                        files.add(header)
                        pending.append(header)
                    break
    return sorted(files)


def folder_targets(folder: str) -> tuple[str, ...]:
    """What nvcc compiles the kernels of a folder of `csrc` for: `sm90` for sm_90a, with its special instructions.

    Raises:
        BuildError: the folder is not one for kernels.
    """
    if folder in PORTABLE_FOLDERS:
        return PORTABLE_TARGETS
    named = re.fullmatch(r"sm(\d{2,3})", folder)
    if not named:
        raise BuildError(f"kernels stand in {', '.join(PORTABLE_FOLDERS)} or a folder such as sm90, not in {folder}")
    return ("-gencode", f"arch=compute_{named[1]}a,code=sm_{named[1]}a")


def kernel_family(capability: tuple[int, int], kinds: Collection[str] | None = None, csrc: Path = CSRC) -> str:
    """The newest family of kernels that a device runs: the folder of its own architecture, else that for every GPU.

    A folder of one architecture runs on that one only, as in `kernel_tables.h`: nothing of sm100 runs on an sm_103.

    Args:
        capability: The device's compute capability, as (9, 0).
        kinds: Sub-folders such as "selection", of which the family must have one; None for any.
        csrc: The source folder.
    """
    own = csrc / f"sm{capability[0]}{capability[1]}"
    has_kernels = own.is_dir() if kinds is None else any((own / kind).is_dir() for kind in kinds)
    return own.name if has_kernels else PORTABLE_FAMILY


def _targets(path: Path, csrc: Path) -> tuple[str, ...]:
    return folder_targets(path.relative_to(csrc).parts[0]) if path.suffix == ".cu" else ()


# --- what the assembler says about a kernel -----------------------------------------------------------------------


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel takes on one architecture: registers per thread, bytes spilled per thread."""

    name: str
    architecture: str
    registers: int
    spill_bytes: int


def parse_ptxas(output: str) -> list[KernelUsage]:
    """The kernels in what `nvcc -Xptxas -v` prints."""
    kernels, name, architecture, spill_bytes = [], None, "", 0
    for line in output.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture, spill_bytes = entry[1], entry[2], 0
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # The line also appears for functions that are not inlined; their spills count for the kernel.
            spill_bytes += int(spills[1]) + int(spills[2])
        elif (used := re.search(r"Used (\d+) registers", line)) and name is not None:
            kernels.append(KernelUsage(name, architecture, int(used[1]), spill_bytes))
            name = None
    return kernels


def check_spills(path: Path, kernels: Iterable[KernelUsage]) -> None:
    """Raises for a kernel that spills registers, unless its file says why in a line `// spills: <reason>`."""
    spilling = [kernel for kernel in kernels if kernel.spill_bytes]
    if spilling and not _SPILLS_ALLOWED.search(path.read_text()):
        listing = "\n".join(
            f"  {kernel.name} on {kernel.architecture}: {kernel.spill_bytes} bytes, {kernel.registers} registers"
            for kernel in spilling
        )
        raise BuildError(
            f"{path} spills registers:\n{listing}\n"
            "Make the tile smaller, or say why it pays in a line `// spills: <reason>` of that file."
        )


# --- building ----------------------------------------------------------------------------------------------------


class Builder:
    """Compiles the units of a source folder, keeping objects in a cache folder by the content they come from.

    Args:
        nvcc: The compiler.
        cache: Folder of objects and assembler reports; may be shared by builds of different sources.
        csrc: The source folder.
        say: Takes a line of progress.
        allow_spills: Whether kernels may spill registers without a reason, as they might with another nvcc.
    """

    def __init__(
        self,
        nvcc: Path,
        cache: Path,
        csrc: Path = CSRC,
        say: Callable[[str], None] = print,
        allow_spills: bool = False,
    ):
        self.nvcc, self.cache, self.csrc, self.say, self.allow_spills = nvcc, cache, csrc, say, allow_spills
        self.torch = torch_folder()
        self.version_text = _run([str(nvcc), "--version"])
        # Before compiling: sources that change meanwhile must not name what was made from the old ones.
        self.library_name = library_name(parse_toolkit_version(self.version_text)[0], csrc)

    def _command(self, path: Path) -> list[str]:
        command = [str(self.nvcc), *COMMON_FLAGS, "-I", str(self.csrc)]
        if path.suffix == ".cu":
            command += [*DEVICE_FLAGS, *_targets(path, self.csrc)]
        else:
            command += ["-isystem", str(self.torch / "include")]
        return command

    def _cached(self, path: Path) -> Path:
        """The stem of a unit's files in the cache; changes with everything that the object depends on."""
        digest = hashlib.sha256(f"{self._command(path)}{self.version_text}".encode())
        if path.suffix != ".cu":
            digest.update((self.torch / "version.py").read_bytes())
        for file in _with_includes(path, self.csrc):
            digest.update(f"{file.relative_to(self.csrc)}\0".encode() + file.read_bytes() + b"\0")
        return self.cache / f"{path.stem}-{digest.hexdigest()[:16]}"

    def _compile(self, path: Path) -> Path:
        stem = self._cached(path)
        target, report = stem.with_suffix(".o"), stem.with_suffix(".json")
        if not (target.is_file() and report.is_file()):
            unfinished = stem.with_suffix(f".{os.getpid()}.o")
            output = _run([*self._command(path), "-c", str(path), "-o", str(unfinished)])
            report.write_text(json.dumps([asdict(kernel) for kernel in parse_ptxas(output)], indent=1))
            unfinished.replace(target)
        if not self.allow_spills:
            check_spills(path, [KernelUsage(**kernel) for kernel in json.loads(report.read_text())])
        return target

    def compile(self, paths: list[Path], jobs: int) -> list[Path]:
        """Objects of the units, in their order; `jobs` compilers run at a time."""
        self.cache.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(self._compile, path): path for path in paths}
            try:
                for number, done in enumerate(as_completed(running), 1):
                    done.result()
                    name = running[done].relative_to(self.csrc)
                    self.say(f"[{number}/{len(paths)}] {name} ({time.monotonic() - started:.0f} s)")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [done.result() for done in running]

    def link(self, objects: list[Path], folder: Path) -> Path:
        """Makes the library in `folder` and returns its path."""
        libraries = self.torch / "lib"
        if not (libraries / "libtorch_cuda.so").is_file():
            raise BuildError(f"the torch in {self.torch} is built without CUDA: install a build with CUDA to link")
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / self.library_name
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        _run([str(self.nvcc), *map(str, objects), "-L", str(libraries), *LINK_FLAGS, "-o", str(unfinished)])
        unfinished.replace(library)
        return library


def build(
    folder: Path,
    cache: Path,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
    allow_spills: bool = False,
) -> Path:
    """Builds the library into `folder` and returns its path.

    Raises:
        BuildError: there is no nvcc or no torch with CUDA, the compiler fails, or a kernel spills registers.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: set CUDA_HOME to a CUDA toolkit, or put nvcc on the PATH")
    builder = Builder(nvcc, cache, say=say, allow_spills=allow_spills)
    return builder.link(builder.compile(units(), jobs or os.cpu_count() or 1), folder)


def check(cache: Path, jobs: int | None = None, say: Callable[[str], None] = print) -> bool:
    """Compiles one instantiation of each kernel, without linking; False where there is no nvcc to do it with."""
    nvcc = find_nvcc()
    if nvcc is None:
        return False
    Builder(nvcc, cache, say=say).compile(units(one_of_each=True), jobs or os.cpu_count() or 1)
    return True
