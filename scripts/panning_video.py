"""Write a video in which a square window moves diagonally over a photograph: a clip to try video input with.

    python scripts/panning_video.py PHOTO CLIP.mp4

The window has 224 x 224 pixels, and the video lasts four seconds.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from replace_when_done import replace_when_done


def write_panning_video(photograph: Path, path: Path, *, seconds: int = 4, fps: int = 12, side: int = 224) -> Path:
    """Encodes an mp4 (H.264) in which a square window of `side` pixels moves diagonally over the photograph."""
    image = Image.open(photograph).convert("RGB")
    num_frames = seconds * fps
    with replace_when_done(path) as unfinished, av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            left = round((image.width - side) * i / (num_frames - 1))
            top = round((image.height - side) * i / (num_frames - 1))
            frame = av.VideoFrame.from_image(image.crop((left, top, left + side, top + side)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a video that pans over a photograph.")
    parser.add_argument("photograph", type=Path, help="a picture of at least 224 x 224 pixels")
    parser.add_argument("video", type=Path, help="path of the mp4 file")
    arguments = parser.parse_args()
    with Image.open(arguments.photograph) as image:
        if min(image.size) < 224:
            parser.error(f"the photograph must have at least 224 x 224 pixels, got {image.width} x {image.height}")
    print(f"wrote {write_panning_video(arguments.photograph, arguments.video)}")


if __name__ == "__main__":
    main()
