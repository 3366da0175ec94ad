"""Video files through torchcodec, for who has it and not PyAV."""

import numpy as np
import torch

from .media_limits import check_frame_size

FRAMES_AT_ONCE = 16


class TorchcodecVideo:
    """As `PyavVideo`, except that it decodes the file for the times too.

    torchcodec turns frames itself, but does not mirror those that the file wants mirrored. Times are the file's, in
    formats without a zero too. A file with damage anywhere cannot be read.
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
        """Whether the installed version turns frames upright; older ones leave them and do not tell."""
        from torchcodec.decoders import VideoStreamMetadata

        return "rotation" in VideoStreamMetadata.__dataclass_fields__

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, np.ndarray, list[float]]:
        """Decode the frames at increasing `indices`: (frames, 3, height, width) uint8."""
        frames = self._decoder.get_frames_at(indices.tolist())
        return frames.data, indices, frames.pts_seconds.tolist()
