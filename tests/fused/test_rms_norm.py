"""The RMS norm, alone and behind a residual addition."""

import pytest
import torch

from modeling_minimax_m3.fused import rms_norm as module
from modeling_minimax_m3.fused.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from modeling_minimax_m3.msa import extension

from .norm_cases import (
    EPS,
    exact_rms_norm,
    kernels_on_cpu,
    poison,
    relative_error,
    results_and_gradients,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
DTYPES += [(torch.float16, torch.float32), (torch.float32, torch.float32)]


def make(shape, dtype, weight_dtype, seed=0, device="cpu"):
    """`x`, `residual`, `weight`, and upstream gradients of the norm and of the sum."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(shape, generator=generator) * scale for scale in (1.0, 2.0, 1.0, 1.0)]
    weight = torch.randn(shape[-1], generator=generator) * 0.5
    x, residual, grad_normed, grad_sum = (tensor.to(device, dtype) for tensor in states)
    return x, residual, weight.to(device, weight_dtype), grad_normed, grad_sum


# --- on a CPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_definition(dtype, weight_dtype):
    x, residual, weight, *_ = make((3, 5, 72), dtype, weight_dtype)
    normed = rms_norm(x, weight, EPS)
    assert normed.dtype == dtype
    exact = exact_rms_norm(x.double(), weight.double())
    assert torch.equal(normed, rms_norm_reference(x, weight, EPS))
    assert relative_error(normed, exact) < torch.finfo(dtype).eps
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm_reference(total, weight, EPS))


def test_summands_of_different_dtypes_are_promoted():
    x, residual, weight, *_ = make((4, 64), torch.float32, torch.float32)
    normed, total = add_rms_norm(x, residual.bfloat16(), weight, EPS)
    assert normed.dtype == total.dtype == torch.float32


@pytest.fixture
def emulated():
    with kernels_on_cpu():
        yield torch.ops.minimax_m3_fused


def test_operators_are_registered_as_pytorch_wants_them(emulated):
    x, residual, weight, grad, grad_sum = (
        tensor.requires_grad_() for tensor in make((3, 16), torch.float32, torch.float32)
    )
    torch.library.opcheck(emulated.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(emulated.add_rms_norm.default, (x, residual, weight, EPS))
    for added, needs in ((None, (True, True)), (grad_sum, (True, False)), (grad_sum, (False, True))):
        torch.library.opcheck(emulated.rms_norm_backward.default, (grad, added, x, weight, EPS, *needs))


@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
def test_gradients_of_gradients(emulated, trained):
    x, residual, weight, *upstream = make((3, 16), torch.float32, torch.float32)
    inputs = [tensor.requires_grad_(is_trained) for tensor, is_trained in zip((x, residual, weight), trained)]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def both_orders(function):
        outputs = function(*inputs, EPS)
        loss = sum((output.square() * grad).sum() for output, grad in zip(outputs, upstream))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), leaves)

    for found, expected in zip(both_orders(emulated.add_rms_norm), both_orders(add_rms_norm_reference)):
        assert relative_error(found, expected.double()) < 1e-5


def test_gradient_without_that_of_the_sum(emulated):
    x, _, weight, grad, _ = make((3, 16), torch.float32, torch.float32)
    found = results_and_gradients(lambda *args: emulated.rms_norm(*args, EPS), (x, weight), (grad,))
    expected = results_and_gradients(lambda *args: rms_norm_reference(*args, EPS), (x, weight), (grad,))
    for ours, reference in zip(found, expected):
        torch.testing.assert_close(ours, reference)


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The kernels are there; a call that does not run on them fails."""
    reason = extension.load(build=True)
    assert reason is None, reason

    def fail(*args):
        raise AssertionError("the definition ran in place of the kernel")

    monkeypatch.setattr(module, "rms_norm_reference", fail)
    monkeypatch.setattr(module, "add_rms_norm_reference", fail)


def by_pytorch(x, weight):
    """The definition, which the fixture `compiled` does not replace here."""
    return rms_norm_reference(x, weight, EPS)


def sum_by_pytorch(x, residual, weight):
    total = x + residual
    return rms_norm_reference(total, weight, EPS), total


def assert_no_worse(found, pytorch, exact, dtype):
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    for number, (ours, theirs, target) in enumerate(zip(found, pytorch, exact, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, allowed = relative_error(ours, target), 1.5 * relative_error(theirs, target) + floor
        assert error <= allowed, (number, error, allowed)


SHAPES = [(1, 6144), (2, 6144), (3, 8), (17, 64), (1000, 128), (300, 6144), (257, 8192), (2, 16384), (300, 16384)]
SHAPES += [(2, 3, 1000), (1, 8200), (259, 40), (5000, 264)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.gpu
@needs_gpu
def test_kernel(compiled, dtype, weight_dtype, shape, seed):
    x, residual, weight, *upstream = make(shape, dtype, weight_dtype, seed, "cuda")
    with torch.no_grad():
        poison(x)
        normed = rms_norm(x, weight, EPS)
        assert normed.is_contiguous() and normed.dtype == dtype
        assert_no_worse([normed], [by_pytorch(x, weight)], [exact_rms_norm(x.double(), weight.double())], dtype)

    poison(x)
    poison(weight)
    found = results_and_gradients(lambda *args: rms_norm(*args, EPS), (x, weight), upstream[:1])
    pytorch = results_and_gradients(by_pytorch, (x, weight), upstream[:1])
    exact = results_and_gradients(exact_rms_norm, (x, weight), upstream[:1], exactly=True)
    assert_no_worse(found, pytorch, exact, dtype)
    assert torch.equal(found[0], normed)

    poison(x)
    poison(weight)
    found = results_and_gradients(lambda *args: add_rms_norm(*args, EPS), (x, residual, weight), upstream)
    pytorch = results_and_gradients(sum_by_pytorch, (x, residual, weight), upstream)
    assert torch.equal(found[1], x + residual)
    total = found[1]  # rounded, as the norm reads it
    exact_normed, exact_grad, exact_grad_weight = results_and_gradients(
        exact_rms_norm, (total, weight), upstream[:1], exactly=True
    )
    exact_grad += upstream[1].double()
    exact = (exact_normed, total.double(), exact_grad, exact_grad, exact_grad_weight)
    assert_no_worse(found, pytorch, exact, dtype)
    again = results_and_gradients(lambda *args: add_rms_norm(*args, EPS), (x, residual, weight), upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@needs_gpu
def test_rows_with_strides(compiled, dtype):
    whole = make((4, 6, 320), dtype, dtype, device="cuda")[0]
    views = (whole[..., 16:272], whole[:, 1::2, :256], whole.transpose(0, 1)[..., 64:], whole[::2, :1, 8:136])
    for x in views:
        assert not x.is_contiguous()
        residual, weight = torch.randn_like(x), torch.randn(x.shape[-1], device="cuda", dtype=dtype)
        torch.testing.assert_close(rms_norm(x, weight, EPS), by_pytorch(x, weight))
        for summands in ((x, residual), (residual, x)):
            found = add_rms_norm(*summands, weight, EPS)
            torch.testing.assert_close(found, sum_by_pytorch(*summands, weight))
        # Upstream gradients with stride 0, as those of a sum.
        upstream = [torch.ones((), device="cuda", dtype=dtype).expand(x.shape), x]
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight)]
        found = torch.autograd.grad(add_rms_norm(*leaves, EPS), leaves, upstream)
        expected = torch.autograd.grad(sum_by_pytorch(*leaves), leaves, upstream)
        for ours, theirs in zip(found, expected):
            assert relative_error(ours, theirs.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@needs_gpu
def test_calls_that_run_the_definition():
    assert extension.load(build=True) is None
    x, residual, weight, *_ = make((4, 64), torch.bfloat16, torch.bfloat16, device="cuda")
    odd = torch.randn(4, 65, device="cuda")
    calls = [
        (x.double(), weight.double()),
        (x, weight.double()),
        (x.float(), weight),
        (odd, odd[0].contiguous()),
        (odd[:, 1:], weight.float()),  # starts between two multiples of 16 bytes
        (x.t().contiguous().t(), weight),
        (torch.randn(2, 16392, device="cuda"), torch.randn(16392, device="cuda")),
    ]
    for x_of_call, weight_of_call in calls:
        found = rms_norm(x_of_call, weight_of_call, EPS)
        assert torch.equal(found, rms_norm_reference(x_of_call, weight_of_call, EPS))
    normed, total = add_rms_norm(x.float(), residual, weight.float(), EPS)  # PyTorch's sum, and the kernel's norm
    assert torch.equal(total, x.float() + residual)
    assert relative_error(normed, rms_norm_reference(total.double(), weight.double(), EPS)) < 1e-6


@pytest.mark.parametrize("width", [64, 6144])
@pytest.mark.parametrize("count", [16, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@needs_gpu
def test_extreme_values(compiled, dtype, count, width):
    x, residual, weight, *_ = make((count, width), dtype, dtype, device="cuda")
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x[0], residual[0] = 0, 0
    x[1], residual[1] = largest, 0
    x[2], residual[2] = smallest, smallest / 2
    x[3, 5] = float("inf")
    x[4, width - 1] = -float("inf")
    x[5, 7] = float("nan")
    x[6, 9], residual[6, 9] = float("inf"), -float("inf")
    x[7], residual[7] = largest, largest  # the sum overflows
    x[8] *= 2.0**-14
    torch.testing.assert_close(rms_norm(x, weight, EPS), by_pytorch(x, weight), equal_nan=True)
    found, expected = add_rms_norm(x, residual, weight, EPS), sum_by_pytorch(x, residual, weight)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    weight[3] = float("nan")
    torch.testing.assert_close(rms_norm(x, weight, EPS), by_pytorch(x, weight), equal_nan=True)


@pytest.mark.gpu
@needs_gpu
def test_only_the_gradients_that_are_needed(compiled):
    x, residual, weight, *upstream = make((40, 256), torch.bfloat16, torch.bfloat16, device="cuda")
    every = results_and_gradients(lambda *args: add_rms_norm(*args, EPS), (x, residual, weight), upstream)[2:]
    for number in range(3):
        inputs = [x.clone(), residual.clone(), weight.clone()]
        inputs[number].requires_grad_()
        (grad,) = torch.autograd.grad(add_rms_norm(*inputs, EPS), inputs[number], upstream)
        assert torch.equal(grad, every[number])


@pytest.mark.gpu
@needs_gpu
def test_no_rows(compiled):
    x, residual, weight, *upstream = make((2, 0, 64), torch.bfloat16, torch.float32, device="cuda")
    assert rms_norm(x, weight, EPS).shape == x.shape
    found = results_and_gradients(lambda *args: add_rms_norm(*args, EPS), (x, residual, weight), upstream)
    assert [tuple(tensor.shape) for tensor in found] == [(2, 0, 64)] * 4 + [(64,)]
    assert (found[-1] == 0).all()


@pytest.mark.parametrize("count", [1, 500])
@pytest.mark.gpu
@needs_gpu
def test_cuda_graph(compiled, count):
    x, residual, weight, *_ = make((count, 6144), torch.bfloat16, torch.bfloat16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            add_rms_norm(x, residual, weight, EPS)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # each step reads what the one before wrote
            first = add_rms_norm(x, residual, weight, EPS)
            second = add_rms_norm(*first, weight, EPS)
            third = rms_norm(second[1], weight, EPS)
        for seed in range(5):
            x.copy_(make((count, 6144), torch.bfloat16, torch.bfloat16, seed)[0])
            graph.replay()
            expected_first = add_rms_norm(x, residual, weight, EPS)
            torch.cuda.synchronize()
            expected_second = add_rms_norm(*expected_first, weight, EPS)
            torch.cuda.synchronize()
            assert torch.equal(second[0], expected_second[0]) and torch.equal(second[1], expected_second[1])
            assert torch.equal(third, rms_norm(expected_second[1], weight, EPS))


@pytest.mark.gpu
@needs_gpu
def test_gradients_of_gradients_on_a_gpu():
    assert extension.load(build=True) is None
    x, residual, weight, *upstream = make((5, 64), torch.float32, torch.float32, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]

    def both_orders(function):
        outputs = function(*leaves, EPS)
        loss = sum((output.square() * grad).sum() for output, grad in zip(outputs, upstream))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), leaves)

    for found, expected in zip(both_orders(add_rms_norm), both_orders(add_rms_norm_reference)):
        assert relative_error(found, expected.double()) < 1e-5
    operators = torch.ops.minimax_m3_fused
    torch.library.opcheck(operators.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(operators.add_rms_norm.default, (x, residual, weight, EPS))
