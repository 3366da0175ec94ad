"""Shared by the tests of the operators for few tokens: inputs, and the definitions in place of the kernels on a CPU."""

import pytest
import torch
from torch.nn import functional as F

from modeling_minimax_m3.fused import attention_input, few_tokens
from modeling_minimax_m3.fused.attention_input import CacheSlots
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8

ALPHA, LIMIT = 1.702, 7.0
EPS = 1e-6

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def random(*shape, seed=0, scale=1.0, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


def _linear(x, *weights_scales_and_whether_they_are_constant):
    weights, scales = (
        weights_scales_and_whether_they_are_constant[:5],
        weights_scales_and_whether_they_are_constant[5:10],
    )
    numbers = [number(*pair, x.dtype) for pair in zip(weights, scales, strict=True) if pair[0] is not None]
    return torch.cat([F.linear(x, weight) for weight in numbers], dim=-1)


def number(values, scales, dtype):
    return values if scales is None else dequantize_mxfp8(values, scales, dtype)


def _mlp(x, *arguments):
    gate_up, down, expert_gate_up, expert_down = map(number, arguments[:4], arguments[4:8], [x.dtype] * 4)
    expert_ids, expert_weights, expert_scale, alpha, limit, _ = arguments[8:]
    experts = (expert_gate_up, expert_down, expert_ids, expert_weights, expert_scale)
    return few_tokens.mlp_reference(x, gate_up, down, alpha, limit, *experts)


def _attention_input(
    projected, query, key, index_query, index_key, cos, sin, eps, length, keys, values, index_keys, norms_are_constant
):
    norms = (query, key) if index_query is None else (query, key, index_query, index_key)
    slots = CacheSlots(length, keys, values, index_keys)
    return attention_input.attention_input_reference(projected, norms, (cos, sin), eps, slots)


def _rotary_table(positions, frequencies, scaling, like):
    return attention_input.rotary_table_reference(like, positions, frequencies, scaling)


FORMULAS = {
    "few_token_linear": _linear,
    "few_token_mlp": _mlp,
    "attention_input": _attention_input,
    "rotary_table": _rotary_table,
}


def record_calls(monkeypatch, functions=None):
    """Lists the kernels that are called; `functions` take their place."""
    calls = []
    namespace = torch.ops.minimax_m3_msa_cuda
    for name in FORMULAS:
        function = functions[name] if functions else getattr(namespace, name)

        def call(*args, name=name, function=function):
            has_experts = name == "few_token_mlp" and args[3] is not None
            calls.append(f"{name} with experts" if has_experts else name)
            return function(*args)

        monkeypatch.setattr(namespace, name, call, raising=False)
    return calls


def pretend_kernels(monkeypatch):
    """Runs the definitions in place of the kernels, on tensors of the CPU. Lists the calls."""
    set_kernels_take(monkeypatch, True)
    return record_calls(monkeypatch, FORMULAS)


def set_kernels_take(monkeypatch, answer):
    for module in (few_tokens, attention_input):
        monkeypatch.setattr(module, "kernels_take", lambda *tensors: answer)


def captured(function):
    """A graph of `function` and what it returned while it was captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out
