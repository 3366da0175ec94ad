"""The `cuda` backend: what the compiled kernels support, and the calls into them, with the signatures of `reference`."""

import functools

import torch

from . import extension

__all__ = [
    "attention_lse",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_with_kvcache",
    "indexer_kl_loss",
    "indexer_kl_loss_backward",
    "missing_kernel",
    "run",
    "saved_tokens",
    "select_blocks",
    "select_blocks_with_kvcache",
    "structured_blocks_of",
    "unsupported",
]

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
GROUP_SIZES = (1, 2, 4, 8, 16)
MAX_TOPK = 64
MAX_INDEX_HEADS = 64
MAX_STRUCTURED_HEADS = 64

# Of the probabilities that a loss keeps for its gradient: their bytes at most, and what they are multiplied by, so that
# float16 holds the small ones (kSavedProbabilityScale of the kernels).
MAX_SAVED_BYTES = 2**30
SAVED_SCALE = 2**15

# Up to this many new tokens per row the cached forms have kernels of their own; above, rows run as packed sequences.
MAX_DECODE_TOKENS = 16

# The decoding kernels take the keys of a page in groups of this many.
PAGE_MULTIPLE = 16

_VECTOR_BYTES = 16  # the kernels read rows in vectors of this size


# --- what is supported -------------------------------------------------------------------------------------------


def unsupported(function: str, args: tuple) -> str | None:
    """Why the kernels cannot run a call of `function` with the arguments `args`; None where they can.

    Looks at dtypes, shapes and strides only, not at whether there is a binary to run.
    """
    if function == "block_sparse_attention_backward":
        # As the forward; what else comes is made to fit.
        _, query, key, value, _, _, *rest = args
        return unsupported("block_sparse_attention", (query, key, value, *rest))
    if function == "structured_blocks_of":
        return _structured_unsupported(*args)
    if function in ("select_blocks", "select_blocks_with_kvcache"):
        *tensors, block_size, topk, _, _ = args
        named = dict(zip(("index_query", "index_key"), tensors))
        group = 1
        if tensors[0].shape[-2] > MAX_INDEX_HEADS:
            return f"there must be at most {MAX_INDEX_HEADS} index heads, there are {tensors[0].shape[-2]}"
    elif function in ("attention_lse", "indexer_kl_loss", "indexer_kl_loss_backward"):
        named, block_indices, block_size = _indexer_loss_arguments(function, args)
        topk = 0 if block_indices is None else block_indices.shape[-1]
        group = named["query"].shape[-2] // named["key"].shape[-2]
    else:
        *tensors, block_size, _ = args
        named = dict(zip(("query", "key", "value"), tensors))
        topk = tensors[3].shape[-1]
        group = tensors[0].shape[-2] // tensors[1].shape[-2]
    query = next(iter(named.values()))
    if query.device.type != "cuda":
        return f"the tensors must be on a CUDA device, they are on {query.device}"
    if query.dtype not in DTYPES:
        return f"the dtype must be float16 or bfloat16, it is {str(query.dtype).removeprefix('torch.')}"
    sizes = {name: tensor.shape[-1] for name, tensor in named.items()}
    if any(size not in HEAD_DIMS for size in sizes.values()) or sizes.get("value", query.shape[-1]) != query.shape[-1]:
        came = ", ".join(f"{size} for `{name}`" for name, size in sizes.items())
        return f"the head dimension must be one of {HEAD_DIMS} and the same for query, key and value, it is {came}"
    if block_size not in BLOCK_SIZES:
        return f"`block_size` must be one of {BLOCK_SIZES}, it is {block_size}"
    if topk > MAX_TOPK:
        return f"there must be at most {MAX_TOPK} blocks per query, there are {topk}"
    if group not in GROUP_SIZES:
        return f"the query heads per key/value head must be one of {GROUP_SIZES}, they are {group}"
    if function.endswith("_with_kvcache"):
        cache, num_new = tensors[1], tensors[0].shape[1]
        is_paged = tensors[-1] is not None
        if is_paged and num_new <= MAX_DECODE_TOKENS and cache.shape[1] % PAGE_MULTIPLE:
            return f"the page size must be a multiple of {PAGE_MULTIPLE}, it is {cache.shape[1]}"
    for name, tensor in named.items():
        if not _is_aligned(tensor):
            return (
                f"`{name}` must start at a multiple of {_VECTOR_BYTES} bytes and have strides that are multiples of "
                f"{_VECTOR_BYTES // tensor.element_size()} elements, they are {tuple(tensor.stride())}"
            )
    return extension.device_reason(query.device.index)


