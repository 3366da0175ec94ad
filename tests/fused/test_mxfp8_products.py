"""Products with MXFP8 weights against products with the numbers that these mean, computed in float64."""

import pytest
import torch

from modeling_minimax_m3.fused import mxfp8_products
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8, quantize_mxfp8

EXPERTS, OUTPUTS, CHANNELS = 6, 96, 64
ENDS = [0, 3, 3, 10, 40, 48]  # of the rows of each expert; two rows more belong to none
ROWS = 50
IDS = torch.tensor([expert for expert, (a, b) in enumerate(zip([0, *ENDS], ENDS, strict=False)) for _ in range(a, b)])


@pytest.fixture
def weight() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return quantize_mxfp8(torch.randn(EXPERTS, OUTPUTS, CHANNELS, generator=generator))


@pytest.fixture
def numbers(weight) -> torch.Tensor:
    return dequantize_mxfp8(*weight, torch.float64)


def states_of(rows: int, dtype: torch.dtype = torch.float64, channels: int = CHANNELS) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def grouped_by_hand(states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    rows = [states[row] @ numbers[expert].T for row, expert in enumerate(IDS.tolist())]
    return torch.stack(rows + [torch.zeros(OUTPUTS, dtype=states.dtype)] * (len(states) - len(IDS)))


def offsets() -> torch.Tensor:
    return torch.tensor(ENDS, dtype=torch.int32)


@pytest.mark.parametrize("most_experts", [1, 2, EXPERTS])
def test_grouped_product(weight, numbers, most_experts, monkeypatch):
    monkeypatch.setattr(mxfp8_products, "DEQUANTIZED_BYTES", most_experts * OUTPUTS * CHANNELS * 8)
    states = states_of(ROWS)
    result = mxfp8_products.grouped_product(states, *weight, offsets())
    torch.testing.assert_close(result, grouped_by_hand(states, numbers))


@pytest.mark.parametrize("most_experts", [1, 4, 100])
def test_paired_product(weight, numbers, most_experts, monkeypatch):
    monkeypatch.setattr(mxfp8_products, "DEQUANTIZED_BYTES", most_experts * OUTPUTS * CHANNELS * 8)
    ids = IDS.flip(0)
    states = states_of(len(ids))
    expected = torch.stack([numbers[expert] @ row for row, expert in zip(states, ids.tolist(), strict=True)])
    torch.testing.assert_close(mxfp8_products.paired_product(states, *weight, ids), expected)


@pytest.mark.parametrize("shape", [(CHANNELS,), (5, CHANNELS), (2, 3, CHANNELS)], ids=str)
def test_linear(weight, numbers, shape):
    states = states_of(6).flatten()[: torch.Size(shape).numel()].view(shape)
    result = mxfp8_products.linear(states, *(tensor[0] for tensor in weight))
    torch.testing.assert_close(result, states @ numbers[0].T)


def test_no_rows(weight):
    no_offsets = torch.zeros(EXPERTS, dtype=torch.int32)
    assert mxfp8_products.grouped_product(states_of(0), *weight, no_offsets).shape == (0, OUTPUTS)
    assert torch.equal(
        mxfp8_products.grouped_product(states_of(4), *weight, no_offsets), torch.zeros(4, OUTPUTS).double()
    )


CALLS = {
    "grouped": lambda states, weight: mxfp8_products.grouped_product(states, *weight, offsets()),
    "paired": lambda states, weight: mxfp8_products.paired_product(states, *weight, IDS),
    "linear": lambda states, weight: mxfp8_products.linear(states, *(tensor[0] for tensor in weight)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_gradients(weight, kind, monkeypatch):
    """First and second derivatives, with groups of two experts."""
    monkeypatch.setattr(mxfp8_products, "DEQUANTIZED_BYTES", 2 * OUTPUTS * CHANNELS * 8)
    states = states_of(len(IDS)).requires_grad_()
    picked = slice(0, 7)
    assert torch.autograd.gradcheck(lambda x: CALLS[kind](x, weight)[:, picked], states, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: CALLS[kind](x, weight)[:, picked] ** 2, states, fast_mode=True)


@pytest.mark.parametrize("kind", CALLS)
def test_nothing_dequantized_is_kept_for_the_backward(weight, kind):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        CALLS[kind](states_of(len(IDS), torch.float32).requires_grad_(), weight)
    assert {tensor.dtype for tensor in kept} <= {torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64}
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in kept)


@pytest.mark.parametrize("name", ["linear", "grouped_product", "paired_product"])
@pytest.mark.parametrize("transposed", [False, True])
def test_custom_operators(weight, name, transposed):
    operator = getattr(torch.ops.minimax_m3_mxfp8, name).default
    places = {"linear": (), "grouped_product": (offsets(),), "paired_product": (IDS,)}[name]
    tensors = tuple(tensor[0] for tensor in weight) if name == "linear" else weight
    states = states_of(len(IDS), torch.float32, OUTPUTS if transposed else CHANNELS).requires_grad_()
    # Its test of the schema computes with its inputs, which 8-bit floats cannot.
    utils = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (states, *tensors, *places, transposed), test_utils=utils)


@pytest.mark.parametrize("kind", CALLS)
def test_compiled(weight, kind):
    states = states_of(len(IDS), torch.float32).requires_grad_()
    expected = CALLS[kind](states, weight)
    compiled = torch.compile(lambda x: CALLS[kind](x, weight), fullgraph=True, backend="aot_eager")
    result = compiled(states)
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), states)
    assert torch.equal(gradient, *torch.autograd.grad(expected.sum(), states))
