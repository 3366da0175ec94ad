"""From a video file to upright frames, each with its own time."""

import io
import os
from collections.abc import Callable

import numpy as np
import torch
from transformers.utils import is_av_available, is_torchcodec_usable, logging

from .downloads import download, is_address
from .media import shorten
from .media_limits import get_media_limits
from .video_metadata import VideoMetadata
from .video_pyav import PyavVideo
from .video_torchcodec import TorchcodecVideo

logger = logging.get_logger(__name__)

DECODERS: dict[str, type[PyavVideo] | type[TorchcodecVideo]] = {"pyav": PyavVideo, "torchcodec": TorchcodecVideo}


def find_decoder() -> str:
    """Names the decoder to use: PyAV, which the extra `video` installs, or else torchcodec.

    Raises:
        ImportError: No decoder is installed.
    """
    if is_av_available():
        return "pyav"
    if is_torchcodec_usable(decode="video") and TorchcodecVideo.turns_frames():
        return "torchcodec"
    raise ImportError("reading a video file needs a decoder: `pip install av`, or a recent torchcodec.")


def decode_video(
    source: str, sample_indices_fn: Callable[..., np.ndarray] | None = None, name: str = "videos"
) -> tuple[np.ndarray | torch.Tensor, VideoMetadata]:
    """Decodes the frames of a file or an address that `sample_indices_fn` chooses.

    Args:
        source (str): Local path or http(s) address.
        sample_indices_fn (Callable, optional): Takes `metadata`, whose `frame_times` cover the whole video, and
            returns increasing frame indices. Without it all frames are decoded.
        name (str): Name of the video in errors.

    Returns:
        The frames and their metadata. The frames are upright, uint8, with 4 dimensions in the layout of the decoder.
        `frames_indices` and `frame_times` of the metadata have one entry per frame.

    Raises:
        ValueError: There is no such file, `MediaLimits` refuse it, it is not a video, nothing in it can be decoded, or
            `sample_indices_fn` refuses it.
        ImportError: No decoder is installed.
    """
    video, metadata, indices, place = _open_video(source, sample_indices_fn, name)
    try:
        frames, metadata.frames_indices, metadata.frame_times = video.read(np.asarray(indices))
    except Exception as error:
        raise ValueError(f"{place} cannot be decoded with {metadata.video_backend}: {error}") from error

    metadata.height, metadata.width = frames.shape[-2:] if isinstance(frames, torch.Tensor) else frames.shape[1:3]
    if len(frames) < len(indices):
        logger.warning(
            f"{name} ({shorten(source)!r}): only {len(frames)} of {len(indices)} frames could be decoded; the file "
            "may be damaged."
        )
    elif video.declared_duration is not None and metadata.duration < 0.9 * video.declared_duration:
        logger.warning(
            f"{name} ({shorten(source)!r}): only {metadata.duration:.1f} of {video.declared_duration:.1f} seconds could be "
            "read; the file may be cut off."
        )
    return frames, metadata


def measure_video(
    source: str, sample_indices_fn: Callable[..., np.ndarray] | None = None, name: str = "videos"
) -> tuple[tuple[int, int, int], VideoMetadata]:
    """Reads the times of a video's frames and decodes the first frame alone.

    Arguments and errors are those of `decode_video`.

    Returns:
        The size that `decode_video` returns frames in, as (frames, height, width), and the metadata of these frames.
    """
    video, metadata, indices, place = _open_video(source, sample_indices_fn, name)
    try:
        frames, _, _ = video.read(np.asarray(indices[:1]))
    except Exception as error:
        raise ValueError(f"{place} cannot be decoded with {metadata.video_backend}: {error}") from error
    size = frames.shape[-2:] if isinstance(frames, torch.Tensor) else frames.shape[1:3]
    metadata.frames_indices = indices
    metadata.frame_times = [video.times[index] for index in indices]
    return (len(indices), int(size[0]), int(size[1])), metadata


def _open_video(
    source: str, sample_indices_fn: Callable[..., np.ndarray] | None, name: str
) -> tuple[PyavVideo | TorchcodecVideo, VideoMetadata, np.ndarray, str]:
    """Opens a video: its reader, the metadata of all frames, the indices of the chosen ones, its place in errors."""
    if not is_address(source) and not get_media_limits().allow_files:
        raise ValueError(f"`{name}` must be an http(s) address, because `MediaLimits.allow_files` is False.")
    if not is_address(source) and not os.path.isfile(source):
        raise ValueError(f"`{name}` must be an existing file or an http(s) address, got {shorten(source)!r}.")
    decoder = find_decoder()
    place = f"`{name}` ({shorten(source)!r})"
    try:
        video = DECODERS[decoder](_fetch(source) if is_address(source) else source)
    except Exception as error:
        raise ValueError(f"{place} cannot be decoded with {decoder}: {error}") from error

    duration = video.end - video.times[0]
    metadata = VideoMetadata(
        total_num_frames=len(video.times),
        fps=video.fps or len(video.times) / duration,
        duration=duration,
        video_backend=decoder,
    )
    metadata.frame_times = video.times
    try:
        indices = np.arange(len(video.times)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return video, metadata, indices, place


def _fetch(address: str) -> bytes:
    file = io.BytesIO()
    download(address, file)
    return file.getvalue()
