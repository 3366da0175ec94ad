"""Draw the picture and the video of the examples: photo.png and clip.mp4, which the small checkpoint can read.

    python scripts/example_media.py [FOLDER]

Both come from rows that are held out from training.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from processing_minimax_m3.pretraining import make_row
from processing_minimax_m3.pretraining.videos import encode_mp4
from replace_when_done import replace_when_done

PICTURE, VIDEO = ("image", 3), ("video", 1)  # a task, and the number of its row


def draw_example_media(folder: Path) -> tuple[Path, Path]:
    """Writes both files, and returns their paths. The folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, video = (
        make_row(task, "heldout", index)["messages"][0]["content"][0][task] for task, index in (PICTURE, VIDEO)
    )
    with replace_when_done(folder / "photo.png") as unfinished:
        picture.save(unfinished)
    with replace_when_done(folder / "clip.mp4") as unfinished:
        unfinished.write_bytes(encode_mp4(video))
    return folder / "photo.png", folder / "clip.mp4"


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw photo.png and clip.mp4, which the small checkpoint can read.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where they go (the current folder)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        print("wrote", *draw_example_media(arguments.folder))
    except ImportError as error:
        raise SystemExit(f'example_media: {error}: `pip install ".[video]"`') from error
    except OSError as error:
        raise SystemExit(f"example_media: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
