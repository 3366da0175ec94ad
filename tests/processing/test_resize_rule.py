"""The resize rule: the same sizes as stock, and its guarantees for any size."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from processing_minimax_m3.resize import fits_patch_grid, smart_resize

sides = st.integers(1, 5000)
factors = st.integers(1, 64)
areas = st.integers(1, 2_000_000)


def may_be_resized(height, width):
    return max(height, width) <= 200 * min(height, width)


@settings(max_examples=300, deadline=None)
@given(height=sides, width=sides, factor=factors, min_pixels=areas, max_pixels=areas)
def test_equals_stock(stock, height, width, factor, min_pixels, max_pixels):
    arguments = (height, width, factor, min_pixels, max_pixels)
    if may_be_resized(height, width):
        assert smart_resize(*arguments) == stock.smart_resize(*arguments)
    else:
        with pytest.raises(ValueError, match="one side may be at most 200 times the other"):
            smart_resize(*arguments)


@settings(max_examples=300, deadline=None)
@given(height=sides, width=sides, factor=factors, min_pixels=areas, max_pixels=areas)
def test_result_fits_the_grid_and_the_bounds(height, width, factor, min_pixels, max_pixels):
    if not may_be_resized(height, width):
        return
    new_height, new_width = smart_resize(height, width, factor, min_pixels, max_pixels)
    assert fits_patch_grid(new_height, new_width, factor)
    area = new_height * new_width
    if factor not in (new_height, new_width):
        assert area <= max_pixels or area < min_pixels + factor * (new_height + new_width)
    rounded_area = round(height / factor) * round(width / factor) * factor**2
    if rounded_area <= max_pixels:
        assert area >= min_pixels


@settings(max_examples=200, deadline=None)
@given(height=st.integers(100, 3000), width=st.integers(100, 3000))
@example(height=2317, width=2317)  # scaled to 672 but for a rounding error, and so to the multiple of 28 below
def test_aspect_ratio_is_kept_up_to_rounding(height, width):
    new_height, new_width = smart_resize(height, width, 28, 3136, 451_584)
    # the area stays the same, or is scaled down to the bound if rounding up would exceed it
    scales = (1.0, math.sqrt(451_584 / (height * width)))
    factor = 28 + 1e-6
    assert any(
        abs(new_height - height * scale) <= factor and abs(new_width - width * scale) <= factor for scale in scales
    )


@settings(max_examples=100, deadline=None)
@given(height=sides, width=sides)
def test_doing_it_twice_changes_nothing(height, width):
    if may_be_resized(height, width):
        once = smart_resize(height, width, 28, 3136, 451_584)
        if once[0] * once[1] <= 451_584:
            assert smart_resize(*once, 28, 3136, 451_584) == once


@pytest.mark.parametrize(
    "size, expected",
    [
        ((672, 672), (672, 672)),
        ((1, 1), (56, 56)),
        ((1080, 1920), (504, 896)),
        ((27, 5400), (28, 5404)),
        ((41, 43), (56, 84)),
    ],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_known_sizes(size, expected, stock):
    assert stock.smart_resize(*size, 28, 3136, 451_584) == smart_resize(*size, 28, 3136, 451_584) == expected


@pytest.mark.parametrize("arguments", [(0, 5), (5, -1), (5, 5, 0), (5, 5, 28, 0, 9), (5, 5, 28, 9, -1)])
def test_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        smart_resize(*arguments)
