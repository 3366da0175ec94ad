"""Images and videos as inputs: nested lists, decoding of images, and checks whose errors name the input.

Everything here runs before any pixel is resized, so that a bad input costs only its own loading.
"""

import io
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb

from .image_sources import is_path_or_base64, open_image_source
from .media_limits import get_media_limits

# The transposition that turns an image upright, by the value of its orientation tag; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_source(item: Any) -> Any:
    """Converts a source to a string or bytes, and returns anything else as it is.

    A `pathlib` path and a `file://` address become a path. `{"bytes": ..., "path": ...}` (a file as `datasets` stores
    it) becomes its bytes, or its path if it has no bytes. Other buffers of bytes become `bytes`.

    Raises:
        ValueError: A `file://` address names a host.
    """
    if isinstance(item, Mapping) and item and item.keys() <= {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    if isinstance(item, os.PathLike):
        return os.fspath(item)
    if isinstance(item, str) and item[:7].lower() == "file://":
        address = urlparse(item)
        if address.netloc not in ("", "localhost"):
            raise ValueError(f"{shorten(item)!r} names the host {address.netloc!r}; write file:///FOLDER/FILE.")
        return unquote(address.path)
    return item


def is_frame_list(item: Any) -> bool:
    """Whether this is one video as a list of frames."""
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(map(is_frame, item))


def shorten(text: str) -> str:
    """Shortens a source, or an error that quotes it, for a message. Base64 text would fill the screen."""
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"


def describe(item: Any) -> str:
    """Describes an item for an error message."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return f"{type(item).__name__} of shape {tuple(item.shape)} and dtype {item.dtype}"
    if isinstance(item, (list, tuple, bytes)):
        return f"{type(item).__name__} of length {len(item)}"
    return type(item).__name__


def is_array(item: Any) -> bool:
    """Whether `item` is an array of NumPy or a tensor."""
    return isinstance(item, (np.ndarray, torch.Tensor))


def is_frame(item: Any) -> bool:
    """Whether `item` is one decoded image: a PIL image, or an array of three dimensions."""
    return isinstance(item, Image.Image) or (is_array(item) and item.ndim == 3)


def fetch_images(images: Any, name: str = "images") -> Any:
    """Reads every source in a nested list to a PIL image. Returns images and arrays as they are.

    Raises:
        ValueError: See `read_image`. The message names the item by its place in `name`.
    """
    if isinstance(images, (list, tuple)):
        return [fetch_images(item, f"{name}[{index}]") for index, item in enumerate(images)]
    try:
        source = as_source(images)
        return read_image(source) if isinstance(source, (str, bytes)) else source
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error


def read_image(source: str | bytes) -> Image.Image:
    """Reads a path, an http(s) address, a data URL, base64 text or the bytes of a file to an RGB image.

    Only Pillow decodes, because torchvision's decoder may end the process at a damaged file. The first frame counts.
    The result is upright, with transparent pixels on white.

    Raises:
        ValueError: The source cannot be read, is not an image, exceeds the `MediaLimits` in force, or its pixels do
            not have 8 bits.
    """
    try:
        with open_image_source(source) as file:
            image = _open_image(file, source)
            load_pixels(image)
            if image.mode == "RGB" and "transparency" not in image.info:
                return turn_upright(image)  # most images; a conversion to an array would double the time
            return Image.fromarray(to_rgb_array(image))
    except Exception as error:  # Pillow raises different errors for damage
        raise _unreadable(source, error) from error


def measure_image(source: str | bytes) -> tuple[int, int]:
    """Reads only the header of an image: (height, width) in pixels, as stored. Sources are those of `read_image`.

    Raises:
        ValueError: The source cannot be opened, or is not an image.
    """
    try:
        with open_image_source(source) as file:
            image = _open_image(file, source, is_verified=False)
            return image.height, image.width
    except Exception as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str | bytes, error: Exception) -> ValueError:
    label = repr(shorten(source)) if isinstance(source, str) else f"of {len(source)} bytes"
    reason = shorten(str(error)) or type(error).__name__
    return ValueError(f"the image {label} cannot be read: {reason}")


def _open_image(file: BinaryIO, source: str | bytes, is_verified: bool = True) -> Image.Image:
    formats = get_media_limits().image_formats
    if formats is not None:
        Image.init()
        formats = [name for name in formats if name in Image.OPEN]  # a build of Pillow may lack a format, such as AVIF
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        content = f"no image in a format that {'Pillow reads' if formats is None else 'is allowed'}."
        if isinstance(file, io.BytesIO) and is_path_or_base64(source):
            raise ValueError(f"there is no such file, and as base64 text it is {content}") from error
        raise ValueError(f"it is {content}") from error
    if is_verified and image.format == "PNG":
        image.verify()  # checks checksums, which decoding skips; the image cannot be used afterwards
        file.seek(0)
        image = Image.open(file, formats=("PNG",))
    return image


def load_pixels(image: Image.Image) -> None:
    """Decodes an image that Pillow has only opened.

    Raises:
        ValueError: The image is damaged, or larger than `MediaLimits.max_image_pixels`, which is checked before
        decoding.
    """
    limit = get_media_limits().max_image_pixels
    # an image that was made or changed in memory is decoded already, so the limit would save nothing
    if isinstance(image, ImageFile.ImageFile) and limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than the {limit} that "
            "`MediaLimits.max_image_pixels` allows."
        )
    try:
        image.load()
    except Exception as error:  # Pillow raises different errors for damage
        raise ValueError(str(error) or type(error).__name__) from error


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns or mirrors an image by its orientation tag, if it has one. The result has none.

    Metadata that cannot be read counts as no orientation. `ImageOps.exif_transpose` would fail on it, because it
    writes all metadata again.
    """
    image.load()  # Pillow turns TIFF files here; a PNG file may have its metadata after its pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    method = TURNS.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # where the tag may stand
        turned.info.pop(name, None)
    return turned


def has_wide_pixels(image: Image.Image) -> bool:
    """Whether pixels may lie outside 0 to 255, because they have 16 or 32 bits, integer or floating-point."""
    return image.mode[0] in "IF"


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """Converts an image to uint8 (height, width, 3), upright, with transparent pixels on white.

    Raises:
        ValueError: The image cannot be decoded (see `load_pixels`), or pixels lie outside 0 to 255.
    """
    load_pixels(image)
    check_range(image)
    return convert_to_rgb(turn_upright(image), return_numpy=True)


def check_range(pixels: Image.Image | torch.Tensor) -> None:
    """Refuses wide integer pixels that lie outside 0 to 255. Floating-point arrays pass.

    Raises:
        ValueError: Pixels lie outside 0 to 255.
    """
    if isinstance(pixels, Image.Image):
        if not has_wide_pixels(pixels):
            return
        # Pillow measures and converts 16-bit pixels only in the byte order of this machine
        low, high = (pixels.convert("I") if pixels.mode.startswith("I;16") else pixels).getextrema()
    elif pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.bool):
        return
    else:
        low, high = (bound.item() for bound in pixels.long().aminmax())
    if low < 0 or high > 255:
        raise ValueError(
            f"pixels must lie in 0 to 255, got {low} to {high}; scale them first, for example 16 bits to 8."
        )


