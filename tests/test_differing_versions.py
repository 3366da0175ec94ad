"""The script that tells whether the newest versions of the dependencies are the pinned ones."""

import sys

import pytest


@pytest.fixture
def script(load_script):
    return load_script("differing_versions")


def test_packages_are_those_of_the_project(script):
    names = script.named_packages()
    assert {"torch", "transformers", "safetensors", "peft", "pytest"} <= names
    assert not {"minimax-m3-transformers", "ruff"} & names


def test_other_and_missing_versions_are_told(script):
    ours = {"torch": "2.14.1", "peft": "0.21.2", "av": "14.0", "numpy": "2.0"}
    theirs = {"torch": "2.14.1", "peft": "0.22.0", "trl": "1.0", "numpy": "3.0"}
    found = script.differing(ours, theirs, {"torch", "peft", "av", "trl"})
    assert found == ["av: 14.0 and none", "peft: 0.21.2 and 0.22.0", "trl: none and 1.0"]
    assert script.differing(ours, ours, set(ours)) == []


def test_an_environment_is_read(script):
    assert script.versions(sys.executable)["pytest"] == pytest.__version__
