"""What the kernels support: the limits, and the checks that several operators share.

Each check returns why a call is not supported, or None.
"""

from collections.abc import Mapping

import torch

from .. import extension
from .layout import VECTOR_BYTES, is_aligned

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
Q_HEADS_PER_KV = (1, 2, 4, 8, 16)
MAX_TOPK = 64
MAX_INDEX_HEADS = 64
MAX_STRUCTURED_HEADS = 64

# The decoding kernels take the keys of a page in runs of this many.
PAGE_MULTIPLE = 16


def sizes_unsupported(
    states: Mapping[str, torch.Tensor], block_size: int, topk: int, q_heads_per_kv: int = 1
) -> str | None:
    """Checks the device, dtype and head dimensions of `states`, and the sizes of the lists and heads.

    Args:
        states (name to tensor): The tensors whose rows the kernels read, queries first.
        block_size (int): Keys per block.
        topk (int): Blocks per query.
        q_heads_per_kv (int): Query heads per key/value head.
    """
    query = next(iter(states.values()))
    if query.device.type != "cuda":
        return not_on_cuda(query)
    if query.dtype not in DTYPES:
        return f"the dtype must be float16 or bfloat16, it is {str(query.dtype).removeprefix('torch.')}"
    sizes = {name: tensor.shape[-1] for name, tensor in states.items()}
    if any(size not in HEAD_DIMS for size in sizes.values()) or sizes.get("value", query.shape[-1]) != query.shape[-1]:
        came = ", ".join(f"{size} for `{name}`" for name, size in sizes.items())
        return f"the head dimension must be one of {HEAD_DIMS} and the same for query, key and value, it is {came}"
    if block_size not in BLOCK_SIZES:
        return f"`block_size` must be one of {BLOCK_SIZES}, it is {block_size}"
    if topk > MAX_TOPK:
        return too_many_blocks(topk)
    if q_heads_per_kv not in Q_HEADS_PER_KV:
        return f"the query heads per key/value head must be one of {Q_HEADS_PER_KV}, they are {q_heads_per_kv}"
    return None


def rows_unsupported(states: Mapping[str, torch.Tensor]) -> str | None:
    """Checks the addresses and strides of `states` (name to tensor), and the GPU that they are on."""
    for name, tensor in states.items():
        if not is_aligned(tensor):
            return (
                f"`{name}` must start at a multiple of {VECTOR_BYTES} bytes and have strides that are multiples of "
                f"{VECTOR_BYTES // tensor.element_size()} elements, they are {tuple(tensor.stride())}"
            )
    return device_unsupported(next(iter(states.values())).device)


def pages_unsupported(cache: torch.Tensor, block_table: torch.Tensor | None) -> str | None:
    """Checks the page size of a cache that a decoding kernel reads."""
    if block_table is not None and cache.shape[1] % PAGE_MULTIPLE:
        return f"the page size must be a multiple of {PAGE_MULTIPLE}, it is {cache.shape[1]}"
    return None


def device_unsupported(device: torch.device) -> str | None:
    """Checks the compute capability of a GPU."""
    return extension.device_reason(device.index)


def not_on_cuda(tensor: torch.Tensor) -> str:
    """The reason of tensors that are on no GPU."""
    return f"the tensors must be on a CUDA device, they are on {tensor.device}"


def too_many_blocks(topk: int) -> str:
    """The reason of lists that are too long."""
    return f"there must be at most {MAX_TOPK} blocks per query, there are {topk}"
