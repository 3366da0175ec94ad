"""Arguments that the operators refuse: the error has the right type and names argument, value and expectation."""

import re

import pytest
import torch

from modeling_minimax_m3.msa import (
    available_backends,
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    select_blocks,
    select_blocks_with_kvcache,
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def every_other(tensor):
    """The same values with a stride of 2 in the last dimension."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def select_arguments():
    return {
        "index_query": torch.randn(12, 2, 8),
        "index_key": torch.randn(12, 8),
        "cu_seqlens_q": int32(0, 5, 12),
        "cu_seqlens_k": int32(0, 5, 12),
        "block_size": 4,
        "topk": 3,
    }


def attend_arguments():
    return {
        "query": torch.randn(12, 4, 8),
        "key": torch.randn(12, 2, 8),
        "value": torch.randn(12, 2, 8),
        "block_indices": torch.zeros(12, 2, 3, dtype=torch.int32) + int32(0, -1, -1),
        "cu_seqlens_q": int32(0, 5, 12),
        "cu_seqlens_k": int32(0, 5, 12),
        "block_size": 4,
    }


def select_cached_arguments():
    return {
        "index_query": torch.randn(2, 3, 2, 8),
        "index_key_cache": torch.randn(2, 16, 8),
        "cache_seqlens": int32(16, 9),
        "block_size": 4,
        "topk": 3,
    }


def attend_cached_arguments():
    return {
        "query": torch.randn(2, 3, 4, 8),
        "key_cache": torch.randn(2, 16, 2, 8),
        "value_cache": torch.randn(2, 16, 2, 8),
        "block_indices": torch.zeros(2, 3, 2, 3, dtype=torch.int32) + int32(0, -1, -1),
        "cache_seqlens": int32(16, 9),
        "block_size": 4,
    }


def select_paged_arguments():
    return {
        **select_cached_arguments(),
        "index_key_cache": torch.randn(6, 8, 8),
        "block_table": int32(5, 0, 3, 1).view(2, 2),
    }


def attend_paged_arguments():
    return {
        **attend_cached_arguments(),
        "key_cache": torch.randn(6, 8, 2, 8),
        "value_cache": torch.randn(6, 8, 2, 8),
        "block_table": int32(5, 0, 3, 1).view(2, 2),
    }


FORMS = {
    "select": (select_blocks, select_arguments),
    "attend": (block_sparse_attention, attend_arguments),
    "select cached": (select_blocks_with_kvcache, select_cached_arguments),
    "attend cached": (block_sparse_attention_with_kvcache, attend_cached_arguments),
    "select paged": (select_blocks_with_kvcache, select_paged_arguments),
    "attend paged": (block_sparse_attention_with_kvcache, attend_paged_arguments),
}

# form, changed arguments, error, parts of its message: names of arguments in backticks, then what came and what fits
REFUSED = {
    # shapes
    "index_query of 2 axes": ("select", {"index_query": torch.randn(12, 8)}, ValueError, ["`index_query`", "(12, 8)"]),
    "index_key of 3 axes": ("select", {"index_key": torch.randn(12, 1, 8)}, ValueError, ["`index_key`", "(12, 1, 8)"]),
    "index_key of another width": ("select", {"index_key": torch.randn(12, 6)}, ValueError, ["`index_key`", "6", "8"]),
    "query of 2 axes": ("attend", {"query": torch.randn(12, 8)}, ValueError, ["`query`", "(12, 8)"]),
    "query of 4 axes": ("attend", {"query": torch.randn(1, 12, 4, 8)}, ValueError, ["`query`", "(1, 12, 4, 8)"]),
    "key of another width": ("attend", {"key": torch.randn(12, 2, 6)}, ValueError, ["`key`", "6", "8"]),
    "value with other tokens": ("attend", {"value": torch.randn(11, 2, 8)}, ValueError, ["`value`", "11", "12"]),
    "value with other heads": ("attend", {"value": torch.randn(12, 1, 8)}, ValueError, ["`value`", "(12, 1, 8)"]),
    "5 query heads for 2 key heads": ("attend", {"query": torch.randn(12, 5, 8)}, ValueError, ["`query`", "5", "2"]),
    "block_indices of one head for two": (
        "attend",
        {"block_indices": torch.zeros(12, 1, 3, dtype=torch.int32)},
        ValueError,
        ["`block_indices`", "(12, 1, 3)", "(12, 2, "],
    ),
    "block_indices for other queries": (
        "attend",
        {"block_indices": torch.zeros(11, 2, 3, dtype=torch.int32)},
        ValueError,
        ["`block_indices`", "(11, 2, 3)", "(12, 2, "],
    ),
    "cached query of 3 axes": ("attend cached", {"query": torch.randn(2, 4, 8)}, ValueError, ["`query`", "(2, 4, 8)"]),
    "cached index_query of 3 axes": (
        "select cached",
        {"index_query": torch.randn(2, 2, 8)},
        ValueError,
        ["`index_query`", "(2, 2, 8)"],
    ),
    "key_cache of 3 axes": ("attend cached", {"key_cache": torch.randn(2, 16, 8)}, ValueError, ["`key_cache`"]),
    "key_cache of other rows": ("attend cached", {"key_cache": torch.randn(3, 16, 2, 8)}, ValueError, ["`key_cache`"]),
    "value_cache of other slots": (
        "attend cached",
        {"value_cache": torch.randn(2, 15, 2, 8)},
        ValueError,
        ["`value_cache`", "15", "16"],
    ),
    "value_cache of other heads": (
        "attend cached",
        {"value_cache": torch.randn(2, 16, 1, 8)},
        ValueError,
        ["`value_cache`", "(2, 16, 1, 8)"],
    ),
    "index_key_cache of another width": (
        "select cached",
        {"index_key_cache": torch.randn(2, 16, 6)},
        ValueError,
        ["`index_key_cache`", "6", "8"],
    ),
    "cached block_indices of other rows": (
        "attend cached",
        {"block_indices": torch.zeros(1, 3, 2, 3, dtype=torch.int32)},
        ValueError,
        ["`block_indices`", "(1, 3, 2, 3)"],
    ),
    "cached heads that do not divide": (
        "attend cached",
        {"query": torch.randn(2, 3, 5, 8)},
        ValueError,
        ["`query`", "5"],
    ),
    "cache_seqlens of other rows": (
        "attend cached",
        {"cache_seqlens": int32(16, 9, 3)},
        ValueError,
        ["`cache_seqlens`", "(3,)", "(2)"],
    ),
    "cache_leftpad of other rows": (
        "attend cached",
        {"cache_leftpad": int32(0)},
        ValueError,
        ["`cache_leftpad`", "(1,)"],
    ),
    "block_table of other rows": (
        "attend paged",
        {"block_table": int32(1, 2).view(1, 2)},
        ValueError,
        ["`block_table`", "(1, 2)"],
    ),
    "block_table of 1 axis": ("select paged", {"block_table": int32(1, 2)}, ValueError, ["`block_table`", "(2,)"]),
    # dtypes and kinds
    "integer query": ("attend", {"query": torch.zeros(12, 4, 8, dtype=torch.int64)}, TypeError, ["`query`", "int64"]),
    "integer index_query": (
        "select",
        {"index_query": torch.zeros(12, 2, 8, dtype=torch.int32)},
        TypeError,
        ["`index_query`", "int32"],
    ),
    "complex query": ("attend", {"query": torch.zeros(12, 4, 8) + 0j}, TypeError, ["`query`", "complex64"]),
    "key of another dtype": (
        "attend",
        {"key": torch.randn(12, 2, 8).bfloat16()},
        TypeError,
        ["`key`", "bfloat16", "float32"],
    ),
    "value of another dtype": (
        "attend",
        {"value": torch.randn(12, 2, 8).double()},
        TypeError,
        ["`value`", "float64", "float32"],
    ),
    "index_key of another dtype": (
        "select",
        {"index_key": torch.randn(12, 8).half()},
        TypeError,
        ["`index_key`", "float16", "float32"],
    ),
    "cache of another dtype": (
        "attend cached",
        {"key_cache": torch.randn(2, 16, 2, 8).bfloat16()},
        TypeError,
        ["`key_cache`", "bfloat16"],
    ),
    "int64 block_indices": (
        "attend",
        {"block_indices": torch.zeros(12, 2, 1, dtype=torch.int64)},
        TypeError,
        ["`block_indices`", "int64", "int32"],
    ),
    "float block_indices": (
        "attend",
        {"block_indices": torch.zeros(12, 2, 1)},
        TypeError,
        ["`block_indices`", "float32"],
    ),
    "int64 cu_seqlens": (
        "select",
        {"cu_seqlens_q": torch.tensor([0, 5, 12])},
        TypeError,
        ["`cu_seqlens_q`", "int64", "int32"],
    ),
    "cu_seqlens as a list": ("attend", {"cu_seqlens_k": [0, 5, 12]}, TypeError, ["`cu_seqlens_k`", "list"]),
    "query as a list": ("attend", {"query": [1.0]}, TypeError, ["`query`", "list"]),
    "key as None": ("attend", {"key": None}, TypeError, ["`key`", "NoneType"]),
    "key_cache as None": ("attend cached", {"key_cache": None}, TypeError, ["`key_cache`", "NoneType"]),
    "int64 cache_seqlens": (
        "select cached",
        {"cache_seqlens": torch.tensor([16, 9])},
        TypeError,
        ["`cache_seqlens`", "int64", "int32"],
    ),
    "int64 cache_leftpad": (
        "select cached",
        {"cache_leftpad": torch.tensor([0, 1])},
        TypeError,
        ["`cache_leftpad`", "int64", "int32"],
    ),
    "int64 block_table": (
        "select paged",
        {"block_table": torch.zeros(2, 2, dtype=torch.int64)},
        TypeError,
        ["`block_table`", "int64"],
    ),
    "block_size of 4.0": ("select", {"block_size": 4.0}, TypeError, ["`block_size`", "4.0"]),
    "topk of True": ("select", {"topk": True}, TypeError, ["`topk`", "True"]),
    "softmax_scale as text": ("attend", {"softmax_scale": "large"}, TypeError, ["`softmax_scale`", "large"]),
    "softmax_scale of nan": ("attend", {"softmax_scale": float("nan")}, ValueError, ["`softmax_scale`", "nan"]),
    "cached softmax_scale of inf": (
        "attend cached",
        {"softmax_scale": float("inf")},
        ValueError,
        ["`softmax_scale`", "inf"],
    ),
    # devices and strides
    "key elsewhere": ("attend", {"key": torch.randn(12, 2, 8, device="meta")}, ValueError, ["`key`", "meta", "cpu"]),
    "block_indices elsewhere": (
        "attend",
        {"block_indices": torch.zeros(12, 2, 3, dtype=torch.int32, device="meta")},
        ValueError,
        ["`block_indices`", "meta", "cpu"],
    ),
    "cu_seqlens elsewhere": (
        "select",
        {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32, device="meta")},
        ValueError,
        ["`cu_seqlens_q`", "meta", "cpu"],
    ),
    "cache elsewhere": (
        "attend cached",
        {"value_cache": torch.randn(2, 16, 2, 8, device="meta")},
        ValueError,
        ["`value_cache`", "meta", "cpu"],
    ),
    "cache_seqlens elsewhere": (
        "attend cached",
        {"cache_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
        ValueError,
        ["`cache_seqlens`", "meta", "cpu"],
    ),
    "strided query": ("attend", {"query": every_other(torch.randn(12, 4, 8))}, ValueError, ["`query`", "last dim"]),
    "strided key": ("attend", {"key": every_other(torch.randn(12, 2, 8))}, ValueError, ["`key`", "last dim"]),
    "strided value": ("attend", {"value": every_other(torch.randn(12, 2, 8))}, ValueError, ["`value`", "last dim"]),
    "strided index_query": (
        "select",
        {"index_query": every_other(torch.randn(12, 2, 8))},
        ValueError,
        ["`index_query`", "last dim"],
    ),
    "strided index_key": (
        "select",
        {"index_key": every_other(torch.randn(12, 8))},
        ValueError,
        ["`index_key`", "last dim"],
    ),
    "strided key_cache": (
        "attend cached",
        {"key_cache": every_other(torch.randn(2, 16, 2, 8))},
        ValueError,
        ["`key_cache`", "last dim"],
    ),
    "strided index_key_cache": (
        "select cached",
        {"index_key_cache": every_other(torch.randn(2, 16, 8))},
        ValueError,
        ["`index_key_cache`", "last dim"],
    ),
    # sequence lengths
    "cu_seqlens of different lengths": (
        "attend",
        {"cu_seqlens_k": int32(0, 12)},
        ValueError,
        ["`cu_seqlens_q`", "`cu_seqlens_k`", "3", "2"],
    ),
    "empty cu_seqlens": (
        "select",
        {"cu_seqlens_q": int32(), "cu_seqlens_k": int32()},
        ValueError,
        ["`cu_seqlens_q`", "`cu_seqlens_k`"],
    ),
    "cu_seqlens that fall": (
        "attend",
        {"cu_seqlens_q": int32(0, 7, 5, 12), "cu_seqlens_k": int32(0, 7, 5, 12)},
        ValueError,
        ["`cu_seqlens_q`", "never fall", "[0, 7, 5, 12]"],
    ),
    "cu_seqlens not from 0": (
        "attend",
        {"cu_seqlens_k": int32(1, 5, 12)},
        ValueError,
        ["`cu_seqlens_k`", "[1, 5, 12]"],
    ),
    "cu_seqlens_q past the end": (
        "select",
        {"cu_seqlens_q": int32(0, 5, 13)},
        ValueError,
        ["`cu_seqlens_q`", "13", "12"],
    ),
    "cu_seqlens_k short of the end": (
        "select",
        {"cu_seqlens_k": int32(0, 5, 11)},
        ValueError,
        ["`cu_seqlens_k`", "11", "12"],
    ),
    "more queries than keys": (
        "select",
        {"cu_seqlens_q": int32(0, 6, 12)},
        ValueError,
        ["`cu_seqlens_q`", "`cu_seqlens_k`", "sequence 0", "6", "5"],
    ),
    "more queries than keys, attending": (
        "attend",
        {"cu_seqlens_k": int32(0, 6, 12)},
        ValueError,
        ["`cu_seqlens_q`", "`cu_seqlens_k`", "sequence 1", "7", "6"],
    ),
    "cache_seqlens past the cache": (
        "attend cached",
        {"cache_seqlens": int32(17, 9)},
        ValueError,
        ["`cache_seqlens`", "17", "16"],
    ),
    "negative cache_seqlens": (
        "select cached",
        {"cache_seqlens": int32(16, -1)},
        ValueError,
        ["`cache_seqlens`", "-1"],
    ),
    "cache_seqlens past the pages": (
        "select paged",
        {"cache_seqlens": int32(17, 9)},
        ValueError,
        ["`cache_seqlens`", "17", "16"],
    ),
    "negative cache_leftpad": (
        "attend cached",
        {"cache_leftpad": int32(-1, 0)},
        ValueError,
        ["`cache_leftpad`", "-1"],
    ),
    "cache_leftpad past cache_seqlens": (
        "attend cached",
        {"cache_leftpad": int32(0, 10)},
        ValueError,
        ["`cache_leftpad`", "`cache_seqlens`", "10", "9"],
    ),
    "cache_leftpad with block_table": (
        "attend paged",
        {"cache_leftpad": int32(0, 0)},
        ValueError,
        ["`cache_leftpad`", "`block_table`"],
    ),
    "cache_leftpad with block_table, selecting": (
        "select paged",
        {"cache_leftpad": int32(0, 0)},
        ValueError,
        ["`cache_leftpad`", "`block_table`"],
    ),
    "page past the cache": (
        "attend paged",
        {"block_table": int32(5, 6, 3, 1).view(2, 2)},
        ValueError,
        ["`block_table`", "6", "5"],
    ),
    "negative page in use": (
        "select paged",
        {"block_table": int32(5, -1, 3, 1).view(2, 2)},
        ValueError,
        ["`block_table`", "-1"],
    ),
    # options
    "block_size of 0": ("select", {"block_size": 0}, ValueError, ["`block_size`", "0", "1"]),
    "negative block_size": ("attend", {"block_size": -4}, ValueError, ["`block_size`", "-4", "1"]),
    "cached block_size of 0": ("attend cached", {"block_size": 0}, ValueError, ["`block_size`", "0", "1"]),
    "topk of 0": ("select", {"topk": 0}, ValueError, ["`topk`", "0", "1"]),
    "cached topk of 0": ("select cached", {"topk": 0}, ValueError, ["`topk`", "0", "1"]),
    "negative local_blocks": ("select", {"local_blocks": -1}, ValueError, ["`local_blocks`", "-1", "0"]),
    "negative init_blocks": ("select", {"init_blocks": -2}, ValueError, ["`init_blocks`", "-2", "0"]),
    "more forced blocks than topk": (
        "select",
        {"init_blocks": 2, "local_blocks": 2},
        ValueError,
        ["`init_blocks`", "`local_blocks`", "`topk`", "3"],
    ),
    "more forced blocks than topk, cached": (
        "select cached",
        {"local_blocks": 4},
        ValueError,
        ["`init_blocks`", "`local_blocks`", "`topk`", "4", "3"],
    ),
    # block ids
    "id below -1": (
        "attend",
        {"block_indices": torch.full((12, 2, 1), -2, dtype=torch.int32)},
        ValueError,
        ["`block_indices`", "-2", "-1"],
    ),
    "id after an unused slot": (
        "attend",
        {"block_indices": torch.zeros(12, 2, 3, dtype=torch.int32) + int32(0, -1, 1)},
        ValueError,
        ["`block_indices`", "left-packed", "[0, -1, 1]"],
    ),
    "id listed twice": (
        "attend",
        {"block_indices": torch.zeros(12, 2, 3, dtype=torch.int32) + int32(1, 0, 1)},
        ValueError,
        ["`block_indices`", "twice", "[1, 0, 1]"],
    ),
    "cached id listed twice": (
        "attend cached",
        {"block_indices": torch.zeros(2, 3, 2, 2, dtype=torch.int32)},
        ValueError,
        ["`block_indices`", "twice", "[0, 0]"],
    ),
    # backends
    "unknown backend": ("select", {"backend": "triton"}, ValueError, ["`backend`", "triton", "torch", "reference"]),
    "unknown cached backend": ("attend cached", {"backend": "fast"}, ValueError, ["`backend`", "fast", "torch"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_unchanged_arguments_are_accepted(form):
    function, arguments = FORMS[form]
    assert function(**arguments()).shape[-1] in (3, 8)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused(name, backend):
    form, changes, error, parts = REFUSED[name]
    function, arguments = FORMS[form]
    with pytest.raises(error) as raised:
        function(**{**arguments(), "backend": backend, **changes})
    for part in parts:
        pattern = rf"(?<![\w.]){re.escape(part)}(?!\w)" if re.fullmatch(r"-?[\d.]+", part) else re.escape(part)
        assert re.search(pattern, str(raised.value)), f"{part!r} is not in: {raised.value}"


@pytest.mark.parametrize("form", FORMS)
def test_options_are_keyword_only(form):
    function, arguments = FORMS[form]
    with pytest.raises(TypeError):
        function(*arguments().values())


@pytest.mark.skipif("cuda" in available_backends(), reason="this machine has the extension")
@pytest.mark.parametrize("form", FORMS)
def test_a_forced_backend_that_cannot_run_says_why(form):
    function, arguments = FORMS[form]
    with pytest.raises(NotImplementedError, match=r"`?backend`?.*cuda.*(extension|device|CUDA)"):
        function(**arguments(), backend="cuda")


def test_available_backends_all_run():
    names = available_backends()
    assert {"torch", "reference"} <= set(names)
    assert names.index("torch") < names.index("reference"), "best first"
    for name in names:
        if name != "cuda":  # takes tensors on its own device only
            select_blocks(**select_arguments(), backend=name)


def test_unused_table_entries_are_not_checked():
    arguments = select_paged_arguments()
    arguments["cache_seqlens"] = int32(8, 16)
    arguments["block_table"][0, 1] = 10**6
    select_blocks_with_kvcache(**arguments)
