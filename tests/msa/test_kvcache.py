"""The cache forms against loops and against the variable-length form. Slots that hold no token hold NaN throughout."""

import pytest
import torch

from modeling_minimax_m3.msa import (
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    portable,
    select_blocks,
    select_blocks_with_kvcache,
)
from modeling_minimax_m3.msa.reference import BlockSparseAttentionWithKVCacheArgs, SelectBlocksWithKVCacheArgs

BACKENDS = ("reference", "torch")
FORMS = ("contiguous", "paged")
NEW_TOKENS = (1, 16, 17)
OPTIONS = {
    "small": {"block_size": 16, "topk": 3},
    "no forced block": {"block_size": 8, "topk": 2, "local_blocks": 0},
    "init and local": {"block_size": 8, "topk": 6, "local_blocks": 2, "init_blocks": 2},
    "odd block size": {"block_size": 7, "topk": 5, "init_blocks": 1},
    "larger than the cache": {"block_size": 128, "topk": 16},
}
# the third row is shorter than most calls' new tokens, so that its first queries are padding
ROWS = {"lengths": [37, 70, 5, 24], "leftpad": [0, 7, 30, 16]}


def as_sets(block_indices):
    return [
        [{block for block in head if block >= 0} for head in query] for query in block_indices.flatten(0, 1).tolist()
    ]


