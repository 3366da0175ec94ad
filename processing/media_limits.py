"""Limits of what the processors read: one set of limits for the whole process."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from PIL import Image

# With three bytes a pixel, this number of pixels takes 256 MiB. Pillow warns from the same number on.
DEFAULT_IMAGE_PIXELS = 2**28 // 3
# The formats of the web, which not every build of Pillow reads.
WEB_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Limits of the size and the sources of images and videos.

    The defaults are for a person who names their own files and addresses. `MediaLimits.strict()` is for a server that
    gets them from others. `set_media_limits` puts limits in force.

    Args:
        max_image_pixels (int, optional): Greatest width x height of an image file or of a video's frames. It is
            checked on the header, before any pixel is decoded. None sets no limit. `PIL.Image.MAX_IMAGE_PIXELS` counts
            in any case.
        max_download_bytes (int, optional): Greatest size of one download. None sets no limit.
        private_addresses (str): Whether the processors may contact hosts of this machine or of a private network.
            "given" allows hosts that the caller names, but no redirect to such a host. "never" allows none: the
            name of a host is looked up, and every address of it must be public. "always" allows all.
        allow_files (bool): Whether the processors may read paths and `file://` addresses.
        allow_address (Callable, optional): A function that takes a normalised http(s) address as a string and returns
            whether the processors may contact it. It is called again for each redirect. None allows all.
        image_formats (tuple[str, ...], optional): The image formats to read, by Pillow's names. None allows all
            formats that Pillow knows. Some of them start other programs (EPS) or hold larger images than their headers
            say (ICO).

    Raises:
        ValueError: A field has a wrong type or value.
    """

    max_image_pixels: int | None = DEFAULT_IMAGE_PIXELS
    max_download_bytes: int | None = 2**30
    private_addresses: Literal["given", "never", "always"] = "given"
    allow_files: bool = True
    allow_address: Callable[[str], bool] | None = None
    image_formats: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # Without these checks, a wrong value would silently leave a server open.
        for name in ("max_image_pixels", "max_download_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, or None, got {value!r}.")
        if self.private_addresses not in ("given", "never", "always"):
            raise ValueError(
                f"`private_addresses` must be 'given', 'never' or 'always', got {self.private_addresses!r}."
            )
        if not isinstance(self.allow_files, bool):
            raise ValueError(f"`allow_files` must be True or False, got {self.allow_files!r}.")
        if self.allow_address is not None and not callable(self.allow_address):
            raise ValueError(f"`allow_address` must be a function or None, got {self.allow_address!r}.")
        if self.image_formats is not None:
            Image.init()
            known = {*WEB_FORMATS, *Image.OPEN}
            if not isinstance(self.image_formats, (tuple, list)) or not known.issuperset(self.image_formats):
                raise ValueError(
                    f"`image_formats` must hold Pillow's names of formats ({', '.join(sorted(known))}), or be "
                    f"None, got {self.image_formats!r}."
                )

    @classmethod
    def strict(cls, **changes) -> "MediaLimits":
        """Limits for a server that gets images and videos from others. `changes` replace single limits.

        They allow no files of this machine and no private addresses, only the image formats of the web, at most 2**25
        pixels (slightly more than 8K video has), and at most 64 MiB a download.
        """
        strict = cls(
            max_image_pixels=2**25,
            max_download_bytes=2**26,
            private_addresses="never",
            allow_files=False,
            image_formats=WEB_FORMATS,
        )
        return dataclasses.replace(strict, **changes)


def check_frame_size(width: int, height: int) -> None:
    """Raises ValueError for a video whose frames are larger than the limits in force allow."""
    limit = get_media_limits().max_image_pixels
    if limit is not None and width * height > limit:
        raise ValueError(
            f"a frame has {width} x {height} pixels, more than the {limit} that `MediaLimits.max_image_pixels` allows"
        )


_limits = MediaLimits()


def get_media_limits() -> MediaLimits:
    """The limits in force."""
    return _limits


def set_media_limits(limits: MediaLimits) -> None:
    """Puts limits in force, for every processor and thread of this process.

        set_media_limits(MediaLimits.strict(allow_address=lambda address: address.startswith("https://img.example/")))

    Raises:
        TypeError: `limits` is not a `MediaLimits`.
    """
    if not isinstance(limits, MediaLimits):
        raise TypeError(f"`limits` must be a MediaLimits, got {type(limits).__name__}.")
    global _limits
    _limits = limits
