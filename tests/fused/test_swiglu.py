"""The gated activation: its definition, the call of the kernel with its derivatives, and the kernel on a GPU."""

import math

import pytest
import torch

from modeling_minimax_m3.fused import swiglu
from modeling_minimax_m3.fused.swiglu import swiglu_oai, swiglu_oai_reference

ALPHA, LIMIT = 1.702, 7.0
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of the result after one rounding, relative to its norm.
TOLERANCES = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def random_inputs(*shape, dtype=torch.float32, seed=0, scale=4.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)
    # Not on the bounds: whether a gradient passes there depends on the release of PyTorch.
    return torch.where(states.abs() == LIMIT, torch.ones_like(states), states)


def special_pairs(dtype, device="cpu"):
    """(1, 2F): every pair of special values as gate and up, repeated to a multiple of a vector."""
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1.0, LIMIT, -LIMIT, 7.5, -7.5, 60.0, -60.0, largest, -largest, math.inf, -math.inf, math.nan]
    pairs = torch.cartesian_prod(torch.tensor(values, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))
    return torch.cat([pairs[:, 0].repeat(8), pairs[:, 1].repeat(8)])[None].to(device, dtype)


def assert_special_gradients(grad, gate_up, expected):
    """Equal to the definition's gradient in float32, except where that depends on the release or overflows on its way.

    At a bound, where PyTorch's releases differ, the gradient is 0.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    assert not grad_gate[gate == LIMIT].any()
    assert not grad_up[up.abs() == LIMIT].any()
    overflows = gate == -torch.finfo(gate.dtype).max
    is_compared = torch.cat([(gate != LIMIT) & ~overflows, up.abs() != LIMIT], dim=-1)
    torch.testing.assert_close(grad[is_compared], expected.to(grad.dtype)[is_compared], equal_nan=True)


def kernel_formula(gate_up, alpha, limit):
    """What the kernel computes, step by step in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up > limit, limit, up)
    up = torch.where(up < -limit, -limit, up)
    return ((up + 1) * (gate * torch.sigmoid(alpha * gate))).to(gate_up.dtype)


def kernel_backward_formula(grad_out, gate_up, alpha, limit):
    raw_gate, raw_up = gate_up.float().chunk(2, dim=-1)
    grad = grad_out.float()
    gate = torch.where(raw_gate > limit, limit, raw_gate)
    up = torch.where(raw_up > limit, limit, raw_up)
    up = torch.where(up < -limit, -limit, up)
    share = torch.sigmoid(alpha * gate)
    slope = share + alpha * (gate * (share * (1 - share)))
    grad_gate = torch.where(raw_gate < limit, grad * (up + 1) * slope, 0.0)
    grad_up = torch.where((raw_up > -limit) & (raw_up < limit), grad * (gate * share), 0.0)
    return torch.cat([grad_gate, grad_up], dim=-1).to(gate_up.dtype)


@pytest.fixture
def pretended_kernels(monkeypatch):
    """The kernels' formulas in their place, so that the call around them runs on a CPU."""
    monkeypatch.setattr(swiglu, "kernels_take", lambda *tensors: True)
    for name, formula in (("swiglu_oai", kernel_formula), ("swiglu_oai_backward", kernel_backward_formula)):
        monkeypatch.setattr(torch.ops.minimax_m3_msa_cuda, name, formula, raising=False)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def gradient(function, gate_up, grad_out):
    leaf = gate_up.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf, ALPHA, LIMIT), leaf, grad_out)
    return grad


def second_gradients(function, gate_up, grad_out, direction):
    """Gradients of <gradient, direction> with respect to the upstream gradient and the input."""
    leaf, upstream = gate_up.detach().requires_grad_(), grad_out.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf, ALPHA, LIMIT), leaf, upstream, create_graph=True)
    return torch.autograd.grad((grad * direction).sum(), (upstream, leaf))