def _indexer_loss_arguments(function: str, args: tuple) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, int]:
    """The tensors whose rows a kernel reads, by name, `block_indices`, and `block_size`."""
    if function == "attention_lse":
        query, key, block_indices, _, _, block_size, _ = args
        return {"query": query, "key": key}, block_indices, block_size
    if function == "indexer_kl_loss_backward":
        args = (*args[1:6], *args[7:])  # without grad_kl and index_lse
    *tensors, _, block_indices, _, _, block_size, _, _ = args
    return dict(zip(("index_query", "index_key", "query", "key"), tensors)), block_indices, block_size


def missing_kernel(function: str) -> str | None:
    """Why the loaded binary cannot run `function`: one named by MINIMAX_M3_MSA_LIBRARY may be older than its kernel."""
    if function.startswith("indexer_kl_loss"):
        operator = getattr(torch.ops.minimax_m3_msa_cuda, function, None)
        if operator is None:
            return "the compiled extension has no kernel for it"
        if all(argument.name != "saved_probs" for argument in operator.default._schema.arguments):
            return "the compiled extension is too old for it"
    return None


def _structured_unsupported(
    own_block: torch.Tensor, num_kv_heads: int, layer_idx: int, local_blocks: int, anchor_blocks: int,
    anchor_stride: int, random_blocks: int, seed: int,
) -> str | None:  # fmt: skip
    if own_block.device.type != "cuda":
        return f"the tensors must be on a CUDA device, they are on {own_block.device}"
    width = local_blocks + anchor_blocks + random_blocks
    if width > MAX_TOPK:
        return f"there must be at most {MAX_TOPK} blocks per query, there are {width}"
    if num_kv_heads > MAX_STRUCTURED_HEADS:
        return f"there must be at most {MAX_STRUCTURED_HEADS} key/value heads, there are {num_kv_heads}"
    return extension.device_reason(own_block.device.index)


def _is_aligned(tensor: torch.Tensor) -> bool:
    step = _VECTOR_BYTES // tensor.element_size()
    return tensor.data_ptr() % _VECTOR_BYTES == 0 and all(
        stride % step == 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1
    )


# --- calls -------------------------------------------------------------------------------------------------------


