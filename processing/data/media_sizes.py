"""Counts the tokens of images and videos from their headers, without decoding them."""

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from PIL import Image

from ..media import as_source, check_pixels, measure_image, read_image, shorten
from ..processor import MiniMaxM3VLProcessor
from ..video_decoding import decode_video, measure_video
from .formats import Example

# Keys of a checked part (see `normalize_messages`) that may hold an image or a video.
KEYS = ("image", "video", "url", "path", "base64")


def source_of(part: Mapping[str, Any]) -> Any:
    """What a part of type "image" or "video" holds, as `as_source` gives it."""
    return as_source(next(part[name] for name in KEYS if name in part))


def media_paths(example: Example) -> list[str]:
    """The files of an example's images and videos. Those that lie elsewhere, or in the row, have none."""
    sources = (source_of(part) for _, part in example.media())
    return [source for source in sources if isinstance(source, str) and os.path.isfile(source)]


class MediaMeter:
    """Says how an image or a video stands in a prompt.

    Args:
        processor (MiniMaxM3VLProcessor): Gives the rules of resizing and of sampling.
        decode (bool): Whether every image and video is decoded too, which finds damage behind the header. Otherwise
            the headers of images are read, and of videos the times of all frames and the first frame.
    """

    def __init__(self, processor: MiniMaxM3VLProcessor, decode: bool = False):
        self.processor, self.decode = processor, decode

    def measure(self, part: Mapping[str, Any], name: str) -> tuple[str, list[int]]:
        """The text that stands for a part of type "image" or "video", and what it leaves out.

        Args:
            part (Mapping): The part.
            name (str): Its place in the row, for errors.

        Returns:
            Text with one placeholder in each bracket, and for each bracket how many placeholders it has in the model's
            input.

        Raises:
            ValueError: The image or video cannot be read or is too elongated.
        """
        source = source_of(part)
        if part["type"] == "image":
            return self._bracket(self.processor.image_token), [self._count_image(source, name)]
        return self._measure_video(source, name)

    def _bracket(self, token: str) -> str:
        return f"{self.processor.VISION_START_TOKEN}{token}{self.processor.VISION_END_TOKEN}"

    def _count_image(self, source: Any, name: str) -> int:
        processor = self.processor.image_processor
        if isinstance(source, (str, bytes)) and not self.decode:
            height, width = measure_image(source)
        else:
            image = read_image(source) if isinstance(source, (str, bytes)) else source
            if not isinstance(image, Image.Image):  # an array, whose layout the processor finds
                grid = processor(images=[image])["image_grid_thw"][0]
                return math.prod(map(int, grid)) // processor.merge_size**2
            check_pixels(image, name)
            width, height = image.size
        label = repr(shorten(source)) if isinstance(source, str) else "of the row"
        try:
            return processor.get_number_of_image_patches(height, width) // processor.merge_size**2
        except ValueError as error:
            raise ValueError(f"the image {label} of {width} x {height} pixels cannot be used: {error}") from error

    def _measure_video(self, source: Any, name: str) -> tuple[str, list[int]]:
        processor = self.processor.video_processor
        if not isinstance(source, str):
            inputs = self.processor.video_processor(videos=[source], return_metadata=True)
            text = self.processor.replace_video_token(inputs, 0)
            runs = re.compile(f"(?:{re.escape(self.processor.video_token)})+")
            counts = [len(run) // len(self.processor.video_token) for run in runs.findall(text)]
            return runs.sub(self.processor.video_token, text), counts
        choose = processor.sample_frames
        if not (processor.do_sample_frames or processor.num_frames):
            choose = partial(processor.sample_frames, fps=math.inf)
        if self.decode:
            frames, metadata = decode_video(source, choose, name)
            size = (len(frames), metadata.height, metadata.width)
        else:
            size, metadata = measure_video(source, choose, name)
        options = {"do_resize": False} if self.processor.videos_kwargs.get("do_resize") is False else {}
        patches = processor.get_num_of_video_patches(*size, videos_kwargs=options)
        steps = math.ceil(size[0] / processor.temporal_patch_size)
        times = metadata.timestamps
        text = "".join(
            f"]<]{times[step * processor.temporal_patch_size]:.1f} seconds[>[{self._bracket(self.processor.video_token)}"
            for step in range(steps)
        )
        return text, [patches // steps // processor.merge_size**2] * steps
