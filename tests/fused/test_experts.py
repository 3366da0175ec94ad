"""The way of tokens to their experts and back: definitions, the calls of the kernels, and the kernels on a GPU."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_minimax_m3.fused import experts
from modeling_minimax_m3.fused.experts import (
    gathered_product,
    gathered_product_reference,
    permute_reference,
    plan,
    plan_reference,
    unpermute,
    unpermute_reference,
)

from .expert_cases import on_gpu, random_ids, random_states, real_rows, relative_error, with_poison

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCES = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 1e-5}
SCALE = 2.5


def naive_sum(expert_out, weights, scale, order, base):
    """`unpermute` in float64, pair by pair."""
    out = torch.zeros(len(weights), expert_out.shape[1], dtype=torch.float64) if base is None else base.double()
    rows = []
    for token, row_of_choice in enumerate(order.rows.tolist()):
        total = out[token]
        for choice, row in enumerate(row_of_choice):
            if row < real_rows(order):
                total = total + scale * weights[token, choice].double() * expert_out[row].double()
        rows.append(total)
    return torch.stack(rows)


def second_gradients(function, inputs, upstream, directions):
    """Derivatives of the gradient along `directions`, with respect to the upstream gradient and the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    upstream = upstream.detach().requires_grad_()
    grads = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
    total = sum((grad * direction).sum() for grad, direction in zip(grads, directions))
    return torch.autograd.grad(total, (upstream, *leaves), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("elsewhere", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_plan_is_a_stable_sort(tokens, elsewhere):
    ids = random_ids(tokens, 3, 5, elsewhere=elsewhere)
    order = plan(ids, 5)
    groups = [expert if 0 <= expert < 5 else 5 for expert in ids.flatten().tolist()]
    pairs = sorted(range(len(groups)), key=lambda pair: groups[pair])
    rows = order.rows.flatten().tolist()
    assert [rows[pair] for pair in pairs] == list(range(len(pairs)))
    assert order.offsets.tolist() == [sum(group <= expert for group in groups) for expert in range(5)]
    assert order.rows.dtype == order.offsets.dtype == torch.int32


@pytest.mark.parametrize("elsewhere", [0.0, 0.4, 1.0])
def test_references_are_the_formulas(elsewhere):
    ids = random_ids(9, 3, 5, elsewhere=elsewhere)
    order = plan_reference(ids, 5)
    x = random_states(9, 8, dtype=torch.float64)
    rows = permute_reference(x, order)
    for token in range(9):
        for row, expert in zip(order.rows[token].tolist(), ids[token].tolist()):
            assert torch.equal(rows[row], x[token] if 0 <= expert < 5 else torch.zeros(8))
    expert_out = with_poison(random_states(27, 8, seed=1, dtype=torch.float64), order)
    weights = random_states(9, 3, seed=2, dtype=torch.float64)
    for base in (None, x):
        inputs = [tensor.clone().requires_grad_() for tensor in (expert_out, weights)]
        out = unpermute_reference(*inputs, SCALE, order, base)
        exact = [tensor.clone().requires_grad_() for tensor in (expert_out, weights)]
        expected = naive_sum(*exact, SCALE, order, base)
        torch.testing.assert_close(out, expected)
        if elsewhere < 1:
            out.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close([leaf.grad for leaf in inputs], [leaf.grad for leaf in exact])


def test_a_cpu_runs_the_references():
    ids, x = random_ids(11, 4, 6), random_states(11, 16)
    order = plan(ids, 6)
    assert all(map(torch.equal, order, plan_reference(ids, 6)))
    weight = random_states(6, 24, 16, seed=1)
    assert torch.equal(gathered_product(x, weight, order), gathered_product_reference(x, weight, order))
    expert_out, weights = random_states(44, 16, seed=2), random_states(11, 4, seed=3)
    actual = unpermute(expert_out, weights, SCALE, order, x)
    assert torch.equal(actual, unpermute_reference(expert_out, weights, SCALE, order, x))


def test_which_calls_the_kernels_take():
    ids, x, weight = random_ids(11, 4, 6), random_states(11, 16), random_states(6, 24, 16)
    order = plan(ids, 6)
    assert experts._has_plan(ids, 6)
    assert not experts._has_plan(ids.int(), 6)
    assert not experts._has_plan(ids[:0], 6)
    assert not experts._has_plan(ids, 513)
    assert not experts._has_plan(ids.repeat(1, 5), 6)
    assert experts._can_gather(x, weight, order)
    assert experts._can_gather(random_states(11, 32)[:, 8:24], weight, order)
    assert not experts._can_gather(random_states(11, 32)[:, 1:17], weight, order)
    assert not experts._can_gather(x.double(), weight.double(), order)
    assert not experts._can_gather(x, weight.bfloat16(), order)
    expert_out, weights = random_states(44, 16), random_states(11, 4)
    assert experts._can_unpermute(expert_out, weights, order, None)
    assert experts._can_unpermute(expert_out, weights, order, x)
    assert not experts._can_unpermute(expert_out, weights, order, x.half())
    assert not experts._can_unpermute(expert_out, weights.double(), order, x)
    assert not experts._can_unpermute(expert_out[:, :12].contiguous(), weights, order, None)
    assert not experts._can_unpermute(expert_out[:, :8], weights, order, None)


@pytest.mark.usefixtures("pretended_kernels")
@pytest.mark.parametrize("elsewhere", [0.0, 0.4, 1.0])
class TestCall:
    """The operators around the kernels."""

    def make(self, elsewhere):
        order = plan(random_ids(9, 3, 5, elsewhere=elsewhere), 5)
        x, weight = random_states(9, 16), random_states(5, 24, 16, seed=1)
        expert_out = with_poison(random_states(27, 16, seed=2), order)
        return order, x, weight, expert_out, random_states(9, 3, seed=3)

    def test_gradients(self, elsewhere):
        order, x, weight, expert_out, weights = self.make(elsewhere)
        base = random_states(9, 16, seed=4)
        cases = (
            (
                lambda x, weight: gathered_product(x, weight, order),
                lambda x, weight: naive_product(x, weight, order),
                (x, weight),
            ),
            (
                lambda out, weights, base: unpermute(out, weights, SCALE, order, base),
                lambda out, weights, base: unpermute_reference(out, weights, SCALE, order, base),
                (expert_out, weights, base),
            ),
        )
        for function, exact_function, inputs in cases:
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            exact = [tensor.double().requires_grad_() for tensor in inputs]
            out, expected = function(*leaves), exact_function(*exact)
            count = real_rows(order) if len(out) == 27 else len(out)
            torch.testing.assert_close(out[:count].double(), expected[:count], rtol=1e-5, atol=1e-5)
            upstream = random_states(*out.shape, seed=5)
            grads = torch.autograd.grad(out, leaves, upstream)
            expected_grads = torch.autograd.grad(expected, exact, upstream.double())
            for grad, expected_grad, leaf in zip(grads, expected_grads, leaves):
                count = real_rows(order) if len(leaf) == 27 else len(leaf)
                torch.testing.assert_close(grad[:count].double(), expected_grad[:count], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
    def test_only_needed_gradients(self, elsewhere, needs):
        order, x, weight, expert_out, weights = self.make(elsewhere)
        out = gathered_product(x.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), order)
        torch.nan_to_num(out).sum().backward()
        assert (x.grad is not None, weight.grad is not None) == needs
        base = random_states(9, 16).requires_grad_()
        out = unpermute(expert_out.requires_grad_(needs[0]), weights.requires_grad_(needs[1]), SCALE, order, base)
        saved = out.grad_fn.saved_tensors
        assert (saved[0] is not None) == needs[1]
        out.sum().backward()
        assert (expert_out.grad is not None, weights.grad is not None) == needs
        assert torch.equal(base.grad, torch.ones_like(base))

    def test_second_derivatives(self, elsewhere):
        order, x, weight, expert_out, weights = self.make(elsewhere)
        expert_out = expert_out.nan_to_num()  # a gradient that must not be read, but is compared here
        real = (torch.arange(27) < real_rows(order))[:, None]
        cases = (
            (
                lambda *inputs: gathered_product(*inputs, order).where(real, 0),
                lambda *inputs: naive_product(*inputs, order),
                (x, weight),
                (27, 24),
            ),
            (
                lambda out, weights: unpermute(out.where(real, 0), weights, SCALE, order),
                lambda out, weights: unpermute_reference(out, weights, SCALE, order),
                (expert_out, weights),
                (9, 16),
            ),
        )
        for function, exact_function, inputs, shape in cases:
            upstream = random_states(*shape, seed=6)
            directions = [random_states(*tensor.shape, seed=7) for tensor in inputs]
            actual = second_gradients(function, inputs, upstream, directions)
            in_float64 = [[tensor.double() for tensor in tensors] for tensors in (inputs, directions)]
            expected = second_gradients(exact_function, in_float64[0], upstream.double(), in_float64[1])
            for one, other in zip(actual, expected):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)

    def test_the_weight_keeps_the_gradient_without_a_copy(self, elsewhere, monkeypatch):
        order, x, weight, *_ = self.make(elsewhere)
        made, product = [], F.grouped_mm

        def noting_product(*args, **kwargs):
            out = product(*args, **kwargs)
            made.append(out.data_ptr())
            return out

        out = gathered_product(x, weight.requires_grad_(), order)
        monkeypatch.setattr(F, "grouped_mm", noting_product)
        torch.nan_to_num(out).sum().backward()
        assert made == [weight.grad.data_ptr()]


def naive_product(x, weight, order):
    """`gathered_product` expert by expert; rows of no expert are 0."""
    rows = permute_reference(x, order)
    ends = order.offsets.tolist()
    starts = [0, *ends[:-1]]
    products = [rows[start:end] @ matrix.T for start, end, matrix in zip(starts, ends, weight)]
    return torch.cat([*products, rows.new_zeros(len(rows) - ends[-1], weight.shape[1])])


@pytest.mark.usefixtures("pretended_kernels")
def test_opcheck():
    order = plan(random_ids(9, 3, 5), 5)
    # PyTorch traces grouped products of bfloat16 only.
    x, weight, grad = (
        random_states(*shape, seed=len(shape), dtype=torch.bfloat16).requires_grad_()
        for shape in ((9, 16), (5, 24, 16), (27, 24))
    )
    expert_out, weights = random_states(27, 16, seed=2).requires_grad_(), random_states(9, 3, seed=3).requires_grad_()
    operators = torch.ops.minimax_m3_fused
    torch.library.opcheck(operators.gathered_product.default, (x, weight, *order))
    torch.library.opcheck(operators.gathered_product_backward.default, (grad, x, weight, *order, True, True))
    for base in (None, random_states(9, 16, seed=5).requires_grad_()):
        torch.library.opcheck(operators.sum_expert_rows.default, (expert_out, weights, SCALE, *order, base))
    args = (random_states(9, 16, seed=6).requires_grad_(), expert_out, weights, SCALE, *order, True, True)
    torch.library.opcheck(operators.sum_expert_rows_backward.default, args)


@pytest.mark.usefixtures("pretended_kernels")
def test_without_gradients_no_operator_of_autograd_is_called(monkeypatch):
    for name in ("gathered_product", "sum_expert_rows"):
        monkeypatch.setattr(torch.ops.minimax_m3_fused, name, None)
    order = plan(random_ids(9, 3, 5), 5)
    x, weight = random_states(9, 16).requires_grad_(), random_states(5, 16, 16, seed=1)
    with torch.no_grad():
        rows = gathered_product(x, weight, order)
        assert not unpermute(rows, random_states(9, 3), SCALE, order, x).requires_grad


# --- on a GPU --------------------------------------------------------------------------------------------------------


def assert_plan(ids, num_experts):
    assert experts._has_plan(ids, num_experts)
    torch.empty(ids.shape, device="cuda", dtype=torch.int32).fill_(-77)  # the rows lie in this memory
    order = plan(ids, num_experts)
    expected = plan_reference(ids, num_experts)
    assert torch.equal(order.offsets, expected.offsets)
    assert torch.equal(order.rows, expected.rows)
    assert order.rows.dtype == order.offsets.dtype == torch.int32
    return order


class TestPlanKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("num_experts", [1, 2, 7, 128, 255, 256, 257, 512])
    @pytest.mark.parametrize(
        ("tokens", "top_k"),
        [(1, 1), (1, 4), (3, 5), (17, 4), (511, 4), (512, 4), (513, 4), (1000, 16), (2049, 1), (32768, 4)],
    )
    def test_is_the_stable_sort(self, tokens, top_k, num_experts):
        for elsewhere in (0.0, 0.3, 1.0):
            ids = random_ids(tokens, top_k, num_experts, tokens + num_experts, elsewhere, "cuda")
            order = assert_plan(ids, num_experts)
            assert all(map(torch.equal, order, plan(ids, num_experts)))

    def test_uneven_loads(self):
        for num_experts in (4, 512):
            assert_plan(torch.full((5000, 4), num_experts - 1, device="cuda"), num_experts)
            assert_plan(torch.zeros(5000, 4, dtype=torch.int64, device="cuda"), num_experts)
            descending = torch.arange(20000, 0, -1, device="cuda").view(5000, 4)
            assert_plan(descending % num_experts, num_experts)
            assert_plan(descending * num_experts // 20001, num_experts)

    def test_many_pairs(self):
        assert_plan(random_ids(2**20, 4, 128, elsewhere=0.1, device="cuda"), 128)
        assert_plan(random_ids(2**20, 8, 512, device="cuda"), 512)

    def test_ids_in_another_layout(self):
        ids = random_ids(4, 1000, 128, device="cuda").T
        assert_plan(ids, 128)


SIZES = [(1, 1, 8), (1, 4, 2048), (2, 3, 6144), (3, 16, 40), (17, 5, 2056), (1000, 4, 1024), (257, 8, 4104)]


class TestRowKernels:
    pytestmark = on_gpu

    def make(self, tokens, top_k, width, dtype, elsewhere=0.2, seed=0):
        order = plan(random_ids(tokens, top_k, 7, seed, elsewhere, "cuda"), 7)
        x = random_states(tokens, width, dtype=dtype, seed=seed + 1, device="cuda")
        expert_out = with_poison(
            random_states(tokens * top_k, width, dtype=dtype, seed=seed + 2, device="cuda"), order
        )
        return order, x, expert_out, random_states(tokens, top_k, seed=seed + 3, device="cuda")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("tokens", "top_k", "width"), SIZES)
    def test_copies(self, tokens, top_k, width, dtype):
        order, x, *_ = self.make(tokens, top_k, width, dtype)
        count = real_rows(order)
        expected = permute_reference(x, order)[:count]
        wide = random_states(tokens, width + 64, dtype=dtype, device="cuda")
        wide[:, 16 : 16 + width] = x
        for rows in (x, wide[:, 16 : 16 + width]):
            torch.empty(tokens * top_k, width, dtype=dtype, device="cuda").fill_(math.nan)
            assert torch.equal(torch.ops.minimax_m3_msa_cuda.gather_tokens(rows, *order)[:count], expected)

    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("tokens", "top_k", "width"), SIZES)
    def test_sums_and_their_gradients(self, tokens, top_k, width, dtype, with_base):
        for seed in range(3):
            order, x, expert_out, weights = self.make(tokens, top_k, width, dtype, seed=10 * seed)
            inputs = (expert_out, weights, x) if with_base else (expert_out, weights)
            real = torch.arange(len(expert_out), device="cuda") < order.offsets[-1]
            exact = [tensor.double().requires_grad_() for tensor in inputs]
            expected = unpermute_reference(*exact[:2], SCALE, order, *exact[2:])
            grad_out = random_states(tokens, width, dtype=dtype, seed=5, device="cuda")
            expected_grads = torch.autograd.grad(expected, exact, grad_out.double())
            results = []
            for function in (unpermute, unpermute, unpermute_reference):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                torch.empty(tokens, width, dtype=dtype, device="cuda").fill_(math.nan)
                out = function(*leaves[:2], SCALE, order, *leaves[2:])
                torch.empty_like(expert_out).fill_(math.nan)
                torch.empty_like(weights).fill_(math.nan)
                grads = torch.autograd.grad(out, leaves, grad_out)
                results.append([out.detach(), grads[0][real], *grads[1:]])
            expected_grads = [expected_grads[0][real], *expected_grads[1:]]
            for actual, again, stepwise, exact in zip(*results, [expected.detach(), *expected_grads]):
                assert torch.equal(actual, again)
                error = relative_error(actual, exact)
                assert error < TOLERANCES[dtype]
                assert error <= 1.5 * relative_error(stepwise, exact) + TOLERANCES[torch.float32]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_real_rows(self, dtype):
        order, x, expert_out, weights = self.make(5, 3, 64, dtype, elsewhere=1.0)
        leaves = [tensor.clone().requires_grad_() for tensor in (expert_out, weights, x)]
        out = unpermute(*leaves[:2], SCALE, order, leaves[2])
        assert torch.equal(out, x)
        out.sum().backward()
        assert not leaves[1].grad.any()
        assert torch.equal(leaves[2].grad, torch.ones_like(x))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_special_values(self, dtype):
        order, x, expert_out, weights = self.make(6, 4, 64, dtype, elsewhere=0.0)
        expert_out[order.rows[0, 1], 3] = math.nan
        expert_out[order.rows[1, 2], 4:6] = math.inf
        expert_out[order.rows[2, 0]] = torch.finfo(dtype).max
        x[3, 7] = math.nan
        x[4, 8] = -math.inf
        weights[5, 3] = math.nan
        weights[2] = 0.0
        expected = unpermute_reference(expert_out.float(), weights, SCALE, order, x.float()).to(dtype)
        actual = unpermute(expert_out, weights, SCALE, order, x)
        torch.testing.assert_close(actual, expected, equal_nan=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
    def test_only_needed_gradients(self, dtype, needs):
        order, _, expert_out, weights = self.make(17, 4, 2048, dtype)
        count, grads = real_rows(order), []
        grad_out = random_states(17, 2048, dtype=dtype, seed=5, device="cuda")
        for which in ((True, True), needs):
            leaves = [expert_out.clone().requires_grad_(which[0]), weights.clone().requires_grad_(which[1])]
            unpermute(*leaves, SCALE, order).backward(grad_out)
            grads.append([leaf.grad for leaf in leaves])
        if needs[0]:
            assert torch.equal(grads[1][0][:count], grads[0][0][:count])
        if needs[1]:
            assert torch.equal(grads[1][1], grads[0][1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("elsewhere", [0.0, 0.3])
    def test_products(self, elsewhere, dtype):
        order, x, *_ = self.make(300, 4, 64, dtype, elsewhere)
        weight = random_states(7, 48, 64, dtype=dtype, seed=8, device="cuda") / 8
        count = real_rows(order)
        upstream = with_poison(random_states(1200, 48, dtype=dtype, seed=9, device="cuda"), order)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
        out, expected = gathered_product(*leaves, order), naive_product(*exact, order)
        grads = torch.autograd.grad(out, leaves, upstream)
        expected_grads = torch.autograd.grad(expected[:count], exact, upstream[:count].double())
        bound = {torch.float32: 2e-3}.get(dtype, TOLERANCES[dtype])  # products of float32 may run in TF32
        for one, other in zip((out[:count], *grads), (expected[:count], *expected_grads)):
            assert relative_error(one, other) < bound

    def test_second_derivatives(self):
        order, _, expert_out, weights = self.make(7, 4, 64, torch.float32, elsewhere=0.0)
        inputs, upstream = (expert_out, weights), random_states(7, 64, seed=5, device="cuda")
        directions = [random_states(*tensor.shape, seed=6, device="cuda") for tensor in inputs]
        actual = second_gradients(lambda *states: unpermute(*states, SCALE, order), inputs, upstream, directions)
        expected = second_gradients(
            lambda *states: unpermute_reference(*states, SCALE, order),
            [tensor.double() for tensor in inputs],
            upstream.double(),
            [tensor.double() for tensor in directions],
        )
        for one, other in zip(actual, expected):
            assert relative_error(one, other) < 1e-5

    def test_opcheck(self):
        order, x, expert_out, weights = self.make(7, 4, 64, torch.float32, elsewhere=0.0)
        args = (expert_out.requires_grad_(), weights.requires_grad_(), SCALE, *order, x.requires_grad_())
        torch.library.opcheck(torch.ops.minimax_m3_fused.sum_expert_rows.default, args)
        grad = random_states(7, 64, seed=5, device="cuda").requires_grad_()
        args = (grad, expert_out, weights, SCALE, *order, True, True)
        torch.library.opcheck(torch.ops.minimax_m3_fused.sum_expert_rows_backward.default, args)

    def test_more_than_2_to_the_31_elements(self, needs_memory):
        needs_memory(32)
        tokens, top_k, width = 2**17, 4, 6144
        order = plan(random_ids(tokens, top_k, 128, device="cuda"), 128)
        x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
        x[-3:] = random_states(3, width, dtype=torch.bfloat16, device="cuda")
        copies = torch.ops.minimax_m3_msa_cuda.gather_tokens(x, *order)
        for token in (0, tokens - 1):
            assert all(torch.equal(copies[row], x[token]) for row in order.rows[token].tolist())
        weights = torch.full((tokens, top_k), 0.25, device="cuda")
        assert torch.equal(unpermute(copies, weights, 1.0, order), x)
        grads = torch.ops.minimax_m3_msa_cuda.sum_expert_rows_backward(x, None, 4 * weights, 1.0, *order, True, False)
        assert torch.equal(grads[0], copies)
