"""The same rules hold for every image format and every way to pass an image, and errors describe a missing source."""

import base64
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from processing_minimax_m3 import MiniMaxM3VLImageProcessor

pytestmark = pytest.mark.compatibility

IMAGE_PROCESSOR = MiniMaxM3VLImageProcessor()
TURNS = {  # what was done to the upright pixels before they were stored, by the value of the orientation tag
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
EXACT = {  # formats that carry an orientation, and how to save every pixel as it is
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
    "lzw.tiff": {"compression": "tiff_lzw"},
    "apng": {"save_all": True, "append_images": [Image.new("RGB", (56, 84))]},
    "mpo": {"save_all": True, "append_images": [Image.new("RGB", (56, 84))]},
    "jpeg": {},
    "avif": {},
}
LOSSY = ("jpeg", "mpo", "avif")
WAYS = {
    "path": str,
    "pathlib": lambda file: file,
    "file-address": lambda file: file.as_uri(),
    "bytes": lambda file: file.read_bytes(),
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "base64": lambda file: base64.b64encode(file.read_bytes()).decode(),
    "base64-lines": lambda file: base64.encodebytes(file.read_bytes()).decode(),
    "base64-url-alphabet": lambda file: base64.urlsafe_b64encode(file.read_bytes()).decode(),
    "data-url": lambda file: "data:image/any;base64," + base64.b64encode(file.read_bytes()).decode(),
    "data-url-escaped": lambda file: "data:image/any," + "".join(f"%{byte:02x}" for byte in file.read_bytes()),
    "dataset-bytes": lambda file: {"bytes": file.read_bytes(), "path": "elsewhere.png"},
    "dataset-path": lambda file: {"bytes": None, "path": str(file)},
    "opened": Image.open,
    "opened-and-copied": lambda file: Image.open(file).copy(),
}


@pytest.fixture
def pass_image(web_host):
    """Passes an image file to the processor in one of `WAYS` or by an http address, and returns the patches."""

    def process(file, way: str, **options) -> torch.Tensor:
        if way == "http-address":
            web_host.answers[f"/{file.name}"] = (200, {}, file.read_bytes())
            source = f"{web_host.address}/{file.name}"
        else:
            source = WAYS[way](file)
        return IMAGE_PROCESSOR([source], **options)["pixel_values"]

    return process


def save(folder, suffix: str, array: np.ndarray, **options) -> os.PathLike:
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    file = folder / f"image.{suffix}"
    kind = {"apng": "png"}.get(file.suffix[1:], file.suffix[1:])
    Image.fromarray(np.ascontiguousarray(array)).save(file, kind, **EXACT[suffix], **options)
    return file


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """An image without symmetry, and so smooth that lossy formats change it little."""
    rows, columns = np.mgrid[0:56, 0:84]
    return np.stack([rows * 4, columns * 3, (rows + columns) * 1.5], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("way", [*WAYS, "http-address"])
@pytest.mark.parametrize("suffix", EXACT)
def test_every_way_turns_every_format_upright(suffix, way, smooth, tmp_path, pass_image):
    """Orientation 6 reveals both a missing turn and a repeated turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(tmp_path, suffix, TURNS[6](smooth), exif=exif)
    # lossy formats change the pixels a little; a missing turn changes the shape
    tolerance = 0.2 if suffix in LOSSY else 0
    torch.testing.assert_close(pass_image(file, way), IMAGE_PROCESSOR(smooth)["pixel_values"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpeg", "avif"])
def test_all_orientations(suffix, orientation, smooth, tmp_path, pass_image):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path, suffix, TURNS[orientation](smooth), exif=exif)
    tolerance = 0.2 if suffix in LOSSY else 0
    for way in ("path", "opened"):
        patches = pass_image(file, way)
        torch.testing.assert_close(patches, IMAGE_PROCESSOR(smooth)["pixel_values"], atol=tolerance, rtol=0)


def test_frames_of_a_video_are_turned_upright(smooth, tmp_path, processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(tmp_path, "png", TURNS[6](smooth), exif=exif)
    expected = processor.video_processor([smooth, smooth])["pixel_values_videos"]
    for frames in ([[str(file), str(file)]], [Image.open(file), Image.open(file)]):
        patches = processor.video_processor([frames])["pixel_values_videos"]
        torch.testing.assert_close(patches, expected, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_unreadable_metadata_have_no_orientation(smooth, tmp_path, pass_image):
    for exif in (b"Exif\0\0XX", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\xff\xff\xff\xff\xff\xff\0\0"):
        file = save(tmp_path, "png", smooth, exif=exif)
        for way in ("path", "opened"):
            patches = pass_image(file, way)
            torch.testing.assert_close(patches, IMAGE_PROCESSOR(smooth)["pixel_values"], atol=0, rtol=0)


@pytest.mark.parametrize(
    "suffix, way",
    [("gif", way) for way in [*WAYS, "http-address"]]
    + [(suffix, way) for suffix in ("png", "webp", "tiff", "avif") for way in ("path", "bytes", "opened")],
)
def test_first_frame_of_an_animation(suffix, way, pixels, tmp_path, pass_image):
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.fromarray(pixels(56, 84, 3, seed=seed)) for seed in range(3)]
    file = tmp_path / f"moving.{suffix}"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    first = next(ImageSequence.Iterator(Image.open(file))).convert("RGB")
    torch.testing.assert_close(pass_image(file, way), IMAGE_PROCESSOR(np.array(first))["pixel_values"], atol=0, rtol=0)


COLOURS = {
    "1": lambda rgb: Image.fromarray(rgb).convert("1"),
    "L": lambda rgb: Image.fromarray(rgb).convert("L"),
    "P": lambda rgb: Image.fromarray(rgb).convert("P"),
    "LA": lambda rgb: Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(rgb[..., 1])]),
    "RGBA": lambda rgb: Image.fromarray(np.concatenate([rgb, rgb[..., :1]], axis=-1)),
    "opaque": lambda rgb: Image.fromarray(rgb).convert("RGBA"),
    "P-transparent": lambda rgb: Image.fromarray(rgb).convert("P"),
    "CMYK": lambda rgb: Image.fromarray(rgb).convert("CMYK"),
    "I;16": lambda rgb: Image.fromarray(rgb[..., 0].astype(np.uint16)),
}


def over_white(image: Image.Image) -> np.ndarray:
    """The expected pixels, uint8 (height, width, 3), blended by hand, exact to one step of rounding."""
    colours, alpha = np.split(np.array(image.convert("RGBA")).astype(float), [3], axis=-1)
    return np.round(colours * alpha / 255 + 255 - alpha).astype(np.uint8)


@pytest.mark.parametrize("way", ["path", "base64", "http-address", "opened"])
@pytest.mark.parametrize("colours", COLOURS)
def test_every_way_converts_all_colours(colours, way, pixels, tmp_path, pass_image):
    image = COLOURS[colours](pixels(56, 84, 3))
    file = tmp_path / ("image.tiff" if colours == "CMYK" else "image.png")
    image.save(file, **({"transparency": image.getpixel((0, 0))} if colours == "P-transparent" else {}))
    gray = np.array(image).astype(np.uint8)[..., None].repeat(3, axis=-1)
    expected = gray if colours == "I;16" else over_white(Image.open(file))
    output = pass_image(file, way, do_rescale=False, do_normalize=False)
    expected = IMAGE_PROCESSOR(expected, do_rescale=False, do_normalize=False)["pixel_values"]
    torch.testing.assert_close(output, expected, atol=1, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_files_equal_stock(suffix, image_files, stock, assert_same_output):
    assert_same_output(IMAGE_PROCESSOR(image_files[suffix]), stock.image(Image.open(image_files[suffix])))


def test_layout_of_arrays_is_not_that_of_files(image_files, pixels):
    images = [str(image_files["png"]), pixels(60, 90, 3)]
    output = IMAGE_PROCESSOR(images, input_data_format="channels_last")["pixel_values"]
    torch.testing.assert_close(*output.chunk(2), atol=0, rtol=0)


def test_every_way_in_a_chat(image_files, processor):
    file = image_files["png"]
    parts = [{"type": "image", "image": make(file)} for make in WAYS.values()]
    output = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    for patches in output["pixel_values"].chunk(len(WAYS)):
        torch.testing.assert_close(patches, IMAGE_PROCESSOR(file)["pixel_values"], atol=0, rtol=0)


MISSING = {
    "photo.png": "there is no such file",
    "./photo.jpg": "there is no such file",
    "/data/images/0001.jpg": "there is no such file",
    "a photo": "there is no such file",
    "photos": "there is no such file, and it is no valid base64 text",
    "images/c": "there is no such file, and as base64 text it is no image",
    "~/cat.png": r"there is no such file \(`~` is not expanded\)",
    "file:///nowhere/a%20b.png": "there is no such file",
    "file://photo.png": "names the host 'photo.png'; write file:///",
    "s3://bucket/cat.png": "'s3://' is not supported: give a path",
    "": "an empty string is neither a path nor an address nor base64 text",
    "folder": "this path is a folder; give the path of an image file",
    "empty.png": "it is empty: 0 bytes",
    "text.png": "it is no image in a format that Pillow reads",
    "data:image/png;base64": "a data URL must have a comma",
    "data:image/png;base64,": "it is empty: 0 bytes",
    "data:image/png;base64,AAA": "it is no valid base64 text: Incorrect padding",
    "data:image/png;base64,A*AA": "it is no valid base64 text",
    "A" * 5001: r"the image 'AAAA.*\.\.\. \(5001 characters\)' cannot be read: it is no valid base64 text",
    b"": "the image of 0 bytes cannot be read: it is empty",
    b"no image": "the image of 8 bytes cannot be read: it is no image",
}


@pytest.mark.parametrize("source", MISSING, ids=lambda source: repr(source[:30]))
def test_missing_image(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    good = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(ValueError, match=MISSING[source]) as error:
        IMAGE_PROCESSOR([[good, good], [good, source]])
    assert str(error.value).startswith("`images[1][1]`: ")


def test_missing_image_by_address(web_host):
    with pytest.raises(ValueError, match=r"none.png' cannot be read: the host answers 404 Not Found"):
        IMAGE_PROCESSOR(f"{web_host.address}/none.png")


def test_truncated_files(smooth, tmp_path):
    for suffix in ("png", "jpeg", "webp", "tiff", "apng"):
        content = save(tmp_path, suffix, smooth).read_bytes()
        for length in (len(content) // 2, len(content) - 20):
            with pytest.raises(ValueError, match=f"the image of {length} bytes cannot be read"):
                IMAGE_PROCESSOR(content[:length])
    for kind in ("GIF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(smooth).save(file, kind)
        with pytest.raises(ValueError, match="cannot be read"):
            IMAGE_PROCESSOR(file.getvalue()[: len(file.getvalue()) // 2])