def flatten_images(images: Any) -> list[Any]:
    """Lists every image of an arbitrarily nested input, in order.

    An image is a PIL image, a path, an address, base64 text, the bytes of a file, or an array of 2 (grayscale) or 3
    dimensions. An array of 4 dimensions is a batch of images.

    Raises:
        ValueError: An item is none of these.
    """
    return list(_iterate_images(images, "images"))


def _iterate_images(images: Any, name: str) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for index, item in enumerate(images):
            yield from _iterate_images(item, f"{name}[{index}]")
    elif isinstance(images, (Image.Image, str, bytes)) or (is_array(images) and images.ndim in (2, 3)):
        yield images
    elif is_array(images) and images.ndim == 4:
        yield from images
    else:
        raise ValueError(
            f"`{name}` must be a PIL image, a path, an address, an array of 2 to 4 dimensions or a list of these, "
            f"got {describe(images)}."
        )


def flatten_videos(videos: Any) -> list[Any]:
    """Lists every video of a nested input, in order.

    A video is a path or an address, an array of 4 dimensions, or a list of frames (PIL images or arrays of 3
    dimensions). An array of 5 dimensions is a batch of videos. A single image is a video of one frame. As in
    Transformers, each string in a list is a video, unless the list is nested twice (`[[["0.jpg", "1.jpg"]]]`): then
    the strings are the frames of one video.

    Raises:
        ValueError: An item is none of these.
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
    """Applies `as_source` to every leaf of a nested list."""
    if isinstance(items, (list, tuple)):
        return [map_sources(item) for item in items]
    return as_source(items)


def stack_frames(frames: list[Any], name: str) -> np.ndarray | torch.Tensor:
    """Makes one array of 4 dimensions from a list of frames.

    Raises:
        ValueError: A frame cannot be decoded, or the frames differ in size.
    """
    for index, frame in enumerate(frames):
        if isinstance(frame, Image.Image):
            check_pixels(frame, f"{name}[{index}]")
    frames = [to_rgb_array(frame) if isinstance(frame, Image.Image) else frame for frame in frames]
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        raise ValueError(f"the frames of `{name}` must have the same size, got {sorted(shapes)}.")
    if all(isinstance(frame, torch.Tensor) for frame in frames):
        return torch.stack(frames)
    return np.stack([frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame for frame in frames])


def check_pixels(pixels: Any, name: str) -> None:
    """Refuses images and arrays that no processor can turn into patches.

    Raises:
        ValueError: A side is empty, values are not numbers or not finite, or a PIL image has pixels outside 0 to 255,
            which its conversion would clip.
    """
    if isinstance(pixels, Image.Image):
        try:
            load_pixels(pixels)
        except ValueError as error:
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
