"""Every argument of every operator, replaced by a likely mistake: the call works, or its error names an argument.

A call that works on the `torch` backend gives what the definition gives.
"""

import math

import pytest
import torch

from modeling_minimax_m3.msa import (
    StructuredPattern,
    block_sparse_attention,
    block_sparse_attention_with_kvcache,
    indexer_kl_loss,
    select_blocks,
    select_blocks_with_kvcache,
    structured_blocks,
    structured_blocks_of,
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LENGTHS = {"cu_seqlens_q": int32(0, 4, 10), "cu_seqlens_k": int32(0, 5, 12)}
HINTS = {"max_seqlen_q": 6, "max_seqlen_k": 7}
SELECTION = {"block_size": 2, "topk": 3, "local_blocks": 1, "init_blocks": 1}
SELECTED = torch.zeros(10, 2, 2, dtype=torch.int32) + int32(0, 1)
CACHE = {"cache_seqlens": int32(8, 5)}
PAGES = {"block_table": int32(2, 0, 1, 3).view(2, 2)}
PATTERN = {"local_blocks": 2, "anchor_blocks": 2, "anchor_stride": 2, "random_blocks": 1, "seed": 7}
SELECTED_OF_CACHE = torch.zeros(2, 3, 2, 2, dtype=torch.int32) + int32(0, 1)

CALLS = {
    "select": (
        select_blocks,
        {"index_query": normal(10, 2, 4), "index_key": normal(12, 4), **LENGTHS, **HINTS, **SELECTION},
    ),
    "attend": (
        block_sparse_attention,
        {"query": normal(10, 4, 4), "key": normal(12, 2, 4), "value": normal(12, 2, 3), "block_indices": SELECTED}
        | {**LENGTHS, **HINTS, "block_size": 2, "softmax_scale": 0.5, "return_lse": False},
    ),
    "loss": (
        indexer_kl_loss,
        {"index_query": normal(10, 2, 4), "index_key": normal(12, 4), "query": normal(10, 4, 4)}
        | {"key": normal(12, 2, 4), "block_indices": SELECTED, **LENGTHS, **HINTS, "lse": normal(10, 4) + 5}
        | {"block_size": 2, "softmax_scale": 0.5, "index_scale": 0.25},
    ),
    "select cached": (
        select_blocks_with_kvcache,
        {"index_query": normal(2, 3, 2, 4), "index_key_cache": normal(2, 8, 4), **CACHE}
        | {"cache_leftpad": int32(1, 0), **SELECTION},
    ),
    "select paged": (
        select_blocks_with_kvcache,
        {"index_query": normal(2, 3, 2, 4), "index_key_cache": normal(4, 4, 4), **CACHE, **PAGES, **SELECTION},
    ),
    "attend cached": (
        block_sparse_attention_with_kvcache,
        {"query": normal(2, 3, 4, 4), "key_cache": normal(2, 8, 2, 4), "value_cache": normal(2, 8, 2, 3)}
        | {"block_indices": SELECTED_OF_CACHE, **CACHE, "cache_leftpad": int32(1, 0)}
        | {"block_size": 2, "softmax_scale": 0.5},
    ),
    "attend paged": (
        block_sparse_attention_with_kvcache,
        {"query": normal(2, 3, 4, 4), "key_cache": normal(4, 4, 2, 4), "value_cache": normal(4, 4, 2, 3)}
        | {"block_indices": SELECTED_OF_CACHE, **CACHE, **PAGES, "block_size": 2, "softmax_scale": 0.5},
    ),
    "structured": (
        structured_blocks,
        {**LENGTHS, "num_kv_heads": 2, "block_size": 1, **PATTERN, "layer_idx": 1, "total_q": 10},
    ),
    "structured of": (
        structured_blocks_of,
        {"own_block": torch.arange(-1, 9), "num_kv_heads": 2, "layer_idx": 1}
        | {"pattern": StructuredPattern(**PATTERN), "num_blocks": 9},
    ),
}


# What an argument becomes, by its kind, as {what it is: function of the right value}.
ANYTHING = {
    "None": lambda value: None,
    "text": lambda value: "3",
    "empty text": lambda value: "",
    "bytes": lambda value: b"3",
    "list": lambda value: [3],
    "empty list": lambda value: [],
    "dict": lambda value: {},
    "object": lambda value: object(),
    "type": lambda value: int,
    "complex": lambda value: 1j,
}
NUMBERS = {
    **{f"{number}": lambda value, number=number: number for number in (True, False, 0, 1, -1, 5, 2**16, 2**16 + 1)},
    **{f"{number:e}": lambda value, number=number: number for number in (2**20, 2**31 - 1, 2**31, 2**32, 2**40)},
    **{f"{number:e}": lambda value, number=number: number for number in (2**63 - 1, 2**63, 2**64, -(2**63), 10**30)},
    "10**400": lambda value: 10**400,
    **{f"{number!r}": lambda value, number=number: number for number in (1.0, 2.5, -1.0, 1e300, math.nan)},
    **{f"{number!r}": lambda value, number=number: number for number in (math.inf, -math.inf, 5e-324)},
    "tensor of one": lambda value: torch.tensor(2),
    "tensor of many": lambda value: torch.zeros(3),
}
TENSORS = {
    "int": lambda value: 1,
    "float": lambda value: 1.0,
    "values as a list": lambda value: value.tolist(),
    "array": lambda value: value.numpy(),
    **{
        f"as {dtype}": lambda value, dtype=dtype: value.to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)
    },
    **{
        f"as {dtype}": lambda value, dtype=dtype: value.to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    },
    "on another device": lambda value: value.to("meta"),
    "scalar": lambda value: value.flatten()[0],
    "one more axis in front": lambda value: value[None],
    "one more axis behind": lambda value: value[..., None],
    "one axis less": lambda value: value[0],
    "flat": lambda value: value.flatten(),
    **{
        f"without axis {axis}": lambda value, axis=axis: value.narrow(axis, 0, 0)
        for axis in (0, -1, -2)  # where there is one
    },
    **{
        f"twice along axis {axis}": lambda value, axis=axis: torch.cat([value, value], dim=axis)
        for axis in (0, -1, -2)  # where there is one
    },
    **{f"one short along axis {axis}": lambda value, axis=axis: value.narrow(axis, 0, value.shape[axis] - 1)
       for axis in (0, -1, -2)},
    "strided last axis": lambda value: torch.stack([value, value], dim=-1)[..., 0],
    "strided other axes": lambda value: torch.stack([value, value])[0],
    "expanded first axis": lambda value: value[:1].expand_as(value),
    "expanded last axis": lambda value: value[..., :1].expand_as(value),
    "reversed axes": lambda value: value.permute(*range(value.dim() - 1, -1, -1)),
    "sparse": lambda value: value.to_sparse(),
    "nested": lambda value: torch.nested.as_nested_tensor([value, value], layout=torch.jagged),
    "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8),
    "zeros": torch.zeros_like,
    "negative": lambda value: value - value - 1,
    "least": lambda value: torch.full_like(value, torch.iinfo(value.dtype).min),  # of integers
    "greatest": lambda value: torch.full_like(value, torch.iinfo(value.dtype).max),
    "NaN": lambda value: value * math.nan,
    "reversed values": lambda value: value.flip(0),
}  # fmt: skip


