"""Forward mode, `torch.func` and gradients of gradients, against finite differences and against each other."""

import pytest
import torch
from torch.autograd import forward_ad

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    select_blocks,
    select_blocks_with_kvcache,
)

BACKENDS = ("auto", "torch", "reference")


class Case:
    """Calls of both differentiable operators in float64, as functions of the tensors that they are differentiated in.

    Some rows list nothing, the second sequence has fewer queries than keys, the third none.
    """

    def __init__(self, inputs, backend="auto"):
        self.case = case = inputs.make_varlen(
            [6, 5, 4],
            [6, 3, 0],
            block_size=2,
            head_dim=2,
            index_dim=2,
            q_heads_per_kv=2,
            num_kv_heads=2,
            dtype=torch.float64,
        )
        self.blocks = case.random_blocks()
        assert (self.blocks[..., 0] < 0).any(), "no empty row"
        self.where = {**case.lengths, "block_size": 2, "backend": backend}
        self.qkv, self.index = case.qkv, (case.index_query, case.index_key)

    def attend(self, query, key, value, blocks=None, **options):
        blocks = self.blocks if blocks is None else blocks
        return block_sparse_attention(query, key, value, blocks, **{**self.where, **options})

    def kl(self, index_query, index_key, **options):
        return indexer_kl_loss(index_query, index_key, *self.qkv[:2], self.blocks, **{**self.where, **options})

    def kl_over_all_keys(self, index_query, index_key):
        return indexer_kl_loss(index_query, index_key, *self.qkv[:2], None, **self.where)

    def functions(self):
        return {
            "attention": (self.attend, self.qkv),
            "loss": (self.kl, self.index),
            "loss over all keys": (self.kl_over_all_keys, self.index),
        }


FUNCTIONS = ("attention", "loss", "loss over all keys")


def like(tensors, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors)


def gradient(function, states, upstream, **options):
    leaves = [state.clone().requires_grad_() for state in states]
    return torch.autograd.grad(function(*leaves), leaves, upstream, **options), leaves


