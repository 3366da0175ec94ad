"""`MediaLimits` also limit videos: their addresses, their size in bytes, and the pixels of a frame."""

import pytest

from processing_minimax_m3 import MediaLimits, get_media_limits, set_media_limits
from processing_minimax_m3.video_decoding import decode_video


@pytest.fixture
def limits():
    before = get_media_limits()
    yield set_media_limits
    set_media_limits(before)


@pytest.fixture
def served_clip(clip, web_host):
    content = clip("clip.mp4", range(0, 400, 100)).read_bytes()
    web_host.answers["/clip.mp4"] = 200, {"Content-Length": str(len(content))}, content
    web_host.answers["/moved"] = 302, {"Location": "/clip.mp4"}, b""
    return web_host


def test_an_address_is_read(served_clip):
    frames, metadata = decode_video(f"{served_clip.address}/clip.mp4")
    assert len(frames) == 4 and metadata.frame_times == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("/moved", {}, "a redirect leads to the private host '127.0.0.1'"),
        ("/clip.mp4", {"private_addresses": "never"}, "private host"),
        ("/clip.mp4", {"max_download_bytes": 100}, "more than the 100 bytes"),
        ("/clip.mp4", {"max_image_pixels": 1000}, "more than the 1000 that `MediaLimits.max_image_pixels` allows"),
        ("/clip.mp4", {"allow_address": lambda address: False}, "`MediaLimits.allow_address` does not allow"),
    ],
)
def test_what_the_limits_refuse(path, changes, message, served_clip, limits):
    limits(MediaLimits(**changes))
    with pytest.raises(ValueError, match=message):
        decode_video(served_clip.address + path)


def test_files_can_be_refused(clip, limits):
    path = clip("clip.mp4", range(0, 400, 100))
    limits(MediaLimits.strict())
    with pytest.raises(ValueError, match="`MediaLimits.allow_files` is False"):
        decode_video(str(path))