@pytest.mark.parametrize("num_new", NEW_TOKENS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selects_the_best_blocks(brute, inputs, backend, form, options, num_new):
    case = inputs.make_cached(**ROWS, num_new=num_new, **OPTIONS[options])
    args, kwargs = case.selection(form)
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    brute.check_selection_with_kvcache(selected, *args, **kwargs)


@pytest.mark.parametrize("num_new", NEW_TOKENS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attends_to_the_listed_blocks(brute, inputs, backend, form, options, num_new):
    case = inputs.make_cached(**ROWS, num_new=num_new, **OPTIONS[options])
    args, kwargs = case.attention(form)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(brute, inputs, backend, form, num_new, dtype):
    case = inputs.make_cached([61, 120], num_new, head_dim=64, index_dim=32, q_heads_per_kv=4, dtype=dtype)
    args, kwargs = case.selection(form)
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    brute.check_selection_with_kvcache(selected, *args, **kwargs)
    args, kwargs = case.attention(form, selected)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert out.dtype == dtype
    budget = 1e-12 if dtype == torch.float64 else 1e-2
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < budget


@pytest.mark.parametrize("num_new", NEW_TOKENS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_variable_length_form(inputs, backend, form, num_new):
    lengths = [61, 120, 40]
    case = inputs.make_cached(lengths, num_new, leftpad=[3, 0, 16])
    packed = {
        "cu_seqlens_q": inputs.offsets([num_new] * 3),
        "cu_seqlens_k": inputs.offsets(lengths),
        "backend": backend,
    }
    args, kwargs = case.selection(form)
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    expected = select_blocks(case.index_query.flatten(0, 1), torch.cat(case.index_key), **packed, **case.options)
    assert as_sets(selected) == [[{b for b in head if b >= 0} for head in query] for query in expected.tolist()]

    args, kwargs = case.attention(form, selected)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    expected_out = block_sparse_attention(
        case.query.flatten(0, 1),
        torch.cat(case.key),
        torch.cat(case.value),
        expected,
        block_size=case.block_size,
        **packed,
    )
    assert inputs.relative_error(out.flatten(0, 1), expected_out) < 1e-5


@pytest.mark.parametrize("num_new", [3, 30])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_id(inputs, backend, form, num_new):
    case = inputs.make_cached([90, 41], num_new, leftpad=[5, 0], block_size=4, topk=5, local_blocks=2, init_blocks=1)
    case.index_query.zero_()
    args, kwargs = case.selection(form)
    selected = as_sets(select_blocks_with_kvcache(*args, **kwargs, backend=backend))
    for row, length in enumerate((90, 41)):
        for i in range(num_new):
            own = (length - num_new + i) // 4
            forced = {block for block in (0, own - 1, own) if block >= 0}
            others = [block for block in range(own + 1) if block not in forced]
            expected = forced | set(others[: 5 - len(forced)])
            assert selected[row * num_new + i] == [expected] * 2, f"row {row}, query {i}"


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_changes_nothing(inputs, backend, num_new):
    plain = inputs.make_cached([61, 33], num_new)
    padded = inputs.make_cached([61, 33], num_new, leftpad=[13, 50])
    results = []
    for case in (plain, padded):
        args, kwargs = case.selection("contiguous")
        selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
        args, kwargs = case.attention("contiguous", selected)
        results.append((as_sets(selected), block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)))
    assert results[0][0] == results[1][0]
    assert inputs.relative_error(results[1][1], results[0][1]) < 1e-6


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_left_padding_is_left_padding_of_zero(inputs, backend, num_new):
    case = inputs.make_cached([61, 33], num_new)
    args, kwargs = case.selection("contiguous")
    zero = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    out = block_sparse_attention_with_kvcache(
        *case.attention("contiguous", zero)[0], **case.attention("contiguous")[1]
    )
    del case.contiguous["where"]["cache_leftpad"]
    args, kwargs = case.selection("contiguous")
    assert torch.equal(select_blocks_with_kvcache(*args, **kwargs, backend=backend), zero)
    args, kwargs = case.attention("contiguous", zero)
    assert torch.equal(block_sparse_attention_with_kvcache(*args, **kwargs), out)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_size_is_free(brute, inputs, backend, num_new, page_size):
    case = inputs.make_cached([61, 120, 33], num_new, page_size=page_size, block_size=16)
    args, kwargs = case.selection("paged")
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    brute.check_selection_with_kvcache(selected, *args, **kwargs)
    args, kwargs = case.attention("paged", selected)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-5


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_may_be_shared(brute, inputs, backend, num_new):
    # two rows with a common prefix that is stored once
    case = inputs.make_cached([50, 50], num_new, page_size=8)
    table = case.paged["where"]["block_table"]
    table[1, :4] = table[0, :4]
    args, kwargs = case.selection("paged")
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    brute.check_selection_with_kvcache(selected, *args, **kwargs)
    args, kwargs = case.attention("paged", selected)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-5


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_hold_nothing(inputs, backend, form, num_new):
    case = inputs.make_cached([0, 30, 0], num_new, leftpad=[0, 2, 9])
    args, kwargs = case.selection(form)
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    assert (selected[[0, 2]] == -1).all()
    args, kwargs = case.attention(form)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert (out[[0, 2]] == 0).all() and out[1].isfinite().all()


@pytest.mark.parametrize("num_new", [2, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_holds_nothing(inputs, backend, form, num_new):
    case = inputs.make_cached([0, 0], num_new)
    args, kwargs = case.selection(form)
    assert (select_blocks_with_kvcache(*args, **kwargs, backend=backend) == -1).all()
    args, kwargs = case.attention(form)
    assert (block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend) == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_new_token(inputs, backend, form):
    case = inputs.make_cached([20, 30], 0)
    args, kwargs = case.selection(form)
    assert select_blocks_with_kvcache(*args, **kwargs, backend=backend).shape == (2, 0, 2, 3)
    args, kwargs = case.attention(form)
    assert block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend).shape == (2, 0, 4, 16)


@pytest.mark.parametrize("num_new", [2, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_without_a_key_attend_to_nothing(inputs, backend, num_new):
    case = inputs.make_cached([61, 33], num_new, leftpad=[4, 0])
    case.block_indices[:] = torch.tensor([5, 2**31 - 1, 1000], dtype=torch.int32)
    for form in FORMS:
        args, kwargs = case.attention(form)
        assert (block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend) == 0).all()


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_caches(inputs, backend, num_new):
    # stored (B, H, S, D), as Transformers' own caches are, and keys and values interleaved in one buffer
    case = inputs.make_cached([61, 33], num_new)
    args, kwargs = case.attention("contiguous")
    expected = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    query, key, value, block_indices = args
    heads_first = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (key, value)]
    together = torch.stack([key, value], dim=3)
    interleaved = [together[:, :, :, 0], together[:, :, :, 1]]
    for caches in (heads_first, interleaved):
        assert not caches[0].is_contiguous()
        out = block_sparse_attention_with_kvcache(query, *caches, block_indices, **kwargs, backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("softmax_scale", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_scale(brute, inputs, backend, num_new, softmax_scale):
    case = inputs.make_cached([61, 33], num_new)
    args, kwargs = case.attention("contiguous")
    kwargs["softmax_scale"] = softmax_scale
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-5


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(brute, inputs, backend, num_new, scale):
    case = inputs.make_cached([61, 33], num_new, dtype=torch.float64)
    case.query *= scale
    args, kwargs = case.attention("contiguous")
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-9
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in args]
    assert block_sparse_attention_with_kvcache(*single, **kwargs, backend=backend).isfinite().all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_no_uninitialised_memory(brute, inputs, backend, form, num_new):
    case = inputs.make_cached(**ROWS, num_new=num_new)
    args, kwargs = case.selection(form)
    selected = select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    brute.check_selection_with_kvcache(selected, *args, **kwargs)
    args, kwargs = case.attention(form)
    out = block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    assert inputs.relative_error(out, brute.attend_with_kvcache(*args, **kwargs)) < 1e-5


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_are_left_alone(inputs, backend, form, num_new):
    case = inputs.make_cached(**ROWS, num_new=num_new)
    cache = getattr(case, form)
    before = {name: cache[name].clone() for name in ("index_key", "key", "value")}
    args, kwargs = case.selection(form)
    select_blocks_with_kvcache(*args, **kwargs, backend=backend)
    args, kwargs = case.attention(form)
    block_sparse_attention_with_kvcache(*args, **kwargs, backend=backend)
    for name, copy in before.items():
        assert torch.equal(cache[name].nan_to_num(7.0), copy.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wanted_gradient_is_refused(inputs, backend):
    case = inputs.make_cached([20, 30], 2)
    (query, *others), kwargs = case.attention("contiguous")
    with pytest.raises(NotImplementedError, match="gradient"):
        block_sparse_attention_with_kvcache(query.requires_grad_(), *others, **kwargs, backend=backend)
    with torch.no_grad():
        block_sparse_attention_with_kvcache(query, *others, **kwargs, backend=backend)


@pytest.mark.parametrize("form", FORMS)
def test_decoding_reads_no_value_on_the_host(inputs, form):
    # meta tensors have no values: reading one raises, and so would a CUDA graph capture
    case = inputs.make_cached([61, 33], 1, leftpad=[4, 0])
    where = {name: tensor.to("meta") for name, tensor in getattr(case, form)["where"].items()}
    where = {"cache_leftpad": None, "block_table": None, **where}
    index_query, index_key = (tensor.to("meta") for tensor in case.selection(form)[0])
    args = SelectBlocksWithKVCacheArgs(index_query, index_key, **where, **case.options)
    selected = portable.select_blocks_with_kvcache(args)
    assert selected.shape == (2, 1, 2, 3)
    query, key, value = (tensor.to("meta") for tensor in case.attention(form)[0][:3])
    args = BlockSparseAttentionWithKVCacheArgs(
        query, key, value, selected, **where, block_size=case.block_size, softmax_scale=0.25
    )
    assert portable.block_sparse_attention_with_kvcache(args).shape == (2, 1, 4, 16)
