"""Reading video files through the decoders that Transformers supports."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.utils import is_av_available, is_torchcodec_usable, logging
from transformers.video_utils import (
    VideoMetadata,
    default_sample_indices_fn,
    is_torchvision_video_decoding_available,
    load_video,
)

from .media import shorten

logger = logging.get_logger(__name__)


def find_decoder() -> str:
    """Name the best decoder at hand.

    Raises:
        ImportError: there is none.
    """
    if is_torchcodec_usable(decode="video"):
        return "torchcodec"
    if is_av_available():
        return "pyav"
    if is_torchvision_video_decoding_available():
        return "torchvision"
    raise ImportError("reading a video file needs a decoder: `pip install av` or `pip install torchcodec`.")


def _count_frames(source: str) -> int:
    import av

    with av.open(source) as container:
        return sum(1 for _ in container.decode(video=0))


def decode_video(
    source: str, sample_indices_fn: Callable[..., np.ndarray] | None = None, name: str = "videos"
) -> tuple[np.ndarray | torch.Tensor, VideoMetadata]:
    """Decode the frames of a file or an address that `sample_indices_fn` chooses (all without it).

    Args:
        source (str): local path, or http(s) address.
        sample_indices_fn (Callable, Optional): takes `metadata`, returns increasing frame indices.
        name (str): what to call the video in errors.

    Returns:
        The frames, uint8, with 4 dimensions in the layout of the decoder, and their metadata; `frames_indices` has
        one entry for each.

    Raises:
        ValueError: no such file, not a video, or nothing in it can be decoded.
    """
    is_address = source.startswith(("http://", "https://"))
    if not is_address and not os.path.isfile(source):
        raise ValueError(f"`{name}` must be an existing file or an http(s) address, got {shorten(source)!r}.")
    decoder = find_decoder()

    def choose(metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
        if metadata.total_num_frames < 1:
            # Matroska, WebM and GIF need not say how long they are
            if decoder != "pyav" or is_address:
                raise ValueError("it does not declare its number of frames; pass a local file and install `av`")
            metadata.total_num_frames = _count_frames(source)
            metadata.duration = metadata.total_num_frames / metadata.fps if metadata.fps else 0.0
        return (sample_indices_fn or default_sample_indices_fn)(metadata=metadata, **kwargs)

    try:
        video, metadata = load_video(source, backend=decoder, sample_indices_fn=choose)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"`{name}` ({shorten(source)!r}) cannot be decoded with {decoder}: {error}") from error

    if len(video) < len(metadata.frames_indices):
        logger.warning(
            f"{name} ({shorten(source)!r}): only {len(video)} of {len(metadata.frames_indices)} frames could be "
            "decoded; the file may be damaged at its end."
        )
        metadata.frames_indices = metadata.frames_indices[: len(video)]
    return video, metadata
