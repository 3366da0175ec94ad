"""Facts hidden in long texts: keys with values, chains of variables, and one sentence between pages of others.

The length in characters and the depth of each fact are arguments, so that an evaluation can ask for both.
"""

import random
from collections.abc import Sequence

from .rows import Row, chat_row
from .text import code_row, english_row

ADJECTIVES = (
    "amber",
    "brave",
    "calm",
    "dusty",
    "early",
    "faint",
    "green",
    "happy",
    "icy",
    "jolly",
    "kind",
    "loud",
    "misty",
    "noble",
    "odd",
    "pale",
)
NOUNS = (
    "anchor",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
)
CITIES = (
    "Bonn",
    "Cairo",
    "Delhi",
    "Quito",
    "Lima",
    "Oslo",
    "Paris",
    "Rome",
    "Seoul",
    "Tokyo",
    "Vienna",
    "Zurich",
    "Accra",
    "Dakar",
    "Hanoi",
    "Kyiv",
)
MAX_QUESTIONS = 10
MAX_FACTS = 100  # of a long row that are asked for
EARLY = 0.25  # the beginning of a long text, where half of its facts are put; the others may be anywhere


def filler(numbers: random.Random, split: str, characters: int) -> list[str]:
    """Lines of code or prose, about `characters` long together."""
    make = code_row if numbers.random() < 0.5 else english_row
    text = make(numbers, split, max(characters, 1))["text"]
    while len(text) < characters:  # more than all files of the split have together
        text += "\n" + make(numbers, split, characters - len(text))["text"]
    return text.split("\n")


def hide(lines: list[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """Puts each fact between two lines of a text, at a depth from 0 (start) to 1 (end). Facts keep their order."""
    size = sum(len(line) + 1 for line in lines)
    pieces: list[str] = []
    waiting = sorted(range(len(facts)), key=lambda index: depths[index])
    done = 0
    for line in lines:
        while waiting and depths[waiting[0]] * size <= done:
            pieces.append(facts[waiting.pop(0)])
        pieces.append(line)
        done += len(line) + 1
    return "\n".join([*pieces, *(facts[index] for index in waiting)])


def recall_row(numbers: random.Random, split: str, characters: int, depths: Sequence[float] | None = None) -> Row:
    """A text with hidden facts, and questions about some of them.

    Args:
        numbers (random.Random): Source of all choices.
        split (str): Split of the text around the facts.
        characters (int): Length of the text, without the facts.
        depths (sequence of float, optional): Depth of each fact that is asked for. By default they are random.
    """
    kinds = (key_value_row, variable_row, needle_row)
    return numbers.choice(kinds)(numbers, split, characters, depths)


def many_facts_row(numbers: random.Random, split: str, characters: int, facts: int) -> Row:
    """Numbers of many things, or many variables, each asked for once.

    The answer to a question is three digits, so a long text needs many questions to teach anything. Half of the facts
    that are asked for are put into its first quarter, far from the questions, and the others anywhere. The names
    of things share adjectives and nouns.

    Args:
        numbers (random.Random): Source of all choices.
        split (str): Split of the text around the facts.
        characters (int): Length of the text, without the facts.
        facts (int): How many are asked for, up to `MAX_FACTS`.
    """
    depths = [numbers.random() * (EARLY if numbers.random() < 0.5 else 1.0) for _ in range(min(facts, MAX_FACTS))]
    row = numbers.choice((key_value_row, variable_row))(numbers, split, characters, depths)
    return _in_any_order(numbers, row)


def _in_any_order(numbers: random.Random, row: Row) -> Row:
    """The questions of a text in another order. The text stays before the first of them."""
    turns = [row["messages"][place : place + 2] for place in range(0, len(row["messages"]), 2)]
    opening = turns[0][0]["content"][:-1]
    turns[0][0]["content"] = turns[0][0]["content"][-1:]
    order = numbers.sample(range(len(turns)), len(turns))
    turns = [turns[place] for place in order]
    turns[0][0]["content"] = [*opening, *turns[0][0]["content"]]
    lists = {name: [row[name][place] for place in order] for name in ("questions", "answers")}
    by_question = {name: row["scene"][name] for name in ("keys", "asked", "depths") if name in row["scene"]}
    scene = row["scene"] | {name: [values[place] for place in order] for name, values in by_question.items()}
    return row | lists | {"messages": [message for turn in turns for message in turn], "scene": scene}


def _depths(numbers: random.Random, count: int, depths: Sequence[float] | None) -> list[float]:
    return sorted(numbers.random() for _ in range(count)) if depths is None else list(depths)


def key_value_row(numbers: random.Random, split: str, characters: int, depths: Sequence[float] | None = None) -> Row:
    """Numbers of several things; as many other things with numbers make it hard to guess."""
    asked = _depths(numbers, numbers.randint(2, MAX_QUESTIONS), depths)
    others = [numbers.random() for _ in asked]
    keys = numbers.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], len(asked) * 2)
    values = [str(numbers.randrange(100, 1000)) for _ in keys]
    facts = [f"The number of the {key} is {value}." for key, value in zip(keys, values)]
    text = hide(filler(numbers, split, characters), facts, asked + others)
    questions = [
        ("key_value", f"What is the number of the {key}?", value) for key, value in zip(keys[: len(asked)], values)
    ]
    scene = {"facts": dict(zip(keys, values)), "keys": keys[: len(asked)], "depths": asked}
    return _row(numbers, text, questions, scene)


