"""Reads video files with PyAV."""

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .media_limits import check_frame_size, get_media_limits
from .video_orientation import turn_of, turn_upright

# FFmpeg's AVFMT_TS_DISCONT: MPEG-TS, MPEG-PS and Ogg, whose clocks may start at any time.
FORMATS_WITHOUT_ZERO = 0x0200
GUESSED_RATE = 25  # FFmpeg's rate for a stream without any timing


class PyavVideo:
    """Reads a file once for its times, without decoding, and once for the wanted frames.

    Memory holds only the wanted frames. Frames that cannot be decoded are left out.

    Args:
        content (str or bytes): Path of a local file, or the content of a file.

    Attributes:
        times (list of float): When each frame begins to be shown, increasing, in seconds from the zero of the file's
            time line, or from the start of the file if the format has no zero.
        end (float): When the last frame ends.
        fps (float, optional): Average rate that the file declares.
        declared_duration (float, optional): Duration that the file declares, in seconds.

    Raises:
        ValueError: The file has no frames, or they are larger than `MediaLimits` allow.
        av.FFmpegError: The file is not a video file.
    """

    def __init__(self, content: str | bytes):
        self._content = content
        self._fault = None
        container, stream = self._open()
        with container:
            self._base = stream.time_base
            self._zero = 0.0
            if container.format.flags & FORMATS_WITHOUT_ZERO:
                self._zero = (container.start_time or 0) / 1e6  # microseconds
            rate = stream.average_rate or stream.guessed_rate
            # AVI has only the times of decoding. The decoder returns frames in the order of these times.
            self._has_times = container.format.name != "avi"
            # Each packet is a frame. An edit list cuts off the discarded ones.
            lengths = {
                packet.pts if self._has_times else packet.dts: packet.duration or 0
                for packet in self._packets(container, stream)
                if packet.size and not packet.is_discard
            }
            self.declared_duration = float(stream.duration * self._base) if stream.duration else None
        if None in lengths:
            lengths = dict.fromkeys((frame.pts for frame in self._frames()), 0)
        if None in lengths:  # a bare stream, without any times
            self._has_times = False
            self._base = 1 / Fraction(rate or GUESSED_RATE)
            lengths = dict.fromkeys(range(sum(1 for _ in self._frames())), 1)
        if not lengths:
            raise self._fault or ValueError("it has no frames")

        self._ticks = np.array(sorted(lengths), dtype=np.int64)
        first, last = int(self._ticks[0]), int(self._ticks[-1])
        length = lengths[last]
        if length <= 0:
            alone = len(lengths) == 1
            length = 1 / (self._base * (rate or GUESSED_RATE)) if alone else (last - first) / (len(lengths) - 1)
        self.times = self._seconds(self._ticks)
        self.end = self.times[-1] + float(length * self._base)
        self.fps = float(rate) if rate else None

    def _seconds(self, ticks: np.ndarray) -> list[float]:
        return [float(tick * self._base) - self._zero for tick in ticks.tolist()]

    def _open(self) -> tuple[Any, Any]:
        import av

        if isinstance(self._content, str):
            container = av.open(self._content)
        else:  # downloaded content: it may be a playlist of other files, which must not be read
            container = av.open(io.BytesIO(self._content), options={"protocol_whitelist": "data"})
        try:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures")
            check_frame_size(stream.codec_context.width, stream.codec_context.height)
            if (limit := get_media_limits().max_image_pixels) is not None:
                stream.codec_context.options = {"max_pixels": str(limit)}  # frames may grow midway
        except Exception:
            container.close()
            raise
        return container, stream

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        import av

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:  # the file was cut off here
                self._fault = error
                return
            yield packet

    def _frames(self, threads: str = "NONE") -> Iterator[Any]:
        import av

        container, stream = self._open()
        stream.thread_type = threads
        with container:
            for packet in self._packets(container, stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    self._fault = error
                    continue
                yield from frames

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Decodes the frames at increasing `indices`.

        If a frame cannot be decoded, the next frame replaces it, unless the next frame is wanted too.

        Returns:
            The upright frames, uint8 (frames, height, width, 3), their indices and their times. A damaged file may
            yield fewer frames than wanted, but at least one.
        """
        wanted = self._ticks[indices]
        video, found = self._collect(wanted, "AUTO")
        if not np.array_equal(found, wanted):
            # Near a damaged frame, several threads lose as many intact frames as the machine has cores. One thread
            # loses none.
            video, found = self._collect(wanted, "NONE")
        if len(found) == 0:
            raise self._fault or ValueError("none of its frames can be decoded")
        return video, np.searchsorted(self._ticks, found), self._seconds(found)

    def _collect(self, wanted: np.ndarray, threads: str) -> tuple[np.ndarray | None, np.ndarray]:
        """The upright frames at the ticks `wanted`, or the frames after them, and their ticks."""
        room, video, found = len(wanted), None, []
        for count, frame in enumerate(self._frames(threads)):
            tick = frame.pts if self._has_times else self._ticks[min(count, len(self._ticks) - 1)]
            if tick is None or tick < wanted[0]:
                continue
            turn = turn_of(frame)
            if video is None:
                height, width = (frame.width, frame.height) if turn.transpose else (frame.height, frame.width)
                video = np.empty((room, height, width, 3), dtype=np.uint8)
            # the size may change midway: the size of the first frame counts
            size = (height, width) if turn.transpose else (width, height)
            video[len(found)] = turn_upright(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]), turn)
            found.append(tick)
            wanted = wanted[np.searchsorted(wanted, tick, side="right") :]
            if len(wanted) == 0:
                break
        return None if video is None else video[: len(found)], np.array(found, dtype=np.int64)
