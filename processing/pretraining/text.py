"""Documents that every Python brings along: source code, docstrings and the pages of its language reference.

A file belongs to the held-out split by the hash of its path below the standard library, so the split is the same on
every machine with the same release of Python.
"""

import ast
import hashlib
import pydoc_data.topics
import random
import sysconfig
from functools import cache
from pathlib import Path

from .rows import Row, check_split

HELDOUT_SHARE = 0.08
LEFT_OUT = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
MIN_DOCSTRING = 200  # characters


def split_of(name: str) -> str:
    """The split of a file or a page, by the hash of its name."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < HELDOUT_SHARE else "train"


@cache
def source_paths(split: str) -> tuple[str, ...]:
    """Paths of source files below the standard library, sorted, with "/" between folders."""
    check_split(split)
    root = standard_library()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in paths if LEFT_OUT.isdisjoint(path.parts))
    return tuple(name for name in names if split_of(name) == split)


def standard_library() -> Path:
    """The folder of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def source_text(path: str) -> str:
    """The text of a file. What is no UTF-8 in it becomes the replacement character."""
    return (standard_library() / path).read_text(encoding="utf-8", errors="replace")


@cache
def docstrings(path: str) -> tuple[str, ...]:
    """The docstrings of a file that are long enough to read as prose."""
    try:
        tree = ast.parse(source_text(path))
    except (SyntaxError, ValueError):  # templates and tests of the parser
        return ()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return tuple(text for text in found if text and len(text) >= MIN_DOCSTRING)


@cache
def reference_pages(split: str) -> tuple[tuple[str, str], ...]:
    """Names and texts of the pages of the language reference that `help()` shows."""
    check_split(split)
    pages = pydoc_data.topics.topics
    return tuple((name, pages[name]) for name in sorted(pages) if split_of(f"topics/{name}") == split)


def code_row(numbers: random.Random, split: str, characters: int) -> Row:
    """Source files one behind the other, each under its path, from any place on: `characters` long."""
    pieces: list[str] = []
    paths = source_paths(split)
    place = numbers.randrange(len(paths))
    # Neighbours in the sorted list are files of one package, so a long document has something to look back at.
    while sum(map(len, pieces)) < characters and len(pieces) < len(paths):
        path = paths[(place + len(pieces)) % len(paths)]
        pieces.append(f"# {path}\n{source_text(path)}\n")
    text = "".join(pieces)
    start = numbers.randrange(max(1, len(text) - characters))
    return {
        "task": "code",
        "modality": "code",
        "text": text[start : start + characters],
        "scene": {"path": paths[place]},
    }


def english_row(numbers: random.Random, split: str, characters: int) -> Row:
    """Pages of the language reference and docstrings of the standard library, one behind the other."""
    pages, paths = reference_pages(split), source_paths(split)
    pieces: list[str] = []
    while sum(map(len, pieces)) < characters:
        if numbers.random() < 0.5:
            pieces.append(numbers.choice(pages)[1])
        else:
            found = docstrings(numbers.choice(paths))
            pieces.extend(numbers.sample(found, min(len(found), 4)))
    text = "\n\n".join(pieces)
    start = numbers.randrange(max(1, len(text) - characters))
    return {"task": "english", "modality": "text", "text": text[start : start + characters], "scene": {}}
