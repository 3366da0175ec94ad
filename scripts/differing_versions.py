"""Which of this project's dependencies have other versions in another environment.

    python scripts/differing_versions.py OTHER_PYTHON

Compares the environment that runs the script with that of another Python, by the packages that pyproject.toml names and
those that they bring. Linters do not count. Prints one line for each that differs, and nothing if none does: tests would tell the same in both.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINTERS = {"clang-format", "codespell", "mypy", "pre-commit", "ruff"}  # no test depends on them
BELOW = {"huggingface-hub", "numpy", "safetensors", "tokenizers"}  # what Transformers brings and the code uses


def named_packages() -> set[str]:
    """The packages of all lists of requirements in pyproject.toml, without this project itself and without linters."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {canonicalize_name(Requirement(entry).name) for entries in lists for entry in entries}
    return (names | BELOW) - LINTERS - {canonicalize_name(project["name"])}


def versions(python: str) -> dict[str, str]:
    """Versions of what is installed, by canonical name."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {canonicalize_name(package["name"]): package["version"] for package in found}


def differing(ours: dict[str, str], theirs: dict[str, str], names: set[str]) -> list[str]:
    """A line for each package of `names` whose versions differ, or that one of both lacks."""
    return [
        f"{name}: {ours.get(name, 'none')} and {theirs.get(name, 'none')}"
        for name in sorted(names)
        if ours.get(name) != theirs.get(name)
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit((__doc__ or "").strip())
    print("\n".join(differing(versions(sys.executable), versions(sys.argv[1]), named_packages())))
