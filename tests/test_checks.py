"""What `make lint` runs: the check of text, and that hooks and workflow run the same."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def check_text(load_script):
    return load_script("check_text")


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.py", "x = 1 \n", "a.py:1: whitespace at the end"),
        ("a.py", "x = 1", "a.py:1: the file must end with one line break"),
        ("a.py", "x = 1\n\n\n", "a.py:4: the file must end with one line break"),
        ("a.toml", "x = \n".replace(" \n", "\n"), "a.toml:1: Invalid value"),
        ("a.yml", "x: [\n", "a.yml:1: while parsing"),
        ("a.md", "word " * 24 + "words\n", "a.md:1: 125 characters, 120 are allowed"),
    ],
)
def test_faults_of_text(check_text, name, text, fault):
    (found,) = check_text.find_faults(name, text)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "| " + "cell " * 40 + "|\n",
        "```\n" + "code " * 40 + "\n```\n",
        "# " + "heading " * 20 + "\nText.\n".lstrip(),
        "https://example.org/" + "a" * 120 + "\n",
    ],
)
def test_text_without_faults(check_text, text):
    assert check_text.find_faults("a.md", text.replace(" \n", "\n")) == []


def test_tags_of_other_programs_are_no_fault(check_text):
    assert check_text.find_faults("a.yaml", "load: !function utils.load\n") == []


def test_wrapping_keeps_the_words_and_what_lines_mean(check_text):
    text = (
        "A short line stays\nas it is.\n\n"
        "- " + "word " * 20 + "is `a piece of code` and " + "word " * 5 + "b - 1 " * 10 + "[a link](to/a/page.md)\n"
        "  second line\n- next item\n\n```\n" + "code " * 40 + "\n```\n"
    )
    wrapped = check_text.wrap(text)
    lines = wrapped.split("\n")
    assert wrapped.split() == text.split()
    assert check_text.find_long_prose(wrapped) == []
    assert check_text.wrap(wrapped) == wrapped
    assert lines[:3] == ["A short line stays", "as it is.", ""]
    assert [line for line in lines if line.startswith("- ")] == [lines[3], "- next item"]
    assert not any(line.lstrip().startswith("- ") for line in lines[4 : lines.index("- next item")])
    assert "`a piece of code`" in wrapped
    assert "[a link](to/a/page.md)" in wrapped


def test_hooks_are_the_parts_of_make_lint():
    parts = re.search(r"^lint: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert sorted(hook["entry"].split()[-1] for hook in repository["hooks"]) == sorted(parts)


def test_workflow_runs_what_every_machine_can_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
