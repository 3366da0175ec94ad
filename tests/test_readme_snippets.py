"""Every Python snippet of the README runs on the small checkpoint, after the snippet that loads the model."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.compatibility

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CHECKPOINT = ROOT / "examples" / "minimax-m3-small"
HEADING_OR_SNIPPET = re.compile(r"^#+ (?P<heading>.+?)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def read_snippets() -> dict[str, str]:
    """Reads the Python snippets of the README, by the heading above each of them."""
    snippets, heading = {}, ""
    for match in HEADING_OR_SNIPPET.finditer(README.read_text(encoding="utf-8")):
        if match["code"] is None:
            heading = match["heading"]
        else:
            assert heading not in snippets, f"two snippets under {heading!r}"
            snippets[heading] = match["code"]
    return snippets


SNIPPETS = read_snippets()


# Lines that a snippet prints on the small checkpoint, which `generate` without sampling gives on every machine.
ANSWERS = {
    "Chat with an image": ["pink triangle, purple diamond, blue ring, purple diamond"],
    "Chat with a video": ["black diamond"],
    "Several conversations at once": ["19", "Rome"],
    "Thinking and tool calls": ["content:  thoughts: None", "invite {'people': ['Ada', 'Ben'], 'day': 'Friday'}"],
    "Long prompts": ["658"],
}


@pytest.fixture(scope="module")
def folder_with_media(load_script, tmp_path_factory) -> Path:
    """A folder with the files that the snippets name: photo.png and clip.mp4."""
    folder = tmp_path_factory.mktemp("readme")
    load_script("example_media").draw_example_media(folder)
    return folder


def run(heading: str, namespace: dict) -> None:
    exec(compile(SNIPPETS[heading], f"README.md: {heading}", "exec"), namespace)


@pytest.mark.parametrize("heading", SNIPPETS)
def test_readme_snippet_runs(heading, folder_with_media, monkeypatch, capsys):
    monkeypatch.setenv("M3_CHECKPOINT", str(CHECKPOINT))
    monkeypatch.chdir(folder_with_media)
    namespace = {}
    run("Load", namespace)
    if heading != "Load":
        run(heading, namespace)
    printed = capsys.readouterr().out
    assert [line for line in ANSWERS.get(heading, []) if line not in printed.splitlines()] == [], printed


def test_readme_opens_with_the_two_commands():
    opening = README.read_text(encoding="utf-8").split("```")[1]
    assert re.findall(r"^make \w+", opening, re.MULTILINE) == ["make demo", "make test"]


def test_readme_shows_what_a_user_does():
    expected = {"Load", "Chat with an image", "Chat with a video", "Several conversations at once", "Packed documents"}
    assert expected | set(ANSWERS) <= set(SNIPPETS)
