"""Products of few tokens, and of groups of rows, beside cuBLAS and PyTorch: `python -m benchmarks.fused_products`.

One GPU, bf16, the released model's sizes, random weights; few tokens also in MXFP8. Few tokens are timed in a CUDA
graph whose calls take turns among several weights, so that no cache holds them. The floor is the time to read the
weights at the rate of a large sum. Groups are the rows of 128 experts that random tokens chose, four each. Each result
is compared with float64.
"""

from functools import partial

import torch
from torch import nn

from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.fused.few_tokens import Weight
from modeling_minimax_m3.fused.swiglu import swiglu_oai_reference
from modeling_minimax_m3.msa import extension
from modeling_minimax_m3.mxfp8 import Mxfp8Tensors, dequantize_mxfp8, quantize_mxfp8

from .gpu import random, require_gpu, time_ms

HIDDEN, WIDTH, EXPERTS, CHOICES = 6144, 3072, 128, 4
ALPHA, LIMIT, SCALE = 1.702, 7.0, 2.5
# name: outputs of the layers that read one input, and its channels
LAYERS = {
    "query, key, value, index": ((8192, 512, 512, 512, 128), HIDDEN),
    "attention output": ((6144,), 8192),
    "dense gate and up": ((24576,), HIDDEN),
    "dense down": ((6144,), 12288),
    "router": ((128,), HIDDEN),
}
TURNS = 6  # sets of weights


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def graph_us(function, calls: int = 24) -> float:
    """Microseconds of a call in a CUDA graph of several; `function` gets the number of the call."""
    function(0)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(0)
        with torch.cuda.graph(graph, stream=stream):
            for call in range(calls):
                function(call)
    return 1e3 * time_ms(graph.replay) / calls


def weights(*shape: int) -> torch.Tensor:
    return nn.Parameter(random(*shape).mul_(0.02), requires_grad=False)


def in_mxfp8(weight: torch.Tensor) -> Mxfp8Tensors:
    return Mxfp8Tensors(*(nn.Parameter(part, requires_grad=False) for part in quantize_mxfp8(weight)))


def number_of_bytes(weight: Weight) -> int:
    return sum(part.nbytes for part in weight) if isinstance(weight, Mxfp8Tensors) else weight.nbytes


def exact(weight: Weight) -> torch.Tensor:
    return (dequantize_mxfp8(*weight) if isinstance(weight, Mxfp8Tensors) else weight).double()


def linear_layers(read_rate: float) -> None:
    for name, (outputs, channels) in LAYERS.items():
        plain = [[weights(rows, channels) for rows in outputs] for _ in range(TURNS)]
        quantized = [[in_mxfp8(weight) for weight in chosen] for chosen in plain]
        for tokens in (1, 2, 4, 8, 16):
            x = random(tokens, channels)

            def cublas(call: int, x=x, sets=plain) -> None:
                for weight in sets[call % TURNS]:
                    nn.functional.linear(x, weight)

            figures = [f"cuBLAS {graph_us(cublas):.1f} us"]
            for form, sets in (("bf16", plain), ("MXFP8", quantized)):

                def ours(call: int, x=x, sets=sets) -> torch.Tensor:
                    return few_tokens._product(x, sets[call % TURNS])

                expected = x.double() @ torch.cat([exact(weight) for weight in sets[0]]).T
                floor = sum(map(number_of_bytes, sets[0])) / read_rate * 1e6
                error = relative_error(ours(0), expected)
                figures.append(f"ours in {form} {graph_us(ours):.1f} (floor {floor:.1f}, error {error:.1e})")
            print(f"{name}, {tokens} tokens: {', '.join(figures)}", flush=True)


