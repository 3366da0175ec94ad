"""Handwritten digits of scikit-learn, 1797 pictures of 8 x 8 pixels, enlarged, turned and moved a little."""

import random
from functools import cache

import numpy as np
from PIL import Image

from .rows import Row, chat_row, check_split
from .scenes import SIDE

HELDOUT_EVERY = 5  # each fifth digit is held out


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the task 'digits' needs scikit-learn, which is not installed: `pip install scikit-learn`, or leave the task "
            "out."
        ) from error
    bunch = load_digits()
    return bunch.images.astype(np.float32) / 16, bunch.target


@cache
def digit_indices(split: str) -> tuple[int, ...]:
    """Which of the pictures belong to a split."""
    check_split(split)
    everything = range(len(_digits()[1]))
    return tuple(index for index in everything if (index % HELDOUT_EVERY == 0) == (split == "heldout"))


def draw_digit(index: int, numbers: random.Random, split: str) -> Image.Image:
    """Digit `index` in the middle of a picture of `SIDE` pixels; a training digit is turned, moved and scaled."""
    ink = Image.fromarray((_digits()[0][index] * 255).astype(np.uint8)).resize((72, 72), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIDE, SIDE))
    size, angle, x, y = 80, 0.0, 0.0, 0.0
    if split == "train":
        size, angle = numbers.randint(64, 96), numbers.uniform(-14, 14)
        x, y = numbers.uniform(-9, 9), numbers.uniform(-9, 9)
    ink = ink.rotate(angle, Image.Resampling.BILINEAR, expand=False).resize((size, size), Image.Resampling.BILINEAR)
    canvas.paste(ink, (round((SIDE - size) / 2 + x), round((SIDE - size) / 2 + y)))
    return Image.merge("RGB", [canvas] * 3)


def digit_row(numbers: random.Random, split: str, characters: int = 0) -> Row:
    """Several questions which digits the pictures show, one to three pictures for each."""
    sections, shown = [], []
    for _ in range(numbers.randint(2, 6)):
        indices = numbers.choices(digit_indices(split), k=numbers.randint(1, 3))
        values = " ".join(str(_digits()[1][index]) for index in indices)
        question = "Which digits are these?" if len(indices) > 1 else "Which digit is this?"
        opening = [{"type": "image", "image": draw_digit(index, numbers, split)} for index in indices]
        sections.append((opening, [("digits", question, values)]))
        shown.append(indices)
    return chat_row("digits", "image", numbers, sections, {"indices": shown})
