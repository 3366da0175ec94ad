"""`block_sparse_attention` against loops, and its gradients against float64 and finite differences."""

import math

import pytest
import torch
import torch.utils.checkpoint
from torch.nn.functional import scaled_dot_product_attention

from modeling_minimax_m3.msa import block_sparse_attention, portable, select_blocks

BACKENDS = ("reference", "torch")
LENGTHS = {
    "one token": ([1], [1]),
    "around a block": ([127, 128, 129], [127, 128, 129]),
    "300 tokens": ([300], [300]),
    "later queries": ([1, 5, 64], [150, 37, 64]),
    "padding gaps": ([0, 40, 0, 33], [9, 40, 17, 50]),
    "empty sequences": ([0, 21, 0, 0], [0, 21, 0, 0]),
}
FORWARD_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GRADIENT_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def attend(case, block_indices, backend="torch", qkv=None, **options):
    query, key, value = case.qkv if qkv is None else qkv
    return block_sparse_attention(
        query, key, value, block_indices, **case.lengths, block_size=case.block_size, backend=backend, **options
    )


def gradients(case, block_indices, backend, grad_out, dtype=None, qkv=None):
    """Gradients of query, key and value for one upstream gradient, computed in `dtype` (default: the inputs')."""
    leaves = [
        tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (case.qkv if qkv is None else qkv)
    ]
    out = attend(case, block_indices, backend, leaves)
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def every_block(case, num_blocks):
    return torch.arange(num_blocks, dtype=torch.int32).expand(len(case.query), case.key.shape[1], -1).contiguous()


# --- forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attends_to_the_listed_blocks(brute, inputs, backend, lengths, block_size):
    lengths_q, lengths_k = LENGTHS[lengths]
    case = inputs.make_varlen(lengths_k, lengths_q, block_size=block_size, topk=4)
    block_indices = case.random_blocks()
    out, lse = attend(case, block_indices, backend, return_lse=True)
    expected_out, expected_lse = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=case.block_size)
    assert inputs.relative_error(out, expected_out) < 1e-5
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q_heads_per_kv", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_query_heads_share_key_value_heads(brute, inputs, backend, num_kv_heads, q_heads_per_kv):
    case = inputs.make_varlen([37, 20], num_kv_heads=num_kv_heads, q_heads_per_kv=q_heads_per_kv, block_size=8)
    block_indices = case.random_blocks()
    expected, _ = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=8)
    assert inputs.relative_error(attend(case, block_indices, backend), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget_of_the_output(brute, inputs, backend, head_dim, dtype):
    case = inputs.make_varlen([129], [60], head_dim=head_dim, block_size=16, topk=5, dtype=dtype)
    block_indices = case.random_blocks()
    out, lse = attend(case, block_indices, backend, return_lse=True)
    expected, expected_lse = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=16)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert inputs.relative_error(out, expected) < FORWARD_BUDGET.get(dtype, 1e-12)
    # scores are summed in fp32 whatever the inputs, so the lse is exact to fp32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_block_selected_is_dense_causal_attention(inputs, backend):
    case = inputs.make_varlen([100], q_heads_per_kv=4, block_size=16)
    out = attend(case, every_block(case, 7), backend)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in case.qkv)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert inputs.relative_error(out, dense[0].transpose(0, 1)) < 1e-5


