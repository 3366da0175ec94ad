"""Turns frames upright, as cameras and phones note it in the file."""

import struct
from typing import Any, NamedTuple

import numpy as np


class Turn(NamedTuple):
    """A turn that first swaps rows and columns, and then mirrors."""

    transpose: bool
    mirror_x: bool  # left and right
    mirror_y: bool  # top and bottom


def turn_of(frame: Any) -> Turn:
    """Reads the display matrix of a decoded PyAV frame, to the nearest quarter turn, with or without mirroring.

    The matrix moves a pixel from (x, y), y downwards, to (a x + c y, b x + d y). `frame.rotation` would not do: PyAV
    14.0 does not have it, and it ignores mirroring.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Turn(False, False, False)
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, c < 0, b < 0)
    return Turn(False, a < 0, d < 0)


def turn_upright(pixels: np.ndarray, turn: Turn) -> np.ndarray:
    """A view of `pixels`, (height, width, channels), that stands upright."""
    if turn.transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1]
