"""`select_blocks` against loops: which blocks every query and index head gets."""

import pytest
import torch

from modeling_minimax_m3.msa import select_blocks

BACKENDS = ("reference", "torch")
OPTIONS = {
    "released": {"block_size": 128, "topk": 16, "local_blocks": 1, "init_blocks": 0},
    "small": {"block_size": 16, "topk": 3, "local_blocks": 1, "init_blocks": 0},
    "no forced block": {"block_size": 16, "topk": 2, "local_blocks": 0, "init_blocks": 0},
    "init and local": {"block_size": 8, "topk": 6, "local_blocks": 2, "init_blocks": 2},
    "forced blocks only": {"block_size": 16, "topk": 3, "local_blocks": 2, "init_blocks": 1},
    "odd block size": {"block_size": 7, "topk": 5, "local_blocks": 1, "init_blocks": 1},
    "one key per block": {"block_size": 1, "topk": 9, "local_blocks": 3, "init_blocks": 0},
    "one block only": {"block_size": 16, "topk": 1, "local_blocks": 0, "init_blocks": 0},
}
LENGTHS = {
    "one token": ([1], [1]),
    "around a block": ([127, 128, 129], [127, 128, 129]),
    "odd lengths": ([1, 300, 15, 63], [1, 300, 15, 63]),
    "later queries": ([1, 5, 64], [150, 37, 64]),
    "padding gaps": ([0, 40, 0, 33], [9, 40, 17, 50]),
    "empty sequences": ([0, 21, 0, 0], [0, 21, 0, 0]),
}


