"""A block of experts on our path and on that of Transformers, beside float64; which blocks take our path."""

import pytest
import torch
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.layers import moe
from modeling_minimax_m3.layers.moe import MiniMaxM3VLSparseMoeBlock

from .expert_cases import on_gpu, random_states, relative_error


def make_block(device="cpu", hidden=64, width=32, num_experts=6, top_k=3, seed=0):
    text = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "shared_intermediate_size": width,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
    }
    config = tiny_config(text=text).text_config
    config._experts_implementation = "grouped_mm"
    block = MiniMaxM3VLSparseMoeBlock(config)
    torch.manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block.to(device, torch.bfloat16)


def block_in_float64(block, tokens, top_k_index):
    """The block's formula for a given choice, expert by expert, with leaves of the names of its parameters."""
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in block.named_parameters()}
    x = tokens.detach().double().requires_grad_()
    scores = (x @ leaves["gate.weight"].T).sigmoid().gather(-1, top_k_index)
    weights = scores / scores.sum(-1, keepdim=True)

    def mlp(states, gate_up, down):
        return block.experts._apply_gate(states @ gate_up.T) @ down.T

    out = mlp(x, leaves["shared_experts.gate_up_proj.weight"], leaves["shared_experts.down_proj.weight"])
    for expert in range(block.experts.num_experts):
        token, choice = torch.nonzero(top_k_index == expert, as_tuple=True)
        of_expert = mlp(x[token], leaves["experts.gate_up_proj"][expert], leaves["experts.down_proj"][expert])
        weighted = block.routed_scaling_factor * weights[token, choice, None] * of_expert
        out = out.index_add(0, token, weighted)
    return out, {"x": x, **leaves}


def run_block(block, tokens, upstream):
    """Output and gradients by name."""
    block.zero_grad()
    x = tokens.clone().requires_grad_()
    out = block(x)
    out.backward(upstream)
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def compare_block(block, tokens, monkeypatch):
    """Our path is as near to float64 as the path of Transformers."""
    upstream = random_states(*tokens.shape, dtype=tokens.dtype, seed=9, device=tokens.device)
    calls = []
    forward = moe.experts_forward
    monkeypatch.setattr(moe, "experts_forward", lambda *args: calls.append(args) or forward(*args))
    actual = run_block(block, tokens, upstream)
    assert len(calls) == 1
    with torch.no_grad():
        # Few tokens have kernels of their own.
        difference = relative_error(block(tokens), actual["out"])
        assert difference < 2e-2
    calls.clear()
    monkeypatch.setattr(moe.many_tokens, "takes_experts", lambda *tensors: False)
    other = run_block(block, tokens, upstream)
    assert not calls
    top_k_index = block.gate(tokens)[2]
    out, leaves = block_in_float64(block, tokens, top_k_index)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.double())
    expected = {"out": out.detach(), **dict(zip(leaves, grads))}
    assert set(expected) == set(actual)
    for name, exact in expected.items():
        # A router that has no choice gets a gradient of rounding errors alone.
        if exact.norm() < 1e-6 * upstream.double().norm():
            continue
        error, other_error = relative_error(actual[name], exact), relative_error(other[name], exact)
        assert error <= 1.5 * other_error + 1e-3, (name, error, other_error)


LOADS = {"balanced": {}, "uneven": {0: 1.0, 1: 0.5, 2: -1.0}, "an idle expert": {3: -9.0}, "a busy expert": {2: 9.0}}


@pytest.mark.usefixtures("pretended_kernels")
@pytest.mark.parametrize("load", LOADS)
def test_block_as_near_as_transformers(load, monkeypatch):
    block = make_block()
    for expert, bias in LOADS[load].items():
        block.gate.e_score_correction_bias[expert] = bias
    compare_block(block, random_states(40, 64, dtype=torch.bfloat16, seed=1), monkeypatch)


@pytest.mark.usefixtures("pretended_kernels")
def test_which_blocks_run_the_kernels(monkeypatch):
    calls = []
    forward = moe.experts_forward
    monkeypatch.setattr(moe, "experts_forward", lambda *args: calls.append(args) or forward(*args))

    def runs(block, tokens):
        calls.clear()
        block(tokens)
        return bool(calls)

    tokens = random_states(20, 64, dtype=torch.bfloat16)
    assert runs(make_block(), tokens)
    assert runs(make_block(), tokens.view(4, 5, 64))
    assert not runs(make_block().float(), tokens.float())
    for name in ("eager", "batched_mm"):  # a GPU's products may stand for those of `batched_mm`, a CPU's do not
        block = make_block()
        block.experts.config._experts_implementation = name
        assert not runs(block, tokens)
    block = make_block()
    seen = []
    block.experts.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert not runs(block, tokens)
    assert seen == [(20, 64)]
    block = make_block()
    nn.utils.parametrize.register_parametrization(block.experts, "down_proj", nn.Identity())
    assert not runs(block, tokens)
    block = make_block()
    block.shared_experts.register_forward_hook(lambda module, args, output: seen.append("shared"))
    assert runs(block, tokens)
    assert seen[-1] == "shared"


@pytest.mark.usefixtures("pretended_kernels")
def test_adapters_of_experts_run_as_before():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"block": make_block()})
    options = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    block = adapted.base_model.model["block"]
    assert block._weights_of_experts() is None


class TestBlockOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("load", LOADS)
    @pytest.mark.parametrize("tokens", [1, 3, 40, 1000])
    def test_as_near_as_transformers(self, tokens, load, monkeypatch):
        block = make_block("cuda", hidden=256, width=128, num_experts=8)
        for expert, bias in LOADS[load].items():
            block.gate.e_score_correction_bias[expert] = bias
        compare_block(block, random_states(tokens, 256, dtype=torch.bfloat16, seed=1, device="cuda"), monkeypatch)

    def test_all_tokens_on_one_expert(self, monkeypatch):
        block = make_block("cuda", hidden=256, width=128, num_experts=8, top_k=1)
        block.gate.e_score_correction_bias[5] = 9.0
        compare_block(block, random_states(500, 256, dtype=torch.bfloat16, seed=1, device="cuda"), monkeypatch)

    def test_two_runs_are_equal(self):
        block = make_block("cuda", hidden=256, width=128)
        tokens = random_states(300, 256, dtype=torch.bfloat16, device="cuda")
        upstream = random_states(300, 256, dtype=torch.bfloat16, seed=1, device="cuda")
        first, second = (
            {name: tensor.clone() for name, tensor in run_block(block, tokens, upstream).items()} for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

    @torch.no_grad()
    def test_captured_in_a_graph_and_repeated(self):
        if torch.cuda.get_device_capability()[0] not in (9, 10):
            pytest.skip("the grouped product reads values on the host")
        block = make_block("cuda", hidden=256, width=128)
        tokens = random_states(100, 256, dtype=torch.bfloat16, device="cuda")
        block(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(tokens)
        tokens.copy_(random_states(100, 256, dtype=torch.bfloat16, seed=1, device="cuda"))
        graph.replay()
        assert torch.equal(captured, block(tokens))

    @torch.no_grad()
    def test_memory(self):
        """The arithmetic of the comment at `TOKENS_OF_A_PART`: tokens and gate-and-up outputs of the pairs."""
        block = make_block("cuda", hidden=512, width=256, num_experts=8, top_k=4)
        tokens = random_states(8192, 512, dtype=torch.bfloat16, device="cuda")
        block(tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(tokens)
        of_pairs = 8192 * 4 * (512 + 2 * 256) * 2
        assert torch.cuda.max_memory_allocated() - before < 1.1 * of_pairs
