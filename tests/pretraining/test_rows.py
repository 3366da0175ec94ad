"""Rows are the same for the same seed, the splits share nothing, and every answer follows from what the row shows.

The checks read the questions as text and derive the answers anew, from the scene or from the pixels.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from processing_minimax_m3.pretraining import SPLITS, make_row, recall
from processing_minimax_m3.pretraining import text as text_sources
from processing_minimax_m3.pretraining.digits import digit_indices
from processing_minimax_m3.pretraining.recall import hide, key_value_row, needle_row, variable_row
from processing_minimax_m3.pretraining.rows import random_numbers
from processing_minimax_m3.pretraining.scenes import COLOURS, COUNTS, SHAPES
from processing_minimax_m3.pretraining.text import reference_pages, source_paths

from .pretraining_cases import available_tasks, check_recall, media, question_texts

ROOT = Path(__file__).parents[2]
ROWS = 60


def fingerprints(tasks: list[str]) -> list[str]:
    """A hash of a row of each task and split, its pixels included."""
    found = []
    for task in tasks:
        for split in SPLITS:
            row = make_row(task, split, 3, seed=5)
            pixels = [np.asarray(item).tobytes() for kind in ("image", "video") for item in media(row, kind)]
            for message in row.get("messages", ()):
                if isinstance(message["content"], list):
                    message["content"] = [part for part in message["content"] if part["type"] == "text"]
            plain = repr(sorted(row.items())).encode()
            found.append(hashlib.sha256(b"".join([plain, *pixels])).hexdigest())
    return found


@pytest.mark.slow
def test_rows_are_the_same_in_every_process():
    """Whatever the order of sets of a process is."""
    tasks = available_tasks()
    here = fingerprints(tasks)
    code = f"from tests.pretraining.test_rows import fingerprints; print(*fingerprints({tasks}))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert there.stdout.split() == here
    assert len(set(here)) == len(here)


@pytest.mark.parametrize("task", available_tasks())
def test_seed_split_and_index_each_give_another_row(task):
    rows = [
        make_row(task, split, index, seed=seed)
        for split, index, seed in (("train", 0, 0), ("train", 1, 0), ("train", 0, 1), ("heldout", 0, 0))
    ]
    shown = [repr([row.get("text"), row["scene"], row.get("answers")]) for row in rows]
    assert len(set(shown)) == 4


def test_splits_share_no_file_no_page_and_no_digit():
    for chosen in (source_paths, lambda split: [name for name, _ in reference_pages(split)]):
        train, heldout = set(chosen("train")), set(chosen("heldout"))
        assert train.isdisjoint(heldout)
        assert 0.02 < len(heldout) / len(train | heldout) < 0.2
    assert not [path for path in source_paths("train") if "site-packages" in path or "/test/" in path]
    if "digits" in available_tasks():
        train, heldout = set(digit_indices("train")), set(digit_indices("heldout"))
        assert train.isdisjoint(heldout)
        assert train | heldout == set(range(1797))


@pytest.mark.parametrize("task", ["code", "english", "recall"])
def test_texts_of_a_split_come_from_its_files(task, monkeypatch):
    read = set()
    original = text_sources.source_text.__wrapped__
    monkeypatch.setattr(text_sources, "source_text", lambda path: read.add(path) or original(path))
    text_sources.docstrings.cache_clear()
    for index in range(8):
        make_row(task, "heldout", index, seed=9)
    text_sources.docstrings.cache_clear()
    assert read
    assert read <= set(source_paths("heldout"))


@pytest.mark.parametrize("characters", [500, 20000])
def test_texts_are_as_long_as_asked(characters):
    for index in range(5):
        assert len(make_row("code", "train", index, characters=characters)["text"]) == characters
        assert len(make_row("english", "train", index, characters=characters)["text"]) == characters
        row = make_row("recall", "train", index, characters=characters)
        assert characters <= row["scene"]["characters"] < characters + 800


def check_image_answer(things: list[dict], question: str, answer: str) -> None:
    def where(**wanted):
        return [thing for thing in things if all(thing[name] == value for name, value in wanted.items())]

    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        assert [thing["colour"] for thing in where(shape=match[1])] == [answer]
    elif match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        assert [thing["shape"] for thing in where(colour=match[1])] == [answer]
    elif question == "How many objects are there?":
        assert COUNTS.index(answer) == len(things)
    elif match := re.fullmatch(r"How many (\w+) objects are there\?", question):
        assert COUNTS.index(answer) == len(where(colour=match[1]))
    elif match := re.fullmatch(r"How many (\w+) are there\?", question):
        (shape,) = [name for name in SHAPES if match[1] in (f"{name}s", f"{name}es")]
        assert COUNTS.index(answer) == len(where(shape=shape))
    elif match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        assert answer == ("yes" if where(colour=match[1], shape=match[2]) else "no")
    elif match := re.fullmatch(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", question):
        (first,), (second,) = where(colour=match[1], shape=match[2]), where(colour=match[4], shape=match[5])
        axis = "x" if match[3] in ("left of", "right of") else "y"
        difference = (second[axis] - first[axis]) * (1 if match[3] in ("left of", "above") else -1)
        assert answer == ("yes" if difference > 0 else "no")
    else:
        assert question == "What do you see, row by row?"
        ordered = sorted(things, key=lambda thing: (thing["row"], thing["x"]))
        assert answer == ", ".join(f"{thing['colour']} {thing['shape']}" for thing in ordered)


def test_answers_about_pictures_follow_from_the_objects():
    kinds = set()
    for index in range(ROWS):
        row = make_row("image", "train", index)
        turns = iter(zip(question_texts(row), row["answers"]))
        for message in row["messages"]:
            if message["role"] == "user":
                if message["content"][0]["type"] == "image":
                    picture = 0 if message is row["messages"][0] else picture + 1  # noqa: F821
                check_image_answer(row["scene"]["pictures"][picture], *next(turns))
        assert [m["content"] for m in row["messages"] if m["role"] == "assistant"] == row["answers"]
        kinds |= set(row["questions"])
    assert kinds == {"colour", "shape", "count", "exists", "relation", "describe"}


def test_pictures_show_the_objects_and_nothing_else():
    for index in range(20):
        row = make_row("image", "train", index)
        for image, things in zip(media(row, "image"), row["scene"]["pictures"], strict=True):
            pixels = np.asarray(image).astype(int)
            covered = np.zeros(pixels.shape[:2], bool)
            for thing in things:
                x, y, radius = (thing[name] for name in ("x", "y", "radius"))
                box = (
                    slice(int(y - radius - 1), int(y + radius + 2)),
                    slice(int(x - radius - 1), int(x + radius + 2)),
                )
                is_colour = (abs(pixels[box] - np.array(COLOURS[thing["colour"]])) < 3).all(-1)
                assert is_colour.sum() > 80, thing
                covered[box] = True
            assert (pixels[~covered] > 190).all()


def test_videos_show_what_the_answers_say():
    kinds = set()
    for index in range(ROWS):
        row = make_row("video", "train", index)
        kinds |= set(row["questions"])
        turns = iter(zip(question_texts(row), row["answers"]))
        number = -1
        for message in row["messages"]:
            if message["role"] == "user":
                number += message["content"][0]["type"] == "video"
                scene, frames = row["scene"]["videos"][number], media(row, "video")[number]
                check = check_motion if "direction" in scene else check_timeline
                check(frames, scene, *next(turns))
    assert kinds == {
        *("direction", "moves", "seconds", "order", "at_second", "which_second", "first", "last", "after")
    }  # fmt: skip


def check_motion(frames: np.ndarray, scene: dict, question: str, answer: str) -> None:
    ink = abs(frames.astype(int) - np.median(frames, axis=(1, 2), keepdims=True)).sum(-1) > 60
    rows, columns = np.indices(ink.shape[1:])
    x, y = ((ink * grid).sum((1, 2)) / ink.sum((1, 2)) for grid in (columns, rows))
    moved = np.array([x[-1] - x[0], y[-1] - y[0]])
    axis = int(abs(moved).argmax())
    if question.startswith("In which direction"):
        assert answer == [("left", "right"), ("up", "down")][axis][int(moved[axis] > 0)]
        assert abs(moved[axis]) > 15 > 3 * abs(moved[1 - axis])
    elif question == "What moves?":
        assert answer == scene["name"]
    else:
        assert question == "How many seconds long is the video?"
        assert int(answer) * 2 == len(frames)


def check_timeline(frames: np.ndarray, scene: dict, question: str, answer: str) -> None:
    timeline = scene["timeline"]
    assert len(frames) == 2 * len(timeline)
    for second, name in enumerate(timeline):
        colour = COLOURS["black" if name.isdigit() else name.split()[0]]
        for frame in frames[2 * second : 2 * second + 2]:
            assert (abs(frame.astype(int) - np.array(colour)) < 3).all(-1).sum() > 40
    names = list(dict.fromkeys(timeline))
    if question == "What appears, in order?":
        assert answer == ", ".join(names)
    elif match := re.fullmatch(r"What is there at second (\d)\?", question):
        assert answer == timeline[int(match[1])]
    elif match := re.fullmatch(r"At which second does the (.+) appear\?", question):
        assert timeline[int(answer)] == match[1]
        assert match[1] not in timeline[: int(answer)]
    elif match := re.fullmatch(r"What appears after the (.+)\?", question):
        assert names.index(answer) == names.index(match[1]) + 1
    else:
        assert answer == {"What appears first?": timeline[0], "What appears last?": timeline[-1]}[question]


@pytest.mark.parametrize("make", [key_value_row, variable_row, needle_row])
@pytest.mark.parametrize("characters", [300, 20000])
def test_answers_of_recall_follow_from_the_text(make, characters):
    for index in range(10):
        check_recall(make(random_numbers("test", index), "train", characters))


def test_facts_lie_at_their_depths():
    lines = ["x" * 9] * 100
    text = hide(lines, ["start", "middle", "end"], [0.0, 0.5, 1.0])
    assert text.startswith("start\n")
    assert text.endswith("\nend")
    assert abs(text.index("middle") / len(text) - 0.5) < 0.02
    row = key_value_row(random_numbers("depth"), "train", 20000, [0.1, 0.9])
    text = row["messages"][0]["content"][0]["text"]
    for key, depth in zip(row["scene"]["keys"], (0.1, 0.9), strict=True):
        assert abs(text.index(key) / len(text) - depth) < 0.05
    row = variable_row(random_numbers("depth"), "train", 20000, [0.9, 0.2])
    text = row["messages"][0]["content"][0]["text"]
    for name, depth in zip(row["scene"]["asked"], row["scene"]["depths"], strict=True):
        assert abs(text.index(f"set {name} =") / len(text) - depth) < 0.05


def test_sums_are_right_and_so_are_their_steps():
    for index in range(ROWS):
        row = make_row("thinking", "train", index)
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        for question, message, answer in zip(question_texts(row), answers, row["answers"], strict=True):
            changes = [
                int(n) * (-1 if verb == "loses" else 1) for verb, n in re.findall(r"(has|buys|loses) (\d+)", question)
            ]
            assert int(answer) == sum(changes) > 0
            assert message["content"] == answer
            equations = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", message["reasoning_content"])
            assert len(equations) == len(changes) - 1
            for left, sign, right, result in equations:
                assert int(left) + int(sign + right) == int(result)


def test_calls_fit_the_tools_and_the_questions(processor):
    """Read by the real parser from what the real chat template writes."""
    for index in range(20):
        row = make_row("tools", "train", index)
        names = {tool["function"]["name"] for tool in row["tools"]}
        calls = iter(zip(row["questions"], row["answers"], question_texts(row)))
        for place, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            kind, answer, question = next(calls)
            if kind == "result":
                assert message["content"] == answer
                continue
            before, after = (
                processor.apply_chat_template(
                    row["messages"][:end],
                    tools=row["tools"],
                    thinking_mode="disabled",
                    add_generation_prompt=is_prompt,
                )
                for end, is_prompt in ((place, True), (place + 1, False))
            )
            parsed = processor.parse_response(after.removeprefix(before), prefix=before, tools=row["tools"])
            (call,) = parsed["tool_calls"]
            assert call["function"] == json.loads(answer)
            assert call["function"]["name"] in names
            for value in call["function"]["arguments"].values():
                for word in value if isinstance(value, list) else [str(value)]:
                    assert word in question


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`task` must be one of.*'poetry'"):
        make_row("poetry", "train", 0)
    with pytest.raises(ValueError, match="`split` must be one of.*'test'"):
        make_row("image", "test", 0)


def test_texts_around_facts_may_be_longer_than_all_files_of_a_split(monkeypatch):
    monkeypatch.setattr(recall, "english_row", recall.code_row)  # so that the text is code
    whole = sum(len(text_sources.source_text(path)) for path in source_paths("heldout"))
    lines = recall.filler(random_numbers("filler"), "heldout", whole + 100_000)
    assert len("\n".join(lines)) >= whole + 100_000
