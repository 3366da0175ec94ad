"""Properties of the operators that hold for any lengths and options, searched for counterexamples by hypothesis."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import scaled_dot_product_attention

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    select_blocks,
    select_blocks_with_kvcache,
)

# float64, so that two ways to compute a score never round to different selections
DTYPE = torch.float64
TOLERANCE = 1e-12

search = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


@st.composite
def options(draw):
    block_size = draw(st.sampled_from([1, 2, 5, 8, 16]))
    topk = draw(st.integers(1, 6))
    local_blocks = draw(st.integers(0, topk))
    init_blocks = draw(st.integers(0, topk - local_blocks))
    return {"block_size": block_size, "topk": topk, "local_blocks": local_blocks, "init_blocks": init_blocks}


@st.composite
def geometry(draw):
    return {
        "num_kv_heads": draw(st.integers(1, 3)),
        "q_heads_per_kv": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([4, 16])),
        "index_dim": draw(st.sampled_from([3, 8])),
        "seed": draw(st.integers(0, 2**20)),
        **draw(options()),
    }


@st.composite
def ragged(draw, max_len=70):
    """Lengths (queries, keys) of a few sequences, some of them empty or without queries."""
    lengths_k = draw(st.lists(st.integers(0, max_len), min_size=1, max_size=4))
    lengths_q = [draw(st.sampled_from(sorted({0, min(1, length), length // 2, length}))) for length in lengths_k]
    return lengths_q, lengths_k


def run(case, backend, qkv=None, indexer=None):
    """Selection and attention: (block_indices, out, lse)."""
    index_query, index_key = (case.index_query, case.index_key) if indexer is None else indexer
    selected = select_blocks(index_query, index_key, **case.lengths, **case.options, backend=backend)
    out, lse = block_sparse_attention(
        *(case.qkv if qkv is None else qkv),
        selected,
        **case.lengths,
        block_size=case.block_size,
        return_lse=True,
        backend=backend,
    )
    return selected, out, lse


def as_sets(block_indices):
    return [[{block for block in head if block >= 0} for head in query] for query in block_indices.tolist()]


@backends
@search
@given(lengths=ragged(), geometry=geometry())
def test_agrees_with_loops(brute, inputs, backend, lengths, geometry):
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    selected, out, _ = run(case, backend)
    brute.check_selection(selected, case.index_query, case.index_key, **case.lengths, **case.options)
    expected, _ = brute.attend(*case.qkv, selected, **case.lengths, block_size=case.block_size)
    assert inputs.relative_error(out, expected) < TOLERANCE


@backends
@search
@given(length=st.integers(2, 70), cut=st.floats(0, 1), geometry=geometry())
def test_later_tokens_change_no_earlier_output(inputs, backend, length, cut, geometry):
    case = inputs.make_varlen([length], dtype=DTYPE, **geometry)
    cut = 1 + int(cut * (length - 2))
    selected, out, lse = run(case, backend)
    changed = [tensor.clone() for tensor in (case.query, case.key, case.value, case.index_query, case.index_key)]
    for tensor in changed:
        tensor[cut:] = 1e3 * case.randn_like(tensor[cut:])
    other_selected, other_out, other_lse = run(case, backend, qkv=changed[:3], indexer=changed[3:])
    assert as_sets(other_selected[:cut]) == as_sets(selected[:cut])
    assert inputs.relative_error(other_out[:cut], out[:cut]) < TOLERANCE
    torch.testing.assert_close(other_lse[:cut], lse[:cut])


@backends
@search
@given(lengths=ragged(), geometry=geometry())
def test_the_order_of_ids_changes_nothing(inputs, backend, lengths, geometry):
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    selected, out, lse = run(case, backend)
    shuffled = selected.clone()
    for row in shuffled.flatten(0, 1):
        count = int((row >= 0).sum())
        row[:count] = row[torch.randperm(count, generator=case.generator)]
    other_out, other_lse = block_sparse_attention(
        *case.qkv, shuffled, **case.lengths, block_size=case.block_size, return_lse=True, backend=backend
    )
    assert inputs.relative_error(other_out, out) < TOLERANCE
    torch.testing.assert_close(other_lse, lse)


@backends
@search
@given(lengths=ragged(), geometry=geometry())
def test_packing_is_separate_calls(inputs, backend, lengths, geometry):
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    selected, out, lse = run(case, backend)
    offset_q = offset_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k):
        rows_q, rows_k = slice(offset_q, offset_q + length_q), slice(offset_k, offset_k + length_k)
        alone = inputs.make_varlen([length_k], [length_q], dtype=DTYPE, **geometry)
        alone.index_query, alone.index_key = case.index_query[rows_q], case.index_key[rows_k]
        alone.query, alone.key, alone.value = case.query[rows_q], case.key[rows_k], case.value[rows_k]
        own_selected, own_out, own_lse = run(alone, backend)
        assert as_sets(selected[rows_q]) == as_sets(own_selected)
        assert inputs.relative_error(out[rows_q], own_out) < TOLERANCE
        torch.testing.assert_close(lse[rows_q], own_lse)
        offset_q, offset_k = rows_q.stop, rows_k.stop


@backends
@search
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=4), geometry=geometry())
def test_chunks_make_up_the_whole(inputs, backend, chunks, geometry):
    # chunked prefill: each chunk's queries against all keys so far; also what splitting queries over workers does
    length = sum(chunks)
    case = inputs.make_varlen([length], dtype=DTYPE, **geometry)
    selected, out, lse = run(case, backend)
    start = 0
    for chunk in chunks:
        stop = start + chunk
        part = inputs.make_varlen([stop], [chunk], dtype=DTYPE, **geometry)
        part.index_query, part.index_key = case.index_query[start:stop], case.index_key[:stop]
        part.query, part.key, part.value = case.query[start:stop], case.key[:stop], case.value[:stop]
        own_selected, own_out, own_lse = run(part, backend)
        assert as_sets(own_selected) == as_sets(selected[start:stop])
        assert inputs.relative_error(own_out, out[start:stop]) < TOLERANCE
        torch.testing.assert_close(own_lse, lse[start:stop])
        start = stop


@backends
@search
@given(lengths=ragged(), geometry=geometry(), position=st.integers(0, 3))
def test_gaps_change_nothing(inputs, backend, lengths, geometry, position):
    # sequences without queries, such as the pads of a padded buffer, wherever they are and whatever they hold
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    selected, out, lse = run(case, backend)
    position = min(position, len(lengths_k))
    gapped = inputs.make_varlen(
        [*lengths_k[:position], 5, *lengths_k[position:]],
        [*lengths_q[:position], 0, *lengths_q[position:]],
        dtype=DTYPE,
        **geometry,
    )
    at = sum(lengths_k[:position])
    gapped.index_query, gapped.query = case.index_query, case.query
    for name in ("index_key", "key", "value"):
        own = getattr(case, name)
        gap = own.new_full((5, *own.shape[1:]), float("nan"))
        setattr(gapped, name, torch.cat([own[:at], gap, own[at:]]))
    other_selected, other_out, other_lse = run(gapped, backend)
    assert as_sets(other_selected) == as_sets(selected)
    assert inputs.relative_error(other_out, out) < TOLERANCE
    torch.testing.assert_close(other_lse, lse)


@backends
@search
@given(lengths=ragged(), geometry=geometry())
def test_enough_blocks_make_it_dense(inputs, backend, lengths, geometry):
    lengths_q, lengths_k = lengths
    geometry["topk"] = max(max(lengths_k) // geometry["block_size"] + 1, geometry["topk"])
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    _, out, _ = run(case, backend)
    offset_q = offset_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k):
        query = case.query[offset_q : offset_q + length_q].transpose(0, 1)[None]
        key, value = (
            tensor[offset_k : offset_k + length_k].transpose(0, 1)[None] for tensor in (case.key, case.value)
        )
        causal = torch.ones(length_q, length_k, dtype=torch.bool).tril(length_k - length_q)
        if length_q > 0:
            dense = scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
            own = out[offset_q : offset_q + length_q]
            assert inputs.relative_error(own, dense[0].transpose(0, 1)) < TOLERANCE
        offset_q, offset_k = offset_q + length_q, offset_k + length_k


@search
@given(lengths=ragged(max_len=40), geometry=geometry())
def test_torch_gradients_are_the_references(inputs, lengths, geometry):
    lengths_q, lengths_k = lengths
    case = inputs.make_varlen(lengths_k, lengths_q, dtype=DTYPE, **geometry)
    selected, out, _ = run(case, "torch")
    grad_out = case.randn_like(out)
    grads = {}
    for backend in ("torch", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in case.qkv]
        out = block_sparse_attention(*leaves, selected, **case.lengths, block_size=case.block_size, backend=backend)
        grads[backend] = torch.autograd.grad(out, leaves, grad_out)
    for grad, expected in zip(grads["torch"], grads["reference"]):
        # a query with a single key has a gradient of 0 before rounding
        assert inputs.relative_error(grad, expected, floor=1e-3) < 1e-11


@backends
@search
@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=3),
    num_new=st.sampled_from([1, 2, 7, 20]),
    page_size=st.sampled_from([1, 3, 8, 16]),
    geometry=geometry(),
)
def test_every_cache_form_is_the_variable_length_form(inputs, backend, rows, num_new, page_size, geometry):
    # NaN in every slot that holds no token; rows shorter than num_new start with padding queries
    lengths, leftpad = zip(*rows)
    case = inputs.make_cached(lengths, num_new, leftpad=leftpad, page_size=page_size, dtype=DTYPE, **geometry)
    real = [min(num_new, length) for length in lengths]

    def real_rows(tensor):
        return torch.cat([own[num_new - count :] for own, count in zip(tensor, real)])

    packed = inputs.make_varlen(lengths, real, dtype=DTYPE, **geometry)
    packed.index_query, packed.query = real_rows(case.index_query), real_rows(case.query)
    packed.index_key, packed.key, packed.value = (torch.cat(rows) for rows in (case.index_key, case.key, case.value))
    expected_selected, expected_out, _ = run(packed, backend)
    for form in ("contiguous", "paged"):
        args, kwargs = case.selection(form)
        selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
        assert as_sets(real_rows(selected)) == as_sets(expected_selected)
        args, kwargs = case.attention(form, selected)
        out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
        assert inputs.relative_error(real_rows(out), expected_out) < TOLERANCE
        for row, count in enumerate(real):
            assert (selected[row, : num_new - count] == -1).all()
            assert (out[row, : num_new - count] == 0).all()
