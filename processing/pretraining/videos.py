"""Short videos of drawn objects and digits that move or appear one after the other, and questions about them.

Frames come two a second, so each group of frames in the prompt is one second. A frame has 4 tokens, and a video of up
to 4 seconds as many patches as a picture.
"""

import random
from fractions import Fraction
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rows import Question, Row, chat_row, check_split
from .scenes import COLOURS, SHAPES, background, draw_thing

SIDE = 56
FPS = 2.0
FRAMES_PER_SECOND = int(FPS)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_SECONDS = 6
MAX_VIDEOS = 3  # of a row


@cache
def _font() -> Any:
    return ImageFont.load_default(size=40)


def _draw(draw: ImageDraw.ImageDraw, name: str, x: float, y: float) -> None:
    """Draws "red circle", or a digit in black."""
    if name.isdigit():
        draw.text((x, y), name, fill=COLOURS["black"], font=_font(), anchor="mm")
    else:
        colour, shape = name.split()
        draw_thing(draw, shape, colour, x, y, 11)


def _frames(drawn: list[list[tuple[str, float, float]]], numbers: random.Random) -> np.ndarray:
    """uint8 (frames, SIDE, SIDE, 3): what each frame shows, each thing by name and centre."""
    empty = background(numbers, SIDE)
    frames = []
    for things in drawn:
        frame = empty.copy()
        for name, x, y in things:
            _draw(ImageDraw.Draw(frame), name, x, y)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def _object(numbers: random.Random) -> str:
    return f"{numbers.choice(tuple(COLOURS))} {numbers.choice(SHAPES)}"


def motion_video(numbers: random.Random) -> tuple[np.ndarray, list[Question], dict[str, Any]]:
    """One thing that crosses the picture in a straight line."""
    name = _object(numbers) if numbers.random() < 0.6 else str(numbers.randrange(10))
    direction = numbers.choice(tuple(DIRECTIONS))
    seconds = numbers.randint(2, 4)
    count = seconds * FRAMES_PER_SECOND
    across, along = numbers.uniform(-8, 8), numbers.uniform(12, 15)
    step_x, step_y = DIRECTIONS[direction]
    places = np.linspace(-along, along, count)
    middle = SIDE / 2
    drawn = [
        [(name, middle + (step_x * p if step_x else across), middle + (step_y * p if step_y else across))]
        for p in places
    ]
    noun = f"digit {name}" if name.isdigit() else name
    questions = [
        ("direction", f"In which direction does the {noun} move?", direction),
        ("moves", "What moves?", name),
        ("seconds", "How many seconds long is the video?", str(seconds)),
    ]
    numbers.shuffle(questions)
    return _frames(drawn, numbers), questions[: numbers.randint(2, 3)], {
        "name": name, "direction": direction, "seconds": seconds
    }  # fmt: skip


def sequence_video(numbers: random.Random) -> tuple[np.ndarray, list[Question], dict[str, Any]]:
    """Different things, each alone for one second or two."""
    count = numbers.randint(2, 4)
    if numbers.random() < 0.5:
        names = [str(digit) for digit in numbers.sample(range(10), count)]
    else:
        names = []
        while len(names) < count:
            name = _object(numbers)
            if name not in names:
                names.append(name)
    spans = [1] * count
    while sum(spans) < MAX_SECONDS and numbers.random() < 0.4:
        spans[numbers.randrange(count)] += 1
    timeline = [name for name, span in zip(names, spans) for _ in range(span)]
    drawn = []
    for name, span in zip(names, spans):
        x, y = numbers.uniform(20, 36), numbers.uniform(22, 34)
        drawn += [[(name, x, y)]] * (span * FRAMES_PER_SECOND)
    second, name = numbers.randrange(len(timeline)), numbers.choice(names)
    place = numbers.randrange(1, count)
    questions = [
        ("order", "What appears, in order?", ", ".join(names)),
        ("at_second", f"What is there at second {second}?", timeline[second]),
        ("which_second", f"At which second does the {name} appear?", str(timeline.index(name))),
        ("first", "What appears first?", names[0]),
        ("last", "What appears last?", names[-1]),
        ("after", f"What appears after the {names[place - 1]}?", names[place]),
    ]
    # The order would give the other answers away, so it comes last.
    chosen = sorted(numbers.sample(questions, 3), key=lambda question: question[0] == "order")
    return _frames(drawn, numbers), chosen, {"timeline": timeline}


def video_row(numbers: random.Random, split: str, characters: int = 0) -> Row:
    """One to three videos, each with questions. The splits differ in their random numbers."""
    check_split(split)
    sections, scenes = [], []
    for _ in range(numbers.randint(1, MAX_VIDEOS)):
        make = motion_video if numbers.random() < 0.4 else sequence_video
        frames, questions, scene = make(numbers)
        sections.append(([{"type": "video", "video": frames}], questions))
        scenes.append(scene)
    return chat_row("video", "video", numbers, sections, {"videos": scenes})


def encode_mp4(frames: np.ndarray, fps: float = FPS) -> bytes:
    """Encodes uint8 frames (frames, height, width, 3) as H.264 in an mp4 file. It needs PyAV."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.fromarray(frame))))
        container.mux(stream.encode())
    return file.getvalue()
