"""A damaged image file gives an error, never a crash, a hang or a wrong picture."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processing_minimax_m3 import MiniMaxM3VLImageProcessor

FUZZER = Path(__file__).parents[2] / "scripts" / "fuzz_images.py"


def test_fuzzer_finds_nothing():
    """The files are read in a separate process, which a fault of a decoder would end."""
    done = subprocess.run(
        [sys.executable, str(FUZZER), "--files", "12"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("png: ")
    assert all(line.endswith("0 other errors, 0 crashes, 0 hangs") for line in lines)
    assert sum(int(line.split("read, ")[1].split()[0]) for line in lines) > 12, "the files were not damaged"


def test_every_wrong_bit_of_a_png_is_found():
    """This includes damage in the pixels, whose checksums Pillow skips while it decodes."""
    gradient = np.linspace(0, 255, 48 * 64 * 3).astype(np.uint8).reshape(48, 64, 3)
    file = io.BytesIO()
    Image.fromarray(gradient).save(file, "PNG")
    content = file.getvalue()
    processor = MiniMaxM3VLImageProcessor()
    processor.fetch_images(content)
    for place in range(content.index(b"IEND") - 4):  # the end holds no pixels
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=rf"the image of {len(content)} bytes cannot be read"):
            processor.fetch_images(bytes(damaged))
