"""Checks of the operators' arguments: shapes, dtypes and devices always, values where reading them is free.

Shape checks use no tensor value, so they also run (once) while `torch.compile` traces. Value checks run inside the
operators: always on CPU tensors, and with `MINIMAX_M3_MSA_CHECK=1` also on CUDA tensors, where they wait for the
device.
"""

import os

import torch
from torch._subclasses.fake_tensor import is_fake

from .sequences import compute_dtype

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Axes of tensors that must not be empty. The axes of tokens, rows, slots and lists may be.
_HEADS_AND_CHANNELS = frozenset(("H_idx", "H_kv", "H_q", "D", "D_idx", "D_v"))

# Name to (tensor, axes after the first two); an int is a required size, a str only a name.
Caches = dict[str, tuple[torch.Tensor, tuple[int | str, ...]]]

_MAX_INT32 = 2**31 - 1
# The longest list that a selection writes, so that a mistyped `topk` does not take more memory than there is.
MAX_TOPK = 2**16


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raises unless `tensor` is a tensor with strides."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        came = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"`{name}` must be a dense tensor, got {came}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raises unless `tensor` has the given axes, dtype and device.

    Args:
        name (str): Name in messages.
        tensor (tensor): What to check.
        shape (tuple of int or str): The axes; an int is a required size, a str only a name.
        dtypes (tuple of dtype): The dtypes that are allowed.
        device (device or None): That of the queries; None for any device.
    """
    check_dense(name, tensor)
    sizes = tensor.shape
    is_right, is_empty = len(sizes) == len(shape), False
    for axis, size in zip(shape, sizes):
        if isinstance(axis, int):
            is_right = is_right and size == axis
        elif axis in _HEADS_AND_CHANNELS:
            is_empty = is_empty or size == 0
    if not is_right or is_empty:
        axes = ", ".join(str(axis) for axis in shape)
        full = " and some heads and channels" if is_right else ""
        raise ValueError(f"`{name}` must have shape ({axes}){full}, got {_describe(tensor)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be {allowed}, got {_describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"`{name}` must be on {device} like the queries, got {_describe(tensor)}")


def check_unit_stride(name: str, tensor: torch.Tensor) -> None:
    """Raises unless the elements of the last dimension lie next to each other."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"`{name}` must be contiguous in its last dimension, got strides {tuple(tensor.stride())}; "
            "other strides are free"
        )