def run(function: str, args: tuple):
    """Calls `function` of this module with the arguments `args`, which may be more than those in `reference`.

    PyTorch's stable ABI hands the extension's errors on as plain RuntimeErrors, while callers that free memory or take
    a smaller batch catch OutOfMemoryError. So a call that failed is made again, which is safe as none reads what it
    writes; if it fails again, the allocator's count of failures says whether memory was the reason.

    Raises:
        torch.OutOfMemoryError: The GPU's memory does not suffice.
    """
    try:
        return globals()[function](*args)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass  # left first, as the exception holds what the call had allocated
    failures = _allocation_failures(args[0].device)
    try:
        return globals()[function](*args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _allocation_failures(args[0].device) == failures:
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory in `{function}` of the compiled extension") from error


def _allocation_failures(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_ooms", 0)


# --- packed sequences --------------------------------------------------------------------------------------------


def select_blocks(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """As `reference.select_blocks`."""
    return torch.ops.minimax_m3_msa_cuda.select_blocks(
        index_query, index_key, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), block_size, topk, local_blocks,
        init_blocks,
    )  # fmt: skip


def structured_blocks_of(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
) -> torch.Tensor:
    """As `reference.structured_blocks_of`."""
    lists = torch.ops.minimax_m3_msa_cuda.structured_blocks_of(
        own_block.flatten().contiguous(), num_kv_heads, layer_idx, local_blocks, anchor_blocks, anchor_stride,
        random_blocks, seed,
    )  # fmt: skip
    return lists.view(*own_block.shape, *lists.shape[1:])


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention(
        query, key, value, block_indices, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), block_size,
        softmax_scale,
    )  # fmt: skip


def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """As `reference.attention_lse`, by a whole attention whose output nobody uses; over all keys in as many as the longest
    list of blocks takes, and as if all keys were one sequence, because lengths are not read."""
    lists = [block_indices]
    if block_indices is None:
        # No sequence has more blocks than all keys together; a list may name some that a query does not have.
        blocks = torch.arange(-(-len(key) // block_size), dtype=torch.int32, device=query.device)
        lists = [ids.expand(len(query), key.shape[1], -1) for ids in blocks.split(MAX_TOPK)]
    parts = (
        block_sparse_attention(query, key, key, ids, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale)[1]
        for ids in lists
    )
    return functools.reduce(torch.logaddexp, parts)


def saved_tokens(block_indices: torch.Tensor, block_size: int) -> int:
    """Of how many query tokens, the first, the loss keeps the main attention's mean probabilities for its gradient.

    As `saved_probs` (saved_tokens, H_kv, topk, block_size), float16, times SAVED_SCALE, by the slots of `block_indices`;
    unspecified for keys that a query does not see. The gradient computes those of the other tokens once more.
    """
    total_q, num_heads, topk = block_indices.shape
    return min(total_q, MAX_SAVED_BYTES // (2 * num_heads * max(topk, 1) * block_size))


def indexer_kl_loss(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    saved_probs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss`; fills `saved_probs`, see `saved_tokens`."""
    return torch.ops.minimax_m3_msa_cuda.indexer_kl_loss(
        index_query, index_key, query, key, *_contiguous(lse, block_indices, cu_seqlens_q, cu_seqlens_k), block_size,
        softmax_scale, index_scale, saved_probs,
    )  # fmt: skip


def indexer_kl_loss_backward(
    grad_kl: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    index_lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    saved_probs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss_backward`; reads the `saved_probs` of the value."""
    if not (saved_probs.is_contiguous() and _is_aligned(saved_probs)):  # hooks may have put it elsewhere
        saved_probs = saved_probs.clone(memory_format=torch.contiguous_format)
    return torch.ops.minimax_m3_msa_cuda.indexer_kl_loss_backward(
        grad_kl.contiguous(), index_query, index_key, query, key,
        *_contiguous(lse, index_lse, block_indices, cu_seqlens_q, cu_seqlens_k), block_size, softmax_scale,
        index_scale, saved_probs,
    )  # fmt: skip


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the saved out and lse; they repeat bit for bit."""
    # A gradient may come expanded, so that elements share memory, or as any view.
    if not _is_aligned(grad_out) or grad_out.stride(-1) != 1 or 0 in grad_out.stride():
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention_backward(
        grad_out, query, key, value, out.contiguous(), lse.contiguous(), block_indices, cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(), block_size, softmax_scale,
    )  # fmt: skip


# --- caches ------------------------------------------------------------------------------------------------------


def select_blocks_with_kvcache(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """As `reference.select_blocks_with_kvcache`."""
    batch, num_new = index_query.shape[:2]
    if num_new > MAX_DECODE_TOKENS:
        (index_key,), *offsets = _rows_as_sequences(
            (index_key_cache,), num_new, cache_seqlens, cache_leftpad, block_table
        )
        selected = select_blocks(
            index_query.flatten(0, 1), index_key, *offsets, block_size, topk, local_blocks, init_blocks
        )
        return selected.unflatten(0, (batch, num_new))
    return torch.ops.minimax_m3_msa_cuda.select_blocks_with_kvcache(
        index_query, index_key_cache, *_contiguous(cache_seqlens, cache_leftpad, block_table), block_size, topk,
        local_blocks, init_blocks,
    )  # fmt: skip


def block_sparse_attention_with_kvcache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """As `reference.block_sparse_attention_with_kvcache`."""
    batch, num_new = query.shape[:2]
    if num_new > MAX_DECODE_TOKENS:
        (key, value), *offsets = _rows_as_sequences(
            (key_cache, value_cache), num_new, cache_seqlens, cache_leftpad, block_table
        )
        out, _ = block_sparse_attention(
            query.flatten(0, 1), key, value, block_indices.flatten(0, 1), *offsets, block_size, softmax_scale
        )
        return out.unflatten(0, (batch, num_new))
    return torch.ops.minimax_m3_msa_cuda.block_sparse_attention_with_kvcache(
        query, key_cache, value_cache, block_indices.contiguous(),
        *_contiguous(cache_seqlens, cache_leftpad, block_table), block_size, softmax_scale,
    )  # fmt: skip


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _rows_as_sequences(
    caches: tuple[torch.Tensor, ...],
    num_new: int,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The rows of caches as packed sequences: each cache as (tokens, ...), cu_seqlens_q and cu_seqlens_k.

    Nothing is read on the host, so that CUDA graphs can capture it, and a contiguous cache is not copied: what lies
    between two rows' tokens becomes sequences of its own without queries, and queries that are padding become a
    sequence without keys. A paged cache is gathered into a contiguous one first, which copies it.
    """
    if block_table is not None:
        pages = block_table.long().clamp(0, caches[0].shape[0] - 1)  # unused entries may hold anything
        caches = tuple(cache[pages].flatten(1, 2) for cache in caches)
    distances = {_row_distance(cache) for cache in caches}
    if len(distances) > 1 or None in distances:
        caches = tuple(cache.contiguous() for cache in caches)
        distances = {caches[0].shape[1]}
    (distance,) = distances
    batch, slots = caches[0].shape[:2]
    num_tokens = (batch - 1) * distance + slots
    tokens = [cache.as_strided((num_tokens, *cache.shape[2:]), cache.stride()[1:]) for cache in caches]

    used = cache_seqlens.clamp(0, slots)
    leftpad = torch.zeros_like(used) if cache_leftpad is None else torch.minimum(cache_leftpad.clamp(min=0), used)
    padding = (num_new - (used - leftpad)).clamp(0, num_new)
    row = torch.arange(batch, dtype=torch.int32, device=used.device)
    # Per row, where these end: padding queries; left padding; the row's own tokens; its unused slots.
    all_new = torch.full_like(padding, num_new)
    ends_q = row[:, None] * num_new + torch.stack((padding, padding, all_new, all_new), dim=1)
    all_slots = torch.full_like(used, distance)
    ends_k = row[:, None] * distance + torch.stack((torch.zeros_like(used), leftpad, used, all_slots), dim=1)
    cu_seqlens_q, cu_seqlens_k = (
        torch.nn.functional.pad(ends.flatten(), (1, 0)) for ends in (ends_q, ends_k.clamp(max=num_tokens))
    )
    return tokens, cu_seqlens_q, cu_seqlens_k


def _row_distance(cache: torch.Tensor) -> int | None:
    """How many slots lie between the starts of two rows of (B, S_max, ...), None if that is no whole number."""
    if cache.shape[0] <= 1:
        return cache.shape[1]
    row, slot = cache.stride()[:2]
    if slot <= 0 or row % slot or row // slot < cache.shape[1]:
        return None
    return row // slot
