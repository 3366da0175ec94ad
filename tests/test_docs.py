"""Every relative link, anchor and file name in the Markdown files leads to something that exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
FILE_NAME = re.compile(r"[\w.-]+\.(?:py|md|toml|txt|yaml|yml|jinja|cu|cuh|cpp|h|png|jsonl)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
# Folders that a path in the text may start from, besides the file's own and the root.
BASES = ("modeling_minimax_m3", "modeling_minimax_m3/msa", "modeling_minimax_m3/msa/csrc")
# Names of files that something writes, or that stand elsewhere.
WRITTEN = {
    *("config.json", "photo.png", "clip.mp4", "results/NAME.json", "samples.jsonl"),
    *("build", "dist", "demo_output", "finetune_demo"),
}


def list_files() -> list[str]:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("needs a git checkout", allow_module_level=True)
    return [name for name in result.stdout.splitlines() if (ROOT / name).is_file()]


FILES = list_files()
PAGES = [name for name in FILES if name.endswith(".md")]


def read(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def names_near(page: str) -> set[str]:
    """The files that a page may mean by a name without a folder.

    They stand in the package of the page or in the root. Pages of the root and of `docs/` may mean any file.
    """
    package = page.split("/")[0]
    is_general = package in (page, "docs")
    return {Path(name).name for name in FILES if is_general or "/" not in name or name.startswith(f"{package}/")}


def is_missing(page: str, name: str) -> bool:
    """Whether `name`, which the page writes as code, looks like a file or a folder of the repository that is not there."""
    if name in WRITTEN or name.split("/")[0] in WRITTEN:
        return False
    if FILE_NAME.fullmatch(name):
        return name not in names_near(page)
    if "/" not in name or not PATH.fullmatch(name):
        return False
    bases = [ROOT, (ROOT / page).parent, *(ROOT / base for base in BASES)]
    may_be_path = [base for base in bases if (base / name.split("/")[0]).exists()]
    return bool(may_be_path) and not any((base / name).exists() for base in may_be_path)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", read(page))
    broken = []
    for target in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_text_names_exist(page):
    names = {word for code in CODE.findall(FENCE.sub("", read(page))) for word in code.split()}
    assert sorted(name for name in names if is_missing(page, name)) == []


def test_broken_links_are_found():
    assert is_missing("README.md", "docs/no_such_page.md")
    assert is_missing("docs/attention.md", "no_such_module.py")
    assert is_missing("docs/attention.md", "msa/csrc/sm80/no_such_folder/")
    assert is_missing("modeling_minimax_m3/msa/csrc/smxx/README.md", "cuda.py"), "only another package has it"
    assert not is_missing("docs/attention.md", "msa/README.md")
    assert not is_missing("docs/attention.md", "cuda.py")
    assert not is_missing("docs/attention.md", "key/value")
    assert anchors("# What `it` does\n```\n# no heading\n```\n## A, b") == {"what-it-does", "a-b"}
