"""The resize rule: the size of an image or a video frame before it is cut into patches."""

import math

MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 14 * 14 * 4 * 1280,
) -> tuple[int, int]:
    """Returns the size nearest to (height, width), in pixels, that a grid of merged patches can cover.

    Both sides of the result are positive multiples of `factor` (patch size * merge size). The area lies within
    [min_pixels, max_pixels], and the aspect ratio is kept as far as rounding allows. The area may lie outside if no
    multiple fits: for a very elongated image, or for bounds that are closer than `factor` squared.

    Raises:
        ValueError: A side, a bound or `factor` is not positive, or one side is more than 200 times the other.
    """
    for name, value in (("height", height), ("width", width), ("factor", factor)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 pixel, got {value} (size {height} x {width}).")
    if min_pixels < 1 or max_pixels < 1:
        raise ValueError(
            f"`min_pixels` and `max_pixels` must be positive, got min_pixels={min_pixels}, max_pixels={max_pixels}."
        )
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"one side may be at most {MAX_ASPECT_RATIO} times the other, got height={height}, width={width} "
            f"(ratio {max(height, width) / min(height, width):.1f}). Crop or pad the image first."
        )

    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    return new_height, new_width


def check_pixel_bounds(min_pixels: int | None, max_pixels: int | None) -> None:
    """Raises `ValueError` if the caller gives both bounds and they contradict each other.

    A single bound may contradict the default of the other. Then `max_pixels` takes precedence.
    """
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise ValueError(
            f"`min_pixels` must not exceed `max_pixels`, got min_pixels={min_pixels}, max_pixels={max_pixels}."
        )


def fits_patch_grid(height: int, width: int, factor: int) -> bool:
    """Whether an image of this size can be cut into merged patches as it is."""
    return height > 0 and width > 0 and height % factor == 0 and width % factor == 0
