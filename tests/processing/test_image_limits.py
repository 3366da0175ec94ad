"""`MediaLimits`: pixels, bytes, files and allowed addresses."""

import gzip
import io
import itertools
import re
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from processing_minimax_m3 import (
    MediaLimits,
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLVideoProcessor,
    get_media_limits,
    set_media_limits,
)
from processing_minimax_m3.downloads import check_address

IMAGE_PROCESSOR = MiniMaxM3VLImageProcessor()
NUM_PATCHES = 24  # of `image_file`


@pytest.fixture(autouse=True)
def default_limits():
    yield
    set_media_limits(MediaLimits())


def image_file(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("1", (84, 56)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def host(web_host):
    """The web server with an image, and the targets of its redirects."""
    web_host.asked.clear()
    web_host.answers.clear()
    web_host.answers["/image.png"] = (200, {}, image_file())
    web_host.redirect = lambda path, to: web_host.answers.update({path: (302, {"Location": to}, b"")})
    return web_host


def refuse_decoding(monkeypatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", lambda image: pytest.fail("decoded"))


@pytest.mark.parametrize("opened", [False, True], ids=["bytes", "opened"])
def test_large_images_are_refused_by_their_header(opened, monkeypatch):
    content = bytearray(image_file())
    content[16:24] = struct.pack(">II", 13000, 13000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    refuse_decoding(monkeypatch)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(
            ValueError,
            match=r"13000 x 13000 pixels, more than the 89478485 that `MediaLimits.max_image_pixels` allows",
        ),
    ):
        IMAGE_PROCESSOR([Image.open(io.BytesIO(content)) if opened else content])


def test_pixel_limit_is_a_switch():
    set_media_limits(MediaLimits(max_image_pixels=84 * 56 - 1))
    for image in (image_file(), Image.open(io.BytesIO(image_file()))):
        with pytest.raises(ValueError, match="84 x 56 pixels, more than the 4703"):
            IMAGE_PROCESSOR(image)
    with pytest.raises(ValueError, match=r"`videos\[0\]\[0\]` cannot be decoded: it has 84 x 56 pixels"):
        MiniMaxM3VLVideoProcessor()([[Image.open(io.BytesIO(image_file()))]])
    IMAGE_PROCESSOR([Image.new("RGB", (84, 56)), np.zeros((56, 84, 3), np.uint8)])  # made by the caller
    for limit in (84 * 56, None):
        set_media_limits(MediaLimits(max_image_pixels=limit))
        IMAGE_PROCESSOR(image_file())


def test_large_downloads_break_off(host):
    sent = itertools.count()
    host.answers["/endless"] = (200, {}, (bytes(2**16) for _ in sent))
    host.answers["/packed"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(2**22)))
    set_media_limits(MediaLimits(max_download_bytes=2**20))
    for path in ("/endless", "/packed"):
        with pytest.raises(ValueError, match="more than the 1048576 bytes that `MediaLimits.max_download_bytes`"):
            IMAGE_PROCESSOR(host.address + path)
    host.answers["/other"] = (200, {"Content-Encoding": "zstd"}, b"")
    with pytest.raises(ValueError, match="content encoding 'zstd', which the request did not accept"):
        IMAGE_PROCESSOR(host.address + "/other")


def test_unasked_gzip_is_unpacked(host):
    host.answers["/packed"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(image_file()))
    assert len(IMAGE_PROCESSOR(host.address + "/packed")["pixel_values"]) == NUM_PATCHES


PRIVATE = ["http://127.0.0.1:1/a", "http://localhost:1/a", "http://[::1]:1/a", "http://169.254.169.254/latest/"]
PRIVATE += ["http://10.0.0.1/a", "http://192.168.1.1/a", "http://0.0.0.0/a", "http://2130706433/a", "http://0x7f.1/a"]
PRIVATE += [
    "http://[::ffff:127.0.0.1]/a",
    "http://[::ffff:100.64.0.1]/a",
    "http://[fe80::1]/a",
    "http://[64:ff9b::7f00:1]/a",
    "http://224.0.0.1/a",
]
PUBLIC = [
    "http://[::ffff:93.184.215.14]/",
    "https://93.184.215.14/a.png",
    "http://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/",
    "http://[64:ff9b::5db8:d70e]/",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_redirects_to_private_addresses(address, host):
    host.redirect("/redirect", address)
    with pytest.raises(ValueError, match=r"cannot be read: a redirect leads to the private host '.*' \(`MediaLimits"):
        IMAGE_PROCESSOR(f"{host.address}/redirect")
    check_address(address)  # the caller may
    set_media_limits(MediaLimits(private_addresses="never"))
    with pytest.raises(ValueError, match="it has the private host"):
        check_address(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    set_media_limits(MediaLimits.strict())
    check_address(address)
    check_address(address, is_redirect=True)


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://example.org/a.png", "gopher://127.0.0.1/"])
def test_redirects_to_other_schemes(address, host):
    host.redirect("/redirect", address)
    for rule in ("given", "always"):
        set_media_limits(MediaLimits(private_addresses=rule))
        with pytest.raises(
            ValueError, match=rf"a redirect leads to the scheme '{address.partition(':')[0]}://', and only http"
        ):
            IMAGE_PROCESSOR(f"{host.address}/redirect")


def test_private_addresses_are_a_switch(host):
    host.redirect("/redirect", "/image.png")
    host.redirect("/circle", "/circle")
    expected = IMAGE_PROCESSOR(image_file())["pixel_values"]
    assert IMAGE_PROCESSOR(f"{host.address}/image.png")["pixel_values"].equal(expected)
    set_media_limits(MediaLimits(private_addresses="always"))
    assert IMAGE_PROCESSOR(f"{host.address}/redirect")["pixel_values"].equal(expected)
    with pytest.raises(ValueError, match="it redirects more than 20 times"):
        IMAGE_PROCESSOR(f"{host.address}/circle")
    set_media_limits(MediaLimits(private_addresses="never"))
    host.asked.clear()
    with pytest.raises(ValueError, match="it has the private host '127.0.0.1'"):
        IMAGE_PROCESSOR(f"{host.address}/image.png")
    assert not host.asked


def test_allowed_addresses(host):
    seen = []

    def allow(address: str) -> bool:
        seen.append(address)
        return address.endswith("redirect")

    host.redirect("/redirect", "/image.png")
    set_media_limits(MediaLimits(private_addresses="always", allow_address=allow))
    with pytest.raises(ValueError, match=r"a redirect leads to an address that `MediaLimits.allow_address` does not"):
        IMAGE_PROCESSOR(f"{host.address}/redirect")
    assert seen == [f"{host.address}/redirect", f"{host.address}/image.png"]
    assert host.asked == ["/redirect"]


def test_names_that_change_their_address(host, monkeypatch):
    """The first look-up returns a public address. The second, for the connection, returns this machine's."""
    addresses = iter(["93.184.215.14", "127.0.0.1"])
    port = int(host.address.rpartition(":")[2])

    def look_up(name, *args, **kwargs):
        assert name == "rebinding.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses), port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    set_media_limits(MediaLimits.strict())
    with pytest.raises(ValueError, match="'rebinding.example' leads to the private address 127.0.0.1"):
        IMAGE_PROCESSOR(f"http://rebinding.example:{port}/image.png")
    assert not host.asked and next(addresses, None) is None


def test_unknown_names(monkeypatch):
    """A proxy may know a name that this machine does not."""

    def look_up(*args, **kwargs):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    check_address("http://nowhere.example/", is_redirect=True)
    set_media_limits(MediaLimits.strict())
    with pytest.raises(ValueError, match="the host 'nowhere.example' cannot be looked up"):
        check_address("http://nowhere.example/")


@pytest.mark.parametrize("source", ["{file}", "file://{file}", "nowhere.png"])
def test_files_are_a_switch(source, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(image_file())
    set_media_limits(MediaLimits(allow_files=False))
    for item in (source.format(file=file), {"bytes": None, "path": source.format(file=file)}):
        with pytest.raises(ValueError, match="`MediaLimits.allow_files` is False"):
            IMAGE_PROCESSOR(item)
    IMAGE_PROCESSOR(file.read_bytes())


def test_formats_are_a_switch():
    set_media_limits(MediaLimits.strict())
    assert len(IMAGE_PROCESSOR(image_file())["pixel_values"]) == NUM_PATCHES
    with pytest.raises(ValueError, match="it is no image in a format that is allowed"):
        IMAGE_PROCESSOR(image_file("PCX"))
    set_media_limits(MediaLimits())
    assert len(IMAGE_PROCESSOR(image_file("PCX"))["pixel_values"]) == NUM_PATCHES


def test_limits_are_checked():
    for options, message in (
        ({"max_image_pixels": 0}, "`max_image_pixels` must be an integer of at least 1, or None, got 0"),
        ({"max_image_pixels": "x"}, "`max_image_pixels` must be an integer of at least 1, or None, got 'x'"),
        ({"max_download_bytes": True}, "`max_download_bytes` must be an integer of at least 1, or None, got True"),
        ({"private_addresses": "some"}, "`private_addresses` must be 'given', 'never' or 'always', got 'some'"),
        ({"allow_files": "no"}, "`allow_files` must be True or False, got 'no'"),
        ({"allow_address": 5}, "`allow_address` must be a function or None, got 5"),
        ({"image_formats": "PNG"}, "or be None, got 'PNG'"),
        ({"image_formats": ("png",)}, "or be None, got ('png',)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            MediaLimits(**options)
    with pytest.raises(TypeError, match="`limits` must be a MediaLimits, got dict"):
        set_media_limits({})
    assert get_media_limits() == MediaLimits()
    assert MediaLimits.strict(max_image_pixels=9).max_image_pixels == 9
