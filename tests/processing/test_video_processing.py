"""The video processor against stock's, over input forms and options, and features that stock lacks."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from processing_minimax_m3 import MiniMaxM3VLVideoProcessor

SHAPES = [(1, 28, 28), (2, 37, 211), (3, 56, 56), (5, 300, 30), (8, 60, 90), (17, 28, 84)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_any_shape_equals_stock(shape, pixels, processor, stock, assert_same_output):
    video = pixels(*shape, 3)
    assert_same_output(processor.video_processor(video, return_tensors="pt"), stock.video(video, return_tensors="pt"))


FORMS = {
    "numpy-last": lambda array: array,
    "numpy-first": lambda array: array.transpose(0, 3, 1, 2),
    "torch-last": torch.from_numpy,
    "torch-first": lambda array: torch.from_numpy(array).permute(0, 3, 1, 2),
    "torch-float": lambda array: torch.from_numpy(array).float(),
    "strided": lambda array: torch.from_numpy(np.repeat(array, 2, axis=0))[::2],
    "pil-frames": lambda array: [Image.fromarray(frame) for frame in array],
    "numpy-frames": list,
    "torch-frames": lambda array: [torch.from_numpy(frame) for frame in array],
    "batch-of-arrays": lambda array: [array, array[::-1].copy()],
    "batch-of-frames": lambda array: [list(array), list(array[::-1])],
    "batch-array": lambda array: np.stack([array, array[::-1]]),
    "one-image": lambda array: array[0],
    "gray": lambda array: array[..., :1],
    "different-lengths": lambda array: [array, array[:2], array[:, :50]],
    "per-sample": lambda array: [[array], [array[:2], array[:1]]],
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_equals_stock(form, pixels, processor, stock, assert_same_output):
    video = FORMS[form](pixels(5, 60, 90, 3))
    ours = processor.video_processor(video, return_metadata=True)
    assert_same_output(ours, stock.video(video, return_metadata=True))


OPTIONS = {
    "no-rescale": {"do_rescale": False},
    "no-normalize": {"do_normalize": False},
    "no-resize": {"do_resize": False},
    "bounds": {"min_pixels": 20_000, "max_pixels": 40_000},
    "small-max": {"max_pixels": 28 * 28},
    "patches": {"patch_size": 7, "merge_size": 1, "temporal_patch_size": 3},
    "one-patch-chunks": {"vision_segment_max_frames": 1},
    "three-patch-chunks": {"vision_segment_max_frames": 3},
    "one-chunk": {"vision_segment_max_frames": None},
    "numpy": {"return_tensors": "np"},
    "torch": {"return_tensors": "pt"},
    "cpu": {"device": "cpu"},
    "layout": {"input_data_format": "channels_last"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_any_option_equals_stock(name, pixels, processor, stock, assert_same_output):
    videos = [pixels(9, 56, 84, 3), pixels(4, 112, 28, 3), pixels(9, 56, 84, 3, seed=1)]
    ours = processor.video_processor(videos, **OPTIONS[name])
    assert_same_output(ours, stock.video(videos, **OPTIONS[name]))


def test_chunks_cover_each_video(pixels, processor):
    output = processor.video_processor([pixels(19, 28, 56, 3), pixels(3, 28, 28, 3)], do_resize=False)
    assert output["video_grid_thw"].tolist() == [[4, 2, 4], [4, 2, 4], [2, 2, 4], [2, 2, 2]]
    assert output["num_chunks_per_video"] == [3, 1]
    assert len(output["pixel_values_videos"]) == output["video_grid_thw"].prod(-1).sum()


def test_last_odd_frame_is_repeated(pixels, processor):
    video = pixels(3, 28, 28, 3)
    odd = processor.video_processor(video)["pixel_values_videos"]
    even = processor.video_processor(np.concatenate([video, video[-1:]]))["pixel_values_videos"]
    torch.testing.assert_close(odd, even, atol=0, rtol=0)


# --- beyond stock -----------------------------------------------------------------------------------------------


def test_frames_off_the_grid_are_resized_by_the_usual_rule(pixels, processor, stock, assert_same_output):
    video = pixels(4, 61, 90, 3)
    with pytest.raises(RuntimeError):
        stock.video(video, do_resize=False)
    assert_same_output(processor.video_processor(video, do_resize=False), processor.video_processor(video))


def test_frames_on_the_grid_are_kept_beside_others(pixels, processor):
    large = pixels(2, 1120, 1120, 3)  # above max_pixels: the usual rule would shrink it
    output = processor.video_processor([large, pixels(2, 61, 90, 3)], do_resize=False)
    assert output["video_grid_thw"].tolist() == [[1, 80, 80], [1, 4, 6]]


def test_each_video_has_its_own_layout(pixels, processor):
    video = pixels(4, 60, 90, 3)
    mixed = processor.video_processor([video, video.transpose(0, 3, 1, 2)])["pixel_values_videos"]
    torch.testing.assert_close(*mixed.chunk(2), atol=0, rtol=0)


def test_rgba_frames_lose_their_alpha(pixels, processor):
    video = pixels(2, 56, 56, 3)
    opaque = np.concatenate([video, np.full_like(video[..., :1], 255)], axis=-1)
    torch.testing.assert_close(
        processor.video_processor(opaque)["pixel_values_videos"],
        processor.video_processor(video)["pixel_values_videos"],
        atol=0,
        rtol=0,
    )


def test_whole_video_in_one_chunk_can_be_set_for_good(pixels, tmp_path):
    video_processor = MiniMaxM3VLVideoProcessor(vision_segment_max_frames=None)
    assert len(video_processor(pixels(20, 28, 28, 3))["video_grid_thw"]) == 1
    video_processor.save_pretrained(tmp_path)
    assert MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path).vision_segment_max_frames is None


def test_total_pixels_bounds_all_frames_together(pixels, processor):
    video = pixels(6, 280, 280, 3)
    bound = 6 * 100 * 100
    grid = processor.video_processor(video, total_pixels=bound)["video_grid_thw"]
    assert grid[:, 1:].prod(-1).max() * 14 * 14 * 6 <= bound
    assert (
        processor.video_processor.get_num_of_video_patches(6, 280, 280, {"total_pixels": bound}) == grid.prod(-1).sum()
    )
    with pytest.raises(ValueError, match="`total_pixels` must leave each of the 6 frames at least min_pixels=3136"):
        processor.video_processor(video, total_pixels=6 * 3135)


def test_limits_of_a_processor(pixels):
    video_processor = MiniMaxM3VLVideoProcessor(max_frames=3, total_pixels=4 * 28 * 28 * 3, do_sample_frames=True)
    metadata = [VideoMetadata(total_num_frames=20, fps=2.0)]
    output = video_processor(pixels(20, 280, 280, 3), video_metadata=metadata, return_metadata=True)
    assert output["video_metadata"][0].frames_indices.tolist() == [0, 6, 13]
    assert output["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert len(video_processor.sample_frames(metadata[0])) == 3
    assert len(video_processor.sample_frames(metadata[0], max_frames=5)) == 5


# --- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [0.5, 1, 3, 4.0])
@pytest.mark.parametrize("num_frames", [3, 8, 30])
def test_sampling_by_rate_equals_stock(num_frames, fps, pixels, processor, stock, assert_same_output):
    options = {"do_sample_frames": True, "return_metadata": True, "fps": fps}
    metadata = {"total_num_frames": num_frames, "fps": 4.0}
    video = pixels(num_frames, 28, 28, 3)
    ours = processor.video_processor(video, video_metadata=[dict(metadata)], **options)
    assert_same_output(ours, stock.video(video, video_metadata=[dict(metadata)], **options))


SAMPLING = {
    "number": ({"num_frames": 4}, [0, 7, 15, 22]),
    "rate": ({"fps": 2}, [0, 5, 10, 15, 20, 25]),
    "rate-above-the-video's": ({"fps": 100}, list(range(30))),
    "greatest": ({"fps": 2, "max_frames": 3}, [0, 10, 20]),
    "least": ({"fps": 0.5, "min_frames": 5}, [0, 6, 12, 18, 24]),
    "least-above-the-video's": ({"fps": 0.5, "min_frames": 50}, list(range(30))),
    "default": ({}, [0, 7, 15, 22]),  # the processor's own rate gives 3, its own `min_frames` is 4
    "default-below-the-call's-limit": ({"max_frames": 2}, [0, 15]),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_frames(name, pixels, processor):
    options, expected = SAMPLING[name]
    metadata = VideoMetadata(total_num_frames=30, fps=10.0)
    video = np.repeat(np.arange(30, dtype=np.uint8), 28 * 28 * 3).reshape(30, 28, 28, 3)
    output = processor.video_processor(
        video,
        video_metadata=[metadata],
        do_sample_frames=True,
        return_metadata=True,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
        **options,
    )
    assert output["video_metadata"][0].frames_indices.tolist() == expected
    frames = output["pixel_values_videos"].reshape(-1, 4, 3, 2, 14 * 14)[:, 0, 0, :, 0].flatten()
    assert frames[: len(expected)].tolist() == expected
    assert metadata.frames_indices is None  # the caller's own object is left alone


def test_number_of_frames_set_for_good_beats_the_rate():
    metadata = VideoMetadata(total_num_frames=30, fps=10.0)
    assert MiniMaxM3VLVideoProcessor(num_frames=2).sample_frames(metadata).tolist() == [0, 15]
    assert MiniMaxM3VLVideoProcessor(num_frames=2).sample_frames(metadata, fps=1).tolist() == [0, 10, 20]


# --- counting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_resize": False},
        {"min_pixels": 20_000, "max_pixels": 40_000},
        {"patch_size": 7, "merge_size": 1, "temporal_patch_size": 3},
        {"total_pixels": 40_000},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (5, 56, 84), (4, 1120, 840)], ids=lambda shape: "x".join(map(str, shape))
)
def test_patch_count_is_the_real_one(options, shape, pixels, processor, stock):
    real = len(processor.video_processor(pixels(*shape, 3), **options)["pixel_values_videos"])
    assert processor.video_processor.get_num_of_video_patches(*shape, options) == real
    if "do_resize" not in options and "total_pixels" not in options:  # stock counts these two wrongly
        assert stock.video.get_num_of_video_patches(*shape, options) == real


def test_patch_count_off_the_grid_is_the_real_one(pixels, processor):
    grid = processor.video_processor(pixels(3, 61, 90, 3), do_resize=False)["video_grid_thw"]
    assert processor.video_processor.get_num_of_video_patches(3, 61, 90, {"do_resize": False}) == grid.prod()
    assert math.prod(grid[0].tolist()) == 2 * 4 * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device(pixels, processor):
    # Away from black and white: torchvision clips between its two passes on a CPU, and only at the end on a GPU.
    video = pixels(4, 60, 90, 3) // 4 + 96
    on_gpu = processor.video_processor(video, device="cuda")["pixel_values_videos"]
    assert on_gpu.is_cuda
    on_cpu = processor.video_processor(video)["pixel_values_videos"]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=0.05, rtol=0)


def test_transparent_frames_lie_over_white(tmp_path, pixels, processor):
    """Frames behave like pictures, as files and as PIL images."""
    frames = [Image.fromarray(pixels(28, 56, 4, seed=seed)) for seed in range(2)]
    files = [tmp_path / f"{index}.png" for index in range(2)]
    for frame, file in zip(frames, files):
        frame.save(file)
    output = processor.video_processor([frames])["pixel_values_videos"]
    from_files = processor.video_processor([[[str(file) for file in files]]])["pixel_values_videos"]
    torch.testing.assert_close(from_files, output, rtol=0, atol=0)
    over_white = [Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame) for frame in frames]
    expected = processor.video_processor([[frame.convert("RGB") for frame in over_white]])["pixel_values_videos"]
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