def dot(left, right):
    return sum((a * b).sum() for a, b in zip(left, right)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(inputs, name, backend):
    function, states = Case(inputs, backend).functions()[name]
    leaves = [state.clone().requires_grad_() for state in states]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_third_derivatives(inputs, name):
    function, states = Case(inputs).functions()[name]
    rows = like([function(*states)])

    def of_first(first):
        (grad,) = torch.autograd.grad(function(first, *states[1:]), first, rows, create_graph=True)
        return grad

    assert torch.autograd.gradgradcheck(of_first, [states[0].clone().requires_grad_()], fast_mode=True)


@pytest.mark.parametrize("way", ["torch.func.jvp", "dual tensors", "dual tensors that record gradients"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_agree_with_gradients(inputs, name, backend, way):
    """For a Jacobian J, u . (J v) = (u J) . v."""
    function, states = Case(inputs, backend).functions()[name]
    tangents = like(states)
    if way == "torch.func.jvp":
        out, tangent = torch.func.jvp(function, states, tangents)
    else:
        if way.endswith("gradients"):
            states = [state.clone().requires_grad_() for state in states]
        with forward_ad.dual_level():
            out, tangent = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, states, tangents)))
    upstream = like([out])
    grads, _ = gradient(function, [state.detach() for state in states], upstream)
    assert inputs.relative_error(out, function(*states)) < 1e-12
    assert dot(upstream, [tangent]) == pytest.approx(dot(grads, tangents), rel=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_that_differentiate_in_reverse(inputs, name):
    function, states = Case(inputs).functions()[name]
    upstream = like([function(*states)])
    expected, _ = gradient(function, states, upstream)
    every = tuple(range(len(states)))
    by_vjp = torch.func.vjp(function, *states)[1](*upstream)
    by_grad = torch.func.grad(lambda *given: (function(*given) * upstream[0]).sum(), argnums=every)(*states)
    for found in (by_vjp, by_grad):
        for got, wanted in zip(found, expected, strict=True):
            assert inputs.relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_and_hessian(inputs, name):
    function, states = Case(inputs).functions()[name]

    def of_first(first):
        return function(first, *states[1:])

    assert (
        inputs.relative_error(torch.func.jacfwd(of_first)(states[0]), torch.func.jacrev(of_first)(states[0])) < 1e-12
    )
    hessian = torch.func.hessian(lambda first: of_first(first).square().sum())(states[0])
    expected = torch.autograd.functional.hessian(lambda first: of_first(first).square().sum(), states[0])
    assert inputs.relative_error(hessian, expected) < 1e-12
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_each_example(inputs, name):
    function, states = Case(inputs).functions()[name]
    examples = [torch.stack([state, state + other, -state]) for state, other in zip(states, like(states))]
    of_one = torch.func.grad(lambda *given: function(*given).square().sum(), argnums=tuple(range(len(states))))
    for got, wanted in zip(torch.func.vmap(of_one)(*examples), zip(*map(of_one, *examples)), strict=True):
        assert inputs.relative_error(got, torch.stack(wanted)) < 1e-12
    assert inputs.relative_error(
        torch.func.vmap(function)(*examples), torch.stack([function(*example) for example in zip(*examples)])
    ) < 1e-12  # fmt: skip


def test_gradients_of_each_example_with_its_own_blocks(inputs):
    calls = Case(inputs)
    blocks = torch.stack([calls.blocks, calls.case.random_blocks(), calls.case.random_blocks()])
    of_one = torch.func.grad(lambda query, ids: calls.attend(query, *calls.qkv[1:], ids).square().sum())
    query = calls.qkv[0].expand(3, -1, -1, -1)
    expected = torch.stack([of_one(query[i], blocks[i]) for i in range(3)])
    assert inputs.relative_error(torch.func.vmap(of_one)(query, blocks), expected) < 1e-12


def test_lengths_of_each_example_are_refused(inputs):
    calls = Case(inputs)
    of_one = torch.func.grad(lambda query, ends: calls.attend(query, *calls.qkv[1:], cu_seqlens_k=ends).sum())
    ends = calls.where["cu_seqlens_k"].expand(3, -1)
    with pytest.raises(NotImplementedError, match="`cu_seqlens_k` must be the same for all examples"):
        torch.func.vmap(of_one)(calls.qkv[0].expand(3, -1, -1, -1), ends)


def test_gradients_of_some_inputs_only(inputs):
    """A penalty on the gradient of one input only, as in training with a gradient penalty."""
    calls = Case(inputs)
    query, key, value = (state.clone().requires_grad_() for state in calls.qkv)
    out = calls.attend(query, key.detach(), value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    grad.square().sum().backward()
    whole = torch.func.grad(
        lambda value: (
            torch.func.grad(lambda query: calls.attend(query, key, value).square().sum())(query).square().sum()
        )
    )(value.detach())
    assert inputs.relative_error(value.grad, whole) < 1e-12
    assert key.grad is None


def test_keys_that_come_from_the_queries(inputs):
    """Each input's own derivative counts, not that through another one."""
    calls = Case(inputs)
    states = calls.qkv

    def function(query):
        return calls.attend(query, states[1] * query.sum(), states[2] + query.mean())

    assert torch.autograd.gradgradcheck(function, [states[0].clone().requires_grad_()], fast_mode=True)


def test_the_log_sum_exp_is_a_constant(inputs):
    calls = Case(inputs)
    (_, lse), (_, tangent) = torch.func.jvp(lambda *qkv: calls.attend(*qkv, return_lse=True), calls.qkv, calls.qkv)
    assert torch.equal(lse, calls.attend(*calls.qkv, return_lse=True, backend="reference")[1])
    assert not tangent.any()


def test_half_precision(inputs):
    calls = Case(inputs)
    half = [state.bfloat16() for state in calls.qkv]
    out, tangent = torch.func.jvp(calls.attend, tuple(half), tuple(half))
    assert out.dtype == tangent.dtype == torch.bfloat16
    exact = tuple(state.double() for state in half)
    assert inputs.relative_error(tangent, torch.func.jvp(calls.attend, exact, exact)[1]) < 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = tuple(state.float() for state in exact)
        tangent = torch.func.jvp(calls.attend, single, single)[1]
    assert inputs.relative_error(tangent, torch.func.jvp(calls.attend, exact, exact)[1]) < 1e-6


def test_the_selection_has_no_tangent(inputs):
    calls = Case(inputs)
    options = {**calls.where, "topk": 2}
    expected = select_blocks(*calls.index, **options)
    ids, tangent = torch.func.jvp(lambda *index: select_blocks(*index, **options), calls.index, calls.index)
    assert torch.equal(ids, expected)
    assert not tangent.any()

    def of_selected(index_query, query):
        return calls.attend(query, *calls.qkv[1:], select_blocks(index_query, calls.index[1], **options)).sum()

    grads = torch.func.grad(of_selected, argnums=(0, 1))(calls.index[0], calls.qkv[0])
    assert not grads[0].any()
    assert grads[1].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_cuda_backend_by_name_refuses_other_derivatives(inputs, name):
    function, states = Case(inputs, "cuda").functions()[name]
    with pytest.raises(NotImplementedError, match=r"`backend`='cuda'.*(reverse-mode|cannot run)"):
        torch.func.jvp(function, states, states)


def test_no_keys_and_no_queries():
    offsets = torch.zeros(1, dtype=torch.int32)
    empty = torch.zeros(0, 2, 4)
    blocks = torch.zeros(0, 2, 1, dtype=torch.int32)

    def attend(query):
        return block_sparse_attention(query, empty, empty, blocks, cu_seqlens_q=offsets, cu_seqlens_k=offsets)

    out, tangent = torch.func.jvp(attend, (empty,), (empty,))
    assert out.shape == tangent.shape == (0, 2, 4)
    query = empty.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attend(query).sum(), query, create_graph=True)
    assert torch.autograd.grad(grad.sum(), query)[0].shape == (0, 2, 4)


# --- caches --------------------------------------------------------------------------------------------------------


def by_grad(function, query):
    torch.func.grad(lambda query: function(query).sum())(query)


def by_duals(function, query):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(query, query))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize(
    "differentiate",
    [lambda function, query: torch.func.jvp(function, (query,), (query,)), by_grad, by_duals],
    ids=["jvp", "grad", "duals"],
)
def test_cached_attention_refuses_derivatives(inputs, form, backend, differentiate):
    case = inputs.make_cached([20, 9], 2, block_size=4)
    (query, *caches), options = case.attention(form)
    with pytest.raises(
        NotImplementedError, match="`block_sparse_attention_with_kvcache` has no gradient and no other"
    ):
        differentiate(
            lambda query: block_sparse_attention_with_kvcache(query, *caches, **options, backend=backend), query
        )


