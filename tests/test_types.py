"""The ratchet of mypy: a module is listed in pyproject.toml while it has errors, and no longer."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the types come from. Other versions have other errors.
TYPED = ("mypy", "torch", "transformers")


def has_pinned_versions() -> bool:
    pins = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    try:
        return all(f"{name}=={version(name).split('+')[0]}" in pins for name in TYPED)
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_pinned_versions(), reason="needs the versions of requirements/constraints.txt")
def test_modules_with_type_errors_are_those_that_are_listed(load_script):
    check_types = load_script("check_types")
    counts = check_types.count_errors()
    listed = check_types.listed_modules()
    assert len(listed) == len(set(listed))
    assert set(counts) - set(listed) == set(), "these modules have errors; mend them"
    assert set(listed) - set(counts) == set(), "these modules are clean; take them off the list in pyproject.toml"


def test_configuration_is_never_listed(load_script):
    listed = load_script("check_types").listed_modules()
    assert [name for name in listed if name.startswith("configuration_minimax_m3")] == []
