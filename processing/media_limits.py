"""What the processors may read and how much of it: one set of limits for the whole process."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from PIL import Image

# Three bytes for each of these pixels are 256 MiB. Pillow warns from the same number on.
DEFAULT_IMAGE_PIXELS = 2**28 // 3
# The formats of the web, which not every build of Pillow reads.
WEB_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """What images and videos may cost and where they may come from.

    The defaults are for a person who names their own files and addresses. `MediaLimits.strict()` is for a server that
    gets them from others. `set_media_limits` puts either in force.

    Args:
        max_image_pixels (int, Optional): greatest width x height of an image file or of a video's frames, read from the
            header before any pixel is decoded. None is no limit of ours; `PIL.Image.MAX_IMAGE_PIXELS` holds too.
        max_download_bytes (int, Optional): greatest size of one download. None is no limit.
        private_addresses (str): whether hosts of this machine or of a private network may be asked. "given": those
            that the caller names, but none that a server redirects to. "never": none at all; the name of a host is
            looked up, and every address that it has must be public. "always": all.
        allow_files (bool): whether paths and `file://` addresses may be read.
        allow_address (Callable, Optional): takes an http(s) address, normalised, as a string and says whether it may
            be asked. It is called for each redirect too. None allows all.
        image_formats (tuple[str, ...], Optional): the image formats to read, by Pillow's names. None is all that
            Pillow knows, some of which start other programs (EPS) or hold larger images than their headers say (ICO).

    Raises:
        ValueError: a field holds something else.
    """

    max_image_pixels: int | None = DEFAULT_IMAGE_PIXELS
    max_download_bytes: int | None = 2**30
    private_addresses: Literal["given", "never", "always"] = "given"
    allow_files: bool = True
    allow_address: Callable[[str], bool] | None = None
    image_formats: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # A wrong value here would leave a server open without a word.
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
        """Limits for a server that gets images and videos from others, with `changes` to single ones.

        No files of this machine, no private addresses, the image formats of the web, 2**25 pixels (a little more than
        8K video has) and 64 MiB.
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
    """Raise ValueError for a video whose frames are larger than the limits in force allow."""
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
    """Put limits in force, for every processor and thread of this process.

        set_media_limits(MediaLimits.strict(allow_address=lambda address: address.startswith("https://img.example/")))

    Raises:
        TypeError: `limits` is no `MediaLimits`.
    """
    if not isinstance(limits, MediaLimits):
        raise TypeError(f"`limits` must be a MediaLimits, got {type(limits).__name__}.")
    global _limits
    _limits = limits
