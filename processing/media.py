"""What counts as an image or a video: nesting, sources on disk and on the web, and checks with a name in the error.

Everything here runs before any pixel is resized, so that a bad input costs nothing but its own loading.
"""

import base64
import io
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image_as_tensor


def as_source(item: Any) -> Any:
    """Turn a `pathlib` path or a `file://` address into a path string; leave anything else as it is."""
    if isinstance(item, os.PathLike):
        return os.fspath(item)
    if isinstance(item, str) and item.startswith("file://"):
        return unquote(urlparse(item).path)
    return item


def is_frame_list(item: Any) -> bool:
    """Whether this is one video, given as a list of frames."""
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(map(is_frame, item))


def shorten(text: str) -> str:
    """A source, or an error that quotes it, for a message: base64 text would fill the screen."""
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"


def describe(item: Any) -> str:
    """What an item is, for an error message."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return f"{type(item).__name__} of shape {tuple(item.shape)} and dtype {item.dtype}"
    if isinstance(item, (list, tuple)):
        return f"{type(item).__name__} of length {len(item)}"
    return type(item).__name__


def is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (is_array(item) and item.ndim == 3)


def read_image(source: str) -> torch.Tensor:
    """Load a path, an http(s) address or base64 text to (3, height, width) uint8, upright, transparency over white.

    Raises:
        ValueError: it cannot be read, is no image, or its pixels are no 8-bit ones.
    """
    try:
        if source.startswith(("http://", "https://")):
            content = httpx.get(source, follow_redirects=True).content
            return decode_image(base64.encodebytes(content).decode(), content)
        if os.path.isfile(source):
            return decode_image(source, source)
        return decode_image(source, base64.decodebytes(source.rpartition(",")[2].encode()))
    except Exception as error:
        raise ValueError(f"the image {shorten(source)!r} cannot be read: {shorten(str(error))}") from error


def decode_image(source: str, content: str | bytes) -> torch.Tensor:
    """Decode one image, given twice: as a path or base64 text, and as a path or bytes."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        # torchvision's decoder is fast, but drops transparency and keeps 16 bits; Pillow also knows more formats.
        if not image.has_transparency_data and not has_wide_pixels(image):
            try:
                pixels = load_image_as_tensor(source)
                if pixels.dtype == torch.uint8:
                    return pixels
            except Exception:
                pass
        return torch.from_numpy(to_rgb_array(ImageOps.exif_transpose(image))).permute(2, 0, 1)


