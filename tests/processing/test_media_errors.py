"""Errors for images and videos that cannot be processed name the item, its value and the expected value."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from processing_minimax_m3 import MiniMaxM3VLImageProcessor, MiniMaxM3VLVideoProcessor


def lazy_image(content: bytes) -> Image.Image:
    """An image with a valid header and damaged pixels."""
    return Image.open(io.BytesIO(content))


def cut_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


GOOD_IMAGE = np.zeros((30, 40, 3), np.uint8)
BAD_IMAGES = {
    "none": ([], {}, "`images` must hold at least one image, got none"),
    "type": (
        [GOOD_IMAGE, 5],
        {},
        "`images[1]` must be a PIL image, a path, an address, an array of 2 to 4 dimensions",
    ),
    "missing": (None, {}, "`images` must be a PIL image, a path, an address, .* got NoneType"),
    "dimensions": ([np.zeros((1, 2, 3, 4, 5))], {}, "got ndarray of shape (1, 2, 3, 4, 5) and dtype float64"),
    "empty": ([GOOD_IMAGE, np.zeros((0, 40, 3))], {}, "`images[1]` must not be empty, got shape (0, 40, 3)"),
    "elongated": (
        [np.zeros((2, 402, 3))],
        {},
        "images[0]: one side may be at most 200 times the other, got height=2, width=402",
    ),
    "channels": (
        [GOOD_IMAGE, np.zeros((30, 40, 5))],
        {},
        "`images[1]` (ndarray of shape (30, 40, 5) .* cannot be used",
    ),
    "nan": ([np.full((3, 30, 40), np.nan)], {}, "`images[0]` holds NaN or infinite pixels"),
    "infinite": ([GOOD_IMAGE, torch.full((3, 30, 40), torch.inf)], {}, "`images[1]` holds NaN or infinite pixels"),
    "complex": (
        [np.zeros((3, 30, 40), complex)],
        {},
        "`images[0]` must hold integers or real numbers, got dtype complex128",
    ),
    "text-array": ([np.full((3, 30, 40), "x")], {}, "`images[0]` must hold integers or real numbers, got dtype <U1"),
    "cut": ([GOOD_IMAGE, lazy_image(cut_png())], {}, "`images[1]` cannot be decoded"),
    "path": (["nowhere.png"], {}, "the image 'nowhere.png' cannot be read"),
    "off-grid": (
        [GOOD_IMAGE],
        {"do_resize": False},
        "images[0]: with do_resize=False .* multiples of .* = 28, got 30 x 40",
    ),
    "size": (
        [GOOD_IMAGE],
        {"size": {"longest_edge": 9}},
        "`size` must have the keys 'shortest_edge' and 'longest_edge'",
    ),
    "sides": ([GOOD_IMAGE], {"size": {"height": 9, "width": 9}}, "got {'height': 9, 'width': 9}"),
    "patch": ([GOOD_IMAGE], {"patch_size": 0}, "`patch_size` must be at least 1, got 0"),
    "bound": (
        [GOOD_IMAGE],
        {"max_pixels": -5},
        "`min_pixels` and `max_pixels` must be positive, got .* max_pixels=-5",
    ),
    "bounds": (
        [GOOD_IMAGE],
        {"min_pixels": 200_000, "max_pixels": 100_000},
        "`min_pixels` must not exceed `max_pixels`, got min_pixels=200000, max_pixels=100000",
    ),
    "16-bit-array": (
        [GOOD_IMAGE, np.full((30, 40, 3), 256, np.uint16)],
        {},
        "images[1]: pixels must lie in 0 to 255, got 256 to 256; scale them first",
    ),
    "negative": ([torch.full((3, 30, 40), -1)], {}, "images[0]: pixels must lie in 0 to 255, got -1 to -1"),
    "16-bit-pil": (
        [GOOD_IMAGE, Image.fromarray(np.full((30, 40), 4000, np.uint16))],
        {},
        "`images[1]` cannot be used: pixels must lie in 0 to 255, got 4000 to 4000; scale them first",
    ),
    "real-pil": (
        [Image.fromarray(np.full((30, 40), 256.5, np.float32))],
        {},
        "`images[0]` cannot be used: pixels must",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, options, message = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in message.split(" .* "))):
        MiniMaxM3VLImageProcessor()(images, **options)


@pytest.mark.parametrize("content", [b"", b"no image", cut_png()[:40]], ids=["empty", "text", "cut"])
def test_corrupt_image_file(content, tmp_path):
    path = tmp_path / "corrupt.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the image '.*corrupt.png' cannot be read"):
        MiniMaxM3VLImageProcessor()([GOOD_IMAGE, path])


def test_sixteen_bit_file(tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.full((30, 40), 4000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"depth.png' cannot be read: pixels must lie in 0 to 255, got 4000 to 4000"):
        MiniMaxM3VLImageProcessor()([GOOD_IMAGE, path])


def test_long_sources_are_shortened():
    with pytest.raises(ValueError, match=r"the image 'AAAA.*\.\.\. \(4000 characters\)' cannot be read") as error:
        MiniMaxM3VLImageProcessor()("A" * 4000)
    assert len(str(error.value)) < 400


GOOD_VIDEO = np.zeros((2, 28, 56, 3), np.uint8)
BAD_VIDEOS = {
    "none": ([], {}, "`videos` must hold at least one video, got none"),
    "type": ([GOOD_VIDEO, 5], {}, "`videos[1]` must be a path, an address, an array of 4 dimensions"),
    "dimensions": ([np.zeros((2, 3))], {}, "got ndarray of shape (2, 3) and dtype float64"),
    "no-frames": ([GOOD_VIDEO, GOOD_VIDEO[:0]], {}, "`videos[1]` must not be empty, got shape (0, 28, 56, 3)"),
    "empty": ([np.zeros((2, 0, 56, 3))], {}, "`videos[0]` must not be empty, got shape (2, 0, 56, 3)"),
    "frame-sizes": (
        [[GOOD_VIDEO[0], np.zeros((28, 28, 3), np.uint8)]],
        {},
        "the frames of `videos[0]` must have the same size",
    ),
    "channels": (
        [np.zeros((2, 28, 56, 5))],
        {},
        "`videos[0]` must have 1, 3 or 4 channels .* got shape (2, 28, 56, 5)",
    ),
    "elongated": (
        [GOOD_VIDEO, np.zeros((2, 3, 603, 3))],
        {},
        "videos[1]: one side may be at most 200 times the other",
    ),
    "nan": ([np.full((2, 3, 28, 28), np.nan)], {}, "`videos[0]` holds NaN or infinite pixels"),
    "16-bit": (
        [GOOD_VIDEO, np.full((2, 28, 56, 3), 256, np.uint16)],
        {},
        "videos[1]: pixels must lie in 0 to 255, got 256 to 256",
    ),
    "bounds": (
        [GOOD_VIDEO],
        {"min_pixels": 200_000, "max_pixels": 100_000},
        "`min_pixels` must not exceed `max_pixels`, got min_pixels=200000, max_pixels=100000",
    ),
    "segment": (
        [GOOD_VIDEO],
        {"vision_segment_max_frames": 0},
        "`vision_segment_max_frames` must be at least 1 or None",
    ),
    "patch": ([GOOD_VIDEO], {"temporal_patch_size": 0}, "`temporal_patch_size` must be at least 1, got 0"),
    "metadata-count": (
        [GOOD_VIDEO],
        {"video_metadata": [{"total_num_frames": 2}, {"total_num_frames": 2}]},
        "`video_metadata` must have one entry for each of the 1 videos, got 2",
    ),
    "metadata-rate": (
        [GOOD_VIDEO],
        {"video_metadata": [{"total_num_frames": 2, "fps": 0.0}]},
        "`video_metadata[0].fps` must be positive, got 0.0",
    ),
    "metadata-indices": (
        [GOOD_VIDEO],
        {"video_metadata": [{"total_num_frames": 9, "fps": 1.0, "frames_indices": [0, 4, 8]}]},
        "`video_metadata[0].frames_indices` must have one entry for each of the 2 frames of `videos[0]`, got 3",
    ),
    "sampling-without-rate": (
        [GOOD_VIDEO],
        {"do_sample_frames": True},
        "sampling by `fps` needs a positive `video_metadata.fps`, got None",
    ),
    "sampling-of-a-sample": (
        [GOOD_VIDEO],
        {"do_sample_frames": True, "video_metadata": [{"total_num_frames": 9, "fps": 1.0}]},
        "`video_metadata[0].total_num_frames` must be the 2 frames of `videos[0]` to sample from them, got 9",
    ),
    "limits": (
        [GOOD_VIDEO],
        {
            "do_sample_frames": True,
            "video_metadata": [{"total_num_frames": 2, "fps": 1.0}],
            "min_frames": 5,
            "max_frames": 4,
        },
        "`min_frames` must not exceed `max_frames`, got 5 and 4",
    ),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_video(name):
    videos, options, message = BAD_VIDEOS[name]
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in message.split(" .* "))):
        MiniMaxM3VLVideoProcessor()(videos, **options)


def test_bad_sizes_to_count():
    with pytest.raises(ValueError, match="one side may be at most 200 times the other"):
        MiniMaxM3VLImageProcessor().get_number_of_image_patches(1, 300)
    with pytest.raises(ValueError, match="`height` must be at least 1 pixel, got 0"):
        MiniMaxM3VLImageProcessor().get_number_of_image_patches(0, 300)
    with pytest.raises(ValueError, match="must be multiples of patch_size"):
        MiniMaxM3VLImageProcessor().get_number_of_image_patches(30, 30, {"do_resize": False})
    with pytest.raises(ValueError, match="`num_frames` must be at least 1, got 0"):
        MiniMaxM3VLVideoProcessor().get_num_of_video_patches(0, 28, 28)


def test_errors_come_before_any_resizing(monkeypatch):
    processor = MiniMaxM3VLImageProcessor()
    monkeypatch.setattr(processor, "resize", lambda *args, **kwargs: pytest.fail("resized before the check"))
    with pytest.raises(ValueError, match=r"images\[2\]"):
        processor([GOOD_IMAGE, GOOD_IMAGE, np.zeros((2, 402, 3), np.uint8)])
