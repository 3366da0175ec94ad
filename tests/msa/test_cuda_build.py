"""The build of the extension: what is compiled, how, and what is kept; with a stand-in for the compiler."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from modeling_minimax_m3.msa import kernel_build

ROOT = Path(__file__).resolve().parents[2]

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3msa6narrowEv' for 'sm_80'
ptxas info    : Function properties for _ZN3msa6narrowEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 432 bytes cmem[0]
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function '_ZN3msa4wideEv' for 'sm_90a'
ptxas info    : Function properties for _ZN3msa4wideEv
    48 bytes stack frame, 40 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 432 bytes cmem[0]
"""


class FakeCompiler:
    """A folder of sources, an nvcc that writes empty objects, and the commands that it was called with."""

    def __init__(self, folder):
        self.csrc, self.cache, self.log = folder / "csrc", folder / "cache", folder / "log"
        self.said = []
        self.write("params.h", "// one")
        self.write("api/select.cpp", '#include "params.h"')
        self.write("sm80/selection/kernel.cuh", '#include "smxx/common/copy.cuh"')
        self.write("smxx/common/copy.cuh", "// copies")
        self.write("sm80/selection/instantiations/rows_bf16_d128.cu", '#include "sm80/selection/kernel.cuh"')
        self.write("sm80/selection/instantiations/rows_fp16_d64.cu", '#include "sm80/selection/kernel.cuh"')
        self.write("sm90/selection/instantiations/scores_bf16_d64.cu", '#include "params.h"')
        self.nvcc = folder / "nvcc"
        self.output = folder / "output"
        self.output.write_text("")
        self.nvcc.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi\n'
            f'echo "$@" >> {self.log}\n'
            'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n'
            f"cat {self.output}\n"
            f"test ! -e {folder}/broken\n"
        )
        self.nvcc.chmod(self.nvcc.stat().st_mode | stat.S_IXUSR)

    def write(self, name, text):
        path = self.csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commands(self):
        """The commands since the last call, as {name of the source or "link": command}."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        found = {}
        for line in lines:
            words = line.split()
            found[words[words.index("-c") + 1].rpartition("/")[2] if "-c" in words else "link"] = line
        return found

    def builder(self, allow_spills=False):
        return kernel_build.Builder(self.nvcc, self.cache, self.csrc, self.said.append, allow_spills)

    def compile(self, **options):
        return self.builder(**options).compile(kernel_build.units(self.csrc), jobs=2)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    torch_folder = tmp_path / "torch"
    (torch_folder / "lib").mkdir(parents=True)
    (torch_folder / "lib" / "libtorch_cuda.so").touch()
    (torch_folder / "version.py").write_text("__version__ = '2.14'")
    monkeypatch.setattr(kernel_build, "torch_folder", lambda: torch_folder)
    return FakeCompiler(tmp_path)


def test_flags_follow_the_kind_of_source(compiler):
    compiler.compile()
    commands = compiler.commands()
    assert set(commands) == {"select.cpp", "rows_bf16_d128.cu", "rows_fp16_d64.cu", "scores_bf16_d64.cu"}
    assert "arch=compute_80,code=[sm_80,compute_80]" in commands["rows_bf16_d128.cu"]
    assert "sm_90a" not in commands["rows_bf16_d128.cu"]
    assert "arch=compute_90a,code=sm_90a" in commands["scores_bf16_d64.cu"]
    assert "compute_80" not in commands["scores_bf16_d64.cu"]
    assert "torch/include" in commands["select.cpp"]
    assert not any(
        "torch/include" in commands[name] for name in ("rows_bf16_d128.cu", "rows_fp16_d64.cu", "scores_bf16_d64.cu")
    ), "kernels know no torch"


@pytest.mark.parametrize(
    "folder, targets",
    [
        ("smxx", kernel_build.PORTABLE_TARGETS),
        ("sm80", kernel_build.PORTABLE_TARGETS),
        ("sm90", ("-gencode", "arch=compute_90a,code=sm_90a")),
        ("sm100", ("-gencode", "arch=compute_100a,code=sm_100a")),
    ],
)
def test_a_folder_names_its_target(folder, targets):
    assert kernel_build.folder_targets(folder) == targets


def test_a_kernel_outside_the_folders_of_kernels_is_refused(compiler):
    compiler.write("hopper/scores.cu", "")
    with pytest.raises(kernel_build.BuildError, match="smxx, sm80 or a folder such as sm90, not in hopper"):
        compiler.compile()


def test_kernels_of_one_architecture_know_no_other():
    """Adding an architecture, or dropping one, leaves the folders of the others alone."""
    folders = [path for path in kernel_build.CSRC.iterdir() if path.name.startswith("sm")]
    assert {path.name for path in folders} >= {"smxx", "sm80", "sm90"}
    for folder in folders:
        others = [other.name for other in folders if other != folder and other.name != "smxx"]
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".md":
                assert not [name for name in others if name in path.read_text()], path


STUB_HEADER = """\
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/selection/schedule.h"

