"""A small tokenizer, our processors beside stock's, and small media files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.minimax_m3_vl import (
    image_processing_minimax_m3_vl,
    processing_minimax_m3_vl,
    video_processing_minimax_m3_vl,
)

from processing_minimax_m3 import (
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLProcessor,
    MiniMaxM3VLVideoProcessor,
    load_chat_template,
)
from processing_minimax_m3.special_tokens import (
    BEGIN_OF_DOCUMENT_TOKEN,
    END_OF_TURN_TOKEN,
    SPECIAL_TOKENS,
    TEXT_MARKUP_TOKENS,
    UNKNOWN_TOKEN,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and M3's special tokens. It needs no training, and every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken(token, special=token not in TEXT_MARKUP_TOKENS, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN_OF_DOCUMENT_TOKEN,
        eos_token=END_OF_TURN_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        pad_token=SPECIAL_TOKENS[0],
    )


@pytest.fixture(scope="session")
def processor(tokenizer) -> MiniMaxM3VLProcessor:
    return MiniMaxM3VLProcessor(
        image_processor=MiniMaxM3VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=MiniMaxM3VLVideoProcessor(),
        chat_template=load_chat_template(),
    )


@pytest.fixture(scope="session")
def stock(tokenizer) -> SimpleNamespace:
    """Stock's image, video and joint processor, with our tokenizer and chat template."""
    image = image_processing_minimax_m3_vl.MiniMaxM3VLImageProcessor()
    video = video_processing_minimax_m3_vl.MiniMaxM3VLVideoProcessor()
    joint = processing_minimax_m3_vl.MiniMaxM3VLProcessor(image, tokenizer, video, chat_template=load_chat_template())
    return SimpleNamespace(
        image=image,
        video=video,
        joint=joint,
        image_class=type(image),
        video_class=type(video),
        joint_class=type(joint),
        smart_resize=image_processing_minimax_m3_vl.smart_resize,
    )


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """Random uint8 pixels of a given shape, the same for the same shape and seed."""

    def make(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make


@pytest.fixture(scope="session")
def assert_same_output() -> Callable[..., None]:
    """Compares two processor outputs key by key, bit by bit."""

    def as_numpy(value):
        return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)

    def check(ours, theirs) -> None:
        assert list(ours) == list(theirs)
        for name in ours:
            if name == "video_metadata":  # stock gives a list, or a tuple for files
                assert [str(entry) for entry in ours[name]] == [str(entry) for entry in theirs[name]]
                continue
            assert type(ours[name]) is type(theirs[name]), name
            if name == "input_ids" and isinstance(ours[name], list):
                assert ours[name] == theirs[name]
            else:
                np.testing.assert_array_equal(as_numpy(ours[name]), as_numpy(theirs[name]), err_msg=name)
                if hasattr(ours[name], "dtype"):
                    assert ours[name].dtype == theirs[name].dtype, name

    return check


@pytest.fixture(scope="session")
def image_files(tmp_path_factory, pixels) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    image = Image.fromarray(pixels(60, 90, 3))
    files = {suffix: folder / f"image.{suffix}" for suffix in ("png", "jpg", "bmp", "webp")}
    for file in files.values():
        image.save(file)
    return files


def write_video(
    path: Path,
    num_frames: int,
    fps: int,
    height: int = 60,
    width: int = 90,
    *,
    milliseconds: Sequence[int] | None = None,
    codec: str = "mpeg4",
    movflags: str = "",
    max_b_frames: int = 0,
    seconds_of_silence: int = 0,
) -> Path:
    """A video whose frame i is a flat gray of brightness 10 * i (modulo 250), shown at `milliseconds[i]` if given."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"bf": str(max_b_frames)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("mp2", rate=48000) if seconds_of_silence else None
        for index in range(seconds_of_silence * 48000 // 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, index * 1152, Fraction(1, 48000)
            container.mux(sound.encode(frame))
        for index in range(num_frames):
            gray = np.full((height, width, 3), 10 * index % 250, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24").reformat(format="yuv420p")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(sound.encode())
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    return write_video


@pytest.fixture
def clip(tmp_path) -> Callable[..., Path]:
    """Writes a video of 56 x 56 pixels, given its name and the times of its frames. Options go to `write_video`."""

    def make(name: str, milliseconds: Sequence[int], fps: int = 10, **options) -> Path:
        options = {"height": 56, "width": 56} | options
        return write_video(tmp_path / name, len(milliseconds), fps, milliseconds=milliseconds, **options)

    return make


@pytest.fixture(scope="session")
def video_file(tmp_path_factory) -> Path:
    """A video of 2.5 seconds at 10 frames per second: 25 frames of 60 x 90, frame i of brightness 10 * i."""
    return write_video(tmp_path_factory.mktemp("videos") / "gray.mp4", num_frames=25, fps=10)


@pytest.fixture(scope="session")
def web_host() -> Iterator[SimpleNamespace]:
    """A web server on this machine.

    `answers` maps a path to a status, headers and a body (bytes, or an iterable of bytes); `address` begins every
    address of it, and `asked` lists the paths that were asked for.
    """
    host = SimpleNamespace(answers={}, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.asked.append(self.path)
            status, headers, body = host.answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for piece in [body] if isinstance(body, bytes) else body:
                    self.wfile.write(piece)
            except ConnectionError:  # the client has had enough
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield host
    server.shutdown()
    server.server_close()
