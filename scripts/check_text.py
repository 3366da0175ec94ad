"""Check the text of all files in git: whitespace, ends of files, YAML, TOML, and the line length of prose.

    python scripts/check_text.py         # print what is wrong; the exit status is 1 where anything is
    python scripts/check_text.py --fix   # mend whitespace, ends of files and long lines

A line of Markdown has at most 120 characters. Tables, headings and code are free, and so is a line of one word.
"""

import argparse
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROSE_WIDTH = 120
# Written by programs.
GENERATED = ("benchmarks/results/",)
WRITTEN_WHOLE = ("examples/minimax-m3-small/tokenizer.json",)  # by Transformers, without a line break at the end
ITEM = re.compile(r"\s*(?:[-*+]|\d+\.) +")
# Spaces where no line may break: in code and links, and before what would look like an item at the start of a line.
UNBROKEN = re.compile(r"`[^`]+`|!?\[[^\]]*\]\([^)]*\)| (?=(?:[-*+=]|\d+\.)\s)")


def read_texts() -> dict[str, str]:
    """The text of each file that git knows or would add, by its path from the root; binary files are left out."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    texts = {}
    for name in sorted(set(names) - {""}):
        path = ROOT / name
        if name not in WRITTEN_WHOLE and path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content.decode("utf-8")
    return texts


def mend(text: str) -> str:
    """Remove whitespace at the ends of lines, and let a file that is not empty end with one line break."""
    lines = [line.rstrip() for line in text.split("\n")]
    stripped = "\n".join(lines).rstrip("\n")
    return stripped + "\n" if stripped else ""


def find_whitespace(text: str) -> list[str]:
    lines = text.split("\n")
    found = [f"{number}: whitespace at the end" for number, line in enumerate(lines, 1) if line != line.rstrip()]
    if text and mend(text) != text and not found:
        found.append(f"{len(lines)}: the file must end with one line break")
    return found


class TaggedLoader(yaml.SafeLoader):
    """Reads a value with a tag of its own, such as `!function` of the lm-eval harness, as its text."""


TaggedLoader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def find_syntax_error(name: str, text: str) -> list[str]:
    try:
        if name.endswith((".yaml", ".yml")):
            list(yaml.load_all(text, TaggedLoader))
        elif name.endswith(".toml"):
            tomllib.loads(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        return [f"1: {error}"]
    return []


def split_paragraphs(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Split Markdown into runs of lines, and say of each whether it is prose: a paragraph or an item of a list."""
    run: list[str] = []
    prose = in_code = False
    for line in text.split("\n"):
        content = line.lstrip()
        is_fence = content.startswith("```")
        is_prose = not (in_code or is_fence or content.startswith(("|", "#", "<")) or not content)
        in_code ^= is_fence
        if run and (is_prose != prose or ITEM.match(line)):
            yield prose, run
            run = []
        prose = is_prose
        run.append(line)
    yield prose, run


def is_long(line: str) -> bool:
    return len(line) > PROSE_WIDTH and " " in line.strip()


def wrap(text: str) -> str:
    """Wrap the paragraphs of Markdown that have a long line."""
    wrapped: list[str] = []
    for prose, run in split_paragraphs(text):
        if prose and any(map(is_long, run)):
            item = ITEM.match(run[0])
            first = item[0] if item else run[0][: len(run[0]) - len(run[0].lstrip())]
            words = " ".join(line.strip() for line in [run[0][len(first) :], *run[1:]])
            wrapper = textwrap.TextWrapper(PROSE_WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
            wrapper.break_long_words = wrapper.break_on_hyphens = False
            words = UNBROKEN.sub(lambda match: match[0].replace(" ", "\0"), words)
            run = [line.replace("\0", " ") for line in wrapper.wrap(words)]
        wrapped += run
    return "\n".join(wrapped)


def find_long_prose(text: str) -> list[str]:
    lines = [(prose, line) for prose, run in split_paragraphs(text) for line in run]
    return [
        f"{number}: {len(line)} characters, {PROSE_WIDTH} are allowed"
        for number, (prose, line) in enumerate(lines, 1)
        if prose and is_long(line)
    ]


def is_prose(name: str) -> bool:
    return name.endswith(".md")


def find_faults(name: str, text: str) -> list[str]:
    faults = find_whitespace(text) + find_syntax_error(name, text)
    if is_prose(name):
        faults += find_long_prose(text)
    return [f"{name}:{fault}" for fault in faults]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="mend whitespace, ends of files and long lines")
    fix = parser.parse_args().fix
    texts = {name: text for name, text in read_texts().items() if not name.startswith(GENERATED)}
    if fix:
        for name, text in texts.items():
            mended = mend(wrap(text)) if is_prose(name) else mend(text)
            if mended != text:
                (ROOT / name).write_bytes(mended.encode("utf-8"))
                texts[name] = mended
    faults = [fault for name, text in texts.items() for fault in find_faults(name, text)]
    print(*faults, sep="\n", end="\n" if faults else "")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
