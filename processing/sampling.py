"""Which frames of a video are looked at."""

import math

import numpy as np


def sample_frame_indices(
    total_num_frames: int,
    video_fps: float | None = None,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> np.ndarray:
    """Choose frames evenly spread over a video.

    The number of frames is `num_frames`, or duration x `fps` rounded down, or all of them. Except for `num_frames`,
    which is exact, it is then brought into [`min_frames`, `max_frames`] and never exceeds what the video has.

    Args:
        total_num_frames (int): frames of the video.
        video_fps (float, Optional): frames per second of the video; needed for `fps`.

    Returns:
        Strictly increasing indices of at least one frame, int64.

    Raises:
        ValueError: an empty video, `num_frames` together with `fps` or larger than the video or than `max_frames`, a
            rate that is not positive, `min_frames` above `max_frames`.
    """
    if total_num_frames < 1:
        raise ValueError(f"the video must have at least one frame, got total_num_frames={total_num_frames}.")
    if num_frames is not None and fps is not None:
        raise ValueError(f"`num_frames` and `fps` exclude each other, got num_frames={num_frames} and fps={fps}.")
    if min_frames is not None and max_frames is not None and min_frames > max_frames:
        raise ValueError(f"`min_frames` must not exceed `max_frames`, got {min_frames} and {max_frames}.")

    if num_frames is not None:
        greatest = total_num_frames if max_frames is None else min(total_num_frames, max_frames)
        if not 1 <= num_frames <= greatest:
            raise ValueError(
                f"`num_frames` must be between 1 and {greatest} (the video has {total_num_frames} frames, "
                f"max_frames={max_frames}), got {num_frames}."
            )
        count = num_frames
    else:
        count = total_num_frames
        if fps is not None:
            for name, rate in (("fps", fps), ("video_metadata.fps", video_fps)):
                if rate is None or not 0 < rate < math.inf:
                    raise ValueError(
                        f"sampling by `fps` needs a positive `{name}`, got {rate}. Pass `video_metadata` with the "
                        "frame rate of the video, or sample by `num_frames`."
                    )
            count = int(total_num_frames / video_fps * fps)
        count = max(count, min_frames or 1)
        count = min(count, max_frames or count, total_num_frames)
    return np.arange(count, dtype=np.int64) * total_num_frames // count
