"""The image processor against stock's, over input forms and options, and its own guarantees."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from processing_minimax_m3 import MiniMaxM3VLImageProcessor

SIZES = [(1, 1), (10, 2000), (28, 28), (37, 411), (300, 299), (672, 672), (900, 1300), (1500, 30)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size_equals_stock(size, pixels, processor, stock, assert_same_output):
    image = pixels(*size, 3)
    ours = processor.image_processor(image, return_tensors="pt", input_data_format="channels_last")
    assert_same_output(ours, stock.image(image, return_tensors="pt", input_data_format="channels_last"))


FORMS = {
    "pil": Image.fromarray,
    "pil-gray": lambda array: Image.fromarray(array[..., 0]),
    "pil-rgba": lambda array: Image.fromarray(np.concatenate([array, array[..., :1]], axis=-1)),
    "pil-palette": lambda array: Image.fromarray(array).convert("P"),
    "numpy-last": lambda array: array,
    "numpy-first": lambda array: array.transpose(2, 0, 1),
    "numpy-rgba": lambda array: np.concatenate([array, array[..., :1]], axis=-1),
    "torch-last": torch.from_numpy,
    "torch-first": lambda array: torch.from_numpy(array).permute(2, 0, 1),
    "torch-float": lambda array: torch.from_numpy(array).float(),
    "torch-bfloat16": lambda array: torch.from_numpy(array).bfloat16(),
    "numpy-int64": lambda array: array.astype(np.int64),
    "batch": lambda array: np.stack([array, array[::-1]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_equals_stock(form, pixels, processor, stock, assert_same_output):
    image = FORMS[form](pixels(70, 100, 3))
    assert_same_output(processor.image_processor(image), stock.image(image))


OPTIONS = {
    "no-rescale": {"do_rescale": False},
    "no-normalize": {"do_normalize": False},
    "raw": {"do_rescale": False, "do_normalize": False},
    "size": {"size": {"shortest_edge": 10_000, "longest_edge": 40_000}},
    "max-below-default-min": {"max_pixels": 28 * 28},
    "min": {"min_pixels": 200_000},
    "patches": {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 3},
    "bilinear": {"resample": 2},
    "mean-std": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    "grouped": {"disable_grouping": False},
    "numpy": {"return_tensors": "np"},
    "torch": {"return_tensors": "pt"},
    "cpu": {"device": "cpu"},
}


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_any_option_equals_stock(name, pixels, processor, stock, assert_same_output):
    images = [pixels(70, 100, 3), pixels(300, 41, 3), pixels(70, 100, 3, seed=1)]
    ours = processor.image_processor(images, **OPTIONS[name])
    assert_same_output(ours, stock.image(images, **OPTIONS[name]))


def test_no_resize_equals_stock(pixels, processor, stock, assert_same_output):
    images = [pixels(56, 84, 3), pixels(700, 700, 3)]  # the second is above max_pixels and kept
    ours = processor.image_processor(images, do_resize=False)
    assert_same_output(ours, stock.image(images, do_resize=False))
    assert ours["image_grid_thw"].tolist() == [[1, 4, 6], [1, 50, 50]]


def test_nested_lists_equal_stock(pixels, processor, stock, assert_same_output):
    images = [[pixels(56, 84, 3)], [], [pixels(40, 40, 3), pixels(60, 30, 3)]]
    assert_same_output(processor.image_processor(images), stock.image(images))


def test_gray_arrays_are_images(pixels, processor):
    gray = pixels(60, 90)
    ours = processor.image_processor([gray, pixels(60, 90, 3)])
    expected = processor.image_processor(np.repeat(gray[..., None], 3, axis=-1))
    torch.testing.assert_close(ours["pixel_values"][: len(expected["pixel_values"])], expected["pixel_values"])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32], ids=lambda dtype: dtype.__name__)
def test_wide_pil_images_within_eight_bits(dtype, pixels, processor):
    gray = pixels(60, 90)
    output = processor.image_processor(Image.fromarray(gray.astype(dtype)))["pixel_values"]
    torch.testing.assert_close(output, processor.image_processor(gray)["pixel_values"], rtol=0, atol=0)


def test_sixteen_bit_colour_file_equals_its_pil_image(tmp_path, processor):
    """Pillow keeps the upper byte."""
    height, width = 28, 28
    values = np.random.default_rng(0).integers(0, 65536, (height, width, 3), dtype=np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    file = tmp_path / "colour.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    output = processor.image_processor(file)["pixel_values"]
    torch.testing.assert_close(output, processor.image_processor(Image.open(file))["pixel_values"], rtol=0, atol=0)
    eight_bits = processor.image_processor((values >> 8).astype(np.uint8))["pixel_values"]
    torch.testing.assert_close(output, eight_bits, rtol=0, atol=0)


def test_any_integers_without_rescaling(pixels, processor, stock, assert_same_output):
    image = pixels(60, 90, 3).astype(np.int32) * 200 - 1000
    options = {"do_rescale": False}
    assert_same_output(processor.image_processor(image, **options), stock.image(image, **options))


def test_patches_hold_the_pixels_they_cover(pixels):
    """Puts the patches together again by hand, for 2 x 2 merged patches in a grid of 1 x 3."""
    processor = MiniMaxM3VLImageProcessor(do_rescale=False, do_normalize=False, do_resize=False)
    image = pixels(3, 28, 84)
    output = processor(image)
    patches = output["pixel_values"].reshape(1, 3, 2, 2, 3, 2, 14, 14)  # rows, columns, in-merge y, x, c, t, y, x
    for time in range(2):
        restored = patches[:, :, :, :, :, time].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 28, 84)
        np.testing.assert_array_equal(restored.numpy(), image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device(pixels, processor):
    # Away from black and white: torchvision clips between its two passes on a CPU, and only at the end on a GPU.
    images = [pixels(70, 100, 3, seed=seed) // 4 + 96 for seed in range(2)]
    on_gpu = processor.image_processor(images, device="cuda")
    assert on_gpu["pixel_values"].is_cuda
    on_cpu = processor.image_processor(images)
    torch.testing.assert_close(on_gpu["pixel_values"].cpu(), on_cpu["pixel_values"], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 10_000, "longest_edge": 40_000}},
        {"max_pixels": 50_000},
        {"min_pixels": 200_000},
        {"patch_size": 8, "merge_size": 3},
        {"do_resize": False},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("size", [(56, 84), (168, 336), (1008, 672)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
def test_patch_count_is_the_real_one(options, size, pixels, processor, stock):
    real = len(processor.image_processor(pixels(*size, 3), **options)["pixel_values"])
    assert processor.image_processor.get_number_of_image_patches(*size, options) == real
    if "size" not in options and "do_resize" not in options:  # stock counts these two wrongly
        assert stock.image.get_number_of_image_patches(*size, options) == real
