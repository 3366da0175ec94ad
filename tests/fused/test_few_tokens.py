"""Linear layers and MLPs of a few tokens: which calls the kernels take, the definitions, and the kernels on a GPU."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.fused.few_tokens import linear, linear_reference, mlp, mlp_reference, product
from modeling_minimax_m3.layers.moe import (
    MiniMaxM3VLDenseMLP,
    MiniMaxM3VLExperts,
    MiniMaxM3VLSparseMoeBlock,
)

from .few_token_cases import (
    ALPHA,
    LIMIT,
    captured,
    on_gpu,
    pretend_kernels,
    random,
    record_calls,
    set_kernels_take,
)
from .norm_cases import poison, relative_error

TOKENS = [1, 2, 3, 7, 8, 9, 15, 16]
HALVES = [torch.bfloat16, torch.float16]


def layers_of(channels, outputs, dtype=torch.bfloat16, device="cpu", seed=0):
    layers = []
    for number, count in enumerate(outputs):
        layer = nn.Linear(channels, count, bias=False)
        weight = random(count, channels, seed=seed + 17 * number + 1, scale=channels**-0.5, dtype=dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return layers


class Weights(nn.Module):
    """What `mlp` takes besides inputs, alpha and limit. A width of 0 means that there is no such MLP."""

    def __init__(self, hidden, width, expert_width, experts, *, dtype=torch.bfloat16, device="cpu", seed=0):
        super().__init__()

        def weight(*shape, number):
            return random(*shape, seed=seed + number, scale=shape[-1] ** -0.5, dtype=dtype, device=device)

        self.gate_up = self.down = self.expert_gate_up = self.expert_down = None
        if width:
            self.gate_up = weight(2 * width, hidden, number=1) * 3
            self.down = weight(hidden, width, number=2)
        if expert_width:
            self.expert_gate_up = weight(experts, 2 * expert_width, hidden, number=3) * 3
            self.expert_down = weight(experts, hidden, expert_width, number=4)

    def call(self, function, x, ids=None, weights=None, scale=1.0, double=False):
        tensors = [self.gate_up, self.down, self.expert_gate_up, self.expert_down]
        if double:
            tensors = [None if tensor is None else tensor.double() for tensor in tensors]
        if self.expert_gate_up is None:
            ids = weights = None
        return function(x.double() if double else x, *tensors[:2], ALPHA, LIMIT, *tensors[2:], ids, weights, scale)


def choices(tokens, experts, top_k, *, seed=0, device="cpu"):
    """Distinct experts of each token, many of them chosen by several tokens, and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    return ids.to(device), (weights / weights.sum(-1, keepdim=True)).to(device)


class QuantizedLike(torch.Tensor):
    """A subclass, as quantized and sharded weights are."""


