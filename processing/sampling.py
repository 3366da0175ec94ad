"""Chooses the frames of a video that the model sees."""

import math
from collections.abc import Sequence

import numpy as np

# In seconds. A frame counts as shown up to 1 ms before its time, because Matroska rounds times to a millisecond.
TIME_TOLERANCE = 1e-3


def sample_frame_indices(
    total_num_frames: int,
    video_fps: float | None = None,
    *,
    times: Sequence[float] | None = None,
    duration: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> np.ndarray:
    """Chooses frames evenly spread over the time of a video.

    `num_frames` chooses exactly that number. `fps` divides the video into floor(duration * fps) equal spans, at least
    one, and chooses the frame shown at the start of each. A frame shown at the start of several spans is chosen once. Without
    `num_frames` and `fps`, all frames are chosen. Except with `num_frames`, the number is then brought into
    [`min_frames`, `max_frames`]. It never exceeds the number of frames of the video.

    Args:
        total_num_frames (int): Frames of the video.
        video_fps (float, optional): Frames per second of the video. `fps` needs it if there are no `times`.
        times (sequence of float, optional): When each frame begins to be shown, in seconds, increasing. Without
            `times`, each frame is shown for the same time.
        duration (float, optional): Seconds from the start of the first frame to the end of the last one. `times` need
            it.
        num_frames (int, optional): Number of frames to choose. It excludes `fps`.
        fps (float, optional): Frames to choose per second of video.
        min_frames (int, optional): Smallest number of frames to choose.
        max_frames (int, optional): Greatest number of frames to choose.

    Returns:
        Strictly increasing indices of at least one frame, int64.

    Raises:
        ValueError: The video is empty.
        ValueError: `num_frames` comes together with `fps`, is below 1, or exceeds the video or `max_frames`.
        ValueError: `fps` is not positive, or comes without `times` and without a positive `video_fps`.
        ValueError: `max_frames` is below 1 or below `min_frames`.
    """
    if total_num_frames < 1:
        raise ValueError(f"the video must have at least one frame, got total_num_frames={total_num_frames}.")
    if num_frames is not None and fps is not None:
        raise ValueError(f"`num_frames` and `fps` exclude each other, got num_frames={num_frames} and fps={fps}.")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
    if min_frames is not None and max_frames is not None and min_frames > max_frames:
        raise ValueError(f"`min_frames` must not exceed `max_frames`, got {min_frames} and {max_frames}.")

    if times is None:
        starts, end, tolerance = np.arange(total_num_frames, dtype=np.float64), total_num_frames, 0.0
    else:
        starts, end, tolerance = np.asarray(times, dtype=np.float64) - times[0], duration, TIME_TOLERANCE

    greatest = total_num_frames if max_frames is None else min(total_num_frames, max_frames)
    if num_frames is not None:
        if not 1 <= num_frames <= greatest:
            raise ValueError(
                f"`num_frames` must be between 1 and {greatest} (the video has {total_num_frames} frames, "
                f"max_frames={max_frames}), got {num_frames}."
            )
        return _spread(starts, end, num_frames, tolerance)

    chosen = np.arange(total_num_frames, dtype=np.int64)
    if fps is not None and fps != math.inf:
        if not fps > 0:
            raise ValueError(f"sampling by `fps` needs a positive `fps`, got {fps}.")
        if times is not None:
            seconds = duration + tolerance
        elif video_fps is not None and 0 < video_fps < math.inf:
            seconds = total_num_frames / video_fps
        else:
            raise ValueError(
                f"sampling by `fps` needs a positive `video_metadata.fps`, got {video_fps}. Pass `video_metadata` with "
                "the frame rate of the video, or sample by `num_frames`."
            )
        # Span k starts at k * end / count. A frame is shown from its own start to the start of the next frame.
        count = max(1.0, math.floor(seconds * fps))
        first_spans = np.ceil((starts - tolerance) * count / end)
        chosen = np.flatnonzero(first_spans < np.append(first_spans[1:], count)).astype(np.int64)
    count = min(max(len(chosen), min_frames or 1), greatest)
    return chosen if count == len(chosen) else _spread(starts, end, count, tolerance)


def _spread(starts: np.ndarray, end: float, count: int, tolerance: float) -> np.ndarray:
    """The frames shown at the starts of `count` equal spans. A neighbour replaces a frame that would come twice."""
    order = np.arange(count)
    shown = np.searchsorted(starts - tolerance, order * end / count, side="right") - 1
    increasing = np.maximum.accumulate(shown - order) + order
    return np.minimum(increasing, len(starts) - count + order).astype(np.int64)
