"""Quantized weights as other libraries see them: reading dequantizes, writing and moving raise."""

import pytest
import torch
from torch import nn

from modeling_minimax_m3.fused.weight_formats import MXFP8, StoredWeight
from modeling_minimax_m3.layers.mxfp8 import Mxfp8Linear
from modeling_minimax_m3.layers.quantized_weight import QuantizedWeight
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8, quantize_mxfp8


@pytest.fixture
def weight() -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return QuantizedWeight(
        StoredWeight(MXFP8, quantize_mxfp8(torch.randn(3, 4, 64, generator=generator))), torch.float32
    )


@pytest.fixture
def numbers(weight) -> torch.Tensor:
    return dequantize_mxfp8(*weight.stored.tensors, torch.float32)


def test_looks_like_a_frozen_parameter(weight):
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert (weight.shape, weight.dtype, weight.device) == ((3, 4, 64), torch.float32, torch.device("cpu"))
    assert repr(weight) == "QuantizedWeight((3, 4, 64), dtype=torch.float32, device=cpu)"
    assert all(type(same) is QuantizedWeight for same in (weight.data, weight.detach()))


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: weight + 1,
        lambda weight: weight.clone(),
        lambda weight: weight.to(torch.float16),
        lambda weight: weight[1, :2].sum(-1),
        lambda weight: torch.linalg.norm(weight, dim=1),
        lambda weight: torch.cat([torch.zeros(1, 4, 64), weight]),
        lambda weight: torch.zeros(3, 4, 64).copy_(weight),
        lambda weight: torch.matmul(torch.ones(3, 2, 4), weight),
    ],
)
def test_reading(weight, numbers, read):
    result = read(weight)
    assert type(result) is torch.Tensor and torch.equal(result, read(numbers))


def test_gradient_of_what_reads_it(weight, numbers):
    gradients = []
    for matrix in (weight, numbers):
        states = torch.ones(3, 2, 4, requires_grad=True)
        (states @ matrix).pow(2).sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


def test_low_rank_update(weight, numbers):
    left, right = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 2, 64, requires_grad=True)
    updated = torch.baddbmm(torch.baddbmm(weight, left, right, alpha=0.5), left, right)
    assert type(updated) is QuantizedWeight and len(updated.updates) == 2 and weight.updates == ()
    expected = torch.baddbmm(torch.baddbmm(numbers, left, right, alpha=0.5), left, right)
    assert torch.equal(updated.dequantize(), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.copy_(torch.zeros(3, 4, 64)),
        lambda weight: weight.zero_(),
        lambda weight: torch.add(weight, 1, out=weight),
        lambda weight: setattr(weight, "data", torch.zeros(3, 4, 64)),
        lambda weight: nn.init.normal_(weight),
    ],
)
def test_writing(weight, numbers, write):
    with pytest.raises(TypeError, match="MXFP8 cannot be changed, as merging an adapter would do"):
        write(weight)
    assert torch.equal(weight.dequantize(), numbers)


def test_moving(weight):
    with pytest.raises(TypeError, match="moves with its layer, not alone.*device_map"):
        weight.to("meta")


def test_layer_shows_numbers_and_keeps_bytes():
    layer = Mxfp8Linear(64, 4, bias=True, compute_dtype=torch.bfloat16)
    values, scales = quantize_mxfp8(torch.randn(4, 64))
    layer.load_state_dict({"weight": values, "weight_scale_inv": scales, "bias": torch.ones(4)})
    assert layer.weight.dtype == torch.float8_e4m3fn
    layer.shows_numbers = True
    assert layer.weight.dtype == torch.bfloat16 and layer.state_dict()["weight"].dtype == torch.float8_e4m3fn
    states = torch.randn(2, 64, dtype=torch.bfloat16)
    expected = nn.functional.linear(states, dequantize_mxfp8(values, scales)) + 1
    assert torch.equal(layer(states), expected)
    stored = layer._parameters["weight"]
    layer.weight = layer.weight  # as PEFT gives it back
    assert layer._parameters["weight"] is stored


def test_values_that_were_cast_keep_their_meaning():
    """FSDP2's mixed precision casts floating-point parameters for a pass."""
    layer = Mxfp8Linear(256, 1, bias=False, compute_dtype=torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes.where(codes.float().isfinite(), torch.zeros(()).to(codes.dtype))
    layer._parameters["weight_scale_inv"].fill_(127)
    layer._parameters["weight"] = nn.Parameter(codes.view(1, 256), requires_grad=False)
    expected = layer(torch.eye(256))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer._parameters["weight"] = nn.Parameter(codes.view(1, 256).to(dtype), requires_grad=False)
        assert torch.equal(layer(torch.eye(256)), expected)