namespace msa::sm100 {

void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule, cudaStream_t stream);

}  // namespace msa::sm100
"""
STUB_SOURCE = """\
#include "block_scores.h"

namespace msa::sm100 {

namespace {

__global__ void block_scores_kernel(const SelectParams, const ScoreSchedule) {}

}  // namespace

void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule, cudaStream_t stream) {
  block_scores_kernel<<<schedule.num_units, 32, 0, stream>>>(params, schedule);
}

}  // namespace msa::sm100
"""


@pytest.fixture
def sources_with_sm100(tmp_path):
    """The sources of the kernels with an architecture more: a folder, and a row and an include of the table."""
    csrc = tmp_path / "sources"
    shutil.copytree(kernel_build.CSRC, csrc)
    folder = csrc / "sm100" / "selection"
    folder.mkdir(parents=True)
    (folder / "block_scores.h").write_text(STUB_HEADER)
    (folder / "block_scores.cu").write_text(STUB_SOURCE)
    tables = csrc / "kernel_tables.h"
    text = tables.read_text()
    row = "ScoreKernel> kScoreKernels[] = {\n"
    assert text.count(row) == 1
    text = text.replace(row, row + "    {{10, 0}, supports_all, {sm100::launch_block_scores, 64, 4096}},\n")
    tables.write_text(text.replace("#pragma once\n", '#pragma once\n\n#include "sm100/selection/block_scores.h"\n'))
    return csrc


def test_a_new_architecture_is_a_folder_and_a_row(compiler, sources_with_sm100, tmp_path):
    csrc = sources_with_sm100
    before, after = set(kernel_build.units()), set(kernel_build.units(csrc, one_of_each=True))
    stub = csrc / "sm100" / "selection" / "block_scores.cu"
    assert stub in after
    assert {path.relative_to(csrc) for path in after - {stub}} <= {
        path.relative_to(kernel_build.CSRC) for path in before
    }
    assert kernel_build.library_name(13, csrc) != kernel_build.library_name(13)
    kernel_build.Builder(compiler.nvcc, tmp_path / "objects", csrc, say=str).compile([stub], jobs=1)
    assert "-gencode arch=compute_100a,code=sm_100a" in compiler.commands()["block_scores.cu"]


@pytest.mark.skipif(kernel_build.find_nvcc() is None, reason="needs nvcc")
def test_a_new_architecture_compiles(sources_with_sm100, tmp_path):
    csrc = sources_with_sm100
    units = [csrc / "sm100" / "selection" / "block_scores.cu", csrc / "api" / "selection.cpp"]
    builder = kernel_build.Builder(kernel_build.find_nvcc(), tmp_path / "objects", csrc, say=str)
    assert len(builder.compile(units, jobs=1)) == len(units)


CHOICES = """\
#include "kernel_tables.h"

using namespace msa;

constexpr bool is_even(const int& call) { return call % 2 == 0; }
constexpr TableRow<int, char> kTable[] = {
    {{10, 0}, is_even, 'b'}, {{9, 0}, supports_all, 'h'}, {kPortable, supports_all, 'p'}};

