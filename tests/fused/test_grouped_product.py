"""Our product of groups of rows, beside float64: values, rows of no group, the gated activation, repeats."""

import itertools

import pytest
import torch

from modeling_minimax_m3.fused.experts import (
    ExpertOrder,
    gated_product,
    gathered_product_reference,
    grouped_product,
    plan_reference,
)
from modeling_minimax_m3.fused.swiglu import swiglu_oai_reference
from modeling_minimax_m3.msa import extension, kernel_build

ALPHA, LIMIT = 1.702, 7.0
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
# rows of each group, around the 64 rows of a warpgroup and the 192 of a thread block
COUNTS = (
    [5, 0, 130],
    [64, 65, 128, 129],
    [191, 192, 193, 0, 0, 1],
    [256, 257, 385, 600],
    [0, 0, 700],
)

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def order_of(counts, spare=0):
    """Rows in the order of the groups, and `spare` rows of no group behind them."""
    total = sum(counts) + spare
    rows = torch.arange(total, dtype=torch.int32, device="cuda")[:, None]
    return ExpertOrder(rows, torch.tensor(counts, device="cuda").cumsum(0).int())


def relative_error(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


class TestKernel:
    pytestmark = on_hopper

    @pytest.fixture(autouse=True)
    def needs_kernel(self):
        device = torch.device("cuda", torch.cuda.current_device())
        if extension.kernel_family(device, ("grouped_product",)) == kernel_build.PORTABLE_FAMILY:
            pytest.skip("only Hopper has the kernel")

    @pytest.mark.parametrize("counts", COUNTS, ids=str)
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize(("outputs", "channels"), [(192, 64), (512, 192), (320, 72), (96, 40), (1000, 1024)])
    @pytest.mark.parametrize("is_gated", [False, True])
    def test_values(self, counts, outputs, channels, dtype, is_gated):
        generator = torch.Generator("cuda").manual_seed(sum(counts) + outputs)
        options = {"generator": generator, "device": "cuda"}
        x = torch.randn(sum(counts) + 3, channels, **options).to(dtype)
        weight = torch.randn(len(counts), outputs, channels, **options).to(dtype)
        order = order_of(counts, spare=3)
        torch.full((len(x), outputs), float("nan"), dtype=dtype, device="cuda")  # the output lies in this memory
        kernel = torch.ops.minimax_m3_msa_cuda.grouped_product
        out, again = (kernel(x, weight, order.offsets, is_gated, ALPHA, LIMIT) for _ in range(2))
        ends = [0, *order.offsets.tolist()]
        assert torch.equal(out[: ends[-1]], again[: ends[-1]])
        for group, (start, end) in enumerate(itertools.pairwise(ends)):
            if end > start:
                expected = x[start:end].double() @ weight[group].double().T
                if is_gated:
                    expected = swiglu_oai_reference(expected, ALPHA, LIMIT)
                assert relative_error(out[start:end], expected) < TOLERANCES[dtype], group

    def test_tokens_and_experts_by_a_router(self):
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(500, 256, device="cuda", generator=generator).bfloat16()
        gate_up = torch.randn(16, 384, 256, device="cuda", generator=generator).bfloat16() * 0.1
        ids = torch.rand(500, 16, device="cuda", generator=generator).topk(4, dim=-1).indices
        order = plan_reference(ids, 16)
        with torch.no_grad():
            out = gated_product(x, gate_up, order, ALPHA, LIMIT)
            states = gathered_product_reference(x, gate_up, order)
        assert relative_error(out, swiglu_oai_reference(states.double(), ALPHA, LIMIT)) < 8e-3

    def test_captured_in_a_graph_with_other_groups(self):
        x = torch.randn(400, 128, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(4, 192, 128, device="cuda", dtype=torch.bfloat16)
        order = order_of([100, 100, 100, 100])
        with torch.no_grad():
            grouped_product(x, weight, order)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = grouped_product(x, weight, order)
            order.offsets.copy_(torch.tensor([3, 300, 300, 400]))
            graph.replay()
            assert torch.equal(out, grouped_product(x, weight, order))

    def test_with_gradients_it_is_pytorchs(self):
        x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(2, 192, 128, device="cuda", dtype=torch.bfloat16)
        out = grouped_product(x, weight, order_of([30, 34]))
        out.backward(torch.randn_like(out))
        assert x.grad is not None
