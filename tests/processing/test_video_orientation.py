"""Videos with an orientation in the file are upright, for every matrix and decoder."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from processing_minimax_m3 import MiniMaxM3VLVideoProcessor, video_decoding
from processing_minimax_m3.video_decoding import decode_video

av = pytest.importorskip("av")

# (a, b, c, d): a pixel at (x, y) belongs to (a x + c y, b x + d y)
STRAIGHT = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)]
MATRICES = STRAIGHT + [(0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)]


@pytest.fixture
def turned(tmp_path):
    """Writes a clip of two frames whose four quarters differ, with a display matrix."""

    def make(matrix: tuple[float, ...], name: str = "clip.mp4") -> Path:
        path = tmp_path / name
        picture = np.full((56, 112, 3), 40, dtype=np.uint8)
        picture[:28, 56:], picture[28:, :56], picture[28:, 56:] = 100, 160, 220
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        content = bytearray(path.read_bytes())
        box = content.find(b"tkhd")  # version 0; the matrix is the last but two of its fields
        a, b, c, d = (round(65536 * value) for value in matrix)
        struct.pack_into(">9i", content, box + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)
        return path

    return make


def turn_by_pixel(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Applies the definition pixel by pixel, and moves the result to non-negative coordinates."""
    a, b, c, d = matrix
    height, width = picture.shape[:2]
    places = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    right, bottom = max(x for x, _ in places), max(y for _, y in places)
    return np.array([[places[x, y] for x in range(left, right + 1)] for y in range(top, bottom + 1)])


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_upright(matrix, turned):
    plain = decode_video(str(turned((1, 0, 0, 1), "plain.mp4")))[0]
    frames, metadata = decode_video(str(turned(matrix)))
    for frame, plain_frame in zip(frames, plain, strict=True):
        np.testing.assert_array_equal(frame, turn_by_pixel(plain_frame, matrix))
    assert (metadata.height, metadata.width) == frames.shape[1:3]


def test_nearly_a_quarter_turn(turned):
    """A matrix that is a few degrees off, or scaled, counts as the nearest quarter turn."""
    expected = decode_video(str(turned((0, 1, -1, 0))))[0]
    np.testing.assert_array_equal(decode_video(str(turned((0.1, 0.99, -0.99, 0.1))))[0], expected)
    np.testing.assert_array_equal(decode_video(str(turned((0, 2, -0.5, 0))))[0], expected)


def test_patches_lie_upright(turned):
    video_processor = MiniMaxM3VLVideoProcessor()
    assert video_processor(str(turned((0, 1, -1, 0))))["video_grid_thw"].tolist() == [[1, 8, 4]]


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)], ids=str)
def test_torchcodec_turns_frames_itself(matrix, turned, monkeypatch):
    """Frames are not turned twice. torchcodec ignores mirroring."""
    pytest.importorskip("torchcodec")
    path = str(turned(matrix))
    with_pyav, expected = decode_video(path)
    monkeypatch.setattr(video_decoding, "is_av_available", lambda: False)
    frames, metadata = decode_video(path)
    assert metadata.video_backend == "torchcodec"
    assert (metadata.height, metadata.width, metadata.timestamps) == (
        expected.height,
        expected.width,
        expected.timestamps,
    )
    torch.testing.assert_close(frames.permute(0, 2, 3, 1), torch.from_numpy(with_pyav), atol=8, rtol=0)
