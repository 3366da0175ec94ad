"""The ratchet of mypy: a module is listed in pyproject.toml while it has errors, and no longer."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# What the types come from. Other versions have other errors.
TYPED = ("mypy", "torch", "transformers")


def has_pinned_versions() -> bool:
    pins = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    try:
        return all(f"{name}=={version(name).split('+')[0]}" in pins for name in TYPED)
    except PackageNotFoundError:
        return False


needs_pinned_versions = pytest.mark.skipif(
    not has_pinned_versions(), reason="needs the versions of requirements/constraints.txt"
)


@needs_pinned_versions
def test_modules_with_type_errors_are_those_that_are_listed(load_script):
    check_types = load_script("check_types")
    counts = check_types.count_errors()
    listed = check_types.listed_modules()
    assert len(listed) == len(set(listed))
    assert set(counts) - set(listed) == set(), "these modules have errors; mend them"
    assert set(listed) - set(counts) == set(), "these modules are clean; take them off the list in pyproject.toml"


@needs_pinned_versions
def test_parts_of_a_config_may_be_given_as_dicts_and_are_read_as_configs(load_script, tmp_path):
    code = tmp_path / "user.py"
    code.write_text(
        "from configuration_minimax_m3 import MiniMaxM3VLConfig\n"
        "config = MiniMaxM3VLConfig(text_config={'num_hidden_layers': 2}, vision_config=None)\n"
        "reveal_type(config.text_config.layer_types)\n"
        "reveal_type(config.vision_config.patch_size)\n"
        "config.text_config = 3\n"
    )
    said = load_script("check_types").run_mypy(str(code)).stdout.replace(str(code), "user.py")
    assert 'user.py:3: note: Revealed type is "list[str]"' in said
    assert 'user.py:4: note: Revealed type is "int"' in said
    assert "user.py:5: error: Incompatible types in assignment" in said


def test_configuration_is_never_listed(load_script):
    listed = load_script("check_types").listed_modules()
    assert [name for name in listed if name.startswith("configuration_minimax_m3")] == []
