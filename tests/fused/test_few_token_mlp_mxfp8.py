"""MLPs of up to four tokens with MXFP8 weights, whose kernels are their own: unusual numbers, memory and launches."""

import threading

import pytest
import torch
from torch import nn

from modeling_minimax_m3.fused.few_tokens import mlp, mlp_reference
from modeling_minimax_m3.mxfp8 import GROUP_SIZE, Mxfp8Tensors, dequantize_mxfp8

from .few_token_cases import ALPHA, LIMIT, captured, on_gpu, random
from .norm_cases import relative_error
from .test_few_tokens_mxfp8 import numbers, weight_of

pytestmark = on_gpu

TOKENS = [1, 2, 3, 4]
HALVED = (0.0, 3e38)  # alpha and limit that make gate / 2 of a gate whose `up` is 0
SIZES = [(1, 256), (4, 8192), (2, 512), (4, 6144)]  # tokens, width: of threads side by side
SCALES = 27  # of the 135 that kernels take, in one weight


def zeros(*shape):
    return Mxfp8Tensors(
        torch.zeros(shape, dtype=torch.float8_e4m3fn, device="cuda"),
        torch.full((*shape[:-1], shape[-1] // GROUP_SIZE), 127, dtype=torch.uint8, device="cuda"),
    )


def gate_alone(weight):
    """A gate and up projection whose second half is 0."""
    return Mxfp8Tensors(*(torch.cat(pair) for pair in zip(weight, zeros(*weight.values.shape), strict=True)))


def mlp_of(hidden, width, seed=0):
    shapes = (2 * width, hidden), (hidden, width)
    return [weight_of(*shape, seed=seed + i, device="cuda") for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("first_scale", range(0, 135, SCALES))
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_ordinary_value_with_every_scale(tokens, first_scale):
    """The numbers of `dequantize_mxfp8`, bit by bit, subnormal ones too: one in each row, any place, the rest 0."""
    rows, width = 256 * SCALES, 256
    down, index = zeros(rows, width), torch.arange(rows, device="cuda")
    column = torch.randint(0, width, (rows,), device="cuda")
    down.values.view(torch.uint8)[index, column] = (index % 256).to(torch.uint8)
    down.scales[index, column // GROUP_SIZE] = (first_scale + index // 256).to(torch.uint8)
    gate = zeros(width, rows)
    gate.values[:, 0] = 2  # all activations are 1
    x = torch.ones(tokens, rows, dtype=torch.bfloat16, device="cuda")
    expected = dequantize_mxfp8(*down).double().sum(1).bfloat16()
    is_number = ~expected.isnan()
    assert is_number.sum() == 254 * SCALES
    for row in mlp(x, gate_alone(gate), down, *HALVED):
        assert torch.equal(row[is_number], expected[is_number])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("powers", [(0, 100, -60, -100), (20, 0, 0, 0)], ids=["tokens", "channels"])
def test_states_of_very_different_sizes(tokens, powers):
    """Each token is as exact as alone, and a large state takes no more than it must from small ones."""
    x = random(tokens, 1024, seed=tokens, device="cuda")
    if powers[0]:
        x[:, ::100] *= 2.0 ** powers[0]
    for row, power in zip(x, powers, strict=False):
        row *= 2.0**power
    gate, down = weight_of(512, 1024, device="cuda"), weight_of(1024, 512, seed=1, device="cuda")
    out = mlp(x, gate_alone(gate), down, *HALVED)
    exact = x.double() @ numbers(gate).T @ numbers(down).T / 2
    for row in range(tokens):
        assert relative_error(out[row], exact[row]) < 6e-3


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_a_state_that_is_not_finite(tokens, value):
    """It spoils its own token alone."""
    x, weights = random(tokens, 1024, seed=tokens, device="cuda"), mlp_of(1024, 512)
    x[0, 300] = value
    out = mlp(x, *weights, ALPHA, LIMIT)
    exact = mlp_reference(x.double(), *map(numbers, weights), ALPHA, LIMIT)
    assert torch.equal(out.isnan(), exact.isnan()) and not out[0].isfinite().any()
    for row in range(1, tokens):
        assert relative_error(out[row], exact[row]) < 2e-2


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_scales_that_begin_anywhere(offset):
    """As in a part of a larger tensor. The kernels of up to four tokens read eight scales at once."""
    x, weights = random(2, 512, device="cuda"), mlp_of(512, 256)
    expected = mlp(x, *weights, ALPHA, LIMIT)
    moved = []
    for values, scales in weights:
        memory = torch.zeros(scales.numel() + offset, dtype=torch.uint8, device="cuda")
        moved.append(Mxfp8Tensors(values, memory[offset:].view_as(scales).copy_(scales)))
    assert relative_error(mlp(x, *moved, ALPHA, LIMIT), expected.double()) < 1e-2


def test_threads_with_other_sizes():
    """They share the limit of a kernel's shared memory: these need less and more than the 48 KB of every kernel."""
    cases = [(random(tokens, 1024, seed=tokens, device="cuda"), mlp_of(1024, width)) for tokens, width in SIZES]
    expected = [mlp(x, *weights, ALPHA, LIMIT) for x, weights in cases]
    torch.cuda.synchronize()
    are_equal, errors = [], []

    def run(number):
        x, weights = cases[number]
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                outputs = [mlp(x, *weights, ALPHA, LIMIT) for _ in range(2000)]
                torch.cuda.current_stream().synchronize()
            are_equal.append(all(torch.equal(out, expected[number]) for out in outputs))
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and are_equal == [True] * len(cases)


@pytest.mark.parametrize("tokens", TOKENS)
def test_layers_behind_each_other_in_a_graph(tokens):
    """Constant weights are read before the kernels before have ended, and so is the list of experts of this layer."""
    hidden, width, experts, top_k, layers = 512, 256, 8, 3, 6
    shapes = (2 * width, hidden), (hidden, width), (experts, 2 * width, hidden), (experts, hidden, width)
    weights = [
        [weight_of(*shape, seed=10 * layer + i, device="cuda") for i, shape in enumerate(shapes)]
        for layer in range(layers)
    ]
    constant = [
        [Mxfp8Tensors(*(nn.Parameter(part, requires_grad=False) for part in weight)) for weight in layer]
        for layer in weights
    ]
    routers = [random(hidden, experts, seed=100 + layer, device="cuda") for layer in range(layers)]
    x = random(tokens, hidden, device="cuda")

    def step(of_layers):
        states, chosen = x, []
        for layer, router in zip(of_layers, routers, strict=True):
            shares, ids = (states[..., None].float() * router.float()).sum(1).softmax(-1).topk(top_k)
            out = mlp(states, *layer[:2], ALPHA, LIMIT, *layer[2:], ids, shares, 2.0)
            states = out / out.float().norm(dim=-1, keepdim=True).to(out.dtype) * hidden**0.5
            chosen.append(ids)
        return states, torch.stack(chosen)

    graph, found = captured(lambda: step(constant))
    seen = set()
    for seed in range(20):
        x.copy_(random(tokens, hidden, seed=seed, device="cuda"))
        graph.replay()
        assert all(map(torch.equal, found, step(weights)))
        seen.add(tuple(found[1].flatten().tolist()))
    assert len(seen) == 20
