"""What a model of scripts/pretrain.py was asked in training: the wording of each question, and what it was shown."""

from textwrap import fill

from processing_minimax_m3.pretraining import scenes, tools, videos
from processing_minimax_m3.pretraining.recall import CITIES

INTRODUCTION = (
    "The model knows only these questions, in this wording. It answers other questions too, but expect wrong answers. A "
    "word in capitals stands for other words. Ask one question in a message, after its picture, video or text. A chat "
    "may ask several, one after the other. `thinking_mode` may be `adaptive`. For sums it may also be `enabled`, for "
    "everything else `disabled`."
)

# Of each task: what the model was shown, and the questions about it. The tests compare the questions with rows.
QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recall": (
        "A text with sentences such as `The number of the calm needle is 658.` (three digits), `set k7 = 658`, `set b2 = "
        f"k7`, or `The secret meeting is in Rome at 9 o'clock.` The cities are {', '.join(CITIES)}.",
        (
            "What is the number of the THING?",
            "What is the value of VARIABLE?",
            "In which city is the secret meeting?",
            "In which city is it?",
            "At which hour is the secret meeting?",
            "At which hour is it?",
        ),
    ),
    "image": (
        f"A square picture: one to four objects on light grey, each in a cell of a {scenes.CELLS} x {scenes.CELLS} grid. "
        f"The processor resizes squares of any size to the {scenes.SIDE} x {scenes.SIDE} pixels of training, where objects "
        "have a radius of 9 to 13 pixels. Other shapes keep their proportions. The model has not seen any, so expect more "
        f"wrong answers about them. The colours are {', '.join(scenes.COLOURS)}. The shapes are {', '.join(scenes.SHAPES)}.",
        (
            "What colour is the SHAPE?",
            "What shape is the COLOUR object?",
            "How many objects are there?",
            "How many COLOUR objects are there?",
            "How many SHAPES are there?",
            "Is there a COLOUR SHAPE?",
            "Is the COLOUR SHAPE RELATION the COLOUR SHAPE?",
            "What do you see, row by row?",
        ),
    ),
    "digits": (
        "One to three square pictures, each with one handwritten digit of scikit-learn, white on black.",
        ("Which digit is this?", "Which digits are these?"),
    ),
    "video": (
        f"A square video with {videos.FRAMES_PER_SECOND} frames a second and at most {videos.MAX_SECONDS} seconds: one "
        "object or digit that moves, or two to four, one after the other. The processor resizes it to the "
        f"{videos.SIDE} x {videos.SIDE} pixels of training, unless its sides are multiples of 28. Then it needs "
        '`processor_kwargs={"videos_kwargs": {"do_resize": True}}`.',
        (
            "What moves?",
            "In which direction does the THING move?",
            "How many seconds long is the video?",
            "What appears first?",
            "What appears last?",
            "What appears after the THING?",
            "What appears, in order?",
            "What is there at second NUMBER?",
            "At which second does the THING appear?",
        ),
    ),
    "tools": (
        f"The definitions of some of the tools {', '.join(tools.TOOLS)}. The model knows no other tool. In training, the "
        "tool that a question needs was always offered. So the model may call a tool that you did not offer.",
        (
            "How will the weather be in CITY on DAY?",
            "What time is it in CITY?",
            "How much is NUMBER CURRENCY in CURRENCY?",
            "Invite NAMES for DAY.",
            "How many ITEM are in stock?",
        ),
    ),
    "thinking": (
        "A sum in one to three steps. It starts with a number below 30, and each step adds or takes away less than 20: `Ada "
        "has 12 apples. Ada buys 7. Ada loses 3.`",
        ("How many ITEM are left?",),
    ),
}


def questions_section(tasks: str = "") -> str:
    """The questions as Markdown.

    Args:
        tasks (str): `--tasks` of the training, such as "image=4,video=2". Empty means all.
    """
    trained = [part.partition("=")[0].strip() for part in tasks.split(",")] if tasks else list(QUESTIONS)
    blocks = [_paragraph(INTRODUCTION)]
    for task, (shown, questions) in QUESTIONS.items():
        if task in trained:
            blocks += [_paragraph(f"**{task}.** {shown}"), "\n".join(["```text", *questions, "```"])]
    return "\n\n".join(blocks) + "\n"


def _paragraph(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)