@pytest.mark.parametrize("form", ["contiguous", "paged"])
def test_cached_operators_in_vmap_and_beside_duals(inputs, form):
    case = inputs.make_cached([20, 9], 2, block_size=4)
    (query, *caches), options = case.attention(form)
    (index_query, index_key), selection = case.selection(form)

    def attend(query):
        return block_sparse_attention_with_kvcache(query, *caches, **options)

    queries = torch.stack([query, -query])
    expected = torch.stack([attend(query), attend(-query)])
    assert torch.equal(torch.func.vmap(attend)(queries), expected)
    selected = select_blocks_with_kvcache(index_query, index_key, **selection)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(index_query, index_query)
        assert torch.equal(select_blocks_with_kvcache(dual, index_key, **selection), selected)
        assert torch.equal(attend(query), expected[0]), "a tensor without a tangent is a constant"


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_code_refuses_tangents() -> bool:
    torch._dynamo.reset()
    state = torch.ones(1)
    with forward_ad.dual_level():
        try:
            torch.compile(torch.sin, backend="eager", fullgraph=True)(forward_ad.make_dual(state, state))
        except torch._dynamo.exc.TorchDynamoException:
            return True
    return False


def test_a_compiled_call_never_drops_a_tangent(inputs):
    """The graph of a plain call must not serve one with tangents, nor may tracing lose them."""
    if not compiled_code_refuses_tangents():
        pytest.skip("this PyTorch gives tangents to graphs that were compiled without")
    torch._dynamo.reset()
    calls = Case(inputs)
    _, expected = torch.func.jvp(calls.attend, calls.qkv, calls.qkv)
    compiled = torch.compile(calls.attend, backend="aot_eager", fullgraph=True)
    compiled(*calls.qkv)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(state, state) for state in calls.qkv]
        try:
            tangent = forward_ad.unpack_dual(compiled(*duals)).tangent
        except torch._dynamo.exc.TorchDynamoException:
            pass  # a version of PyTorch that traces no such call, and says so
        else:
            assert inputs.relative_error(tangent, expected) < 1e-12


@pytest.mark.parametrize("order", ["outside", "inside"])
def test_transforms_and_the_compiler(inputs, order):
    torch._dynamo.reset()
    calls = Case(inputs)
    _, expected = torch.func.jvp(calls.attend, calls.qkv, calls.qkv)

    def compiled(function):
        return torch.compile(function, backend="aot_eager")

    if order == "outside":
        function = compiled(calls.attend)
        function(*calls.qkv)
        _, tangent = torch.func.jvp(function, calls.qkv, calls.qkv)
    else:
        _, tangent = compiled(lambda *qkv: torch.func.jvp(calls.attend, qkv, qkv))(*calls.qkv)
    assert inputs.relative_error(tangent, expected) < 1e-12
