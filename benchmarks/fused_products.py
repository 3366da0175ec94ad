"""Products of few tokens, and of groups of rows, beside cuBLAS and PyTorch: `python -m benchmarks.fused_products`.

One GPU, bf16, the released model's sizes, random weights. Few tokens are timed in a CUDA graph whose calls take turns
among several weights, so that no cache holds them; the floor is the time to read the weights at the rate of a large
sum. Groups are the rows of 128 experts that random tokens chose, four each. Each result is compared with float64.
"""

from functools import partial

import torch
from torch import nn

from modeling_minimax_m3.fused.swiglu import swiglu_oai_reference
from modeling_minimax_m3.msa import extension

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
    return random(*shape).mul_(0.02)


def few_token_linear(x: torch.Tensor, sets: list[list[torch.Tensor]], call: int) -> torch.Tensor:
    chosen = sets[call % len(sets)]
    return torch.ops.minimax_m3_msa_cuda.few_token_linear(x, *chosen, *[None] * (5 - len(chosen)), True)


def cublas_linear(x: torch.Tensor, sets: list[list[torch.Tensor]], call: int) -> list[torch.Tensor]:
    return [nn.functional.linear(x, weight) for weight in sets[call % len(sets)]]


def linear_layers(read_rate: float) -> None:
    for name, (outputs, channels) in LAYERS.items():
        sets = [[weights(rows, channels) for rows in outputs] for _ in range(TURNS)]
        for tokens in (1, 2, 4, 8, 16):
            x = random(tokens, channels)
            expected = x.double() @ torch.cat(sets[0]).double().T
            ours, cublas = (graph_us(partial(run, x, sets)) for run in (few_token_linear, cublas_linear))
            floor = 2 * sum(outputs) * channels / read_rate * 1e6
            error = relative_error(few_token_linear(x, sets, 0), expected)
            print(
                f"{name}, {tokens} tokens: ours {ours:.1f} us, cuBLAS {cublas:.1f}, floor {floor:.1f}, "
                f"error {error:.1e}",
                flush=True,
            )


def mlp(states: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    return swiglu_oai_reference(states @ gate_up.double().T, ALPHA, LIMIT) @ down.double().T


def few_token_mlp(x: torch.Tensor, sets: list[torch.Tensor], *tensors: torch.Tensor, call: int) -> torch.Tensor:
    *matrices, shares = tensors
    return torch.ops.minimax_m3_msa_cuda.few_token_mlp(
        x, *matrices, sets[call % len(sets)], shares, SCALE, ALPHA, LIMIT, True
    )


def experts_of_few_tokens(read_rate: float, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    shared = weights(2 * WIDTH, HIDDEN), weights(HIDDEN, WIDTH)
    for tokens in (1, 4, 8, 16):
        x = random(tokens, HIDDEN)
        ids = [torch.rand(tokens, EXPERTS, device="cuda").topk(CHOICES).indices for _ in range(8)]
        shares = torch.rand(tokens, CHOICES, device="cuda")
        run = partial(few_token_mlp, x, ids, *shared, gate_up, down, shares)
        exact = x.double()
        expected = mlp(exact, *shared)
        for token in range(tokens):
            for share, expert in zip(shares[token], ids[0][token]):
                expected[token] += SCALE * share.double() * mlp(exact[token], gate_up[expert], down[expert])
        read = sum(len(chosen.unique()) for chosen in ids) / len(ids) + 1
        floor = read * 3 * HIDDEN * WIDTH * 2 / read_rate * 1e6
        us, error = graph_us(lambda call, run=run: run(call=call)), relative_error(run(call=0), expected)
        print(
            f"experts and shared expert, {tokens} tokens: {us:.1f} us, floor {floor:.1f} ({read - 1:.1f} experts), "
            f"error {error:.1e}",
            flush=True,
        )


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
    experts_of_few_tokens(read_rate, gate_up, down)
    groups(gate_up, down)


if __name__ == "__main__":
    main()