@pytest.mark.parametrize("softmax_scale", [0.0, 0.3, 2.0, -1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_scale(brute, inputs, backend, softmax_scale):
    case = inputs.make_varlen([50], block_size=8)
    block_indices = case.random_blocks()
    expected, expected_lse = brute.attend(
        *case.qkv, block_indices, **case.lengths, block_size=8, softmax_scale=softmax_scale
    )
    out, lse = attend(case, block_indices, backend, softmax_scale=softmax_scale, return_lse=True)
    assert inputs.relative_error(out, expected) < 1e-5
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(brute, inputs, backend, scale):
    case = inputs.make_varlen([70], block_size=8)
    case.query = case.query * scale
    case.value = case.value * scale
    block_indices = case.random_blocks()
    out, lse = attend(case, block_indices, backend, return_lse=True)
    # such a softmax picks one key, or almost: compare where the choice is clear of fp32 rounding of the scores
    exact = attend(case, block_indices, backend, [tensor.double() for tensor in case.qkv])
    expected, expected_lse = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=8)
    assert inputs.relative_error(exact, expected) < 1e-9
    assert out.isfinite().all()
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    rows_off = ((out - expected).norm(dim=-1) > 1e-2 * expected.norm(dim=-1)).float().mean()
    assert rows_off < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key(inputs, backend):
    case = inputs.make_varlen([40, 24], block_size=8, topk=3)
    block_indices = case.random_blocks(empty_rows=False)
    block_indices[3] = -1  # nothing listed
    block_indices[4, 1] = torch.tensor([1, 4, -1])  # all in the future
    block_indices[63, 0] = torch.tensor([3, 9, 2**31 - 1])  # all past the sequence's three blocks
    out, lse = attend(case, block_indices, backend, return_lse=True)
    for token, heads in ((3, slice(0, 4)), (4, slice(2, 4)), (63, slice(0, 2))):
        assert (out[token, heads] == 0).all()
        assert (lse[token, heads] == -math.inf).all()
    grad_query, grad_key, grad_value = gradients(case, block_indices, backend, torch.ones_like(out))
    assert (grad_query[3] == 0).all() and (grad_query[4, 2:] == 0).all() and (grad_query[63, :2] == 0).all()
    for grad in (grad_query, grad_key, grad_value):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_listed_at_all(inputs, backend):
    case = inputs.make_varlen([20], block_size=8)
    for width in (0, 3):
        block_indices = torch.full((20, 2, width), -1, dtype=torch.int32)
        out, lse = attend(case, block_indices, backend, return_lse=True)
        assert (out == 0).all() and (lse == -math.inf).all()
        assert all((grad == 0).all() for grad in gradients(case, block_indices, backend, torch.ones_like(out)))


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([], []), ([0], [0]), ([0, 0], [4, 9])], ids=["no sequence", "no token", "no query"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_for(inputs, backend, lengths_q, lengths_k):
    case = inputs.make_varlen(lengths_k, lengths_q)
    block_indices = torch.zeros(0, 2, 3, dtype=torch.int32)
    out, lse = attend(case, block_indices, backend, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
    grad_query, grad_key, grad_value = gradients(case, block_indices, backend, torch.ones_like(out))
    assert grad_query.shape == (0, 4, 16)
    assert grad_key.shape == grad_value.shape == (sum(lengths_k), 2, 16)
    assert (grad_key == 0).all() and (grad_value == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_wider_than_keys(brute, inputs, backend):
    case = inputs.make_varlen([40], block_size=8)
    case.value = torch.randn(40, 2, 24, generator=case.generator)
    block_indices = case.random_blocks()
    expected, _ = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=8)
    out = attend(case, block_indices, backend)
    assert out.shape == (40, 4, 24)
    assert inputs.relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_slots_than_blocks(inputs, backend):
    case = inputs.make_varlen([20], block_size=8)
    narrow = every_block(case, 3)
    wide = torch.full((20, 2, 40), -1, dtype=torch.int32)
    wide[..., :3] = narrow
    torch.testing.assert_close(attend(case, wide, backend), attend(case, narrow, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(inputs, backend):
    case = inputs.make_varlen([60], block_size=8)
    block_indices = case.random_blocks()
    expected = attend(case, block_indices, backend)
    grad_out = case.randn_like(expected)
    # heads first in memory, and one fused projection split by views
    query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([case.key, case.value], dim=-1)
    qkv = (query, fused[..., :16], fused[..., 16:])
    assert not any(tensor.is_contiguous() for tensor in qkv)
    torch.testing.assert_close(attend(case, block_indices, backend, qkv), expected)
    strided_grad_out = grad_out.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    plain = gradients(case, block_indices, backend, grad_out)
    for grad, plain_grad in zip(gradients(case, block_indices, backend, strided_grad_out, qkv=qkv), plain):
        torch.testing.assert_close(grad, plain_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_hints_change_nothing(inputs, backend):
    case = inputs.make_varlen([40, 90], [40, 3], block_size=8)
    block_indices = case.random_blocks()
    hinted = attend(case, block_indices, backend, max_seqlen_q=40, max_seqlen_k=90)
    assert torch.equal(hinted, attend(case, block_indices, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gaps_may_hold_anything(inputs, backend):
    case = inputs.make_varlen([9, 40, 17], [0, 40, 0], block_size=8)
    block_indices = case.random_blocks()
    grad_out = case.randn_like(case.query)
    clean = attend(case, block_indices, backend)
    clean_grads = gradients(case, block_indices, backend, grad_out)
    for tensor in (case.key, case.value):
        tensor[:9] = float("nan")
        tensor[49:] = float("inf")
    assert torch.equal(attend(case, block_indices, backend), clean)
    for grad, clean_grad in zip(gradients(case, block_indices, backend, grad_out), clean_grads):
        assert torch.equal(grad, clean_grad)
    _, grad_key, grad_value = clean_grads
    for grad in (grad_key, grad_value):
        assert (grad[:9] == 0).all() and (grad[49:] == 0).all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_no_uninitialised_memory(brute, inputs, backend, lengths):
    lengths_q, lengths_k = LENGTHS[lengths]
    case = inputs.make_varlen(lengths_k, lengths_q, block_size=16, topk=4)
    block_indices = case.random_blocks()
    out, lse = attend(case, block_indices, backend, return_lse=True)
    expected, expected_lse = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=16)
    assert inputs.relative_error(out, expected) < 1e-5
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    for grad in gradients(case, block_indices, backend, torch.ones_like(out)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("tile", [1, 50, 300])
def test_result_does_not_depend_on_the_tile_size(brute, inputs, monkeypatch, tile):
    case = inputs.make_varlen([75, 1, 0, 40], [75, 1, 0, 11], block_size=8, topk=4)
    block_indices = case.random_blocks()
    expected, _ = brute.attend(*case.qkv, block_indices, **case.lengths, block_size=8)
    expected_grads = gradients(case, block_indices, "reference", torch.ones_like(case.query), torch.float64)
    monkeypatch.setattr(portable.tiles, "ATTENTION_TILE", tile)
    monkeypatch.setattr(portable.selection, "SELECTION_TILE", tile)
    assert inputs.relative_error(attend(case, block_indices), expected) < 1e-5
    grads = gradients(case, block_indices, "torch", torch.ones_like(case.query))
    for grad, expected_grad in zip(grads, expected_grads):
        assert inputs.relative_error(grad, expected_grad) < 1e-5
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend="torch")
    brute.check_selection(selected, case.index_query, case.index_key, **case.lengths, **case.options)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [([7], [7]), ([0, 5, 3], [4, 5, 6]), ([1], [9])], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_finite_differences(inputs, backend, lengths):
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, head_dim=3, block_size=2, topk=3, dtype=torch.float64)
    block_indices = case.random_blocks()
    assert (block_indices == -1).all(-1).any() or sum(lengths_q) == 1, "one row should be empty"
    leaves = [tensor.requires_grad_() for tensor in case.qkv]
    torch.autograd.gradcheck(lambda *qkv: attend(case, block_indices, backend, qkv), leaves, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget_of_the_gradients(inputs, backend, head_dim, dtype):
    case = inputs.make_varlen(
        [300, 129], [300, 20], head_dim=head_dim, q_heads_per_kv=4, block_size=64, topk=3, dtype=dtype
    )
    block_indices = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options)
    grad_out = case.randn_like(case.query)
    expected = gradients(case, block_indices, "reference", grad_out, torch.float64)
    for name, grad, expected_grad in zip("qkv", gradients(case, block_indices, backend, grad_out), expected):
        assert grad.dtype == dtype
        error = inputs.relative_error(grad, expected_grad)
        assert error < GRADIENT_BUDGET[dtype], f"gradient of {name}: {error}"


@pytest.mark.parametrize("q_heads_per_kv", [1, 2, 8, 16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_torch_gradients_match_the_reference(inputs, lengths, q_heads_per_kv):
    lengths_q, lengths_k = LENGTHS[lengths]
    case = inputs.make_varlen(lengths_k, lengths_q, q_heads_per_kv=q_heads_per_kv, block_size=16, topk=4)
    block_indices = case.random_blocks()
    grad_out = case.randn_like(case.query)
    expected = gradients(case, block_indices, "reference", grad_out, torch.float64)
    for grad, expected_grad in zip(gradients(case, block_indices, "torch", grad_out), expected):
        # a row with a single key has a query gradient of exactly 0 before rounding
        assert inputs.relative_error(grad, expected_grad, floor=0.1) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(inputs, backend):
    case = inputs.make_varlen([20], block_size=8)
    block_indices = case.random_blocks()
    key = case.key.requires_grad_()
    out, lse = attend(case, block_indices, backend, return_lse=True)
    assert not lse.requires_grad
    out.sum().backward()
    assert key.grad is not None and case.query.grad is None and case.value.grad is None


def test_repeats_bit_for_bit(inputs):
    torch.set_num_threads(2)  # the order of sums must not depend on which thread is first
    case = inputs.make_varlen([700, 90], q_heads_per_kv=4, head_dim=64, block_size=64, topk=5)
    block_indices = case.random_blocks()
    grad_out = case.randn_like(case.query)
    first_out, first_grads = attend(case, block_indices), gradients(case, block_indices, "torch", grad_out)
    for _ in range(3):
        assert torch.equal(attend(case, block_indices), first_out)
        for grad, first_grad in zip(gradients(case, block_indices, "torch", grad_out), first_grads):
            assert torch.equal(grad, first_grad)
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(inputs, backend):
    case = inputs.make_varlen([30], block_size=8)
    block_indices = case.random_blocks()
    arguments = [*case.qkv, block_indices, *case.lengths.values()]
    copies = [tensor.clone() for tensor in arguments]
    gradients(case, block_indices, backend, torch.ones_like(case.query))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, copies))


def test_activation_checkpointing_gives_the_same_gradients(inputs):
    case = inputs.make_varlen([50], block_size=8)
    block_indices = case.random_blocks()
    leaves = [tensor.requires_grad_() for tensor in case.qkv]
    plain = torch.autograd.grad(attend(case, block_indices, qkv=leaves).sum(), leaves)

    def forward(*qkv):
        return attend(case, block_indices, qkv=qkv)

    out = torch.utils.checkpoint.checkpoint(forward, *leaves, use_reentrant=False)
    for grad, plain_grad in zip(torch.autograd.grad(out.sum(), leaves), plain):
        assert torch.equal(grad, plain_grad)