class TestWhatTheKernelsTake:
    """On tensors of a CPU, which the kernels would take if they were a GPU's."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        return pretend_kernels(monkeypatch)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 64), (16, 64), (2, 8, 64), (4, 1, 64)], ids=str)
    def test_several_layers(self, calls, shape, dtype):
        x, layers = random(*shape, dtype=dtype), layers_of(64, [32, 1, 7, 64, 5], dtype)
        assert torch.equal(linear(x, layers), torch.cat([layer(x) for layer in layers], dim=-1))
        assert calls == ["few_token_linear"]

    @pytest.mark.parametrize("tokens", [8, 9])
    def test_one_layer(self, calls, tokens):
        x, layers = random(tokens, 64), layers_of(64, [32])
        assert torch.equal(linear(x, layers), layers[0](x))
        assert torch.equal(product(x, layers[0].weight), layers[0](x))
        assert len(calls) == (2 if tokens == 8 else 0)

    @pytest.mark.parametrize("shape", [(0, 64), (17, 64), (2, 9, 64), (3, 0, 64)], ids=str)
    def test_numbers_of_tokens(self, calls, shape):
        x, layers = random(*shape), layers_of(64, [32, 16])
        assert torch.equal(linear(x, layers), linear_reference(x, layers))
        assert not calls

    REASONS = {
        "float32": lambda x, layers: (x.float(), [layer.float() for layer in layers]),
        "six layers": lambda x, layers: (x, layers * 2),
        "a bias": lambda x, layers: (x, [*layers[:2], nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)]),
        "channels": lambda x, layers: (x[:, :48].contiguous(), layers_of(48, [32, 16, 8])),
        "no outputs": lambda x, layers: (x, layers[:1] + layers_of(64, [0])),
        "another class": lambda x, layers: (x, [nn.Sequential(layer) for layer in layers]),
    }

    @pytest.mark.parametrize("reason", REASONS)
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_reasons_to_run_the_definition(self, calls, reason):
        x, layers = self.REASONS[reason](random(2, 64), layers_of(64, [32, 16, 8]))
        assert not few_tokens.takes_linear(x, layers)
        assert torch.equal(linear(x, layers), linear_reference(x, layers))
        assert not calls

    def test_another_dtype(self):
        with pytest.raises(RuntimeError, match="dtype"):
            linear(random(2, 64, dtype=torch.float16), layers_of(64, [32, 16]))

    def test_weights_that_are_not_rows_behind_each_other(self):
        x, layers = random(2, 64), layers_of(64, [32, 16])
        layers[0].weight = nn.Parameter(random(64, 32).T, requires_grad=False)
        assert not few_tokens.takes_linear(x, layers)
        layers[0].weight = nn.Parameter(random(32 * 64 + 1)[1:].view(32, 64), requires_grad=False)
        assert not few_tokens.takes_linear(x, layers), "no multiple of 16 bytes"

    def test_inputs_that_are_not_rows_behind_each_other(self, calls):
        layers = layers_of(64, [32, 16])
        for x in (random(64, 3).T, random(3, 128)[:, 32:96], random(3 * 64 + 1)[1:].view(3, 64)):
            assert torch.equal(linear(x, layers), linear_reference(x.clone(), layers))
        assert len(calls) == 3

    def test_the_kernel_gets_aligned_rows(self, monkeypatch):
        seen = []
        formula = torch.ops.minimax_m3_msa_cuda.few_token_linear
        monkeypatch.setattr(
            torch.ops.minimax_m3_msa_cuda, "few_token_linear", lambda x, *rest: (seen.append(x), formula(x, *rest))[1]
        )
        linear(random(3 * 64 + 1)[1:].view(3, 64), layers_of(64, [32, 16]))
        assert seen[0].is_contiguous() and seen[0].data_ptr() % 16 == 0

    @pytest.mark.parametrize("needs", ["inputs", "weight"])
    def test_gradients(self, calls, needs):
        x, layers = random(2, 64), layers_of(64, [32, 16])
        (x if needs == "inputs" else layers[1].weight).requires_grad_()
        assert linear(x, layers).requires_grad and not calls
        with torch.no_grad():
            linear(x, layers)
        assert len(calls) == 1

    def test_autocast(self, calls):
        x, layers = random(2, 64), layers_of(64, [32, 16])
        with torch.autocast("cpu", torch.float16):
            assert linear(x, layers).dtype == torch.float16
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, layers).dtype == torch.bfloat16
        assert calls

    @pytest.mark.parametrize("watch", ["hook", "pre-hook", "replaced", "parametrized", "compiled"])
    def test_watched_layers(self, calls, watch):
        x, layers = random(2, 64), layers_of(64, [32, 16])
        layer = layers[1]
        if watch == "hook":
            layer.register_forward_hook(lambda module, args, out: out * 2)
        elif watch == "pre-hook":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        elif watch == "replaced":
            layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2
        elif watch == "parametrized":
            parametrization = nn.Identity()
            parametrization.forward = lambda weight: weight * 2
            nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
        else:
            layer.compile(backend=lambda graph, inputs: graph.forward)
            assert not few_tokens.takes_linear(x, layers)
            return
        expected = layers[0](x), nn.functional.linear(x, layers_of(64, [32, 16])[1].weight) * 2
        assert torch.equal(linear(x, layers), torch.cat(expected, dim=-1))
        assert not calls

    def test_adapters(self, calls):
        model = nn.ModuleDict({"a": layers_of(64, [32])[0], "b": layers_of(64, [16], seed=5)[0]})
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["b"], init_lora_weights=False)).eval()
        x, layers = random(2, 64), [adapted.base_model.model["a"], adapted.base_model.model["b"]]
        with torch.no_grad():
            out = linear(x, layers)
            assert torch.equal(out, torch.cat([layer(x) for layer in layers], dim=-1))
            assert not torch.equal(out[:, 32:], layers[1].base_layer(x))
        assert not calls

    def test_definition_of_a_linear_layer_under_a_compiler(self, monkeypatch):
        x, layers = random(2, 64), layers_of(64, [32, 16])
        monkeypatch.setattr(few_tokens, "is_torchdynamo_compiling", lambda: True)
        assert not few_tokens.takes_linear(x, layers)
        assert not few_tokens.takes_weights(x, [layers[0].weight])


def test_tensors_that_a_kernel_cannot_read():
    """Those of a CPU, and subclasses."""
    x, layers = random(2, 64), layers_of(64, [32, 16])
    assert not few_tokens.takes_linear(x, layers)
    layers[0].weight = nn.Parameter(layers[0].weight.data.as_subclass(QuantizedLike), requires_grad=False)
    assert not few_tokens.kernels_take(x, layers[0].weight)
    assert torch.equal(linear(x, layers), linear_reference(x, layers))


def exact_mlp(x, weights, ids, choice_weights, scale):
    """Sums over tokens and experts, one after the other, in float64."""

    def one(token, gate_up, down):
        gate, up = (gate_up.double() @ token).chunk(2)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return down.double() @ (gate / (1 + torch.exp(-ALPHA * gate)) * (up + 1))

    out = []
    for row, token in enumerate(x.double()):
        total = torch.zeros_like(token)
        if weights.gate_up is not None:
            total += one(token, weights.gate_up, weights.down)
        if weights.expert_gate_up is not None:
            for expert, share in zip(ids[row].tolist(), choice_weights[row].tolist()):
                if 0 <= expert < len(weights.expert_gate_up):
                    total += share * scale * one(token, weights.expert_gate_up[expert], weights.expert_down[expert])
        out.append(total)
    return torch.stack(out)


OUTSIDE = torch.tensor([[-1, 4, 2], [0, 2**40, 1], [4, 5, -(2**40)], [3, 1, 2]])


class TestDefinitionOfTheMlp:
    @pytest.mark.parametrize("width, expert_width", [(32, 64), (32, 0), (0, 64)])
    def test_formula(self, width, expert_width):
        weights = Weights(64, width, expert_width, 4, dtype=torch.float64)
        x = random(4, 64, dtype=torch.float64)
        for ids, shares in (choices(4, 4, 3), (OUTSIDE, choices(4, 4, 3)[1])):
            out = weights.call(mlp_reference, x, ids, shares, 2.0)
            torch.testing.assert_close(out, exact_mlp(x, weights, ids, shares, 2.0), rtol=1e-12, atol=1e-12)
            in_float32 = Weights(64, width, expert_width, 4, dtype=torch.float32).call(
                mlp_reference, x.float(), ids, shares, 2.0
            )
            assert relative_error(in_float32, exact_mlp(x.float(), weights, ids, shares, 2.0)) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_layers(self, dtype):
        """Bit for bit what the eager experts and the shared expert compute."""
        block = make_block(dtype, "eager")
        tokens = random(7, 64, dtype=dtype)
        _, shares, ids = block.gate(tokens)
        ids[1, 0] = block.experts.num_experts
        expected = block._combine(tokens, ids, shares)
        experts, shared = block.experts, block.shared_experts
        constants = (experts.swiglu_alpha, experts.swiglu_limit)
        own = (shared.gate_up_proj.weight, shared.down_proj.weight)
        others = (experts.gate_up_proj, experts.down_proj, ids, shares, block.routed_scaling_factor)
        assert torch.equal(mlp_reference(tokens, *own, *constants, *others), expected)
        assert torch.equal(mlp_reference(tokens, *own, *constants), shared(tokens))
        assert mlp_reference(tokens.view(1, 7, 64), *own, *constants, *others).shape == (1, 7, 64)


def make_block(dtype, implementation=None):
    config = tiny_config().text_config
    config._experts_implementation = implementation
    block = MiniMaxM3VLSparseMoeBlock(config)
    for number, parameter in enumerate(block.parameters()):
        parameter.data = random(*parameter.shape, seed=number + 1, scale=parameter.shape[-1] ** -0.5, dtype=dtype)
    return block.eval().requires_grad_(False)


class TestLayers:
    """Which calls of the layers run as kernels."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        return pretend_kernels(monkeypatch)

    def test_block(self, calls):
        block, x = make_block(torch.bfloat16), random(2, 3, 64)
        out = block(x)
        assert calls == ["few_token_linear", "few_token_mlp with experts"]
        calls.clear()
        block.experts.config._experts_implementation = "eager"  # a user's choice
        assert torch.equal(out, block(x))
        assert calls == ["few_token_linear", "few_token_mlp"], "the router and the shared expert"

    def test_dense_mlp(self, calls):
        dense = MiniMaxM3VLDenseMLP(tiny_config().text_config).bfloat16().requires_grad_(False)
        x = random(2, 3, 64)
        out = dense(x)
        assert calls == ["few_token_mlp"]
        dense.down_proj.register_forward_hook(lambda *args: None)
        assert torch.equal(out, dense(x)) and len(calls) == 1

    def test_choices_of_many_tokens(self, calls):
        weights = [torch.zeros(4, 64, 64, dtype=torch.bfloat16)]

        def takes(tokens, choices, dtype=torch.long, shape=None):
            ids, shares = torch.zeros(tokens, choices, dtype=dtype), torch.zeros(tokens, choices)
            return few_tokens.takes_mlp(random(tokens, 64), weights, ids.view(shape or ids.shape), shares)

        assert takes(16, 16)
        assert not takes(16, 17)
        assert not takes(17, 2)
        assert not takes(4, 2, dtype=torch.int32)
        assert not takes(4, 2, shape=(8,))

    def test_one_mlp_of_many_tokens(self, calls):
        weights = [torch.zeros(64, 64, dtype=torch.bfloat16)]
        assert few_tokens.takes_mlp(random(8, 64), weights)
        assert not few_tokens.takes_mlp(random(9, 64), weights)

    def test_a_bias_is_added(self, calls):
        dense = MiniMaxM3VLDenseMLP(tiny_config().text_config).bfloat16().requires_grad_(False)
        x = random(2, 64)
        without = dense(x)
        dense.down_proj = nn.Linear(dense.down_proj.in_features, 64, dtype=torch.bfloat16).requires_grad_(False)
        with_bias = dense(x)
        bias = dense.down_proj.bias.clone()
        dense.down_proj.bias.zero_()
        torch.testing.assert_close(with_bias, dense(x) + bias, rtol=2e-2, atol=2e-2)
        assert calls == ["few_token_mlp"] and without.shape == with_bias.shape

    def test_the_routers_gradient_passes_frozen_experts(self, calls):
        block, x = make_block(torch.bfloat16, "eager"), random(2, 64)
        block.experts.config._experts_implementation = "grouped_mm"
        block.gate.weight.requires_grad_()
        block(x).float().square().sum().backward()
        assert block.gate.weight.grad.any()
        assert calls == ["few_token_mlp"], "the shared expert"
        calls.clear()
        with torch.no_grad():
            block(x)
        assert calls == ["few_token_linear", "few_token_mlp with experts"]

    CHANGES = {
        "hook of the experts": lambda block: block.experts.register_forward_hook(lambda *args: None),
        "hook of the shared expert": lambda block: block.shared_experts.register_forward_pre_hook(lambda *args: None),
        "hook of a projection": lambda block: block.shared_experts.down_proj.register_forward_hook(lambda *args: None),
        "replaced experts": lambda block: setattr(block.experts, "forward", block.experts.forward),
        "experts of another class": lambda block: setattr(
            block.experts, "__class__", type("Others", (MiniMaxM3VLExperts,), {})
        ),
        "strided weights": lambda block: setattr(
            block.experts.down_proj, "data", block.experts.down_proj.data.mT.contiguous().mT
        ),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_watched_blocks(self, calls, change):
        block, x = make_block(torch.bfloat16, "eager"), random(3, 64)
        expected = block(x)
        block.experts.config._experts_implementation = None if change == "strided weights" else "grouped_mm"
        self.CHANGES[change](block)
        calls.clear()
        assert relative_error(block(x), expected.double()) < 2e-2
        assert calls == ["few_token_linear"] + ["few_token_mlp"] * (change != "hook of a projection")


# Channels, then rows of each weight. The last ones are those of a released layer, in part.
LINEARS = [(32, [8]), (32, [1, 3]), (96, [40, 8, 24]), (256, [512]), (288, [64, 16, 16, 16, 9])]
LINEARS += [(2048, [1024, 128, 128]), (6144, [2048, 512, 512, 512, 128]), (6144, [128])]
# Hidden size, width, width of experts, experts, choices
MLPS = [(32, 32, 32, 4, 1), (96, 64, 32, 4, 2), (256, 0, 64, 4, 4), (256, 96, 0, 4, 1), (256, 64, 64, 128, 8)]
MLPS += [(2048, 96, 64, 128, 8), (6144, 3072, 3072, 4, 4), (288, 288, 544, 128, 16)]


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("channels, outputs", LINEARS, ids=str)
    def test_linear(self, channels, outputs, tokens, dtype):
        x = random(tokens, channels, seed=tokens, dtype=dtype, device="cuda")
        weights = [layer.weight for layer in layers_of(channels, outputs, dtype, "cuda")]
        exact = torch.cat([x.double() @ weight.double().T for weight in weights], dim=-1)
        path = torch.cat([nn.functional.linear(x, weight) for weight in weights], dim=-1)
        poison(path)
        out = few_tokens._product(x, weights)
        assert out.dtype == dtype and out.shape == exact.shape
        assert relative_error(out, exact) <= 1.5 * relative_error(path, exact) + 1e-6
        poison(path)
        assert torch.equal(out, few_tokens._product(x, weights))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("sizes", MLPS, ids=str)
    def test_mlp(self, sizes, tokens, dtype):
        hidden, width, expert_width, experts, top_k = sizes
        weights = Weights(hidden, width, expert_width, experts, dtype=dtype, device="cuda")
        x = random(tokens, hidden, seed=tokens, dtype=dtype, device="cuda")
        ids, shares = choices(tokens, experts, top_k, seed=tokens, device="cuda")
        exact = weights.call(mlp_reference, x, ids, shares.double(), 2.0, double=True)
        path = weights.call(mlp_reference, x, ids, shares, 2.0)
        poison(path)
        poison(torch.empty(tokens * (top_k * expert_width * bool(expert_width) + width), dtype=dtype, device="cuda"))
        out = weights.call(mlp, x, ids, shares, 2.0)
        assert out.dtype == dtype and out.shape == exact.shape
        assert relative_error(out, exact) <= 1.5 * relative_error(path, exact) + 1e-6
        for row in range(tokens):  # each token by itself, because one of them may hide in the norm of all
            assert relative_error(out[row], exact[row]) <= 6 * relative_error(path, exact) + 1e-6
        poison(path)
        assert torch.equal(out, weights.call(mlp, x, ids, shares, 2.0))

    @pytest.mark.parametrize("tokens", [1, 2, 5, 9, 16])
    def test_ids_that_are_none_of_ours(self, tokens):
        weights = Weights(256, 64, 64, 8, device="cuda")
        x = random(tokens, 256, device="cuda")
        ids, shares = choices(tokens, 8, 4, device="cuda")
        outside = torch.rand(tokens, 4, device="cuda") < 0.5
        outside[0] = True
        kept = torch.where(outside, 0.0, shares)
        for value in (-1, 8, 9, 2**31, 2**40, -(2**40)):
            out = weights.call(mlp, x, torch.where(outside, value, ids), shares)
            exact = weights.call(mlp_reference, x, ids, kept.double(), double=True)
            assert relative_error(out, exact) < 6e-3
            assert torch.equal(out[0], weights.call(mlp, x, torch.full_like(ids, value), shares)[0])

    def test_a_token_does_not_depend_on_the_others(self):
        """Not on their number within eight, nor on their experts; NaN and infinity stay in their token."""
        weights = Weights(256, 64, 64, 8, device="cuda")
        x = random(8, 256, device="cuda")
        ids, shares = choices(8, 8, 4, device="cuda")
        expected = weights.call(mlp, x, ids, shares)
        for number, value in enumerate((math.nan, math.inf, -math.inf)):
            spoiled = x.clone()
            spoiled[number, 5] = value
            out = weights.call(mlp, spoiled, ids, shares)
            others = torch.arange(8) != number
            torch.testing.assert_close(out[others], expected[others], rtol=1e-2, atol=1e-3)
            assert not out[number].isfinite().all()
        shares[3] = math.nan
        out = weights.call(mlp, x, ids, shares)
        assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()

    @pytest.mark.parametrize("alpha, limit", [(1.702, math.inf), (1.702, 0.25), (0.0, 7.0), (-1.0, 7.0), (50.0, 1e30)])
    def test_constants(self, alpha, limit):
        x = random(3, 96, device="cuda", scale=2.0)
        weights = Weights(96, 64, 0, 4, device="cuda")
        out = mlp(x, weights.gate_up, weights.down, alpha, limit)
        exact = mlp_reference(x.double(), weights.gate_up.double(), weights.down.double(), alpha, limit)
        assert relative_error(out, exact) < 6e-3

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_large_and_zero_inputs(self, dtype):
        weights = Weights(96, 64, 64, 4, dtype=dtype, device="cuda")
        ids, shares = choices(3, 4, 2, device="cuda")
        zeros = torch.zeros(3, 96, dtype=dtype, device="cuda")
        assert not weights.call(mlp, zeros, ids, shares).any()
        x = random(3, 96, dtype=dtype, device="cuda", scale=1e3)  # gates far beyond the range of the exponential
        exact = weights.call(mlp_reference, x, ids, shares.double(), double=True)
        assert relative_error(weights.call(mlp, x, ids, shares), exact) < 6e-3

    @pytest.mark.parametrize("tokens", [1, 3, 16])
    def test_captured_in_a_graph(self, tokens):
        weights = Weights(256, 64, 96, 16, device="cuda")
        linear_weights = [layer.weight for layer in layers_of(256, [256, 40], device="cuda")]
        x = random(tokens, 256, device="cuda")
        ids, shares = choices(tokens, 16, 4, device="cuda")

        def step():
            first = few_tokens._product(x, linear_weights)[:, :256]
            return weights.call(mlp, first, ids, shares)

        graph, out = captured(step)
        for seed in range(1, 6):
            x.copy_(random(tokens, 256, seed=seed, device="cuda"))
            new_ids, new_shares = choices(tokens, 16, 4, seed=seed, device="cuda")
            ids.copy_(new_ids)
            shares.copy_(new_shares)
            graph.replay()
            assert torch.equal(out, step())

    @pytest.mark.parametrize("tokens", [1, 2, 8, 16])
    def test_kernels_behind_each_other(self, tokens):
        """A kernel that starts before the one before it has ended reads nothing that is not there yet."""
        weights = Weights(512, 96, 64, 16, device="cuda")
        linear_weights = [layer.weight for layer in layers_of(512, [512, 8], device="cuda")]
        many = [choices(tokens, 16, 4, seed=seed, device="cuda") for seed in range(200)]
        start = random(tokens, 512, device="cuda")
        buffers = [torch.empty_like(start), *(torch.empty_like(part) for part in many[0])]

        def run(waits):
            x, outs = start, []
            for ids, shares in many:
                for buffer, states in zip(buffers, (x, ids, shares)):
                    buffer.copy_(states)
                x = few_tokens._product(few_tokens._product(buffers[0], linear_weights)[:, :512], linear_weights)
                x = weights.call(mlp, x[:, :512].contiguous(), *buffers[1:], 2.0)
                x = weights.call(mlp, x, *buffers[1:], 2.0)
                x = x / x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3).to(x.dtype)
                outs.append(x)
                if waits:
                    torch.cuda.synchronize()
            return torch.stack(outs)

        expected = run(waits=True)
        assert expected.isfinite().all()
        for _ in range(3):
            assert torch.equal(run(waits=False), expected)

    def test_layers_take_the_kernels(self, monkeypatch):
        block = make_block(torch.bfloat16, "grouped_mm").cuda()
        x = random(3, 64, device="cuda")
        calls = record_calls(monkeypatch)
        out = block(x)
        assert calls == ["few_token_linear", "few_token_mlp with experts"]
        set_kernels_take(monkeypatch, False)
        expected = block(x)
        assert len(calls) == 2
        assert relative_error(out, expected.double()) < 2e-2
