"""Every Python snippet of the README runs on the tiny checkpoint, after the snippet that loads the model."""

import re
from importlib.resources import files
from pathlib import Path
from shutil import copyfile

import pytest

pytestmark = pytest.mark.compatibility

README = Path(__file__).resolve().parents[1] / "README.md"
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


@pytest.fixture(scope="module")
def folder_with_media(load_script, tmp_path_factory) -> Path:
    """A folder with the files that the snippets name: photo.png and clip.mp4."""
    folder = tmp_path_factory.mktemp("readme")
    copyfile(str(files("skimage.data") / "astronaut.png"), folder / "photo.png")
    load_script("panning_video").write_panning_video(folder / "photo.png", folder / "clip.mp4", seconds=2)
    return folder


def run(heading: str, namespace: dict) -> None:
    exec(compile(SNIPPETS[heading], f"README.md: {heading}", "exec"), namespace)


@pytest.mark.parametrize("heading", SNIPPETS)
def test_readme_snippet_runs(heading, tiny_checkpoint, folder_with_media, monkeypatch):
    monkeypatch.setenv("M3_CHECKPOINT", str(tiny_checkpoint))
    monkeypatch.chdir(folder_with_media)
    namespace = {}
    run("Load", namespace)
    if heading != "Load":
        run(heading, namespace)


def test_readme_opens_with_the_two_commands():
    opening = README.read_text(encoding="utf-8").split("```")[1]
    assert re.findall(r"^make \w+", opening, re.MULTILINE) == ["make demo", "make test"]


def test_readme_shows_what_a_user_does():
    expected = {"Load", "Chat with an image", "Chat with a video", "Several conversations at once", "Packed documents"}
    assert expected <= set(SNIPPETS)
