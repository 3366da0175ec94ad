"""Drawn pictures with one to four objects, and questions about them whose answers follow from the objects."""

import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .rows import Question, Row, chat_row, check_split

# 64 patches, 16 tokens. All pictures have this size: the vision tower attends to many of one size in one call.
SIDE = 112
COLOURS = {
    "red": (214, 39, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 214),
    "yellow": (240, 210, 40),
    "orange": (245, 130, 20),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
    "pink": (250, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
CELLS = 3  # objects stand in different cells of a 3 x 3 grid
CELL = SIDE / CELLS
COUNTS = ("zero", "one", "two", "three", "four")
QUESTIONS = 5  # about each picture, of different kinds
MAX_PICTURES = 4  # of a row

Thing = dict[str, Any]  # shape, colour, row, column, x, y (centre in pixels), radius (pixels)


def draw_thing(draw: ImageDraw.ImageDraw, shape: str, colour: str, x: float, y: float, radius: float) -> None:
    """Draws one shape around its centre."""
    fill = COLOURS[colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.85 * radius, y - 0.85 * radius, x + 0.85 * radius, y + 0.85 * radius), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, round(radius * 0.4)))
    elif shape == "cross":
        arm = 0.35 * radius
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=fill)
    else:
        raise ValueError(f"`shape` must be one of {SHAPES}, got {shape!r}.")


def background(numbers: random.Random, side: int) -> Image.Image:
    """A light grey square with a little noise."""
    level = numbers.randint(205, 250)
    noise = np.random.default_rng(numbers.getrandbits(32)).integers(-5, 6, (side, side, 1))
    return Image.fromarray(np.clip(level + noise, 0, 255).repeat(3, axis=2).astype(np.uint8))


def make_scene(numbers: random.Random) -> list[Thing]:
    """One to four objects in different cells."""
    things = []
    for cell in numbers.sample(range(CELLS**2), numbers.randint(1, 4)):
        row, column = divmod(cell, CELLS)
        things.append(
            {
                "shape": numbers.choice(SHAPES),
                "colour": numbers.choice(tuple(COLOURS)),
                "row": row,
                "column": column,
                "x": (column + 0.5) * CELL + numbers.uniform(-4, 4),
                "y": (row + 0.5) * CELL + numbers.uniform(-4, 4),
                "radius": numbers.uniform(9, 13),
            }
        )
    return sorted(things, key=lambda thing: (thing["row"], thing["column"]))


def draw_scene(things: list[Thing], numbers: random.Random) -> Image.Image:
    """A picture of the objects, of `SIDE` pixels."""
    image = background(numbers, SIDE)
    draw = ImageDraw.Draw(image)
    for thing in things:
        draw_thing(draw, *(thing[name] for name in ("shape", "colour", "x", "y", "radius")))
    return image


def _unique(things: list[Thing], name: str) -> list[Thing]:
    values = [thing[name] for thing in things]
    return [thing for thing in things if values.count(thing[name]) == 1]


def _name(thing: Thing) -> str:
    return f"{thing['colour']} {thing['shape']}"


def _holds(first: Thing, relation: str, second: Thing) -> bool:
    axis, sign = {"left of": ("column", 1), "right of": ("column", -1), "above": ("row", 1), "below": ("row", -1)}[
        relation
    ]
    return sign * (second[axis] - first[axis]) > 0


def make_question(things: list[Thing], kind: str, numbers: random.Random) -> tuple[str, str] | None:
    """A question of a kind and its answer; None where the objects allow none that is clear."""
    if kind == "colour":
        if not (chosen := _unique(things, "shape")):
            return None
        thing = numbers.choice(chosen)
        return f"What colour is the {thing['shape']}?", thing["colour"]
    if kind == "shape":
        if not (chosen := _unique(things, "colour")):
            return None
        thing = numbers.choice(chosen)
        return f"What shape is the {thing['colour']} object?", thing["shape"]
    if kind == "count":
        # Half about all objects, and some about what is not there: most colours and shapes would count one otherwise.
        if numbers.random() < 0.5:
            return "How many objects are there?", COUNTS[len(things)]
        shown = [thing[name] for thing in things for name in ("shape", "colour")]
        what = numbers.choice(shown if numbers.random() < 0.7 else (*SHAPES, *COLOURS))
        number = sum(what in (thing["shape"], thing["colour"]) for thing in things)
        noun = f"{what} objects" if what in COLOURS else {"cross": "crosses"}.get(what, f"{what}s")
        return f"How many {noun} are there?", COUNTS[number]
    if kind == "exists":
        thing = numbers.choice(things)
        colour = thing["colour"] if numbers.random() < 0.5 else numbers.choice(tuple(COLOURS))
        found = any((other["colour"], other["shape"]) == (colour, thing["shape"]) for other in things)
        return f"Is there a {colour} {thing['shape']}?", "yes" if found else "no"
    if kind == "relation":
        chosen = [thing for thing in things if sum(_name(other) == _name(thing) for other in things) == 1]
        pairs = [(a, b) for a in chosen for b in chosen if a is not b]
        if not pairs:
            return None
        first, second = numbers.choice(pairs)
        relations = [r for r in RELATIONS if _holds(first, r, second) or _holds(second, r, first)]
        relation = numbers.choice(relations)
        answer = "yes" if _holds(first, relation, second) else "no"
        return f"Is the {_name(first)} {relation} the {_name(second)}?", answer
    if kind == "describe":
        return "What do you see, row by row?", ", ".join(_name(thing) for thing in things)
    raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")


KINDS = ("colour", "shape", "count", "exists", "relation", "describe")


def make_questions(things: list[Thing], numbers: random.Random) -> list[Question]:
    """Some questions about one picture. At least one of them is clear, because each picture can be described."""
    # A description would give the answers of the questions behind it away, so it comes last.
    kinds = sorted(numbers.sample(KINDS, QUESTIONS), key="describe".__eq__)
    made = [(kind, make_question(things, kind, numbers)) for kind in kinds]
    questions = [(kind, *question) for kind, question in made if question is not None]
    return questions or [("describe", *make_question(things, "describe", numbers))]  # type: ignore[misc]


def image_row(numbers: random.Random, split: str, characters: int = 0) -> Row:
    """One to four pictures, each with several questions. The splits differ in their random numbers."""
    check_split(split)
    scenes = [make_scene(numbers) for _ in range(numbers.randint(1, MAX_PICTURES))]
    sections = [
        ([{"type": "image", "image": draw_scene(things, numbers)}], make_questions(things, numbers))
        for things in scenes
    ]
    return chat_row("image", "image", numbers, sections, {"pictures": scenes})
