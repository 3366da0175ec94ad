"""What is known of a video's time line."""

from transformers import video_utils


class VideoMetadata(video_utils.VideoMetadata):
    """Transformers' metadata, with the frames' own times where a file has told them.

    `frame_times` (list of float, Optional): when each frame begins to be shown, in seconds from the zero of the file's
    time line, one entry per frame. It is not a field, so that the metadata stay a mapping with stock's keys.
    """

    frame_times: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """When each frame begins to be shown, in seconds.

        Raises:
            ValueError: neither the frames' own times nor both of `fps` and `frames_indices` are known.
        """
        return super().timestamps if self.frame_times is None else self.frame_times