def mlp(states: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The definition. All arguments are in float64."""
    return swiglu_oai_reference(states @ gate_up.T, ALPHA, LIMIT) @ down.T


def experts_of_few_tokens(read_rate: float, gate_up: Weight, down: Weight, has_shared: bool) -> None:
    is_quantized = isinstance(gate_up, Mxfp8Tensors)
    plain = weights(2 * WIDTH, HIDDEN), weights(HIDDEN, WIDTH)
    shared: list[Weight] = [in_mxfp8(weight) if is_quantized else weight for weight in plain] if has_shared else []
    shared_gate_up, shared_down = shared or (None, None)
    for tokens in (1, 4, 8, 16):
        x = random(tokens, HIDDEN)
        ids = [torch.rand(tokens, EXPERTS, device="cuda").topk(CHOICES).indices for _ in range(8)]
        shares = torch.rand(tokens, CHOICES, device="cuda")

        def ours(call: int, x=x, ids=ids, shares=shares) -> torch.Tensor:
            chosen = (gate_up, down, ids[call % len(ids)], shares, SCALE)
            return few_tokens.mlp(x, shared_gate_up, shared_down, ALPHA, LIMIT, *chosen)

        states = x.double()
        expected = mlp(states, *map(exact, shared)) if has_shared else torch.zeros_like(states)
        for token in range(tokens):
            for share, expert in zip(shares[token], ids[0][token]):
                expert_weights = [exact(expert_of(weight, int(expert))) for weight in (gate_up, down)]
                expected[token] += SCALE * share.double() * mlp(states[token], *expert_weights)
        hit = sum(len(chosen.unique()) for chosen in ids) / len(ids)
        read = sum(number_of_bytes(weight) * hit / EXPERTS for weight in (gate_up, down))
        read += sum(map(number_of_bytes, shared))
        floor, error = read / read_rate * 1e6, relative_error(ours(0), expected)
        print(
            f"experts{' and shared expert' * has_shared} in {'MXFP8' if is_quantized else 'bf16'}, {tokens} tokens: "
            f"{graph_us(ours):.1f} us, floor {floor:.1f} ({hit:.1f} experts), error {error:.1e}",
            flush=True,
        )


def expert_of(weight: Weight, expert: int) -> Weight:
    return Mxfp8Tensors(*(part[expert] for part in weight)) if isinstance(weight, Mxfp8Tensors) else weight[expert]


def groups(gate_up: torch.Tensor, down: torch.Tensor) -> None:
    ours = torch.ops.minimax_m3_msa_cuda.grouped_product
    theirs = nn.functional.grouped_mm
    for tokens in (1024, 4096, 8192, 16384):
        chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(CHOICES).indices
        ends = torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).int()
        x, states = random(CHOICES * tokens, HIDDEN), random(CHOICES * tokens, WIDTH)
        some = slice(*ends[4:6].tolist())
        gated = partial(ours, x, gate_up, ends, True, ALPHA, LIMIT)
        expected = swiglu_oai_reference(x[some].double() @ gate_up[5].double().T, ALPHA, LIMIT)
        times = {
            "gate and up, gated": time_ms(gated),
            "grouped_mm": time_ms(partial(theirs, x, gate_up.transpose(-2, -1), offs=ends)),
            "down": time_ms(partial(ours, states, down, ends, False, 0.0, 0.0)),
            "grouped_mm of down": time_ms(partial(theirs, states, down.transpose(-2, -1), offs=ends)),
        }
        figures = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
        print(f"groups of {tokens} tokens: {figures}, error {relative_error(gated()[some], expected):.1e}", flush=True)


@torch.no_grad()
def main() -> None:
    require_gpu()
    reason = extension.load(build=True)
    assert reason is None, reason
    torch.manual_seed(0)
    large = random(2**31)
    read_rate = 2 * large.numel() / time_ms(large.sum) * 1e3
    del large
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a sum reads {read_rate / 1e12:.2f} TB/s")
    linear_layers(read_rate)
    gate_up, down = weights(EXPERTS, 2 * WIDTH, HIDDEN), weights(EXPERTS, HIDDEN, WIDTH)
    for has_shared in (False, True):
        experts_of_few_tokens(read_rate, gate_up, down, has_shared)
        experts_of_few_tokens(read_rate, in_mxfp8(gate_up), in_mxfp8(down), has_shared)
    groups(gate_up, down)


if __name__ == "__main__":
    main()
