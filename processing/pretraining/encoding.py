"""From rows of pretraining data to tokens and patches, without the processors' general path, which is slower.

The result equals that of `MultimodalChatCollator`: the tests compare them. The shortcut is possible because drawn
pictures fit the patch grid as they are, and all videos have the same frame rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.encoding import IGNORED, Encoded, Encoder
from ..data.formats import read_example
from ..data.media_sizes import MediaMeter
from ..patches import patchify
from ..processor import MiniMaxM3VLProcessor
from . import scenes, videos
from .rows import Row
from .videos import FPS


@dataclass
class Answer:
    """Where an answer of the assistant stands in the tokens.

    Attributes:
        task (str): Task of the row.
        question (str): Kind of the question.
        start (int): Its first token.
        end (int): The token after its last one, which ends the turn.
    """

    task: str
    question: str
    start: int
    end: int


@dataclass
class EncodedRow:
    """A row as the model reads it.

    Attributes:
        ids (int64 (tokens,)): Token ids.
        labels (int64 (tokens,)): The same, -100 where the model learns nothing.
        modality (str): The modality of the row.
        answers (list of Answer): The answers of a chat, in order.
        jump ((start, size), optional): Positions from token `start` on are larger by `size`.
        images, videos (list of (patches (patches, channels * time * side * side), grids (chunks, 3))): Pixels in
            float32, in the order of their placeholders.
    """

    ids: np.ndarray
    labels: np.ndarray
    modality: str
    answers: list[Answer] = field(default_factory=list)
    jump: tuple[int, int] | None = None
    images: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    videos: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def resize_to_drawn_sizes(processor: MiniMaxM3VLProcessor) -> None:
    """Sets the size limits of a processor so that pictures and videos get the sizes of those of the rows.

    A model that was trained on these alone reads nothing else. Squares of any size become squares of `scenes.SIDE`
    and `videos.SIDE` pixels, and other shapes get about that area. Frames whose sides are multiples of the patch grid are
    resized only if a call gives `videos_kwargs={"do_resize": True}`, as with every processor of M3.
    """
    image, video = processor.image_processor, processor.video_processor
    least, most = _areas(scenes.SIDE, image.patch_size * image.merge_size)
    image.size = {"shortest_edge": least, "longest_edge": most}
    video.min_pixels, video.max_pixels = _areas(videos.SIDE, video.patch_size * video.merge_size)


def _areas(side: int, unit: int) -> tuple[int, int]:
    # The neighbours on the grid are excluded, and both limits are far from side**2, so that rounding does not matter.
    return side * (side - unit) + 1, side * (side + unit) - 1


class DrawnMedia(MediaMeter):
    """Says how drawn pictures and videos stand in a prompt, by their sizes alone."""

    def measure(self, part: Any, name: str) -> tuple[str, list[int]]:
        """The text with one placeholder in each bracket, and how many placeholders each bracket has."""
        processor = self.processor
        image, video = processor.image_processor, processor.video_processor
        if part["type"] == "image":
            width, height = part["image"].size
            unit = image.patch_size * image.merge_size
            return self._bracket(processor.image_token), [height // unit * (width // unit)]
        num_frames, height, width = part["video"].shape[:3]
        unit, frames = video.patch_size * video.merge_size, video.temporal_patch_size
        steps = -(-num_frames // frames)
        bracket = self._bracket(processor.video_token)
        text = "".join(f"]<]{step * frames / FPS:.1f} seconds[>[{bracket}" for step in range(steps))
        return text, [height // unit * (width // unit)] * steps


class RowEncoder(Encoder):
    """Encodes rows of pretraining data with the tokenizer, chat template and sizes of a processor.

    Args:
        processor (MiniMaxM3VLProcessor): Its image and video processors must keep pictures that fit their patch grid.
    """

    def __init__(self, processor: MiniMaxM3VLProcessor):
        super().__init__(processor)
        self.processor = processor
        self._meter = DrawnMedia(processor)

    def encode(self, row: Row, max_length: int | None = None) -> EncodedRow | None:
        """The tokens of a row.

        Args:
            row (dict): A row of `mixture.make_row`.
            max_length (int, optional): Most tokens. A longer text is cut. A longer chat has no encoding.

        Returns:
            The encoded row, or None for a chat that is too long.

        Raises:
            ValueError: The row fits no format, or its chat does not fit the template.
        """
        (found,) = self([read_example(row)])
        if isinstance(found, ValueError):
            raise found
        if max_length is not None and found.length > max_length:
            if not found.is_text:
                return None
            found = Encoded(found.ids[:max_length], found.learned[:max_length], is_text=True)
        widths = np.ones(len(found.ids), np.int64)
        widths[found.holders] = found.counts
        ids, learned = found.ids.repeat(widths), found.learned.repeat(widths)
        encoded = EncodedRow(ids, np.where(learned, ids, IGNORED), row["modality"])
        if not found.is_text:
            encoded.answers = _answers(row, learned)
            self._add_pixels(row, encoded)
        return encoded

    def _add_pixels(self, row: Row, encoded: EncodedRow) -> None:
        for message in row["messages"]:
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                if part["type"] == "image":
                    pixels = np.asarray(part["image"])[None]
                    encoded.images.append(_patches(pixels, self.processor.image_processor, None))
                elif part["type"] == "video":
                    processor = self.processor.video_processor
                    encoded.videos.append(_patches(part["video"], processor, processor.vision_segment_max_frames))


def _answers(row: Row, learned: np.ndarray) -> list[Answer]:
    edges = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0)).reshape(-1, 2).tolist()
    if len(edges) != len(row["questions"]):
        raise ValueError(
            f"the chat template marks {len(edges)} answers, but the row of task {row['task']!r} has "
            f"{len(row['questions'])} `questions`."
        )
    return [Answer(row["task"], kind, start, end) for kind, (start, end) in zip(row["questions"], edges)]


def _patches(frames: np.ndarray, processor: Any, segment: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of uint8 frames (frames, height, width, 3), and the grids of chunks of at most `segment` groups."""
    pixels = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float()
    mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1) / processor.rescale_factor
    std = torch.tensor(processor.image_std).view(1, 3, 1, 1) / processor.rescale_factor
    sizes = {name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    patches = patchify(((pixels - mean) / std)[None], **sizes)[0]
    time = -(-len(frames) // processor.temporal_patch_size)
    height, width = (side // processor.patch_size for side in frames.shape[1:3])
    chunks: Sequence[int] = [min(segment or time, time - start) for start in range(0, time, segment or time)]
    return patches, torch.tensor([[chunk, height, width] for chunk in chunks])
