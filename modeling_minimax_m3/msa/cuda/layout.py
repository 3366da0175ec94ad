"""How tensors must lie in memory for the kernels to read them."""

from dataclasses import replace
from typing import TypeVar

import torch

from ..arguments import Arguments

Args = TypeVar("Args", bound=Arguments)

VECTOR_BYTES = 16  # the kernels read rows in vectors of this size


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether the kernels can read the rows of `tensor` in vectors."""
    step = VECTOR_BYTES // tensor.element_size()
    return tensor.data_ptr() % VECTOR_BYTES == 0 and all(
        stride % step == 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1
    )


def contiguous(args: Args, *names: str) -> Args:
    """`args` with the named tensors contiguous; those that are None stay None."""
    tensors = {name: getattr(args, name) for name in names}
    strided = {name: tensor for name, tensor in tensors.items() if tensor is not None and not tensor.is_contiguous()}
    if not strided:
        return args
    return replace(args, **{name: tensor.contiguous() for name, tensor in strided.items()})