def as_lists(block_indices):
    return [[{block for block in head if block >= 0} for head in query] for query in block_indices.tolist()]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selects_the_best_blocks(brute, inputs, backend, options, lengths):
    lengths_q, lengths_k = LENGTHS[lengths]
    case = inputs.make_varlen(lengths_k, lengths_q, index_dim=32, **OPTIONS[options])
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    brute.check_selection(selected, case.index_query, case.index_key, **case.lengths, **case.options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index_dim", [16, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_keep_their_precision(brute, inputs, backend, index_dim, dtype):
    # bf16 products are exact in fp32; rounding the scores to bf16 would break ties at random among 100 blocks
    case = inputs.make_varlen([100], index_dim=index_dim, dtype=dtype, block_size=1, topk=8)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    brute.check_selection(selected, case.index_query, case.index_key, **case.lengths, **case.options)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_magnitude(brute, inputs, backend, scale):
    case = inputs.make_varlen([90, 33], block_size=8, topk=4)
    index_query = case.index_query * scale
    selected = select_blocks(index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    brute.check_selection(selected, index_query, case.index_key, **case.lengths, **case.options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_scores_lose_to_nothing(brute, inputs, backend):
    # every product is below zero, so a padded or masked score of 0 would win
    case = inputs.make_varlen([61, 7, 40], [61, 7, 3], block_size=8, topk=4)
    index_query, index_key = case.index_query.abs(), -case.index_key.abs() - 0.1
    selected = select_blocks(index_query, index_key, **case.lengths, **case.options, backend=backend)
    brute.check_selection(selected, index_query, index_key, **case.lengths, **case.options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_ties_go_to_the_lower_id(brute, inputs, backend, options):
    case = inputs.make_varlen([130, 45], [70, 45], index_dim=4, **OPTIONS[options])
    # small integers: every score is exact in every backend, and most of them are tied
    index_query = torch.randint(-1, 2, case.index_query.shape, generator=case.generator).float()
    index_key = torch.randint(-1, 2, case.index_key.shape, generator=case.generator).float()
    selected = select_blocks(index_query, index_key, **case.lengths, **case.options, backend=backend)
    assert as_lists(selected) == brute.selected_sets(index_query, index_key, **case.lengths, **case.options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_scores_tied(inputs, backend):
    case = inputs.make_varlen([2000], [5], block_size=1, topk=12, local_blocks=2, init_blocks=1)
    zeros = torch.zeros_like(case.index_query)
    selected = select_blocks(zeros, case.index_key, **case.lengths, **case.options, backend=backend)
    for i, heads in enumerate(as_lists(selected)):
        own = 1995 + i
        assert heads == [{*range(10), own - 1, own}] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_coinciding_forced_blocks_count_once(inputs, backend):
    # 5 blocks: block 0 is both initial and local for the first queries
    case = inputs.make_varlen([20], block_size=4, topk=4, local_blocks=2, init_blocks=2)
    selected = as_lists(
        select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    )
    for position, heads in enumerate(selected):
        own = position // 4
        for blocks in heads:
            assert {0, own, max(own - 1, 0), min(1, own)} <= blocks
            assert len(blocks) == min(4, own + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_count_from_the_sequence_start(inputs, backend):
    first = inputs.make_varlen([53], block_size=8, topk=3, seed=1)
    second = inputs.make_varlen([5, 53, 11], block_size=8, topk=3, seed=2)
    second.index_query[5:58], second.index_key[5:58] = first.index_query, first.index_key
    alone = select_blocks(first.index_query, first.index_key, **first.lengths, **first.options, backend=backend)
    packed = select_blocks(second.index_query, second.index_key, **second.lengths, **second.options, backend=backend)
    assert as_lists(packed[5:58]) == as_lists(alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([], []), ([0], [0]), ([0, 0], [4, 9])], ids=["no sequence", "no token", "no query"]
)
def test_nothing_to_select_for(inputs, backend, lengths_q, lengths_k):
    case = inputs.make_varlen(lengths_k, lengths_q, topk=3)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    assert selected.shape == (0, 2, 3) and selected.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_hints_change_nothing(inputs, backend):
    case = inputs.make_varlen([40, 90], [40, 3], block_size=8)
    call = {**case.lengths, **case.options, "backend": backend}
    plain = select_blocks(case.index_query, case.index_key, **call)
    hinted = select_blocks(case.index_query, case.index_key, max_seqlen_q=40, max_seqlen_k=90, **call)
    assert as_lists(hinted) == as_lists(plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(inputs, backend):
    case = inputs.make_varlen([70], block_size=8)
    call = {**case.lengths, **case.options, "backend": backend}
    heads_first = case.index_query.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([case.index_key, case.index_key + 1], dim=-1)
    strided_key = fused[:, : case.index_key.shape[-1]]
    assert not heads_first.is_contiguous() and not strided_key.is_contiguous()
    plain = select_blocks(case.index_query, case.index_key, **call)
    assert as_lists(select_blocks(heads_first, strided_key, **call)) == as_lists(plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_and_no_change_of_inputs(inputs, backend):
    case = inputs.make_varlen([30], block_size=8)
    index_query, index_key = case.index_query.clone().requires_grad_(), case.index_key.clone().requires_grad_()
    selected = select_blocks(index_query, index_key, **case.lengths, **case.options, backend=backend)
    assert not selected.requires_grad
    assert torch.equal(index_query, case.index_query) and torch.equal(index_key, case.index_key)


def test_repeats_bit_for_bit(inputs):
    case = inputs.make_varlen([200, 90], block_size=8, topk=5)
    first = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend="torch")
    for _ in range(3):
        again = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend="torch")
        assert torch.equal(first, again)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_no_uninitialised_memory(brute, inputs, backend, lengths):
    assert torch.empty(3).isnan().all()  # the fixture works
    lengths_q, lengths_k = LENGTHS[lengths]
    case = inputs.make_varlen(lengths_k, lengths_q, block_size=16, topk=4, init_blocks=1)
    selected = select_blocks(case.index_query, case.index_key, **case.lengths, **case.options, backend=backend)
    brute.check_selection(selected, case.index_query, case.index_key, **case.lengths, **case.options)