def check_int(name: str, value: int) -> None:
    """Raises unless `value` is an int, symbolic ones of `torch.compile` included."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"`{name}` must be an int, got {_short(value)} of type {type(value).__name__}")


def check_at_least(name: str, value: int, minimum: int, maximum: int = _MAX_INT32) -> None:
    """Raises unless `value` is an int from `minimum` to `maximum`."""
    check_int(name, value)
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {_short(value)}")
    if value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {_short(value)}")


def check_bool(name: str, value: bool) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {_short(value)}")


def scale(name: str, value: float | None, states: torch.Tensor) -> float:
    """The factor of the scores of `states` (..., D): `value` after a check, or 1 / sqrt(D) for None."""
    if value is None:
        return states.shape[-1] ** -0.5
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {_short(value)} of type {type(value).__name__}")
    dtype = compute_dtype(states)
    largest = torch.finfo(dtype).max
    if not -largest <= value <= largest:  # also catches NaN, and ints that no float holds
        raise ValueError(f"`{name}` must be finite in {str(dtype).removeprefix('torch.')}, got {_short(value)}")
    return float(value)


def check_selection_options(block_size: int, topk: int, local_blocks: int, init_blocks: int) -> None:
    """Raises unless the options of a selection are in range and the forced blocks fit into a list."""
    check_at_least("block_size", block_size, 1)
    check_at_least("topk", topk, 1, MAX_TOPK)
    check_at_least("local_blocks", local_blocks, 0)
    check_at_least("init_blocks", init_blocks, 0)
    if init_blocks + local_blocks > topk:
        raise ValueError(
            f"`init_blocks` + `local_blocks` must not exceed `topk`, as they count against it: "
            f"got {init_blocks} + {local_blocks} > {topk}"
        )


def check_cu_seqlens(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, device: torch.device | None = None
) -> None:
    """Raises unless both are int32 offsets of the same batch, on `device`, or on one device where that is None."""
    check_tensor("cu_seqlens_q", cu_seqlens_q, ("batch + 1",), (torch.int32,), device)
    check_tensor("cu_seqlens_k", cu_seqlens_k, ("batch + 1",), (torch.int32,), cu_seqlens_q.device)
    if cu_seqlens_q.shape[0] < 1 or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "`cu_seqlens_q` and `cu_seqlens_k` must have the same length batch + 1, at least 1: "
            f"got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )


def check_q_heads_per_kv(query: torch.Tensor, num_kv_heads: int) -> None:
    """Raises unless the query heads of `query` (..., H_q, D) share the key/value heads evenly."""
    num_heads = query.shape[-2]
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"the number of heads of `query` must be a multiple of the number of key/value heads, "
            f"got {num_heads} and {num_kv_heads}"
        )


def check_cache(
    names_and_caches: Caches,
    query: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    """Raises unless caches, and the tensors that say where their rows are, fit the queries.

    Args:
        names_and_caches (Caches): A contiguous cache starts with the axes (B, S), a paged one with (pages, page_size).
        query (B, T, ...): Queries.
        cache_seqlens, cache_leftpad, block_table: As in `reference.SelectBlocksWithKVCacheArgs`.
    """
    batch, device = query.shape[0], query.device
    leading = (batch, "S_max") if block_table is None else ("pages", "page_size")
    first_two: torch.Size | None = None
    for name, (cache, trailing) in names_and_caches.items():
        check_tensor(name, cache, (*leading, *trailing), (query.dtype,), device)
        check_unit_stride(name, cache)
        if first_two is not None and cache.shape[:2] != first_two:
            raise ValueError(f"`{name}` must start with the axes {tuple(first_two)}, got {_describe(cache)}")
        first_two = cache.shape[:2]
    check_tensor("cache_seqlens", cache_seqlens, (batch,), (torch.int32,), device)
    if block_table is not None:
        check_tensor("block_table", block_table, (batch, "pages of a row"), (torch.int32,), device)
        if cache.shape[1] < 1:
            raise ValueError(f"`{name}` must have a page_size of at least 1, got {_describe(cache)}")
        if cache_leftpad is not None:
            raise ValueError(
                "`cache_leftpad` needs a contiguous cache: it cannot be given together with `block_table`, "
                "whose rows start at their first page"
            )
    if cache_leftpad is not None:
        check_tensor("cache_leftpad", cache_leftpad, (batch,), (torch.int32,), device)


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Whether the operators read values of `tensor` to check them."""
    return tensor.device.type == "cpu" or os.environ.get("MINIMAX_M3_MSA_CHECK") == "1"


