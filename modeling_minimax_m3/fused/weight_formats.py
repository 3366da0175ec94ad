"""Formats in which weights are stored in fewer bits: their tensors, and how these become numbers again.

A stack of weights has the expert as the first axis of each of its tensors, so experts can be picked before anything is
dequantized.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..mxfp8 import (
    GROUP_SIZE,
    SCALE_DTYPE,
    VALUE_DTYPE,
    Mxfp8Tensors,
    dequantize_mxfp8,
    quantize_mxfp8,
)
from .support import is_vector_block, kernels_take


class WeightFormat(ABC):
    """How a weight is stored.

    Attributes:
        name (`str`): By which the operators find the format.
        label (`str`): What messages call it.
        plain_weights (`str`): The sentence that says how to get a model with plain weights.
        suffixes (`tuple[str, ...]`): What a tensor has behind the name of the weight. The first is empty.
        is_split_on_disk (`bool`): Whether a released layout has the tensors of each expert, gate and up apart.
    """

    name: str
    label: str
    plain_weights: str
    suffixes: tuple[str, ...]
    is_split_on_disk = False

    @abstractmethod
    def empty(self, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The tensors of a weight of this shape, with any content.

        Raises:
            ValueError: The format has no weight of this shape.
        """

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From a stack of weights, (E, rows, columns) in a floating-point dtype, to its tensors."""

    @abstractmethod
    def dequantize(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The numbers, contiguous. `tensors` are those of one weight or of a stack of them."""

    def shape(self, tensors: Sequence[torch.Tensor]) -> torch.Size:
        """The shape of the numbers."""
        return tensors[0].shape

    def restored(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors in their own dtypes, where others have cast them.

        Raises:
            TypeError: The cast has changed their numbers.
        """
        return tuple(tensors)


class StoredWeight(NamedTuple):
    """A weight, or a stack of weights, in a format.

    Args:
        format (WeightFormat): The format.
        tensors (tuple of torch.Tensor): Its tensors, in the order of `format.suffixes`.
    """

    format: WeightFormat
    tensors: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        return self.format.shape(self.tensors)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers."""
        return self.format.dequantize(self.tensors, dtype)

    def of_expert(self, expert: int) -> "StoredWeight":
        """One weight of a stack."""
        return StoredWeight(self.format, tuple(tensor[expert] for tensor in self.tensors))

    def of_experts(self, experts: slice | torch.Tensor) -> "StoredWeight":
        """Some weights of a stack, by a slice or by ids."""
        if isinstance(experts, slice):
            return StoredWeight(self.format, tuple(tensor[experts] for tensor in self.tensors))
        return StoredWeight(self.format, tuple(_select(tensor, experts) for tensor in self.tensors))


def _select(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if tensor.element_size() > 1:
        return tensor[ids]
    return tensor.view(torch.uint8)[ids].view(tensor.dtype)  # not every device selects from 8-bit floats


class _Mxfp8(WeightFormat):
    name, label = "mxfp8", "MXFP8"
    plain_weights = "Load the model with `quantization_config=mxfp8_config(dequantize=True)`, and merge into that."
    suffixes = ("", "_scale_inv")
    is_split_on_disk = True

    def empty(self, shape: Sequence[int]) -> Mxfp8Tensors:
        """As in the base class."""
        values = torch.empty(tuple(shape), dtype=VALUE_DTYPE)
        return Mxfp8Tensors(values, torch.empty((*shape[:-1], shape[-1] // GROUP_SIZE), dtype=SCALE_DTYPE))

    def quantize(self, weight: torch.Tensor) -> Mxfp8Tensors:
        """As in the base class."""
        return quantize_mxfp8(weight)

    def dequantize(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """`dequantize_mxfp8`, by one kernel where there is one."""
        values, scales = tensors
        is_ours = dtype == torch.bfloat16 and kernels_take(values, scales) and values.numel() > 0
        if is_ours and is_vector_block(values) and scales.is_contiguous() and scales.dtype == torch.uint8:
            return torch.ops.minimax_m3_msa_cuda.dequantize_mxfp8(values, scales)
        return dequantize_mxfp8(values, scales, dtype)

    def restored(self, tensors: Sequence[torch.Tensor]) -> Mxfp8Tensors:
        """Undoes the cast of FSDP2, whose mixed precision casts all floating-point parameters. It changes no value."""
        values, scales = tensors
        return Mxfp8Tensors(values if values.dtype == VALUE_DTYPE else values.detach().to(VALUE_DTYPE), scales)


MXFP8 = _Mxfp8()

_FORMATS: dict[str, WeightFormat] = {}


def register_format(weight_format: WeightFormat) -> WeightFormat:
    """Let the operators find a format by its name."""
    _FORMATS[weight_format.name] = weight_format
    return weight_format


def format_named(name: str) -> WeightFormat:
    """The registered format of this name."""
    return _FORMATS[name]


register_format(MXFP8)
