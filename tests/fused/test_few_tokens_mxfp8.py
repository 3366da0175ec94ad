"""Few tokens and weights in MXFP8: which calls the kernels take, and the kernels on a GPU."""

import pytest
import torch
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.fused.few_tokens import linear, mlp, mlp_reference, takes_linear, takes_mlp
from modeling_minimax_m3.fused.weight_formats import MXFP8
from modeling_minimax_m3.layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.layers.mxfp8 import Mxfp8Experts, Mxfp8Linear
from modeling_minimax_m3.mxfp8 import GROUP_SIZE, Mxfp8Tensors, dequantize_mxfp8, quantize_mxfp8

from .few_token_cases import ALPHA, LIMIT, captured, on_gpu, pretend_kernels, random
from .norm_cases import poison, relative_error
from .test_few_tokens import choices

TOKENS = [1, 2, 3, 4, 5, 8, 9, 16]


def weight_of(*shape, seed=0, device="cpu"):
    return quantize_mxfp8(random(*shape, seed=seed, scale=3 * shape[-1] ** -0.5, device=device))


def numbers(weight):
    return None if weight is None else dequantize_mxfp8(*weight).double()


def store(layer, name, weight):
    for stored, tensor in zip(layer.stored(name), weight, strict=True):
        stored.data.copy_(tensor)


def layer_of(channels, outputs, seed=0, bias=False):
    layer = Mxfp8Linear(channels, outputs, bias, torch.bfloat16)
    store(layer, "weight", weight_of(outputs, channels, seed=seed))
    return layer.requires_grad_(False)