def are_readable(tensor: torch.Tensor) -> bool:
    """Whether values of `tensor` can be checked outside of the operators: a tensor that is traced has none."""
    if torch.compiler.is_compiling() or is_fake(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return values_are_checked(tensor)


def check_max_seqlens(
    max_seqlen_q: int | None, max_seqlen_k: int | None, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    """Raises unless each hint is None, or an int that is at least the length of the longest sequence."""
    hints = (
        ("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_seqlens_q),
        ("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_seqlens_k),
    )
    for name, hint, name_of_offsets, cu_seqlens in hints:
        if hint is None:
            continue
        check_int(name, hint)
        if torch.compiler.is_compiling():
            continue  # a graph may compute the hint, and a check would make it branch on that
        check_at_least(name, hint, 0)
        if len(cu_seqlens) > 1 and are_readable(cu_seqlens):
            longest = int(cu_seqlens.diff().max())
            if hint < longest:
                raise ValueError(
                    f"`{name}` must be at least the length of the longest sequence, {longest} by `{name_of_offsets}`, "
                    f"got {hint}"
                )


def check_cu_seqlens_values(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, total_k: int
) -> None:
    """Raises unless both start at 0, never fall, end at the number of tokens, and no sequence has len_q > len_k."""
    if not values_are_checked(cu_seqlens_q):
        return
    lengths = {}
    for name, cu_seqlens, total in (("cu_seqlens_q", cu_seqlens_q, total_q), ("cu_seqlens_k", cu_seqlens_k, total_k)):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        lengths[name] = cu_seqlens.diff()
        if first != 0 or last != total or bool((lengths[name] < 0).any()):
            raise ValueError(
                f"`{name}` must start at 0, never fall and end at the number of tokens {total}, "
                f"got {_abbreviate(cu_seqlens.tolist())}"
            )
    too_long = (lengths["cu_seqlens_q"] > lengths["cu_seqlens_k"]).nonzero()
    if len(too_long) > 0:
        sequence = int(too_long[0])
        raise ValueError(
            "queries are the last tokens of their sequence, so no sequence may have more queries than keys: "
            f"`cu_seqlens_q` gives sequence {sequence} {int(lengths['cu_seqlens_q'][sequence])} queries, "
            f"`cu_seqlens_k` gives it {int(lengths['cu_seqlens_k'][sequence])} keys"
        )


def check_cache_values(
    cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    """Raises unless the tensors that say where the rows of a cache are name slots that exist."""
    if not values_are_checked(cache_seqlens) or len(cache_seqlens) == 0:
        return
    capacity = cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]
    if int(cache_seqlens.min()) < 0 or int(cache_seqlens.max()) > capacity:
        raise ValueError(
            f"`cache_seqlens` must lie between 0 and the {capacity} slots of a row, "
            f"got {_abbreviate(cache_seqlens.tolist())}"
        )
    if cache_leftpad is not None and bool(((cache_leftpad < 0) | (cache_leftpad > cache_seqlens)).any()):
        raise ValueError(
            "`cache_leftpad` must lie between 0 and `cache_seqlens`, got "
            f"{_abbreviate(cache_leftpad.tolist())} for {_abbreviate(cache_seqlens.tolist())}"
        )
    if block_table is not None:
        pages_used = -(-cache_seqlens // cache.shape[1])
        in_use = torch.arange(block_table.shape[1], device=block_table.device) < pages_used[:, None]
        if bool((in_use & ((block_table < 0) | (block_table >= cache.shape[0]))).any()):
            raise ValueError(
                f"`block_table` must name pages between 0 and {cache.shape[0] - 1} wherever `cache_seqlens` reaches, "
                f"got {_abbreviate(block_table.tolist())}"
            )


def check_block_indices_values(block_indices: torch.Tensor) -> None:
    """Raises unless ids are >= -1, left-packed and without duplicates. Ids past the sequence attend to nothing."""
    if not values_are_checked(block_indices) or block_indices.numel() == 0:
        return
    lowest = int(block_indices.min())
    if lowest < -1:
        raise ValueError(f"`block_indices` must hold block ids, or -1 for unused places, got {lowest}")
    unused = block_indices < 0
    misplaced = unused[..., :-1] & ~unused[..., 1:]
    if bool(misplaced.any()):
        row = tuple(misplaced.any(-1).nonzero()[0].tolist())
        raise ValueError(
            "`block_indices` must be left-packed, with every -1 after the last id, "
            f"got {_abbreviate(block_indices[row].tolist())} at {row}"
        )
    ids = block_indices.sort(dim=-1).values
    duplicate = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    if bool(duplicate.any()):
        row = tuple(duplicate.any(-1).nonzero()[0].tolist())
        raise ValueError(
            "`block_indices` must not list a block twice for the same query and head, "
            f"got {_abbreviate(block_indices[row].tolist())} at {row}"
        )


def _short(value: object, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _abbreviate(values: list[int], limit: int = 12) -> str:
    return str(values) if len(values) <= limit else f"[{', '.join(map(str, values[:limit]))}, ...]"
