"""Frames have the times of the file, for every container, and sampling follows these times."""

import re
import struct

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata

from processing_minimax_m3 import MiniMaxM3VLVideoProcessor
from processing_minimax_m3.video_decoding import decode_video

pytestmark = pytest.mark.compatibility

av = pytest.importorskip("av")

FORMATS = {
    "mp4": ("mp4", {}),
    "mov": ("mov", {}),
    "matroska": ("mkv", {}),
    "webm": ("webm", {"codec": "libvpx"}),
    "webm-vp9": ("webm", {"codec": "libvpx-vp9"}),
    "b-frames": ("mp4", {"codec": "libx264", "max_b_frames": 2}),
    "transport-stream": ("ts", {}),
}
GAPS = [0, 100, 200, 900, 1000, 3000, 3100]


def told_times(processor, text_ids) -> list[float]:
    return [float(time) for time in re.findall(r"\]<\]([\d.]+) seconds", processor.tokenizer.decode(text_ids))]


def brightness(frames) -> list[int]:
    """The number of each frame of a gray clip, from its brightness."""
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize("name", FORMATS)
def test_variable_frame_rate(name, clip, processor):
    suffix, options = FORMATS[name]
    path = clip(f"clip.{suffix}", GAPS, **options)
    frames, metadata = decode_video(str(path))
    np.testing.assert_allclose(metadata.timestamps, np.array(GAPS) / 1000, atol=1e-3)
    assert brightness(frames) == list(range(7))
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)}]}]
    output = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert told_times(processor, output["input_ids"][0]) == [0.0, 0.2, 1.0, 3.1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("seconds_of_silence", [0, 1], ids=["alone", "after-its-sound"])
def test_late_start_counts_from_the_zero_of_the_file(suffix, seconds_of_silence, clip):
    path = clip(f"late.{suffix}", [2000 + time for time in GAPS], seconds_of_silence=seconds_of_silence)
    metadata = decode_video(str(path))[1]
    np.testing.assert_allclose(metadata.timestamps, 2 + np.array(GAPS) / 1000, atol=1e-3)
    assert metadata.duration == pytest.approx(3.2, abs=1e-3)  # without the wait


@pytest.mark.parametrize("seconds_of_silence, start", [(0, 0), (1, 2)], ids=["alone", "after-its-sound"])
def test_transport_stream_counts_from_its_start(seconds_of_silence, start, clip):
    """Its clock may start at any time, which players show as 0."""
    path = clip("clip.ts", [2000 + time for time in GAPS], seconds_of_silence=seconds_of_silence)
    np.testing.assert_allclose(decode_video(str(path))[1].timestamps, start + np.array(GAPS) / 1000, atol=0.02)


def test_edit_list_cuts_the_beginning_off(clip):
    path = clip("clip.mp4", range(0, 2000, 100), codec="libx264", max_b_frames=2)
    content = bytearray(path.read_bytes())
    entry = content.find(b"elst") + 12  # duration in ms, start in ticks of the track
    duration, start = struct.unpack_from(">Ii", content, entry)
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].time_base.denominator
    struct.pack_into(">Ii", content, entry, duration - 500, start + ticks // 2)
    path.write_bytes(content)
    frames, metadata = decode_video(str(path))
    np.testing.assert_allclose(metadata.timestamps, np.arange(15) / 10, atol=1e-3)
    assert brightness(frames) == list(range(5, 20))
    assert metadata.total_num_frames == 15


@pytest.mark.parametrize("name", ["clip.avi", "clip.h264"])
def test_containers_without_times(name, clip):
    """AVI has a fixed rate and no frame times. A bare stream has neither, and counts as 25 frames a second."""
    path = clip(name, range(0, 700, 100), codec="libx264", max_b_frames=2)
    with av.open(str(path)) as container:
        rate = 25 if name == "clip.h264" else float(1 / container.streams.video[0].time_base)
    frames, metadata = decode_video(str(path))
    assert brightness(frames) == list(range(7))
    step = 1 / 25 if name == "clip.h264" else 0.1
    np.testing.assert_allclose(np.diff(metadata.timestamps), step, atol=1 / rate)


@pytest.mark.parametrize("name, time", [("one.mp4", 0.0), ("one.mkv", 0.3)])
def test_single_frame(name, time, clip):
    metadata = decode_video(str(clip(name, [int(1000 * time)])))[1]
    assert metadata.timestamps == pytest.approx([time])
    assert metadata.fps == 10 and metadata.duration == pytest.approx(0.1)


SAMPLED = {
    # ten frames a second, and then one a second
    "rate": ([*range(0, 1000, 100), *range(1000, 11000, 1000)], {"fps": 1}, [0, *range(10, 19)]),
    "higher-rate": ([*range(0, 1000, 100), *range(1000, 4000, 1000)], {"fps": 2}, [0, 5, 10, 11]),
    # a frame that stays on show for a long time is chosen once
    "gap": ([*range(0, 1000, 100), *range(5000, 6000, 100)], {"fps": 1}, [0, 9, 10]),
    "late": ([*range(7000, 8000, 100), *range(12000, 13000, 100)], {"fps": 1}, [0, 9, 10]),
    "number": ([*range(0, 1000, 100), *range(1000, 4000, 1000)], {"num_frames": 3}, [0, 10, 11]),
    "greatest": ([*range(0, 1000, 100), *range(1000, 4000, 1000)], {"max_frames": 3}, [0, 10, 11]),
    "least": ([*range(0, 1000, 100), *range(5000, 6000, 100)], {"fps": 1, "min_frames": 6}, [0, 9, 10, 11, 12, 13]),
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_on_the_time_line(name, suffix, clip):
    milliseconds, options, expected = SAMPLED[name]
    path = clip(f"clip.{suffix}", milliseconds)
    output = MiniMaxM3VLVideoProcessor()(str(path), return_metadata=True, **options)
    metadata = output["video_metadata"][0]
    assert metadata.frames_indices.tolist() == expected
    np.testing.assert_allclose(metadata.timestamps, [milliseconds[index] / 1000 for index in expected], atol=1e-3)


def test_times_go_with_frames_that_are_sampled_again(clip):
    frames, metadata = decode_video(str(clip("clip.mp4", GAPS)))
    output = MiniMaxM3VLVideoProcessor()(frames, video_metadata=[metadata], num_frames=3, return_metadata=True)
    sampled = output["video_metadata"][0]
    assert sampled.timestamps == [metadata.timestamps[index] for index in sampled.frames_indices]
    assert len(metadata.timestamps) == 7  # the caller's own object is left alone
    with pytest.raises(
        ValueError, match=r"`video_metadata\[0\].frames_indices` must have one entry for each of the 2"
    ):
        MiniMaxM3VLVideoProcessor()(frames[:2], video_metadata=[metadata])


def test_given_rate_and_indices_tell_the_times(processor, pixels):
    metadata = VideoMetadata(total_num_frames=90, fps=30.0, frames_indices=[0, 30, 75])
    output = processor(text="]<]video[>[", videos=pixels(3, 28, 28, 3), video_metadata=metadata)
    assert told_times(processor, output["input_ids"][0]) == [0.0, 2.5]


def test_metadata_have_the_keys_of_stock(clip):
    metadata = decode_video(str(clip("clip.mp4", GAPS)))[1]
    again = VideoMetadata(**metadata)
    assert list(metadata) == list(again) and again.total_num_frames == 7