def test_reference_is_the_formula():
    gate_up = random_inputs(3, 5, 16, dtype=torch.float64, scale=8.0)
    result = swiglu_oai_reference(gate_up, ALPHA, LIMIT)
    for row, out in zip(gate_up.flatten(0, 1).tolist(), result.flatten(0, 1).tolist()):
        for gate, up, value in zip(row[:8], row[8:], out):
            gate, up = min(gate, LIMIT), max(-LIMIT, min(up, LIMIT))
            assert value == pytest.approx((up + 1) * gate / (1 + math.exp(-ALPHA * gate)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_cpu_runs_the_reference(dtype):
    gate_up = random_inputs(5, 32, dtype=dtype)
    assert torch.equal(swiglu_oai(gate_up, ALPHA, LIMIT), swiglu_oai_reference(gate_up, ALPHA, LIMIT))


def test_which_tensors_the_kernel_reads(monkeypatch):
    gate_up = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert swiglu._has_kernel(gate_up)
    assert swiglu._has_kernel(gate_up.view(2, 2, 64))
    assert not swiglu._has_kernel(gate_up[:0])
    assert swiglu._has_kernel(gate_up[:, 16:48]), "rows of a wider tensor"
    assert not swiglu._has_kernel(gate_up[:, 1:33]), "no multiple of 16 bytes"
    assert not swiglu._has_kernel(gate_up[:, :24]), "halves of 12 elements"
    assert not swiglu._has_kernel(gate_up.T)
    assert not swiglu._has_kernel(gate_up.view(2, 2, 64)[..., :32])
    assert not swiglu._has_kernel(gate_up.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_of_the_kernels_formula(dtype):
    """NaN and infinity go where they go in the definition, and clamps pass the gradients that PyTorch's pass."""
    gate_up = special_pairs(dtype)
    in_float32 = gate_up.float()
    expected = swiglu_oai_reference(in_float32, ALPHA, LIMIT).to(dtype)
    torch.testing.assert_close(kernel_formula(gate_up, ALPHA, LIMIT), expected, equal_nan=True)
    for value in (1.0, 0.0, math.nan):
        grad_out = torch.full_like(expected, value)
        expected_grad = gradient(swiglu_oai_reference, in_float32, grad_out.float())
        assert_special_gradients(kernel_backward_formula(grad_out, gate_up, ALPHA, LIMIT), gate_up, expected_grad)


@pytest.mark.usefixtures("pretended_kernels")
class TestCall:
    """The operator around the kernels."""

    def test_opcheck(self):
        for shape in ((7, 32), (2, 3, 16), (0, 16)):
            gate_up = random_inputs(*shape).requires_grad_()
            torch.library.opcheck(torch.ops.minimax_m3_fused.swiglu_oai.default, (gate_up, ALPHA, LIMIT))
            grad_out = random_inputs(*shape[:-1], shape[-1] // 2).requires_grad_()
            args = (grad_out, gate_up, ALPHA, LIMIT)
            torch.library.opcheck(torch.ops.minimax_m3_fused.swiglu_oai_backward.default, args)

    @pytest.mark.parametrize("shape", [(7, 32), (2, 3, 16), (16,)], ids=str)
    def test_derivatives(self, shape):
        gate_up, half = random_inputs(*shape), (*shape[:-1], shape[-1] // 2)
        grad_out, direction = random_inputs(*half, seed=1), random_inputs(*shape, seed=2)
        exact = [tensor.double() for tensor in (gate_up, grad_out, direction)]
        assert relative_error(swiglu_oai(gate_up, ALPHA, LIMIT), swiglu_oai_reference(exact[0], ALPHA, LIMIT)) < 1e-6
        grad = gradient(swiglu_oai, gate_up, grad_out)
        assert relative_error(grad, gradient(swiglu_oai_reference, *exact[:2])) < 1e-6
        second = second_gradients(swiglu_oai, gate_up, grad_out, direction)
        for actual, expected in zip(second, second_gradients(swiglu_oai_reference, *exact)):
            assert relative_error(actual, expected) < 1e-5

    def test_a_gradient_that_is_one_number_expanded(self):
        leaf = random_inputs(3, 16).requires_grad_()
        swiglu_oai(leaf, ALPHA, LIMIT).sum().backward()
        assert torch.equal(leaf.grad, kernel_backward_formula(torch.ones(3, 8), leaf.detach(), ALPHA, LIMIT))

    def test_without_gradients_no_operator_of_autograd_is_called(self, monkeypatch):
        monkeypatch.setattr(torch.ops.minimax_m3_fused, "swiglu_oai", None)
        leaf = random_inputs(3, 16).requires_grad_()
        with torch.no_grad():
            assert not swiglu_oai(leaf, ALPHA, LIMIT).requires_grad
        swiglu_oai(leaf.detach(), ALPHA, LIMIT)


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 17, 1000])
    @pytest.mark.parametrize("width", [8, 40, 1024, 1032, 3072])
    def test_values_and_gradients(self, width, tokens, dtype):
        gate_up = random_inputs(tokens, 2 * width, dtype=dtype, seed=tokens + width, device="cuda")
        grad_out = random_inputs(tokens, width, dtype=dtype, seed=1, device="cuda")
        assert swiglu._has_kernel(gate_up)
        exact = gate_up.double(), grad_out.double()
        torch.empty(tokens, width, dtype=dtype, device="cuda").fill_(math.nan)  # the output lies in this memory
        out = swiglu_oai(gate_up, ALPHA, LIMIT)
        assert relative_error(out, swiglu_oai_reference(exact[0], ALPHA, LIMIT)) < TOLERANCES[dtype]
        assert torch.equal(out, swiglu_oai(gate_up, ALPHA, LIMIT))
        expected = gradient(swiglu_oai_reference, *exact)
        torch.empty_like(gate_up).fill_(math.nan)
        grad = gradient(swiglu_oai, gate_up, grad_out)
        assert relative_error(grad, expected) < TOLERANCES[dtype]
        stepwise = gradient(swiglu_oai_reference, gate_up, grad_out)
        assert relative_error(grad, expected) <= 1.5 * relative_error(stepwise, expected) + 1e-7
        assert torch.equal(grad, gradient(swiglu_oai, gate_up, grad_out))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_special_values(self, dtype):
        gate_up = special_pairs(dtype, "cuda")
        in_float32 = gate_up.float()
        expected = swiglu_oai_reference(in_float32, ALPHA, LIMIT).to(dtype)
        torch.testing.assert_close(swiglu_oai(gate_up, ALPHA, LIMIT), expected, equal_nan=True)
        for value in (1.0, 0.0, math.nan):
            grad_out = torch.full_like(expected, value)
            expected_grad = gradient(swiglu_oai_reference, in_float32, grad_out.float())
            assert_special_gradients(gradient(swiglu_oai, gate_up, grad_out), gate_up, expected_grad)

    @pytest.mark.parametrize("limit", [6.99, 7.02, 1e30, math.inf])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_limits_that_are_no_elements(self, limit, dtype):
        """The limit is rounded to the dtype: next to it, the same elements get a gradient as in the definition."""
        near = torch.linspace(6.9, 7.1, 64, device="cuda", dtype=dtype)
        gate_up = torch.cat([near, -near, near, -near])[None]
        grad_out = torch.ones(1, 128, dtype=dtype, device="cuda")
        grads = []
        for function in (swiglu_oai, swiglu_oai_reference):
            leaf = gate_up.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, ALPHA, limit), leaf, grad_out)[0])
        is_compared = gate_up.abs() != torch.tensor(limit, dtype=dtype)
        assert torch.equal((grads[0] == 0)[is_compared], (grads[1] == 0)[is_compared])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_of_a_wider_tensor(self, dtype):
        wide = random_inputs(17, 256, dtype=dtype, device="cuda")
        gate_up, grad_out = wide[:, 64:192], random_inputs(17, 64, dtype=dtype, seed=1, device="cuda")
        assert swiglu._has_kernel(gate_up)
        alone = gate_up.contiguous()
        assert torch.equal(swiglu_oai(gate_up, ALPHA, LIMIT), swiglu_oai(alone, ALPHA, LIMIT))
        assert torch.equal(gradient(swiglu_oai, gate_up, grad_out), gradient(swiglu_oai, alone, grad_out))
        assert torch.equal(
            gradient(swiglu_oai, alone, grad_out.T.contiguous().T), gradient(swiglu_oai, alone, grad_out)
        )
        odd = random_inputs(65, 64, dtype=dtype, seed=2, device="cuda").flatten()[1 : 1 + 17 * 64].view(17, 64)
        in_odd_place = gradient(swiglu_oai, alone, odd)
        assert torch.equal(in_odd_place, gradient(swiglu_oai, alone, odd.clone()))
        misaligned = wide[:, 1:129]
        expected = swiglu_oai_reference(misaligned, ALPHA, LIMIT)
        assert torch.equal(swiglu_oai(misaligned, ALPHA, LIMIT), expected)

    @pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)], ids=str)
    def test_no_elements(self, shape):
        leaf = torch.zeros(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = swiglu_oai(leaf, ALPHA, LIMIT)
        assert out.shape == (*shape[:-1], shape[-1] // 2)
        out.sum().backward()
        assert leaf.grad.shape == shape

    def test_more_than_2_to_the_31_elements(self, needs_memory):
        needs_memory(16)
        rows, width = 2**19, 2048
        gate_up = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device="cuda")
        gate_up[-1] = random_inputs(2 * width, dtype=torch.bfloat16, device="cuda")
        expected = swiglu_oai(gate_up[-1:].clone(), ALPHA, LIMIT)
        out = swiglu_oai(gate_up, ALPHA, LIMIT)
        assert torch.equal(out[-1:], expected)
        assert not out[:-1].any()

    def test_captured_in_a_graph_and_repeated(self):
        gate_up = random_inputs(3, 128, dtype=torch.bfloat16, device="cuda")
        swiglu_oai(gate_up, ALPHA, LIMIT)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = swiglu_oai(swiglu_oai(gate_up, ALPHA, LIMIT), ALPHA, LIMIT)
        gate_up.copy_(random_inputs(3, 128, dtype=torch.bfloat16, seed=1, device="cuda"))
        graph.replay()
        assert torch.equal(captured, swiglu_oai(swiglu_oai(gate_up, ALPHA, LIMIT), ALPHA, LIMIT))

    def test_second_derivatives(self):
        gate_up, grad_out = random_inputs(5, 64, device="cuda"), random_inputs(5, 32, seed=1, device="cuda")
        direction = random_inputs(5, 64, seed=2, device="cuda")
        exact = [tensor.double() for tensor in (gate_up, grad_out, direction)]
        second = second_gradients(swiglu_oai, gate_up, grad_out, direction)
        for actual, expected in zip(second, second_gradients(swiglu_oai_reference, *exact)):
            assert relative_error(actual, expected) < 1e-5

    def test_opcheck(self):
        gate_up = random_inputs(7, 32, device="cuda").requires_grad_()
        grad_out = random_inputs(7, 16, seed=1, device="cuda").requires_grad_()
        torch.library.opcheck(torch.ops.minimax_m3_fused.swiglu_oai.default, (gate_up, ALPHA, LIMIT))
        args = (grad_out, gate_up, ALPHA, LIMIT)
        torch.library.opcheck(torch.ops.minimax_m3_fused.swiglu_oai_backward.default, args)
