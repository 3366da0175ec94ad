"""Replaces a file that the source distribution lacks, and the media that the tests name by address.

It makes each image or video instead of downloading it, with the size and the number of frames that the tests expect.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "media"
NUM_FRAMES = 11


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    path = FOLDER / url.rpartition("/")[2]
    write = {".jpg": _write_image, ".png": _write_image, ".mp4": _write_video}.get(path.suffix)
    if write is None:
        return url
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        # several test processes may write the same file
        unfinished = path.with_name(f"{os.getpid()}-{path.name}")
        write(unfinished)
        unfinished.replace(path)
    return str(path)


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def _write_image(path: Path) -> None:
    Image.fromarray(_noise(480, 640)).save(path)


def _write_video(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(_noise(240, 320), index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