def mutations(value):
    if isinstance(value, torch.Tensor):
        return {**ANYTHING, **TENSORS}
    return {**ANYTHING, **NUMBERS}


def cases():
    for form, (_, arguments) in CALLS.items():
        for name in (*arguments, "backend"):
            yield form, name


def outcome(form, changes):
    """What a call with some arguments changed returns, or the error that it raises, of any kind."""
    function, arguments = CALLS[form]
    try:
        return function(**{**arguments, **changes})
    except Exception as error:  # the test says which ones are right
        return error


def is_same(found, expected):
    if isinstance(found, tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    if found.shape != expected.shape or found.dtype != expected.dtype or found.device != expected.device:
        return False
    if found.device.type == "meta":
        return True
    if not found.is_floating_point():
        return torch.equal(found.sort(-1).values, expected.sort(-1).values)
    is_finite = expected.isfinite()
    if not torch.equal(found.isfinite(), is_finite):
        return False
    expected, found = expected[is_finite].double(), found[is_finite].double()
    return (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(("form", "name"), cases())
def test_a_changed_argument_works_or_is_named(form, name):
    arguments = CALLS[form][1]
    value = arguments.get(name, "torch")
    wrong = []
    for what, change in mutations(value).items():
        try:
            changed = change(value)
        except (IndexError, RuntimeError, TypeError):
            continue  # the argument has no such axis, or its dtype no such value
        given = {name: changed} if name == "backend" else {name: changed, "backend": "torch"}
        found = outcome(form, given)
        if isinstance(found, Exception):
            message = str(found)
            # A tensor may be right by itself and not fit another one.
            names = [*arguments, "backend"] if isinstance(value, torch.Tensor) else [name]
            if not isinstance(found, (ValueError, TypeError, NotImplementedError)):
                wrong.append(f"{what}: {type(found).__name__}: {message[:200]}")
            elif not any(f"`{one}`" in message for one in names):
                wrong.append(f"{what}: names nothing: {message[:200]}")
            elif len(message) > 1000:
                wrong.append(f"{what}: says too much: {len(message)} characters")
        elif name != "backend" and not is_same(found, outcome(form, {name: changed, "backend": "reference"})):
            wrong.append(f"{what}: not what the definition gives")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("form", CALLS)
def test_the_unchanged_calls_work(form):
    assert not isinstance(outcome(form, {}), Exception)
