"""One row as the model sees it: its text with the learned tokens marked, its images and videos."""

import base64
import html
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..media import read_image
from ..video_decoding import decode_video
from .encoded_rows import EncodedRow
from .media_sizes import source_of

# Escape sequences of terminals.
LEARNED, DIM, PLAIN = "\033[30;42m", "\033[2m", "\033[0m"
SIDE = 512  # pixels of the longer side of a picture on the page
FRAMES = 6  # pictures of a video

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 1em; border-radius: 6px; }
.learned { background: #b7e4c7; color: #081c15; } .read { color: #666; }
.media { background: #cfe2ff; color: #084298; padding: 0 .3em; border-radius: 3px; }
.cut { background: #f8d7da; color: #842029; } figure { display: inline-block; margin: 0 1em 1em 0; }
img { max-width: 100%; border: 1px solid #ccc; } td { padding-right: 1.5em; vertical-align: top; }
"""


@dataclass
class Piece:
    """Consecutive tokens of one kind.

    Args:
        text (str): Their text.
        kind (str): "read", "learned", "media" (placeholders of one bracket) or "cut" (beyond the greatest length).
    """

    text: str
    kind: str


def split_pieces(result: EncodedRow, tokenizer: Any, max_length: int) -> Iterator[Piece]:
    """The tokens of a row in pieces."""
    _, encoded = result.checked()
    kinds = np.where(encoded.learned, "learned", "read").astype("<U7")
    if not encoded.is_text:  # a text is cut into several rows, which are learned alike
        kinds[encoded.ends() > max_length] = "cut"
    counts = dict(zip(encoded.holders.tolist(), encoded.counts.tolist()))
    start = 0
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start] and end not in counts and start not in counts:
            continue
        text = tokenizer.decode(encoded.ids[start:end])
        if start in counts:
            yield Piece(f"{text} x {counts[start]}", "media" if kinds[start] == "read" else "cut")
        else:
            yield Piece(text, str(kinds[start]))
        start = end


def facts(result: EncodedRow, max_length: int) -> dict[str, str]:
    """What there is to say about a row, by its name."""
    example, encoded = result.checked()
    found = {
        "row": f"{result.located.number} of {result.located.file}",
        "kind": example.kind,
        "tokens": f"{encoded.length:,}, {encoded.num_learned(None if encoded.is_text else max_length):,} of them learned",
    }
    if example.messages is not None:
        found["thinking mode"] = str(example.variables.get("thinking_mode", "adaptive, by default"))
    if encoded.media:
        media = ", ".join(f"{count} {kind}" for kind, count in encoded.media.items())
        found["media"] = f"{media}, {encoded.media_tokens:,} tokens"
    if encoded.length > max_length:
        found["too long"] = f"more than --max_length, {max_length:,} tokens"
    if why := encoded.why_left_out(max_length):
        found["left out"] = f"such rows {why}"
    if example.unused:
        found["not read"] = f"columns {', '.join(example.unused)}"
    return found


def show_text(result: EncodedRow, tokenizer: Any, max_length: int, has_colour: bool) -> str:
    """A row for a terminal. Learned tokens are green, or stand between » and « where there is no colour."""
    lines = [f"{name:<14} {value}" for name, value in facts(result, max_length).items()]
    marks = {
        "learned": (LEARNED, PLAIN) if has_colour else ("»", "«"),
        "read": (DIM, PLAIN) if has_colour else ("", ""),
        "media": ("", ""),
        "cut": (f"{DIM}\033[9m", PLAIN) if has_colour else ("[cut: ", "]"),
    }
    pieces = split_pieces(result, tokenizer, max_length)
    text = "".join(f"{marks[piece.kind][0]}{piece.text}{marks[piece.kind][1]}" for piece in pieces)
    return "\n".join([*lines, "", text])


def show_page(result: EncodedRow, processor: Any, max_length: int) -> str:
    """A row as one HTML page, which holds its pictures."""
    example, _ = result.checked()
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts(result, max_length).items()
    )
    pictures = "".join(
        f'<figure><img src="{_as_url(picture)}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for place, part in example.media()
        for caption, picture in _pictures(part, place, processor)
    )
    pieces = split_pieces(result, tokenizer, max_length)
    text = "".join(f'<span class="{piece.kind}">{html.escape(piece.text)}</span>' for piece in pieces)
    legend = "".join(f'<span class="{kind}">{kind}</span> ' for kind in ("learned", "read", "media", "cut"))
    title = html.escape(f"{result.located.file}, row {result.located.number}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><table>{rows}</table><p>{legend}</p>{pictures}<pre>{text}</pre></html>\n"
    )


def _pictures(part: dict[str, Any], name: str, processor: Any) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of an image or a video, each with its caption."""
    source = source_of(part)
    if part["type"] == "image":
        image = read_image(source) if isinstance(source, (str, bytes)) else source
        if isinstance(image, Image.Image):
            yield f"{name}: {image.width} x {image.height} pixels", image
        return
    if isinstance(source, str):
        choose = partial(processor.video_processor.sample_frames, num_frames=None, fps=math.inf, max_frames=FRAMES)
        frames, metadata = decode_video(source, choose, name)
        frames = np.asarray(frames)
        if frames.shape[-1] != 3:  # channels first, as one of the decoders has them
            frames = frames.transpose(0, 2, 3, 1)
        for frame, time in zip(frames, metadata.timestamps):
            yield f"{name}: {time:.1f} seconds", Image.fromarray(frame)


def _as_url(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