constexpr char choice(Capability device, int call, bool portable_only = false) {
  return choose_kernel(kTable, device, portable_only, call);
}
static_assert(choice({10, 0}, 2) == 'b');
static_assert(choice({10, 0}, 3) == 'p', "what the newest does not support");
static_assert(choice({10, 3}, 2) == 'p', "code of one architecture runs on no other");
static_assert(choice({9, 0}, 2) == 'h');
static_assert(choice({8, 0}, 2) == 'p');
static_assert(choice({8, 9}, 2) == 'p');
static_assert(choice({12, 0}, 2) == 'p');
static_assert(choice({10, 0}, 2, true) == 'p');
"""


@pytest.mark.skipif(kernel_build.find_nvcc() is None, reason="needs nvcc")
def test_the_first_row_that_fits_is_chosen(tmp_path):
    source = tmp_path / "choices.cpp"
    source.write_text(CHOICES)
    command = [kernel_build.find_nvcc(), "-std=c++20", "-I", kernel_build.CSRC, "-c", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_progress_counts_every_unit(compiler):
    compiler.compile()
    assert [line.split()[0] for line in compiler.said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


@pytest.mark.parametrize(
    "changed, compiled",
    [
        (None, []),
        ("api/select.cpp", ["select.cpp"]),
        ("sm80/selection/instantiations/rows_fp16_d64.cu", ["rows_fp16_d64.cu"]),
        ("smxx/common/copy.cuh", ["rows_bf16_d128.cu", "rows_fp16_d64.cu"]),
        ("params.h", ["scores_bf16_d64.cu", "select.cpp"]),
    ],
    ids=["nothing", "a source", "an instantiation", "a header of headers", "a shared header"],
)
def test_only_what_depends_on_a_change_is_compiled_again(compiler, changed, compiled):
    compiler.compile()
    compiler.commands()
    if changed:
        path = compiler.csrc / changed
        path.write_text(path.read_text() + "\n// changed")
    assert all(path.is_file() for path in compiler.compile())
    assert sorted(compiler.commands()) == compiled


def test_a_newer_torch_compiles_the_api_again(compiler):
    compiler.compile()
    compiler.commands()
    (kernel_build.torch_folder() / "version.py").write_text("__version__ = '2.15'")
    compiler.compile()
    assert set(compiler.commands()) == {"select.cpp"}


@pytest.mark.compatibility
@pytest.mark.skipif(kernel_build.find_nvcc() is None, reason="needs nvcc")
def test_the_api_compiles_with_the_installed_torch():
    """An installed package builds the kernels where it runs, with the headers of whatever torch is there.

    The cache is that of `make check-kernels`, which has the objects if it ran with the same torch and sources.
    """
    api = [path for path in kernel_build.units() if path.suffix == ".cpp"]
    builder = kernel_build.Builder(kernel_build.find_nvcc(), ROOT / "build" / "kernels", say=str)
    assert len(builder.compile(api, jobs=1)) == len(api) > 1


def test_a_failed_compilation_names_command_and_output(compiler, tmp_path):
    compiler.output.write_text("error: expected a ';'")
    (tmp_path / "broken").touch()
    with pytest.raises(
        kernel_build.BuildError, match=r"(?s)-c .*(select\.cpp|rows_bf16_d128\.cu).*status 1.*expected a ';'"
    ):
        compiler.compile()
    (tmp_path / "broken").unlink()
    compiler.commands()
    compiler.compile()
    assert set(compiler.commands()) == {"select.cpp", "rows_bf16_d128.cu", "rows_fp16_d64.cu", "scores_bf16_d64.cu"}, (
        "a failed object was kept"
    )


def test_spills_fail_also_from_the_cache(compiler):
    compiler.output.write_text(PTXAS)
    for _ in range(2):
        with pytest.raises(kernel_build.BuildError, match=r"spills registers.*\n.*wideEv on sm_90a: 64 bytes, 255"):
            compiler.compile()
    assert len(compiler.compile(allow_spills=True)) == 4


def test_a_spill_with_a_reason_passes(compiler):
    compiler.output.write_text(PTXAS)
    for name in (
        "api/select.cpp",
        *(f"sm80/selection/instantiations/rows_{name}.cu" for name in ("bf16_d128", "fp16_d64")),
    ):
        compiler.write(name, "// spills: the loop that spills runs once per tile\n")
    compiler.write("sm90/selection/instantiations/scores_bf16_d64.cu", "// spills:\n")
    with pytest.raises(kernel_build.BuildError, match=r"scores_bf16_d64\.cu spills"):
        compiler.compile()
    compiler.write("sm90/selection/instantiations/scores_bf16_d64.cu", "// spills: likewise\n")
    assert len(compiler.compile()) == 4


def test_ptxas_report():
    assert kernel_build.parse_ptxas(PTXAS) == [
        kernel_build.KernelUsage("_ZN3msa6narrowEv", "sm_80", 128, 0),
        kernel_build.KernelUsage("_ZN3msa4wideEv", "sm_90a", 255, 64),
    ]
    assert kernel_build.parse_ptxas("warning: nothing was compiled") == []


def test_the_library_links_the_runtime_in(compiler, tmp_path):
    builder, name = compiler.builder(), kernel_build.library_name(13, compiler.csrc)
    objects = compiler.compile()
    compiler.write("params.h", "// changed while the compiler ran")
    library = builder.link(objects, tmp_path / "out")
    assert library == tmp_path / "out" / name
    assert library.is_file()
    assert "-cudart static" in compiler.commands()["link"]


def test_a_torch_without_cuda_cannot_link(compiler, tmp_path):
    (kernel_build.torch_folder() / "lib" / "libtorch_cuda.so").unlink()
    with pytest.raises(kernel_build.BuildError, match="built without CUDA"):
        compiler.builder().link([], tmp_path / "out")


def test_the_library_is_named_after_its_sources(compiler):
    name = kernel_build.library_name(13, compiler.csrc)
    compiler.write("notes.md", "not a source")
    assert kernel_build.library_name(13, compiler.csrc) == name
    compiler.write("smxx/common/copy.cuh", "// copies more")
    assert kernel_build.library_name(13, compiler.csrc) != name


def test_a_check_takes_one_instantiation_of_each_kernel(compiler):
    compiler.write("sm80/selection/combine.cu", "")
    compiler.write("sm80/selection/instantiations/columns_fp16_d64.cu", "")
    names = {path.name for path in kernel_build.units(compiler.csrc, one_of_each=True)}
    assert names == {"select.cpp", "combine.cu", "columns_fp16_d64.cu", "rows_bf16_d128.cu", "scores_bf16_d64.cu"}


@pytest.mark.parametrize("text, version", [("release 13.0, V13.0.88", (13, 0)), ("release 12.10, V1", (12, 10))])
def test_toolkit_version(text, version):
    assert kernel_build.parse_toolkit_version(f"Cuda compilation tools, {text}\n") == version


def test_a_compiler_without_version_is_refused():
    with pytest.raises(kernel_build.BuildError, match="no release"):
        kernel_build.parse_toolkit_version("gcc 12")


def test_nvcc_is_found(compiler, monkeypatch, tmp_path):
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_bytes(compiler.nvcc.read_bytes())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert kernel_build.find_nvcc() == compiler.nvcc
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert kernel_build.find_nvcc() == home / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert kernel_build.find_nvcc() == compiler.nvcc


@pytest.fixture
def script(load_script, monkeypatch, tmp_path):
    """scripts/build_kernels.py with the stand-in compiler."""
    script = load_script("build_kernels")
    monkeypatch.setattr(script, "load_kernel_build", lambda: kernel_build)
    return script


def test_the_script_without_nvcc(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernel_build, "find_nvcc", lambda: None)
    folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    assert script.main(["--check", *folders]) == 0
    assert "skipped" in capsys.readouterr().out
    assert script.main(folders) == 1
    assert "nvcc was not found" in capsys.readouterr().err


def test_the_script_replaces_binaries_of_other_sources(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kernels-000000000000-cu13.so").touch()
    (out / "README.md").touch()
    called_with = []

    def build(folder, cache, jobs, say, allow_spills):
        called_with.append((folder, cache, jobs, allow_spills))
        library = folder / "kernels-111111111111-cu13.so"
        library.touch()
        return library

    monkeypatch.setattr(kernel_build, "build", build)
    assert script.main(["--cache", str(tmp_path / "cache"), "--output", str(out), "--jobs", "3"]) == 0
    assert called_with == [(out, tmp_path / "cache", 3, False)]
    assert {path.name for path in out.iterdir()} == {"kernels-111111111111-cu13.so", "README.md"}
    assert "kernels-111111111111-cu13.so" in capsys.readouterr().out


def test_the_script_finds_the_module_by_its_path(load_script):
    loaded = load_script("build_kernels").load_kernel_build()
    assert loaded.CSRC == kernel_build.CSRC
