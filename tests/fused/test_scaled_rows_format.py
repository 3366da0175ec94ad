"""Values of 8 bits with a scale for each row: near the numbers, exact for what a format can hold."""

import pytest
import torch

from modeling_minimax_m3.fused.scaled_rows_format import FLOAT8_ROWS, INT8_ROWS

FORMATS = {"float8": FLOAT8_ROWS, "int8": INT8_ROWS}


@pytest.fixture(params=FORMATS)
def weight_format(request):
    return FORMATS[request.param]


@pytest.fixture
def weights():
    sizes = torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]
    return torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0)) * sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_are_near(weight_format, weights, dtype):
    """Half of a step: 1/16 of a number in E4M3, 1/255 of the row's largest in int8; and the rounding to `dtype`."""
    numbers = weight_format.dequantize(weight_format.quantize(weights), dtype)
    assert numbers.dtype == dtype and numbers.shape == weights.shape
    distance = (numbers.float() - weights).abs()
    largest = weights.abs().amax(-1, keepdim=True)
    # The smallest values of E4M3 have a step of 2**-9, for a largest value of 448.
    step = largest / 255 if weight_format is INT8_ROWS else torch.maximum(weights.abs() / 16, largest * 2**-10 / 448)
    # int8 has no value 127.5, so the largest number of a row is off by half a step.
    assert (distance <= step * 1.01 + weights.abs() * 2**-8).all() and distance.sum() > 0
    assert (numbers[:, 3] == 0).all()


def test_numbers_that_fit_are_kept(weight_format):
    values = (
        torch.tensor([[[448.0, -3.5, 0.0, 26.0]]])
        if weight_format is FLOAT8_ROWS
        else torch.tensor([[[127.5, -3, 1, 0]]])
    )
    numbers = weight_format.dequantize(weight_format.quantize(values * 2**-7), torch.float32)
    expected = values.clamp(max=127) if weight_format is INT8_ROWS else values
    assert torch.equal(numbers, expected * 2**-7)


def test_some_experts(weight_format, weights):
    stored = weight_format.quantize(weights)
    numbers = weight_format.dequantize(stored, torch.float32)
    assert torch.equal(weight_format.dequantize([tensor[1] for tensor in stored], torch.float32), numbers[1])


def test_casts(weight_format, weights):
    values, scales = weight_format.quantize(weights)
    restored = weight_format.restored((values.to(torch.bfloat16), scales))
    assert restored[0].dtype == values.dtype and torch.equal(restored[0].float(), values.float())
    with pytest.raises(TypeError, match="scales of a weight in .*8 must be in torch.float32, got torch.bfloat16"):
        weight_format.restored((values, scales.bfloat16()))