def variable_row(numbers: random.Random, split: str, characters: int, depths: Sequence[float] | None = None) -> Row:
    """Chains of variables: each gets the value of an earlier one, or a number.

    `depths` are those of the assignments whose variables are asked for.
    """
    places = _depths(numbers, numbers.randint(3, 2 * MAX_QUESTIONS), depths)
    places.sort()
    names = numbers.sample(
        [f"{letter}{digit}" for letter in "abcdehkmnpqrstuvwxz" for digit in range(10)], len(places)
    )
    steps: list[tuple[str, str]] = []
    values: dict[str, str] = {}
    hops: dict[str, int] = {}
    for name in names:
        near = [other for other in values if hops[other] < 2]
        if near and numbers.random() < 0.5:
            source = numbers.choice(near)
            values[name], hops[name] = values[source], hops[source] + 1
        else:
            source = str(numbers.randrange(100, 1000))
            values[name], hops[name] = source, 0
        steps.append((name, source))
    facts = [f"set {name} = {source}" for name, source in steps]
    text = hide(filler(numbers, split, characters), facts, places)
    asked = names if depths is not None else numbers.sample(names, min(len(names), MAX_QUESTIONS))
    questions = [(f"variable_{hops[name]}", f"What is the value of {name}?", values[name]) for name in asked]
    depth_of = dict(zip(names, places))
    return _row(
        numbers, text, questions, {"steps": steps, "asked": asked, "depths": [depth_of[name] for name in asked]}
    )


def needle_row(numbers: random.Random, split: str, characters: int, depths: Sequence[float] | None = None) -> Row:
    """A meeting in one sentence of a long text: its city and its hour."""
    places = _depths(numbers, 1, depths)[:1]
    city, hour = numbers.choice(CITIES), str(numbers.randint(1, 12))
    text = hide(filler(numbers, split, characters), [f"The secret meeting is in {city} at {hour} o'clock."], places)
    questions = [("needle", "In which city is the secret meeting?", city), ("needle", "At which hour is it?", hour)]
    numbers.shuffle(questions)
    if questions[0][1] == "At which hour is it?":
        questions[0] = ("needle", "At which hour is the secret meeting?", hour)
        questions[1] = ("needle", "In which city is it?", city)
    return _row(numbers, text, questions, {"city": city, "hour": hour, "depths": places * 2})


def _row(numbers: random.Random, text: str, questions: list[tuple[str, str, str]], scene: dict) -> Row:
    opening = [{"type": "text", "text": text + "\n\n"}]
    return chat_row("recall", "recall", numbers, [(opening, questions)], scene | {"characters": len(text)})
