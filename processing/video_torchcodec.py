"""Reads video files with torchcodec, if PyAV is not installed."""

import numpy as np
import torch

from .media_limits import check_frame_size

FRAMES_AT_ONCE = 16


class TorchcodecVideo:
    """Reads a file as `PyavVideo` does, but also decodes it to read the times.

    torchcodec turns frames upright by itself, but ignores mirroring. Times are always those of the file, even if the
    format has no zero. torchcodec cannot read a file with any damage.
    """

    def __init__(self, content: str | bytes):
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(content, seek_mode="exact", num_ffmpeg_threads=0)
        check_frame_size(self._decoder.metadata.width, self._decoder.metadata.height)
        total = len(self._decoder)
        if total < 1:
            raise ValueError("it has no frames")
        self.times = []
        for start in range(0, total, FRAMES_AT_ONCE):
            frames = self._decoder.get_frames_in_range(start, min(start + FRAMES_AT_ONCE, total))
            self.times += frames.pts_seconds.tolist()
        self.end = self.times[-1] + float(frames.duration_seconds[-1])
        self.fps = self._decoder.metadata.average_fps
        self.declared_duration = None

    @staticmethod
    def turns_frames() -> bool:
        """Whether the installed version turns frames upright. Older versions do not, without a warning."""
        from torchcodec.decoders import VideoStreamMetadata

        return "rotation" in VideoStreamMetadata.__dataclass_fields__

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, np.ndarray, list[float]]:
        """Decodes the frames at increasing `indices` to uint8 (frames, 3, height, width)."""
        frames = self._decoder.get_frames_at(indices.tolist())
        return frames.data, indices, frames.pts_seconds.tolist()
