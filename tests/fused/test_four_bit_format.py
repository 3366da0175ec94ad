"""Experts in 4 bits against bitsandbytes, which quantizes and dequantizes each of them alone."""

import pytest
import torch

from modeling_minimax_m3.fused.four_bit_format import FOUR_BIT_FORMATS
from modeling_minimax_m3.fused.weight_formats import StoredWeight

FORMATS = {weight_format.name: weight_format for weight_format in FOUR_BIT_FORMATS.values()}
# Blocks that end with rows, blocks that run through two rows, and more scales than share a factor.
SHAPES = [(3, 4, 64), (3, 6, 32), (2, 8, 96), (2, 130, 128), (3, 257, 64)]


@pytest.fixture(params=FORMATS)
def weight_format(request):
    return FORMATS[request.param]


def weights_of(shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class TestAgainstBitsandbytes:
    @pytest.fixture(autouse=True)
    def functional(self):
        pytest.importorskip("bitsandbytes")
        from bitsandbytes import functional

        return functional

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_same_bytes_and_numbers(self, functional, weight_format, shape, dtype):
        weights = weights_of(shape, dtype)
        stored = weight_format.quantize(weights)
        numbers = weight_format.dequantize(stored, dtype)
        assert numbers.shape == shape and numbers.dtype == dtype and numbers.is_contiguous()
        for expert, matrix in enumerate(weights):
            packed, state = functional.quantize_4bit(
                matrix.flatten(), compress_statistics=weight_format.double, quant_type=weight_format.quant_type
            )
            assert torch.equal(stored[0][expert].flatten(), packed.flatten())
            assert torch.equal(stored[1][expert], state.absmax)
            if weight_format.double:
                assert torch.equal(stored[2][expert], state.state2.absmax)
                assert torch.equal(stored[3][expert], state.offset)
            expected = functional.dequantize_4bit(packed, state).view_as(matrix)
            assert torch.equal(numbers[expert], expected)

    def test_numbers_are_near(self, weight_format):
        """The widest gap between neighbours of the 16 numbers is a third of the largest, so half of it is the error."""
        weights = weights_of((2, 16, 64), torch.float32)
        distance = (weight_format.dequantize(weight_format.quantize(weights), torch.float32) - weights).abs()
        largest = weights.abs().amax(-1, keepdim=True)
        assert (distance <= 0.18 * largest).all() and distance.mean() > 0

    def test_some_experts(self, weight_format):
        stored = StoredWeight(weight_format, weight_format.quantize(weights_of((5, 6, 32))))
        numbers = stored.dequantize(torch.float32)
        assert torch.equal(stored.of_expert(3).dequantize(torch.float32), numbers[3])
        assert torch.equal(stored.of_experts(slice(1, 4)).dequantize(torch.float32), numbers[1:4])
        ids = torch.tensor([4, 0, 0, 2])
        assert torch.equal(stored.of_experts(ids).dequantize(torch.float32), numbers[ids])

    def test_other_dtypes_of_the_result(self, weight_format):
        stored = weight_format.quantize(weights_of((1, 4, 64)))
        numbers = weight_format.dequantize(stored, torch.float32)
        assert torch.equal(weight_format.dequantize(stored, torch.float64), numbers.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(weight_format, shape):
    """4 bits, and a scale of 32 bits for 64 values, or of 8 bits and 32 more for 256 scales and for the expert."""
    experts, rows, columns = shape
    stored = weight_format.empty(shape)
    scales = rows * columns // 64
    expected = rows * columns // 2 + (scales + 4 * -(-scales // 256) + 4 if weight_format.double else 4 * scales)
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored) == experts * expected
    assert len(stored) == len(weight_format.suffixes)
    assert weight_format.shape(stored) == shape


@pytest.mark.parametrize("rows, columns", [(3, 32), (64, 5), (1, 66)])
def test_shapes_that_do_not_fit(weight_format, rows, columns):
    with pytest.raises(ValueError, match=f"multiple of 64 elements with an even number of columns, got {rows} x"):
        weight_format.empty((2, rows, columns))


def test_cast_scales_are_refused():
    weight_format = FORMATS["nf4"]
    packed, scales = weight_format.empty((2, 4, 64))
    assert weight_format.restored((packed, scales)) == (packed, scales)
    with pytest.raises(TypeError, match="'_absmax' of a weight in NF4 must be in torch.float32, got torch.bfloat16"):
        weight_format.restored((packed, scales.bfloat16()))
    with pytest.raises(TypeError, match="'_absmax' of a weight in NF4 must be in torch.float32, got torch.uint8"):
        weight_format.restored((packed, scales.to(torch.uint8)))
