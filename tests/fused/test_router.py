"""The routing of tokens: its definition, the call of the kernel with its derivatives, and the kernel on a GPU."""

import math

import pytest
import torch

from modeling_minimax_m3.fused import router
from modeling_minimax_m3.fused.router import route, route_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCES = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 2e-6}

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def random_logits(tokens, experts, dtype=torch.float32, seed=0, scale=2.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def random_bias(experts, dtype=torch.float32, seed=99, device="cpu"):
    return random_logits(1, experts, dtype, seed, 0.3, device)[0]


def weights_of(logits, indices):
    """Weights in the dtype of `logits` (of float32 at least)."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().gather(-1, indices)
    return scores / scores.sum(-1, keepdim=True)


def kernel_formula(router_logits, bias, top_k):
    scores = router_logits.float().sigmoid()
    indices = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return weights_of(router_logits, indices), indices


def kernel_backward_formula(grad_weights, router_logits, weights, indices):
    mean = (grad_weights * weights).sum(-1, keepdim=True)
    complement = (-router_logits.float()).sigmoid().gather(-1, indices)
    grads = (weights * (grad_weights - mean) * complement).to(router_logits.dtype)
    return torch.zeros_like(router_logits, memory_format=torch.contiguous_format).scatter(-1, indices, grads)


@pytest.fixture
def pretended_kernels(monkeypatch):
    """The kernels' formulas in their place, so that the call around them runs on a CPU."""
    monkeypatch.setattr(router, "kernels_take", lambda *tensors: True)
    for name, formula in (("route", kernel_formula), ("route_backward", kernel_backward_formula)):
        monkeypatch.setattr(torch.ops.minimax_m3_msa_cuda, name, formula, raising=False)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def second_gradients(logits, grad_weights, direction, weights_function):
    leaf, upstream = logits.detach().requires_grad_(), grad_weights.detach().requires_grad_()
    (grad,) = torch.autograd.grad(weights_function(leaf), leaf, upstream, create_graph=True)
    return torch.autograd.grad((grad * direction).sum(), (upstream, leaf))


def assert_route(logits, bias, top_k):
    """The kernel's choice is the best one, best first, and the weights belong to it. Returns it."""
    tokens = logits.shape[0]
    torch.empty(tokens, top_k, device=logits.device).fill_(math.nan)  # the outputs lie in this memory
    torch.empty(tokens, top_k, device=logits.device, dtype=torch.int64).fill_(987654321)
    weights, indices = route(logits, bias, top_k)
    assert (weights.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert weights.shape == indices.shape == (tokens, top_k)
    assert ((indices >= 0) & (indices < logits.shape[1])).all()
    ordered = indices.sort(dim=-1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an expert was chosen twice"
    ranks = logits.float().sigmoid() + bias
    best = torch.topk(ranks, top_k, dim=-1).values
    torch.testing.assert_close(ranks.gather(-1, indices), best, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(weights, weights_of(logits, indices), rtol=1e-6, atol=1e-7, equal_nan=True)
    return weights, indices


def test_reference_is_the_formula():
    logits, bias = random_logits(20, 9, torch.float64), random_bias(9)
    weights, indices = route_reference(logits, bias, 3)
    for row, row_weights, chosen in zip(logits.tolist(), weights.tolist(), indices.tolist()):
        scores = [1 / (1 + math.exp(-logit)) for logit in row]
        best = sorted(range(9), key=lambda expert: -scores[expert] - bias[expert].item())[:3]
        assert set(chosen) == set(best)
        total = sum(scores[expert] for expert in chosen)
        assert row_weights == pytest.approx([scores[expert] / total for expert in chosen], rel=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_cpu_runs_the_reference(dtype):
    logits, bias = random_logits(11, 12, dtype), random_bias(12, dtype)
    for actual, expected in zip(route(logits, bias, 4), route_reference(logits, bias, 4)):
        assert torch.equal(actual, expected)


def test_which_calls_the_kernel_takes():
    logits, bias = torch.zeros(4, 128, dtype=torch.bfloat16), torch.zeros(128)
    assert router._has_kernel(logits, bias, 4)
    assert router._has_kernel(logits, bias.bfloat16(), 16)
    assert router._has_kernel(logits[:, 1:101], bias[1:101], 8)
    assert not router._has_kernel(logits, bias, 17)
    assert not router._has_kernel(logits[:, :3], bias[:3], 4), "fewer experts than choices"
    assert not router._has_kernel(torch.zeros(4, 513), torch.zeros(513), 4)
    assert not router._has_kernel(logits.double(), bias, 4)
    assert not router._has_kernel(logits, bias.double(), 4)
    assert not router._has_kernel(logits.view(2, 2, 128), bias, 4)
    assert not router._has_kernel(torch.zeros(128, 4).T, bias, 4)


@pytest.mark.usefixtures("pretended_kernels")
class TestCall:
    """The operator around the kernels."""

    def test_opcheck(self):
        for tokens in (0, 1, 5):
            logits, bias = random_logits(tokens, 12).requires_grad_(), random_bias(12)
            torch.library.opcheck(torch.ops.minimax_m3_fused.route.default, (logits, bias, 3))
            weights, indices = kernel_formula(logits.detach(), bias, 3)
            args = (random_logits(tokens, 3, seed=1).requires_grad_(), logits, weights, indices)
            # Of `weights`, which are a function of the logits, the operator gives no gradient.
            torch.library.opcheck(torch.ops.minimax_m3_fused.route_backward.default, args)

    def test_derivatives(self):
        logits, bias = random_logits(7, 12), random_bias(12)
        grad_weights, direction = random_logits(7, 3, seed=1), random_logits(7, 12, seed=2)
        leaf = logits.clone().requires_grad_()
        weights, indices = route(leaf, bias, 3)
        assert not indices.requires_grad
        (grad,) = torch.autograd.grad(weights, leaf, grad_weights)
        exact = logits.double().requires_grad_()
        (expected,) = torch.autograd.grad(weights_of(exact, indices), exact, grad_weights.double())
        assert relative_error(grad, expected) < 1e-5
        second = second_gradients(logits, grad_weights, direction, lambda leaf: route(leaf, bias, 3)[0])
        in_float64 = [tensor.double() for tensor in (logits, grad_weights, direction)]
        expected = second_gradients(*in_float64, lambda leaf: weights_of(leaf, indices))
        for actual, exact in zip(second, expected):
            assert relative_error(actual, exact) < 1e-5

    def test_without_gradients_no_operator_of_autograd_is_called(self, monkeypatch):
        monkeypatch.setattr(torch.ops.minimax_m3_fused, "route", None)
        leaf, bias = random_logits(3, 12).requires_grad_(), random_bias(12)
        with torch.no_grad():
            assert not route(leaf, bias, 3)[0].requires_grad
        route(leaf.detach(), bias, 3)


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 17, 1000])
    @pytest.mark.parametrize(
        ("experts", "top_k"),
        [(1, 1), (4, 2), (8, 8), (16, 16), (100, 4), (128, 4), (129, 8), (256, 8), (300, 5), (384, 16), (512, 1), (509, 7)],
    )  # fmt: skip
    def test_values_and_gradients(self, experts, top_k, tokens, dtype):
        logits = random_logits(tokens, experts, dtype, tokens + experts, device="cuda")
        for bias_dtype in {torch.float32, dtype}:
            bias = random_bias(experts, bias_dtype, device="cuda")
            assert router._has_kernel(logits, bias, top_k)
            weights, indices = assert_route(logits, bias, top_k)
            again = route(logits, bias, top_k)
            assert torch.equal(weights, again[0])
            assert torch.equal(indices, again[1])

        grad_weights = random_logits(tokens, top_k, seed=1, device="cuda")
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        torch.empty_like(logits).fill_(math.nan)
        (grad,) = torch.autograd.grad(route(leaf, bias, top_k)[0], leaf, grad_weights)
        (expected,) = torch.autograd.grad(weights_of(exact, indices), exact, grad_weights.double())
        chosen = torch.zeros_like(grad, dtype=torch.bool).scatter_(-1, indices, True)
        assert not grad[~chosen].any()
        if top_k > 1:  # a single weight is 1, and its gradient 0
            assert relative_error(grad, expected) < TOLERANCES[dtype]
            stepwise = logits.clone().requires_grad_()
            (other,) = torch.autograd.grad(weights_of(stepwise, indices), stepwise, grad_weights)
            assert relative_error(grad, expected) <= 1.5 * relative_error(other, expected) + 1e-6
        (repeated,) = torch.autograd.grad(route(leaf, bias, top_k)[0], leaf, grad_weights)
        assert torch.equal(grad, repeated)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("experts", [7, 128, 250, 512])
    def test_of_equal_scores_the_lowest_id_comes_first(self, experts, dtype):
        generator = torch.Generator().manual_seed(experts)
        logits = torch.randint(-1, 2, (500, experts), generator=generator).to("cuda", dtype)
        logits[0] = 0
        bias = torch.zeros(experts, device="cuda")
        for top_k in (1, 4, 7):
            _, indices = assert_route(logits, bias, top_k)
            assert torch.equal(indices, kernel_formula(logits, bias, top_k)[1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("experts", [12, 128, 300])
    def test_special_values(self, experts, dtype):
        logits = random_logits(9, experts, dtype, device="cuda")
        logits[0] = math.nan
        logits[1] = math.inf
        logits[2] = -math.inf
        logits[3, 5] = math.nan
        logits[4, ::2] = math.nan
        logits[5, 3], logits[5, 4] = math.inf, -math.inf
        logits[6] = torch.finfo(dtype).max
        logits[7] = -torch.finfo(dtype).max
        bias = random_bias(experts, device="cuda")
        assert_route(logits, bias, 4)
        bias[: experts - 2] = -math.inf  # fewer experts than choices are left
        assert_route(logits, bias, 4)
        bias[:] = math.nan
        assert_route(logits, bias, 4)

    def test_gradients_of_special_values(self):
        logits = random_logits(4, 16, device="cuda")
        logits[0, 3], logits[1, :2], logits[2] = math.nan, math.inf, -math.inf
        bias, grads = torch.zeros(16, device="cuda"), []
        for function in (route, route_reference):
            leaf = logits.clone().requires_grad_()
            weights, indices = function(leaf, bias, 4)
            (weights.sum(-1) + weights.square().sum(-1)).sum().backward()
            grads.append((leaf.grad, indices))
        assert grads[0][0][0].gather(-1, grads[0][1][0]).isnan().all()
        torch.testing.assert_close(grads[0][0][[1, 3]], grads[1][0][[1, 3]])
        assert grads[0][0][2].gather(-1, grads[0][1][2]).isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_of_a_wider_tensor(self, dtype):
        wide, bias = random_logits(17, 260, dtype, device="cuda"), random_bias(128, device="cuda")
        for start in (0, 1, 8, 132):
            logits = wide[:, start : start + 128]
            for actual, expected in zip(route(logits, bias, 4), route(logits.clone(), bias, 4)):
                assert torch.equal(actual, expected)
            grads = []
            for rows in (logits, logits.contiguous()):
                leaf = rows.detach().requires_grad_()
                route(leaf, bias, 4)[0].square().sum().backward()
                grads.append(leaf.grad)
            assert torch.equal(*grads)

    def test_no_tokens(self):
        leaf, bias = torch.zeros(0, 128, device="cuda", requires_grad=True), torch.zeros(128, device="cuda")
        weights, indices = route(leaf, bias, 4)
        assert weights.shape == indices.shape == (0, 4)
        weights.sum().backward()
        assert leaf.grad.shape == (0, 128)

    def test_captured_in_a_graph_and_repeated(self):
        logits, bias = random_logits(3, 128, torch.bfloat16, device="cuda"), random_bias(128, device="cuda")
        route(logits, bias, 4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = route(logits, bias, 4)
        logits.copy_(random_logits(3, 128, torch.bfloat16, seed=1, device="cuda"))
        graph.replay()
        for actual, expected in zip(captured, route(logits, bias, 4)):
            assert torch.equal(actual, expected)

    def test_second_derivatives(self):
        logits, bias = random_logits(7, 128, device="cuda"), random_bias(128, device="cuda")
        grad_weights, direction = (
            random_logits(7, 4, seed=1, device="cuda"),
            random_logits(7, 128, seed=2, device="cuda"),
        )
        indices = route(logits, bias, 4)[1]
        second = second_gradients(logits, grad_weights, direction, lambda leaf: route(leaf, bias, 4)[0])
        in_float64 = [tensor.double() for tensor in (logits, grad_weights, direction)]
        for actual, expected in zip(second, second_gradients(*in_float64, lambda leaf: weights_of(leaf, indices))):
            assert relative_error(actual, expected) < 1e-5

    def test_opcheck(self):
        logits, bias = random_logits(7, 128, device="cuda").requires_grad_(), random_bias(128, device="cuda")
        torch.library.opcheck(torch.ops.minimax_m3_fused.route.default, (logits, bias, 4))
        grad_weights = random_logits(7, 4, seed=1, device="cuda").requires_grad_()
        args = (grad_weights, logits, *route(logits.detach(), bias, 4))
        torch.library.opcheck(torch.ops.minimax_m3_fused.route_backward.default, args)
