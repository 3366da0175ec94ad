"""The times of a video's frames."""

from transformers import video_utils


class VideoMetadata(video_utils.VideoMetadata):
    """Transformers' metadata with the frame times of a file.

    Attributes:
        frame_times (list of float, optional): When each frame begins to be shown, in seconds from the zero of the
            file's time line, one entry per frame. It is not a dataclass field, so that the metadata stay a mapping
            with stock's keys.
    """

    frame_times: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """When each frame begins to be shown, in seconds.

        Raises:
            ValueError: There are no frame times, and `fps` or `frames_indices` is missing.
        """
        return super().timestamps if self.frame_times is None else self.frame_times
