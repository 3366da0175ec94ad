"""Video files that are cut off, damaged or malicious give an exception that names the file, or the intact frames."""

import numpy as np
import pytest

from processing_minimax_m3 import video_decoding
from processing_minimax_m3.video_decoding import decode_video
from processing_minimax_m3.video_pyav import PyavVideo

av = pytest.importorskip("av")


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr(video_decoding.logger, "propagate", True)
    return caplog


@pytest.mark.parametrize("name, options", [("clip.mkv", {}), ("clip.mp4", {"movflags": "faststart"})])
def test_cut_file_gives_what_it_has(name, options, clip, warnings):
    path = clip(name, range(0, 2000, 100), **options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    frames, metadata = decode_video(str(path), lambda metadata: np.arange(0, metadata.total_num_frames, 2))
    assert 2 < len(frames) < 10 and metadata.total_num_frames < 20
    assert metadata.frames_indices.tolist() == list(range(0, 2 * len(frames), 2))
    assert [round(float(frame.mean()) / 20) for frame in frames] == list(range(len(frames)))
    assert ("of 2.0 seconds could be read" in warnings.text) == (name == "clip.mp4")  # Matroska does not say


def overwrite_packets(path, which) -> None:
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[which]:
        content[position : position + size] = b"\xff" * size
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 16])
def test_damaged_frames_are_left_out(threads, clip, warnings, monkeypatch):
    """The result is the same on any machine, although FFmpeg uses a thread per core."""
    open_stream = PyavVideo._open

    def open_with_threads(self):
        container, stream = open_stream(self)
        stream.codec_context.thread_count = threads
        return container, stream

    monkeypatch.setattr(PyavVideo, "_open", open_with_threads)
    path = clip("clip.mp4", range(0, 1000, 100), codec="libx264")
    overwrite_packets(path, slice(6, 8))
    frames, metadata = decode_video(str(path))
    assert len(frames) == 8 and metadata.frames_indices.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    np.testing.assert_allclose(metadata.timestamps, metadata.frames_indices / 10)
    assert f"videos ({str(path)!r}): only 8 of 10 frames could be decoded" in warnings.text
    # the next frame replaces a lost frame
    assert decode_video(str(path), lambda metadata: np.array([0, 6, 9]))[1].frames_indices.tolist() == [0, 8, 9]


def test_nothing_can_be_decoded(clip):
    path = clip("clip.mp4", range(0, 300, 100), codec="libx264")
    overwrite_packets(path, slice(None))
    with pytest.raises(ValueError, match=r"`videos` \('.*clip.mp4'\) cannot be decoded with pyav: "):
        decode_video(str(path))


def test_no_frames(clip):
    path = clip("clip.mkv", [0, 100])
    content = path.read_bytes()
    path.write_bytes(content[: content.find(bytes.fromhex("1f43b675"))])  # up to the first cluster
    with pytest.raises(ValueError, match=r"`videos` \('.*clip.mkv'\) cannot be decoded with pyav: "):
        decode_video(str(path))


def test_a_frame_of_absurd_size_is_refused_unread(tmp_path):
    huge = tmp_path / "huge.y4m"
    huge.write_bytes(b"YUV4MPEG2 W16000 H15000 F10:1 C420\nFRAME\n" + bytes(100))
    with pytest.raises(ValueError, match=r"'.*huge.y4m'\) cannot .*: a frame has 16000 x 15000 pixels, more than"):
        decode_video(str(huge))


def test_a_fetched_list_of_files_reads_no_local_one(clip, monkeypatch):
    part = clip("part.ts", range(0, 500, 100))
    monkeypatch.chdir(part.parent)
    with pytest.raises(av.FFmpegError):
        PyavVideo(b"ffconcat version 1.0\nfile part.ts\n")
