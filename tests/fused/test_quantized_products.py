"""Products with stored weights against products with the numbers that these mean, computed in float64."""

import pytest
import torch

from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.fused.four_bit_format import FOUR_BIT_FORMATS
from modeling_minimax_m3.fused.scaled_rows_format import FLOAT8_ROWS, INT8_ROWS
from modeling_minimax_m3.fused.weight_formats import MXFP8, StoredWeight

EXPERTS, OUTPUTS, CHANNELS = 6, 96, 64
ENDS = [0, 3, 3, 10, 40, 48]  # of the rows of each expert; two rows more belong to none
ROWS = 50
IDS = torch.tensor([expert for expert, (a, b) in enumerate(zip([0, *ENDS], ENDS, strict=False)) for _ in range(a, b)])


FORMATS = {
    weight_format.name: weight_format for weight_format in (MXFP8, FLOAT8_ROWS, INT8_ROWS, *FOUR_BIT_FORMATS.values())
}


@pytest.fixture(params=FORMATS)
def weight(request) -> StoredWeight:
    weight_format = FORMATS[request.param]
    if weight_format in FOUR_BIT_FORMATS.values():
        pytest.importorskip("bitsandbytes")
    numbers = torch.randn(EXPERTS, OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(0))
    return StoredWeight(weight_format, weight_format.quantize(numbers))


@pytest.fixture
def numbers(weight) -> torch.Tensor:
    return weight.dequantize(torch.float64)


def states_of(rows: int, dtype: torch.dtype = torch.float64, channels: int = CHANNELS) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def grouped_by_hand(states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    rows = [states[row] @ numbers[expert].T for row, expert in enumerate(IDS.tolist())]
    return torch.stack(rows + [torch.zeros(OUTPUTS, dtype=states.dtype)] * (len(states) - len(IDS)))


def ends() -> torch.Tensor:
    return torch.tensor(ENDS, dtype=torch.int32)


@pytest.mark.parametrize("most_experts", [1, 2, EXPERTS])
def test_grouped_product(weight, numbers, most_experts, monkeypatch):
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", most_experts * OUTPUTS * CHANNELS * 8)
    states = states_of(ROWS)
    result = quantized_products.grouped_product(states, weight, ends())
    torch.testing.assert_close(result, grouped_by_hand(states, numbers))


@pytest.mark.parametrize("most_experts", [1, 4, 100])
def test_paired_product(weight, numbers, most_experts, monkeypatch):
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", most_experts * OUTPUTS * CHANNELS * 8)
    ids = IDS.flip(0)
    states = states_of(len(ids))
    expected = torch.stack([numbers[expert] @ row for row, expert in zip(states, ids.tolist(), strict=True)])
    torch.testing.assert_close(quantized_products.paired_product(states, weight, ids), expected)


@pytest.mark.parametrize("shape", [(CHANNELS,), (5, CHANNELS), (2, 3, CHANNELS)], ids=str)
def test_linear(weight, numbers, shape):
    states = states_of(6).flatten()[: torch.Size(shape).numel()].view(shape)
    result = quantized_products.linear(states, weight.of_expert(0))
    torch.testing.assert_close(result, states @ numbers[0].T)


def test_no_rows(weight):
    no_ends = torch.zeros(EXPERTS, dtype=torch.int32)
    assert quantized_products.grouped_product(states_of(0), weight, no_ends).shape == (0, OUTPUTS)
    assert torch.equal(
        quantized_products.grouped_product(states_of(4), weight, no_ends), torch.zeros(4, OUTPUTS).double()
    )


CALLS = {
    "grouped": lambda states, weight: quantized_products.grouped_product(states, weight, ends()),
    "paired": lambda states, weight: quantized_products.paired_product(states, weight, IDS),
    "linear": lambda states, weight: quantized_products.linear(states, weight.of_expert(0)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_gradients(weight, kind, monkeypatch):
    """First and second derivatives, with groups of two experts."""
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 2 * OUTPUTS * CHANNELS * 8)
    states = states_of(len(IDS)).requires_grad_()
    picked = slice(0, 7)
    assert torch.autograd.gradcheck(lambda x: CALLS[kind](x, weight)[:, picked], states, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: CALLS[kind](x, weight)[:, picked] ** 2, states, fast_mode=True)


@pytest.mark.parametrize("kind", CALLS)
def test_nothing_dequantized_is_kept_for_the_backward(weight, kind):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        CALLS[kind](states_of(len(IDS), torch.float32).requires_grad_(), weight)
    stored = [tensor for tensor in kept if tensor.dtype not in (torch.int32, torch.int64)]
    parts = weight.of_expert(0).tensors if kind == "linear" else weight.tensors
    assert [(tensor.dtype, tensor.shape) for tensor in stored] == [(tensor.dtype, tensor.shape) for tensor in parts]


@pytest.mark.parametrize("name", ["linear", "grouped_product", "paired_product"])
@pytest.mark.parametrize("transposed", [False, True])
def test_custom_operators(weight, name, transposed):
    operator = getattr(torch.ops.minimax_m3_quantized, name).default
    places = {"linear": (), "grouped_product": (ends(),), "paired_product": (IDS,)}[name]
    stored = weight.of_expert(0) if name == "linear" else weight
    states = states_of(len(IDS), torch.float32, OUTPUTS if transposed else CHANNELS).requires_grad_()
    # Its test of the schema computes with its inputs, which 8-bit floats cannot.
    utils = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator, (states, list(stored.tensors), stored.format.name, *places, transposed), test_utils=utils
    )


@pytest.mark.parametrize("kind", CALLS)
def test_compiled(weight, kind):
    torch.compiler.reset()  # the same function is compiled for every format
    states = states_of(len(IDS), torch.float32).requires_grad_()
    expected = CALLS[kind](states, weight)
    compiled = torch.compile(lambda x: CALLS[kind](x, weight), fullgraph=True, backend="aot_eager")
    result = compiled(states)
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), states)
    assert torch.equal(gradient, *torch.autograd.grad(expected.sum(), states))
