"""What the wheel holds, and the version that it has."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.version import Version

import modeling_minimax_m3

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "configuration": "configuration_minimax_m3",
    "processing": "processing_minimax_m3",
    "modeling_minimax_m3": "modeling_minimax_m3",
}
CHECKPOINT = "examples/minimax-m3-small"  # in the source distribution and in no wheel
# Built, not part of the source.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "kernels-*.so")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that it leaves nothing in the checkout."""
    if not any(Version(found.version) >= Version("77") for found in distributions(name="setuptools")):
        pytest.skip("needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    shutil.copytree(ROOT / CHECKPOINT, folder / CHECKPOINT)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_the_packages(source, wheel):
    expected = {
        f"{FOLDERS[name]}/{path.relative_to(source / name).as_posix()}"
        for name in FOLDERS
        for path in (source / name).rglob("*")
        if path.is_file()
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_source_distribution_holds_the_small_checkpoint(source, tmp_path):
    code = "import sys, setuptools.build_meta as m; m.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"{CHECKPOINT}/{path.name}" for path in (ROOT / CHECKPOINT).iterdir()}
    assert f"{CHECKPOINT}/model.safetensors" in expected <= names


@pytest.mark.parametrize("package", FOLDERS.values())
def test_wheel_says_that_its_packages_have_types(wheel, package):
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_has_the_version_of_the_module(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {modeling_minimax_m3.__version__}\n" in wheel.read(name).decode("utf-8")


def test_changelog_has_a_section_of_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    release = Version(modeling_minimax_m3.__version__).base_version
    assert f"\n## [{release}]" in changelog


def test_development_tools_are_pinned():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    names = [requirement.split(">=")[0].lower() for requirement in extra["dev"] if "[" not in requirement]
    assert [name for name in names if f"\n{name}==" not in pins] == []
