"""Derivatives beyond the kernels' own gradient, on a GPU: by the definition with `auto`, an error by name."""

import pytest
import torch

from modeling_minimax_m3.msa import block_sparse_attention, indexer_kl_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


@pytest.fixture
def case(gpu):
    return gpu.packed(([300, 200], None), q_heads_per_kv=4)


def functions(case, backend):
    ids = case.random_blocks(2, 128)
    options = {**case.lengths, "block_size": 128, "backend": backend}

    def attend(*qkv):
        return block_sparse_attention(*qkv, ids, **options)

    def loss(*index):
        query, key = (state.detach().to(index[0].dtype) for state in case.qkv[:2])
        return indexer_kl_loss(*index, query, key, ids, **options)

    return {"attention": (attend, case.qkv), "loss": (loss, (case.index_query, case.index_key))}


@pytest.mark.parametrize("name", ["attention", "loss"])
def test_tangents(case, inputs, name):
    function, states = functions(case, "auto")[name]
    out, tangent = torch.func.jvp(function, states, states)
    exact = tuple(state.double() for state in states)
    expected_out, expected = torch.func.jvp(function, exact, exact)
    assert inputs.relative_error(out, expected_out) < 1e-2
    assert inputs.relative_error(tangent, expected) < 2e-2


@pytest.mark.parametrize("name", ["attention", "loss"])
def test_gradient_of_a_gradient(case, inputs, name):
    """The gradient is the kernels', its derivative that of the definition."""
    function, states = functions(case, "auto")[name]

    def penalty_gradients(states):
        leaves = [state.detach().clone().requires_grad_() for state in states]
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return grads, torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), leaves)

    (first, second), (exact_first, exact_second) = (
        penalty_gradients(states), penalty_gradients([state.double() for state in states])
    )  # fmt: skip
    for found, expected in zip((*first, *second), (*exact_first, *exact_second), strict=True):
        assert inputs.relative_error(found, expected) < 4e-2


@pytest.mark.parametrize("name", ["attention", "loss"])
def test_kernels_by_name_have_one_gradient(case, name):
    function, states = functions(case, "cuda")[name]
    with pytest.raises(NotImplementedError, match=r"`backend`='cuda' supports only first-order"):
        torch.func.jvp(function, states, states)
    leaves = [state.clone().requires_grad_() for state in states]
    grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"`backend`='cuda' supports only first-order"):
        torch.autograd.grad(grads[0].sum(), leaves)
