"""Reading video files: decoding, sampling, timing, and files with a wrong name or content."""

import re

import numpy as np
import pytest
from PIL import Image

from processing_minimax_m3 import MiniMaxM3VLVideoProcessor, video_decoding

av = pytest.importorskip("av")

RAW = {"do_rescale": False, "do_normalize": False, "return_metadata": True}


@pytest.fixture
def video_processor() -> MiniMaxM3VLVideoProcessor:
    return MiniMaxM3VLVideoProcessor()


def shown_frames(output) -> list[int]:
    """The numbers of the processed frames of the gray video, from their brightness."""
    patches = output["pixel_values_videos"].float()
    grid_t = int(output["video_grid_thw"][:, 0].sum())
    brightness = patches.reshape(grid_t, -1, 3, 2, 14 * 14).mean(dim=(1, 2, 4)).flatten()
    return (brightness / 10).round().int().tolist()


def test_all_frames(video_file, video_processor):
    output = video_processor(str(video_file), **RAW)
    metadata = output["video_metadata"][0]
    assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (25, 10.0, 60, 90)
    assert shown_frames(output) == [*range(25), 24]
    assert list(metadata.frames_indices) == list(range(25))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"fps": 2}, [0, 5, 10, 15, 20]),
        ({"num_frames": 4}, [0, 6, 12, 18]),
        ({"fps": 10, "max_frames": 2}, [0, 12]),
        ({"fps": 1, "min_frames": 6}, [0, 4, 8, 12, 16, 20]),
        ({}, [0, 6, 12, 18]),
    ],
    ids=["rate", "number", "greatest", "least", "default"],
)
def test_sampled_frames(options, expected, video_file, video_processor):
    output = video_processor(str(video_file), do_sample_frames=True, **RAW, **options)
    assert list(output["video_metadata"][0].frames_indices) == expected
    assert shown_frames(output)[: len(expected)] == expected


def test_same_as_stock_with_its_own_decoding(video_file, video_processor, stock, monkeypatch, assert_same_output):
    """Stock needs torchcodec. With the same decoder, both return the same output for a file."""
    from transformers.video_utils import load_video

    def decode(sources, sample_indices_fn=None):
        return zip(*[load_video(source, backend="pyav", sample_indices_fn=sample_indices_fn) for source in sources])

    monkeypatch.setattr(stock.video, "fetch_videos", lambda *args, **kwargs: list(decode(*args, **kwargs)))
    for options in ({}, {"do_sample_frames": True, "fps": 1}, {"do_sample_frames": True, "fps": 3}):
        ours = video_processor([str(video_file)], return_metadata=True, **options)
        assert_same_output(ours, stock.video([str(video_file)], return_metadata=True, **options))


def test_paths_and_file_addresses(video_file, video_processor):
    expected = video_processor(str(video_file))["pixel_values_videos"]
    for source in (video_file, video_file.as_uri()):
        assert video_processor(source)["pixel_values_videos"].equal(expected)


def test_files_and_arrays_in_one_batch(video_file, video_processor, pixels):
    output = video_processor([pixels(2, 56, 56, 3), str(video_file), [pixels(56, 56, 3)]], return_metadata=True)
    assert output["num_chunks_per_video"] == [1, 4, 1]
    assert [metadata.fps for metadata in output["video_metadata"]] == [None, 10.0, None]


def test_image_files_are_frames(image_files, video_processor):
    frames = [str(image_files["png"])] * 3
    output = video_processor([[frames]], **RAW)
    expected = video_processor([Image.open(frame) for frame in frames], **RAW)
    assert output["pixel_values_videos"].equal(expected["pixel_values_videos"])
    for options in ({"do_sample_frames": True}, {"fps": 2}, {"num_frames": 2}):
        with pytest.raises(ValueError, match=r"`videos\[0\]`: Sampling frames from a list of images is not supported"):
            video_processor([[frames]], **options)


def test_undeclared_number_of_frames_is_counted(clip, video_processor):
    path = clip("gray.mkv", range(0, 1200, 100))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    output = video_processor(str(path), do_sample_frames=True, fps=5, **RAW)
    assert list(output["video_metadata"][0].frames_indices) == [0, 2, 4, 6, 8, 10]
    assert shown_frames(output) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("content", [b"", b"this is no video", b"\x00" * 5000], ids=["empty", "text", "zeros"])
def test_corrupt_file(content, tmp_path, video_processor):
    path = tmp_path / "corrupt.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`videos\[1\]` \('.*corrupt.mp4'\) cannot be decoded with"):
        video_processor([np.zeros((1, 28, 28, 3), np.uint8), str(path)])


def test_cut_file(video_file, tmp_path, video_processor):
    content = video_file.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"`videos\[0\]` .* cannot be decoded"):
        video_processor(str(path))


def test_missing_file(video_processor):
    with pytest.raises(ValueError, match=re.escape("`videos[0]` must be an existing file or an http(s) address")):
        video_processor("nowhere.mp4")


def test_sound_without_pictures(tmp_path, video_processor):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"`videos\[0\]` .* cannot be decoded"):
        video_processor(str(path))


def test_no_decoder(video_file, video_processor, monkeypatch):
    monkeypatch.setattr(video_decoding, "is_av_available", lambda: False)
    monkeypatch.setattr(video_decoding, "is_torchcodec_usable", lambda decode: False)
    with pytest.raises(ImportError, match="pip install av"):
        video_processor(str(video_file))
    # an old torchcodec is no decoder either, because it does not turn frames upright
    monkeypatch.setattr(video_decoding, "is_torchcodec_usable", lambda decode: True)
    monkeypatch.setattr(video_decoding.TorchcodecVideo, "turns_frames", lambda: False)
    with pytest.raises(ImportError, match="a recent torchcodec"):
        video_processor(str(video_file))


@pytest.mark.parametrize("options", [{"num_frames": 26}, {"num_frames": 5, "max_frames": 4}], ids=["video", "limit"])
def test_too_many_frames_asked_for(options, video_file, video_processor):
    with pytest.raises(ValueError, match=f"`num_frames` must be between 1 and .* got {options['num_frames']}"):
        video_processor(str(video_file), do_sample_frames=True, **options)


def test_number_and_rate_exclude_each_other(video_file, video_processor):
    with pytest.raises(ValueError, match="`num_frames` and `fps` exclude each other"):
        video_processor(str(video_file), do_sample_frames=True, num_frames=2, fps=2)