def has_wide_pixels(image: Image.Image) -> bool:
    """Whether pixels may lie outside 0 to 255: 16 or 32 bits, integer or floating-point."""
    return image.mode[0] in "IF"


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8, transparency over white.

    Raises:
        ValueError: pixels lie outside 0 to 255.
    """
    check_range(image)
    return convert_to_rgb(image, return_numpy=True)


def check_range(pixels: Image.Image | torch.Tensor) -> None:
    """Refuse pixels that are neither 8-bit ones nor floating-point.

    Raises:
        ValueError: pixels lie outside 0 to 255.
    """
    if isinstance(pixels, Image.Image):
        if not has_wide_pixels(pixels):
            return
        low, high = pixels.getextrema()
    elif pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.bool):
        return
    else:
        low, high = (bound.item() for bound in pixels.long().aminmax())
    if low < 0 or high > 255:
        raise ValueError(f"pixels must lie in 0 to 255, got {low} to {high}; scale them first (16 bits to 8, say).")


def flatten_images(images: Any) -> list[Any]:
    """List every image of an arbitrarily nested input, in order.

    An image is a PIL image, a path, an address, base64 text, or an array of 2 (grayscale) or 3 dimensions;
    an array of 4 dimensions is a batch of images.

    Raises:
        ValueError: an item is none of these.
    """
    return list(_iterate_images(images, "images"))


def _iterate_images(images: Any, name: str) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for index, item in enumerate(images):
            yield from _iterate_images(item, f"{name}[{index}]")
    elif isinstance(images, (Image.Image, str)) or (is_array(images) and images.ndim in (2, 3)):
        yield images
    elif is_array(images) and images.ndim == 4:
        yield from images
    else:
        raise ValueError(
            f"`{name}` must be a PIL image, a path, an address, an array of 2 to 4 dimensions or a list of these, "
            f"got {describe(images)}."
        )


def flatten_videos(videos: Any) -> list[Any]:
    """List every video of a nested input, in order.

    A video is a path or an address, an array of 4 dimensions, or a list of frames (PIL images or arrays of 3
    dimensions). An array of 5 dimensions is a batch of videos, a single image a video of one frame. As in
    Transformers, a list of strings holds one video each, unless it is nested twice (`[[["0.jpg", "1.jpg"]]]`): then
    they are the frames of one video.

    Raises:
        ValueError: an item is none of these.
    """
    return list(_iterate_videos(videos, "videos", depth=0))


def _iterate_videos(videos: Any, name: str, depth: int) -> Iterator[Any]:
    if isinstance(videos, (list, tuple)):
        are_frame_files = depth >= 2 and len(videos) > 0 and all(isinstance(item, str) for item in videos)
        if are_frame_files or is_frame_list(videos):
            yield list(videos)
        else:
            for index, item in enumerate(videos):
                yield from _iterate_videos(item, f"{name}[{index}]", depth + 1)
    elif is_frame(videos):
        yield [videos]
    elif isinstance(videos, str) or (is_array(videos) and videos.ndim == 4):
        yield videos
    elif is_array(videos) and videos.ndim == 5:
        yield from videos
    else:
        raise ValueError(
            f"`{name}` must be a path, an address, an array of 4 dimensions (frames, then channels, height and width "
            f"in either order), a list of frames or a list of these, got {describe(videos)}."
        )


def map_sources(items: Any) -> Any:
    """Apply `as_source` to every leaf of a nested list."""
    if isinstance(items, (list, tuple)):
        return [map_sources(item) for item in items]
    return as_source(items)


def stack_frames(frames: list[Any], name: str) -> np.ndarray | torch.Tensor:
    """Make one array of 4 dimensions from a list of frames.

    Raises:
        ValueError: the frames differ in size.
    """
    frames = [to_rgb_array(frame) if isinstance(frame, Image.Image) else frame for frame in frames]
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        raise ValueError(f"the frames of `{name}` must have one size, got {sorted(shapes)}.")
    if all(isinstance(frame, torch.Tensor) for frame in frames):
        return torch.stack(frames)
    return np.stack([frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame for frame in frames])


def check_pixels(pixels: Any, name: str) -> None:
    """Refuse arrays that no processor can turn into patches.

    Raises:
        ValueError: an empty side, values that are not numbers or not finite, or a PIL image with pixels outside 0 to
            255, which its conversion would clip.
    """
    if isinstance(pixels, Image.Image):
        try:
            pixels.load()  # an image file is decoded only here
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"`{name}` cannot be decoded: {error}") from error
        if 0 in pixels.size:
            raise ValueError(f"`{name}` must have a height and a width of at least 1 pixel, got {pixels.size}.")
        try:
            check_range(pixels)
        except ValueError as error:
            raise ValueError(f"`{name}` cannot be used: {error}") from error
        return
    if 0 in pixels.shape:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(pixels.shape)}.")
    if isinstance(pixels, np.ndarray):
        is_real, is_float = pixels.dtype.kind in "buif", pixels.dtype.kind == "f"
        is_finite = np.isfinite
    else:
        is_real, is_float = not pixels.is_complex(), pixels.is_floating_point()
        is_finite = torch.isfinite
    if not is_real:
        raise ValueError(f"`{name}` must hold integers or real numbers, got dtype {pixels.dtype}.")
    if is_float and not bool(is_finite(pixels).all()):
        raise ValueError(f"`{name}` holds NaN or infinite pixels; every pixel must be finite.")
