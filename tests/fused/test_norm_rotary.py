"""The norm of each head and its rotary embedding."""

import pytest
import torch

from modeling_minimax_m3.fused import norm_rotary as module
from modeling_minimax_m3.fused.norm_rotary import norm_rotary, norm_rotary_reference
from modeling_minimax_m3.msa import extension

from .norm_cases import (
    EPS,
    exact_norm_rotary,
    kernels_on_cpu,
    poison,
    relative_error,
    results_and_gradients,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Of the states, the weight, the angles.
DTYPES = [(half, weight, angle) for half in (torch.bfloat16, torch.float16) for weight, angle in (
    (half, half), (torch.float32, torch.float32), (half, torch.float32), (torch.float32, half))]  # fmt: skip
DTYPES.append((torch.float32, torch.float32, torch.float32))
# B, T, heads, D, R
SHAPES = [(1, 1, 64, 128, 64), (1, 1, 4, 128, 64), (2, 1, 1, 128, 128), (1, 17, 3, 64, 32), (2, 3, 5, 64, 64)]
SHAPES += [(3, 7, 2, 72, 48), (1, 5, 3, 8 * 3, 16), (2, 9, 3, 256, 128), (1, 6, 2, 200, 16), (1, 1000, 4, 128, 64)]
SHAPES += [(2, 1100, 32, 128, 64), (1, 1031, 65, 64, 32), (1, 700, 97, 256, 64)]


def make(shape, dtypes, seed=0, device="cpu", shared_angles=False):
    """`states`, `weight`, `cos`, `sin`, and an upstream gradient. The halves of `cos` and of `sin` differ."""
    batch, num_new, heads, head_dim, channels = shape
    generator = torch.Generator().manual_seed(seed)
    states, upstream = (torch.randn(batch, num_new, heads, head_dim, generator=generator) for _ in range(2))
    weight = torch.randn(head_dim, generator=generator) * 0.5
    angles = torch.randn(1 if shared_angles else batch, num_new, channels, generator=generator) * 3
    tensors = zip((states, weight, angles.cos(), angles.sin(), upstream), (*dtypes, dtypes[-1], dtypes[0]))
    return tuple(tensor.to(device, dtype) for tensor, dtype in tensors)


# --- on a CPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_definition(dtypes):
    states, weight, cos, sin, _ = make((2, 5, 3, 72, 48), dtypes)
    out = norm_rotary(states, weight, cos, sin, EPS)
    assert out.dtype == dtypes[0]
    assert torch.equal(out, norm_rotary_reference(states, weight, cos, sin, EPS))
    exact = exact_norm_rotary(*(tensor.double() for tensor in (states, weight, cos, sin)))
    assert relative_error(out, exact) < torch.finfo(dtypes[0]).eps


@pytest.fixture
def emulated():
    with kernels_on_cpu():
        yield torch.ops.minimax_m3_fused


def test_operators_are_registered_as_pytorch_wants_them(emulated):
    states, weight, cos, sin, grad = make((2, 3, 2, 32, 16), (torch.float32,) * 3)
    leaves = [tensor.requires_grad_() for tensor in (grad, states, weight)]
    torch.library.opcheck(emulated.norm_rotary.default, (*leaves[1:], cos, sin, EPS))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(emulated.norm_rotary_backward.default, (*leaves, cos, sin, EPS, *needs))


def both_orders(function, leaves, cos, sin, upstream):
    loss = (function(*leaves, cos, sin, EPS).square() * upstream).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    return *grads, *torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), leaves)


