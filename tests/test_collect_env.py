"""The report that a bug report carries: `python -m modeling_minimax_m3.collect_env`."""

import pytest
import torch
import transformers

import modeling_minimax_m3
from modeling_minimax_m3 import collect_env
from modeling_minimax_m3.msa import available_backends, extension

from .forked_processes import run_python

pytestmark = pytest.mark.compatibility


@pytest.fixture
def lines(monkeypatch):
    """`lines()` collects our lines as a dict; torch's report, which takes seconds, is left out."""
    monkeypatch.setattr(collect_env.torch_environment, "get_pretty_env_info", lambda: "")

    def collect() -> dict[str, str]:
        ours = collect_env.collect().strip().split("\n")
        width = ours[0].index(modeling_minimax_m3.__version__)
        return {line[:width].strip(): line[width:] for line in ours}

    return collect


def test_command_prints_both_reports(tmp_path):
    done = run_python("-m", "modeling_minimax_m3.collect_env", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.startswith("minimax-m3-transformers")
    assert f"PyTorch version: {torch.__version__}" in printed
    assert "Python version" in printed
    assert "GPU models" in printed


def test_versions_and_kernels(lines, monkeypatch):
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "portable")
    found = lines()
    assert found["minimax-m3-transformers"].startswith(modeling_minimax_m3.__version__)
    assert found["transformers"] == transformers.__version__
    assert found["backends"] == ", ".join(available_backends())
    assert found["kernels run"] == ("yes" if "cuda" in available_backends() else f"no: {extension.unavailable()}")
    assert found["MINIMAX_M3_MSA_CUDA"] == "portable"


def test_package_that_is_missing():
    assert collect_env.installed_version("no-such-package") == "not installed"


def test_errors_are_lines_of_the_report(lines, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho broken\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "fast")
    found = lines()
    assert found["nvcc"] == "BuildError: `nvcc --version` names no release: 'broken'"
    assert found["backends"].startswith("ValueError: the environment variable MINIMAX_M3_MSA_CUDA must be one of")
    assert found["MINIMAX_M3_MSA_CUDA"] == "fast"


def test_secrets_stay_out(lines, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "HF_TOKEN" not in lines()