def plain_layer(channels, outputs):
    return nn.Linear(channels, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def quantized_mlp(mlp_of_layer):
    for name in ("gate_up_proj", "down_proj"):
        rows, columns = getattr(mlp_of_layer, name).weight.shape
        setattr(mlp_of_layer, name, layer_of(columns, rows))
    return mlp_of_layer


def quantized_block():
    config = tiny_config(
        text={"hidden_size": 128, "intermediate_size": 64, "shared_intermediate_size": 64}
    ).text_config
    block = MiniMaxM3VLSparseMoeBlock(config).bfloat16().requires_grad_(False)
    block.gate.weight.copy_(random(*block.gate.weight.shape))
    plain = block.experts
    block.experts = Mxfp8Experts(plain, torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        store(block.experts, name, weight_of(*getattr(plain, name).shape, seed=len(name)))
    quantized_mlp(block.shared_experts)
    return block.eval()


class TestWhatTheKernelsTake:
    """On tensors of a CPU, which the kernels would take if they were a GPU's."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        return pretend_kernels(monkeypatch)

    @pytest.mark.parametrize("tokens", [1, 16])
    def test_layers(self, calls, tokens):
        x, layers = random(tokens, 128), [layer_of(128, 24), layer_of(128, 64, seed=1), layer_of(128, 8, seed=2)]
        for chosen in (layers, layers[:1]):
            assert torch.equal(linear(x, chosen), torch.cat([layer(x) for layer in chosen], dim=-1))
        assert calls == ["few_token_linear"] * 2

    def test_layers_of_both_forms(self, calls):
        """As of attention whose indexer is not quantized: one kernel for each form, outputs in the given order."""
        layers = [layer_of(128, 24), layer_of(128, 8), plain_layer(128, 16), plain_layer(128, 8)]
        x = random(2, 128)
        assert torch.equal(linear(x, layers), torch.cat([layer(x) for layer in layers], dim=-1))
        assert calls == ["few_token_linear"] * 2

    REASONS = {
        "float16": lambda: (random(2, 128, dtype=torch.float16), layer_of(128, 8)),
        "channels": lambda: (random(2, 96), layer_of(96, 8)),
        "many tokens": lambda: (random(17, 128), layer_of(128, 8)),
        "a bias": lambda: (random(2, 128), layer_of(128, 8, bias=True)),
        "a gradient": lambda: (random(2, 128).requires_grad_(), layer_of(128, 8)),
    }

    @pytest.mark.parametrize("reason", REASONS)
    def test_reasons_to_run_the_layer(self, calls, reason):
        x, layer = self.REASONS[reason]()
        assert not takes_linear(x, [layer])
        assert linear(x, [layer]).shape == (len(x), 8)
        assert not calls

    @pytest.mark.parametrize("watch", ["hook", "class", "forward"])
    def test_watched_layers(self, calls, watch):
        layer, x = layer_of(128, 8), random(2, 128)
        if watch == "hook":
            layer.register_forward_hook(lambda *args: None)
        elif watch == "class":
            layer.__class__ = type("Other", (Mxfp8Linear,), {})
        else:
            layer.forward = layer.forward
        assert not takes_linear(x, [layer])

    @pytest.mark.parametrize("tokens", [1, 16])
    def test_dense_mlp(self, calls, tokens):
        layer = quantized_mlp(MiniMaxM3VLDenseMLP(tiny_config(text={"hidden_size": 128}).text_config))
        x = random(tokens, 128)
        out = layer(x)
        assert calls == ["few_token_mlp"]
        layer.register_forward_hook(lambda *args: None)
        layer.down_proj.register_forward_hook(lambda *args: None)
        assert relative_error(out, layer(x).double()) < 2e-2 and len(calls) == 1

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_block(self, calls, tokens):
        block, x = quantized_block(), random(tokens, 128)
        out = block(x)
        assert calls == ["few_token_linear", "few_token_mlp with experts"]
        block.experts.register_forward_hook(lambda *args: None)
        assert relative_error(out, block(x).double()) < 2e-2
        assert calls[2:] == ["few_token_linear", "few_token_mlp"], "the router and the shared expert"

    def test_experts_beside_a_shared_expert_in_another_form(self, calls):
        block, x = quantized_block(), random(3, 128)
        out = block(x)
        calls.clear()
        shared = block.shared_experts
        for name in ("gate_up_proj", "down_proj"):
            weight = nn.Parameter(dequantize_mxfp8(*getattr(shared, name).stored("weight")), requires_grad=False)
            plain = plain_layer(*weight.shape[::-1])
            plain.weight = weight
            setattr(shared, name, plain)
        assert relative_error(block(x), out.double()) < 2e-2
        assert calls == ["few_token_linear", "few_token_mlp"], "the router and the shared expert"

    def test_wrapped_experts(self, calls):
        """What wraps the experts is called, although it passes on questions to them."""
        block = quantized_block()

        class Wrapper(nn.Module):
            def __init__(self, wrapped):
                super().__init__()
                self.wrapped = wrapped

            def __getattr__(self, name):
                return super().__getattr__(name) if name == "wrapped" else getattr(self.wrapped, name)

            def forward(self, *args):
                return 2 * self.wrapped(*args)

        block.experts = Wrapper(block.experts)
        block(random(2, 128))
        assert calls == ["few_token_linear", "few_token_mlp"]

    def test_a_subclass_of_the_experts(self):
        block = quantized_block()
        block.experts.__class__ = type("Others", (Mxfp8Experts,), {})
        assert block._weights_of_experts() is None
        assert issubclass(Mxfp8Experts, MiniMaxM3VLExperts)

    def test_forms_are_not_mixed_in_an_mlp(self):
        x, weight = random(2, 128), weight_of(128, 128)
        assert takes_mlp(x, [weight, weight])
        assert not takes_mlp(x, [weight, dequantize_mxfp8(*weight)])

    def test_scales_of_another_shape(self):
        x, (values, scales) = random(2, 128), weight_of(128, 128)
        for wrong in (scales[:64], scales.T.contiguous(), scales.float(), scales.repeat(1, 2)[:, ::2]):
            assert not few_tokens.takes_weights(x, [Mxfp8Tensors(values, wrong)])


class TestUnusualNumbers:
    """NaN and scales above 2 ** 7 are for the layers' own code, which dequantizes."""

    CHANGES = {
        "NaN": lambda values, scales: values.view(torch.uint8)[5, 6].fill_(0x7F),
        "negative NaN": lambda values, scales: values.view(torch.uint8)[5, 6].fill_(0xFF),
        "large scale": lambda values, scales: scales[5, 1].fill_(135),
        "scale of NaN": lambda values, scales: scales[5, 1].fill_(255),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_they_are_noticed(self, monkeypatch, change):
        calls = pretend_kernels(monkeypatch)
        layer, x = layer_of(128, 8), random(2, 128)
        assert takes_linear(x, [layer])
        with torch.no_grad():
            self.CHANGES[change](*layer.stored("weight"))
        assert not takes_linear(x, [layer])
        torch.testing.assert_close(linear(x, [layer]), layer(x), equal_nan=True)
        assert not calls

    def test_values_are_looked_at_once(self, monkeypatch):
        pretend_kernels(monkeypatch)
        looks = []
        monkeypatch.setattr(few_tokens, "is_ordinary", lambda weight: looks.append(weight) or True)
        layer, x = layer_of(128, 8), random(2, 128)
        for _ in range(3):
            assert takes_linear(x, [layer])
        assert len(looks) == 1
        with torch.no_grad():
            layer.stored("weight").values.copy_(weight_of(8, 128, seed=1).values)
        assert takes_linear(x, [layer])
        assert len(looks) == 2


BFLOAT16 = {"dtype": torch.bfloat16, "device": "cuda"}


def every_value_with_every_scale(scales, device, channels=128):
    """A row for each byte of a value and each byte of a scale below `scales`, in a place of its own. Else 0."""
    rows = 256 * scales
    index = torch.arange(rows, device=device)
    column = torch.randint(0, channels, (rows,), device=device)
    values = torch.zeros(rows, channels, dtype=torch.uint8, device=device)
    values[index, column] = (index % 256).to(torch.uint8)
    exponents = torch.full((rows, channels // GROUP_SIZE), 127, dtype=torch.uint8, device=device)
    exponents[index, column // GROUP_SIZE] = (index // 256).to(torch.uint8)
    return Mxfp8Tensors(values.view(torch.float8_e4m3fn), exponents)


# Hidden size, width, width of experts, experts, choices
MLPS = [(64, 64, 64, 4, 1), (512, 64, 192, 5, 2), (1024, 0, 320, 6, 3), (704, 448, 0, 4, 1), (256, 64, 64, 128, 8)]
MLPS += [(6144, 3072, 3072, 4, 4), (320, 320, 576, 64, 16)]
# Rows of more channels than all warps take at once, and no whole number of times as many; one kind of MLP alone.
MLPS += [(512, 512, 512, 4, 2), (2560, 0, 1536, 5, 3), (1536, 2560, 0, 4, 1), (1024, 512, 1024, 9, 8)]
# More states of four tokens than the shared memory of a thread block holds.
MLPS += [(512, 0, 4096, 9, 8)]
LINEARS = [(64, [8]), (64, [1, 3]), (320, [64, 16, 16, 16, 9]), (6144, [2048, 512, 512]), (8192, [1000])]
LINEARS += [(512, [16]), (1536, [16, 32, 48]), (6144, [8192, 512, 512, 512, 128])]


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("channels", [128, 256])
    @pytest.mark.parametrize("tokens", [1, 4, 5, 16])
    def test_every_ordinary_value_with_every_scale(self, tokens, channels):
        """The numbers of `dequantize_mxfp8`, bit by bit, subnormal ones too."""
        weight = every_value_with_every_scale(135, "cuda", channels)
        expected = dequantize_mxfp8(*weight).double().sum(1).bfloat16()
        out = few_tokens._product(torch.ones(tokens, weight.values.shape[1], **BFLOAT16), [weight])
        is_nan = dequantize_mxfp8(*weight).isnan().any(1)
        assert is_nan.sum() == 2 * 135
        for row in out:
            assert torch.equal(row[~is_nan], expected[~is_nan])

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("channels, outputs", LINEARS, ids=str)
    def test_linear(self, channels, outputs, tokens):
        x = random(tokens, channels, seed=tokens, device="cuda")
        weights = [weight_of(rows, channels, seed=rows, device="cuda") for rows in outputs]
        exact = torch.cat([x.double() @ numbers(weight).T for weight in weights], dim=-1)
        poison(torch.empty_like(exact, dtype=torch.bfloat16))
        out = few_tokens._product(x, weights)
        assert relative_error(out, exact) < 3e-3
        assert torch.equal(out, few_tokens._product(x, weights))

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("sizes", MLPS, ids=str)
    def test_mlp(self, sizes, tokens):
        hidden, width, expert_width, experts, top_k = sizes
        shapes = [(2 * width, hidden), (hidden, width), (experts, 2 * expert_width, hidden)]
        shapes += [(experts, hidden, expert_width)]
        weights = [weight_of(*shape, seed=i, device="cuda") if min(shape) else None for i, shape in enumerate(shapes)]
        x = random(tokens, hidden, seed=tokens, device="cuda")
        ids, shares = choices(tokens, experts, top_k, seed=tokens, device="cuda")
        if not expert_width:
            ids = shares = None
        exact_weights = [numbers(weight) for weight in weights]
        exact_shares = None if shares is None else shares.double()

        def call(function, x, weights, shares):
            return function(x, *weights[:2], ALPHA, LIMIT, *weights[2:], ids, shares, 2.0)

        exact = call(mlp_reference, x.double(), exact_weights, exact_shares)
        poison(torch.empty_like(x))
        out = call(mlp, x, weights, shares)
        assert relative_error(out, exact) < 6e-3
        for row in range(tokens):
            assert relative_error(out[row], exact[row]) < 2e-2
        assert torch.equal(out, call(mlp, x, weights, shares))

    @pytest.mark.parametrize("tokens", [1, 4, 8])
    @pytest.mark.parametrize("powers", [(0, 100, -60, -100), (20, 0, 0, 0)], ids=["tokens", "channels"])
    def test_states_of_very_different_sizes(self, tokens, powers):
        """Each token is as exact as alone, and a large state takes no more than it must from small ones."""
        x = random(tokens, 1024, seed=tokens, device="cuda")
        if powers[0]:
            x[:, ::100] *= 2.0 ** powers[0]
        for row, power in zip(x, powers, strict=False):
            row *= 2.0**power
        weight = weight_of(512, 1024, device="cuda")
        out, exact = few_tokens._product(x, [weight]), x.double() @ numbers(weight).T
        for row in range(tokens):
            assert relative_error(out[row], exact[row]) < 3e-3

    @pytest.mark.parametrize("tokens", [1, 4, 8])
    @pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
    def test_a_state_that_is_not_finite(self, tokens, value):
        """It spoils its own token alone."""
        x = random(tokens, 1024, seed=tokens, device="cuda")
        x[0, 300] = value
        weight = weight_of(512, 1024, device="cuda")
        out, exact = few_tokens._product(x, [weight]), x.float() @ numbers(weight).float().T
        assert torch.equal(out.isfinite(), exact.isfinite())
        for row in range(1, tokens):
            assert relative_error(out[row], exact[row].double()) < 3e-3

    @pytest.mark.parametrize("tokens", [1, 2, 4])
    def test_experts_that_are_none_of_ours(self, tokens):
        """As with expert parallelism: they add zero, also where a whole token has no other."""
        weights = [weight_of(*shape, seed=i, device="cuda") for i, shape in enumerate([(4, 1024, 256), (4, 256, 512)])]
        x = random(tokens, 256, seed=tokens, device="cuda")
        shares = torch.rand(tokens, 3, device="cuda")
        ids = torch.tensor([[-1, 2, 4], [0, 7, 2], [9, -5, 4], [3, 1, 0]], device="cuda")[:tokens]
        for chosen in (ids, torch.full_like(ids, 4)):
            call = (None, None, ALPHA, LIMIT)
            is_ours = (chosen >= 0) & (chosen < 4)
            exact = mlp_reference(
                x.double(), *call, *map(numbers, weights), chosen.where(is_ours, 0), (shares * is_ours).double(), 2.0
            )
            poison(torch.empty_like(x))
            out = mlp(x, *call, *weights, chosen, shares, 2.0)
            for row in range(tokens):
                if exact[row].any():
                    assert relative_error(out[row], exact[row]) < 2e-2
                else:
                    assert not out[row].any()

    @pytest.mark.parametrize("tokens", [1, 3, 16])
    def test_captured_in_a_graph(self, tokens):
        weights = [nn.Parameter(part, requires_grad=False) for part in weight_of(256, 256, device="cuda")]
        weight = Mxfp8Tensors(*weights)
        x = random(tokens, 256, device="cuda")

        def step():
            return few_tokens._product(few_tokens._product(x, [weight]), [weight])

        graph, out = captured(step)
        for seed in range(1, 6):
            x.copy_(random(tokens, 256, seed=seed, device="cuda"))
            graph.replay()
            assert torch.equal(out, step())

    def test_block(self):
        block = quantized_block().cuda()
        for tokens in TOKENS:
            x = random(tokens, 128, seed=tokens, device="cuda")
            assert takes_mlp(x, block.experts.few_token_weights(), *choices(tokens, 4, 2, device="cuda"))
            out = block(x)
            handle = block.experts.register_forward_hook(lambda *args: None)
            expected = block(x)
            handle.remove()
            assert relative_error(out, expected.double()) < 2e-2

    @pytest.mark.parametrize("shape", [None, (32,), (3, 5, 96), (1000, 4128)], ids=str)
    def test_dequantized(self, shape):
        """Bit by bit, NaN and infinity too."""
        weight = every_value_with_every_scale(256, "cuda") if shape is None else weight_of(*shape, device="cuda")
        expected = dequantize_mxfp8(*weight)
        poison(torch.empty_like(expected))
        out = torch.ops.minimax_m3_msa_cuda.dequantize_mxfp8(*weight)
        assert out.dtype == torch.bfloat16 and out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert (
            torch.equal(MXFP8.dequantize(weight, torch.float32), dequantize_mxfp8(*weight, torch.float32)) or not shape
        )

    def test_mismatched_tensors_raise(self):
        x, (values, scales) = random(2, 128, device="cuda"), weight_of(64, 128, device="cuda")
        call = torch.ops.minimax_m3_msa_cuda.few_token_linear
        nothing = [None] * 4
        with pytest.raises(RuntimeError, match="scales"):
            call(x, values, *nothing, scales[:32].contiguous(), *nothing, False)
        with pytest.raises(RuntimeError, match="float8_e4m3fn"):
            call(x, values, *nothing, None, *nothing, False)
        with pytest.raises(RuntimeError, match="all weights or none"):
            call(x, values, values, *nothing[1:], scales, *nothing, False)
        with pytest.raises(RuntimeError, match="bfloat16"):
            call(x.half(), values, *nothing, scales, *nothing, False)


def test_an_answer_is_not_kept_for_other_memory_at_the_same_address():
    """As where memory is freed, and an allocator gives its address out again."""
    memory = bytearray(64 * 64)

    def tensor_there() -> torch.Tensor:
        return torch.frombuffer(memory, dtype=torch.uint8).view(torch.float8_e4m3fn).view(64, 64)

    weight = Mxfp8Tensors(tensor_there(), torch.full((64, 2), 127, dtype=torch.uint8))
    assert few_tokens._is_known_as_ordinary(weight)
    address, version = weight.values.data_ptr(), weight.values._version
    memory[:] = b"\x7f" * len(memory)  # NaN
    weight.values.data = tensor_there()
    assert (weight.values.data_ptr(), weight.values._version) == (address, version)
    assert not few_tokens._is_known_as_ordinary(weight)


def test_an_answer_is_kept_while_nothing_changes(monkeypatch):
    weight = quantize_mxfp8(torch.randn(64, 64))
    assert few_tokens._is_known_as_ordinary(weight)
    monkeypatch.setattr(few_tokens, "is_ordinary", lambda weight: pytest.fail("looked again"))
    assert few_tokens._is_known_as_ordinary(weight)
    monkeypatch.setattr(few_tokens, "is_ordinary", lambda weight: False)
    weight.values[0, 0] = 1.0
    assert not few_tokens._is_known_as_ordinary(weight), "a new version"
    assert not few_tokens._is_known_as_ordinary(weight._replace(scales=weight.scales.clone())), "other scales"
