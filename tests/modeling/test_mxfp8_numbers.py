"""MXFP8 numbers against plain Python: values, scales, edges and errors."""

import math

import pytest
import torch

from modeling_minimax_m3 import mxfp8
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8, quantize_mxfp8

E4M3 = sorted(
    {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)} - {480.0}
    | {m / 8 * 2.0**-6 for m in range(8)}
)


def numbers(*shape: int, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp2(spread * torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * magnitudes).to(dtype)


def by_hand(group: list[float]) -> tuple[list[float], int]:
    """The nearest numbers of a group, and the byte of its scale."""
    exponent = next(e for e in range(-127, 128) if max(map(abs, group)) <= 448 * 2.0**e)
    nearest = [min(E4M3, key=lambda value: abs(value - abs(x) / 2.0**exponent)) for x in group]
    return [math.copysign(value * 2.0**exponent, x) for value, x in zip(nearest, group, strict=True)], exponent + 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearest_numbers(dtype):
    tensor = numbers(3, 4, 64, dtype=dtype)
    values, scales = quantize_mxfp8(tensor)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (3, 4, 64))
    assert (scales.dtype, scales.shape) == (torch.uint8, (3, 4, 2))
    expected = [by_hand(group.tolist()) for group in tensor.double().view(-1, 32)]
    torch.testing.assert_close(scales.flatten(), torch.tensor([byte for _, byte in expected], dtype=torch.uint8))
    # Equally far neighbours differ in the choice of the even one, which the distance shows.
    result = dequantize_mxfp8(values, scales, torch.float32).double().view(-1, 32)
    nearest = torch.tensor([group for group, _ in expected], dtype=torch.float64)
    source = tensor.double().view(-1, 32)
    assert torch.equal((result - source).abs(), (nearest - source).abs())


@pytest.mark.parametrize("largest, byte", [(448.0, 127), (448.5, 128), (1.75, 119), (1.7500001, 120), (0.0, 127)])
def test_scale_at_its_bounds(largest, byte):
    tensor = torch.zeros(1, 32)
    tensor[0, 5] = -largest
    values, scales = quantize_mxfp8(tensor)
    assert scales.item() == byte and values.float().abs().max() <= 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_all_numbers_are_exact(dtype):
    """Every value with every scale; in bfloat16 from its normal numbers on."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()].repeat(32)[None].repeat(254, 1)
    scales = torch.arange(254, dtype=torch.uint8)[:, None].repeat(1, values.shape[1] // 32)
    expected = values.double() * torch.exp2(torch.arange(254.0, dtype=torch.float64) - 127)[:, None]
    normal = (expected.abs() >= torch.finfo(dtype).tiny) | (expected == 0)
    representable = normal & (expected.abs() <= torch.finfo(dtype).max)
    result = dequantize_mxfp8(values, scales, dtype).double()
    assert torch.equal(result[representable], expected[representable])
    assert representable.float().mean() > 0.9


def test_numbers_survive_a_second_time():
    values, scales = quantize_mxfp8(numbers(8, 256, spread=6.0))
    once = dequantize_mxfp8(values, scales)
    assert torch.equal(dequantize_mxfp8(*quantize_mxfp8(once)), once)


def test_float16_overflows_only_where_the_number_does():
    values = torch.full((1, 64), 2.0**-3).to(torch.float8_e4m3fn)
    scales = torch.tensor([[127 + 17, 127 + 30]], dtype=torch.uint8)
    result = dequantize_mxfp8(values, scales, torch.float16)
    assert torch.equal(result[0, ::32], torch.tensor([2.0**14, math.inf], dtype=torch.float16))


def test_parts_give_the_same_numbers(monkeypatch):
    tensor = numbers(3, 5, 64)
    expected = quantize_mxfp8(tensor)
    monkeypatch.setattr(mxfp8, "_ELEMENTS_AT_A_TIME", 2 * 64)
    for part, whole in zip(quantize_mxfp8(tensor), expected, strict=True):
        assert torch.equal(part.view(torch.uint8), whole.view(torch.uint8))


def test_views_and_scale_dtypes():
    tensor = numbers(64, 8).t()
    values, scales = quantize_mxfp8(tensor)
    assert values.is_contiguous()
    same = dequantize_mxfp8(values, scales.view(torch.float8_e8m0fnu))
    assert torch.equal(same, dequantize_mxfp8(*quantize_mxfp8(tensor.contiguous())))


def test_nan_scale():
    values = torch.ones(1, 32).to(torch.float8_e4m3fn)
    assert dequantize_mxfp8(values, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(
    "tensor, error, message",
    [
        (torch.zeros(4, 33), ValueError, "`tensor` must have rows of a multiple of 32 values"),
        (torch.zeros(()), ValueError, "`tensor` must have rows"),
        (torch.zeros(4, 32, dtype=torch.int32), TypeError, "floating-point dtype of 16 bits or more, got torch.int32"),
        (torch.zeros(4, 32).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
        (torch.full((4, 32), math.nan), ValueError, "`tensor` must hold finite numbers"),
        (torch.full((4, 32), -math.inf), ValueError, "`tensor` must hold finite numbers"),
    ],
)
def test_what_cannot_be_quantized(tensor, error, message):
    with pytest.raises(error, match=message):
        quantize_mxfp8(tensor)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"values": torch.zeros(4, 64)}, TypeError, "`values` must be in torch.float8_e4m3fn, got torch.float32"),
        ({"scales": torch.zeros(4, 2)}, TypeError, "`scales` must be in torch.uint8"),
        ({"scales": torch.zeros(4, 1, dtype=torch.uint8)}, ValueError, r"shape \(4, 2\).*got \(4, 1\)"),
        ({"values": torch.zeros(4, 40).to(torch.float8_e4m3fn)}, ValueError, "`values` must have rows"),
    ],
)
def test_what_cannot_be_dequantized(changes, error, message):
    arguments = {"values": torch.zeros(4, 64).to(torch.float8_e4m3fn), "scales": torch.zeros(4, 2, dtype=torch.uint8)}
    with pytest.raises(error, match=message):
        dequantize_mxfp8(**(arguments | changes))