def test_gradients_of_gradients(emulated):
    states, weight, *others = make((2, 3, 2, 32, 16), (torch.float32,) * 3)
    leaves = [tensor.requires_grad_() for tensor in (states, weight)]
    expected = both_orders(norm_rotary_reference, leaves, *others)
    for found, target in zip(both_orders(emulated.norm_rotary, leaves, *others), expected):
        assert relative_error(found, target.double()) < 1e-5


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The kernels are there; a call that does not run on them fails."""
    reason = extension.load(build=True)
    assert reason is None, reason

    def fail(*args):
        raise AssertionError("the definition ran in place of the kernel")

    monkeypatch.setattr(module, "norm_rotary_reference", fail)


def assert_no_worse(found, pytorch, exact, dtype):
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    for number, (ours, theirs, target) in enumerate(zip(found, pytorch, exact, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, allowed = relative_error(ours, target), 1.5 * relative_error(theirs, target) + floor
        assert error <= allowed, (number, error, allowed)


def assert_kernel(states, weight, cos, sin, upstream):
    with torch.no_grad():
        poison(states)
        out = norm_rotary(states, weight, cos, sin, EPS)
    assert out.is_contiguous()
    poison(states)
    poison(weight)
    calls = [
        lambda states, weight: norm_rotary(states, weight, cos, sin, EPS),
        lambda states, weight: norm_rotary_reference(states, weight, cos, sin, EPS),
        lambda states, weight: exact_norm_rotary(states, weight, cos.double(), sin.double()),
    ]
    found, pytorch = (results_and_gradients(call, (states, weight), (upstream,)) for call in calls[:2])
    exact = results_and_gradients(calls[2], (states, weight), (upstream,), exactly=True)
    assert_no_worse(found, pytorch, exact, states.dtype)
    assert torch.equal(found[0], out)
    again = results_and_gradients(calls[0], (states, weight), (upstream,))
    assert all(torch.equal(one, other) for one, other in zip(found, again))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.gpu
@needs_gpu
def test_kernel(compiled, dtypes, shape):
    for seed in range(2):
        assert_kernel(*make(shape, dtypes, seed, "cuda", shared_angles=seed == 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@needs_gpu
def test_states_with_strides(compiled, dtype):
    _, weight, cos, sin, _ = make((2, 13, 1, 128, 64), (dtype,) * 3, device="cuda")
    projected = torch.randn(2, 13, 11 * 128 + 64, device="cuda").to(dtype)
    wider = torch.randn(2, 13, 4, 192, device="cuda").to(dtype)
    views = (
        projected[..., 64 : 64 + 5 * 128].unflatten(-1, (5, 128)),
        projected[..., -128:].unsqueeze(2),
        wider[..., 32:160],
        wider.transpose(1, 2).contiguous().transpose(1, 2)[..., :128],
    )
    for states in views:
        assert not states.is_contiguous()
        upstream = torch.randn_like(wider[:, :, :1]).expand(*states.shape[:3], 192)[..., 64:]
        calls = (norm_rotary, norm_rotary_reference)
        found, expected = [], []
        for call, results in zip(calls, (found, expected)):
            leaves = [states.detach().requires_grad_(), weight.detach().requires_grad_()]
            out = call(*leaves, cos, sin, EPS)
            results += [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
        for ours, theirs in zip(found, expected):
            assert relative_error(ours, theirs.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@needs_gpu
def test_calls_that_run_the_definition():
    assert extension.load(build=True) is None
    states, weight, cos, sin, _ = make((2, 3, 4, 64, 32), (torch.bfloat16,) * 3, device="cuda")
    calls = [
        (states.double(), weight.double(), cos.double(), sin.double()),
        (states, weight, cos[..., :24].contiguous(), sin[..., :24].contiguous()),
        (states, weight, cos[..., :16], sin[..., :16]),
        (states[..., :60], weight[:60], cos, sin),
        (states.transpose(2, 3).contiguous().transpose(2, 3), weight, cos, sin),
    ]
    for call in calls:
        assert torch.equal(norm_rotary(*call, EPS), norm_rotary_reference(*call, EPS))
    leaf = cos.clone().requires_grad_()
    (grad,) = torch.autograd.grad(norm_rotary(states, weight, leaf, sin, EPS).sum(), leaf)
    assert grad.shape == cos.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@needs_gpu
def test_extreme_values(compiled, dtype):
    states, weight, cos, sin, _ = make((1, 12, 2, 128, 64), (dtype,) * 3, device="cuda")
    states[0, 0] = 0
    states[0, 1] = torch.finfo(dtype).max
    states[0, 2] = torch.finfo(dtype).smallest_normal
    for token, channel in ((3, 0), (4, 31), (5, 32), (6, 64), (7, 127)):
        states[0, token, 0, channel] = float("inf")
    states[0, 8, 1, 40] = float("nan")
    cos[0, 9, 3], sin[0, 10, 35] = float("inf"), float("nan")
    found = norm_rotary(states, weight, cos, sin, EPS)
    expected = norm_rotary_reference(states, weight, cos, sin, EPS)
    assert torch.equal(found.isnan(), expected.isnan())
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, expected, equal_nan=True, **close)


@pytest.mark.gpu
@needs_gpu
def test_only_the_gradients_that_are_needed(compiled):
    states, weight, cos, sin, upstream = make((2, 30, 3, 128, 64), (torch.bfloat16,) * 3, device="cuda")
    every = results_and_gradients(
        lambda states, weight: norm_rotary(states, weight, cos, sin, EPS), (states, weight), (upstream,)
    )[1:]
    for number in range(2):
        leaves = [states.clone(), weight.clone()]
        leaves[number].requires_grad_()
        (grad,) = torch.autograd.grad(norm_rotary(*leaves, cos, sin, EPS), leaves[number], upstream)
        assert torch.equal(grad, every[number])


@pytest.mark.gpu
@needs_gpu
def test_no_tokens(compiled):
    states, weight, cos, sin, upstream = make((2, 0, 3, 64, 32), (torch.bfloat16,) * 3, device="cuda")
    out, grad_states, grad_weight = results_and_gradients(
        lambda states, weight: norm_rotary(states, weight, cos, sin, EPS), (states, weight), (upstream,)
    )
    assert out.shape == grad_states.shape == states.shape
    assert (grad_weight == 0).all()


@pytest.mark.parametrize("num_new", [1, 2000])
@pytest.mark.gpu
@needs_gpu
def test_cuda_graph(compiled, num_new):
    shape, dtypes = (1, num_new, 64, 128, 64), (torch.bfloat16,) * 3
    states, weight, cos, sin, _ = make(shape, dtypes, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            norm_rotary(states, weight, cos, sin, EPS)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the second reads what the first wrote
            first = norm_rotary(states, weight, cos, sin, EPS)
            second = norm_rotary(first, weight, cos, sin, EPS)
        for seed in range(5):
            states.copy_(make(shape, dtypes, seed)[0])
            graph.replay()
            expected = norm_rotary(states, weight, cos, sin, EPS)
            torch.cuda.synchronize()
            assert torch.equal(first, expected)
            assert torch.equal(second, norm_rotary(expected, weight, cos, sin, EPS))


@pytest.mark.gpu
@needs_gpu
def test_gradients_of_gradients_on_a_gpu():
    assert extension.load(build=True) is None
    states, weight, *others = make((2, 3, 2, 64, 32), (torch.float32,) * 3, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (states, weight)]
    expected = both_orders(norm_rotary_reference, leaves, *others)
    for found, target in zip(both_orders(norm_rotary, leaves, *others), expected):
        assert relative_error(found, target.double()) < 1e-5
    torch.library.opcheck(torch.ops.minimax_m3_fused.norm_rotary.default, (*leaves, *others[:2], EPS))
