"""Values of weights in blocks of rows: copied, quantized, dequantized, or with adapters added."""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from ..mxfp8 import GROUP_SIZE, dequantize_mxfp8, quantize_mxfp8
from .layouts import SCALE_SUFFIX
from .tensor_files import Region

# Elements of a block. Quantizing needs about 20 bytes for each.
BLOCK_ELEMENTS = 2**18


class Deltas(Protocol):
    """What is added to weights."""

    def __contains__(self, name: object) -> bool:
        """Whether something is added to the weight with this released name."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """What is added to rows `start` to `stop`, in float32."""


class Values:
    """The values of a converted checkpoint, by released name.

    Args:
        tensors (Mapping[str, Region]): Where the values come from.
        shapes (Mapping[str, tuple[int, ...]]): Shapes of the result. It holds the first rows of a longer source.
        quantized (frozenset[str]): Weights that the result holds in MXFP8.
        deltas (Deltas): Additions to weights.
    """

    def __init__(
        self,
        tensors: Mapping[str, Region],
        shapes: Mapping[str, tuple[int, ...]],
        quantized: frozenset[str],
        deltas: Deltas,
    ):
        self.tensors = tensors
        self.shapes = shapes
        self.quantized = quantized
        self.deltas = deltas

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the result for a weight or its scales."""
        if name.endswith(SCALE_SUFFIX):
            return torch.uint8
        if name in self.quantized:
            return torch.float8_e4m3fn
        dtype = self.tensors[name].dtype
        return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a weight or of its scales, one block of rows after the other."""
        weight = name.removesuffix(SCALE_SUFFIX)
        stored = self.tensors[weight]
        rows = self.shapes[weight][0]
        columns = math.prod(self.shapes[weight][1:])
        is_copied = weight not in self.deltas and (stored.dtype == torch.float8_e4m3fn) == (weight in self.quantized)
        step = max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if is_copied:
                source = self.tensors[name]
                width = math.prod(source.shape[1:])
                yield source.part(start * width, (stop - start, width)).read()
            else:
                yield self._computed(weight, name, start, stop, columns)

    def _computed(self, weight: str, name: str, start: int, stop: int, columns: int) -> torch.Tensor:
        stored = self.tensors[weight]
        numbers = stored.part(start * columns, (stop - start, columns)).read()
        if stored.dtype == torch.float8_e4m3fn:
            width = columns // GROUP_SIZE
            scales = self.tensors[weight + SCALE_SUFFIX].part(start * width, (stop - start, width)).read()
            numbers = dequantize_mxfp8(numbers, scales, torch.bfloat16)
        if weight in self.deltas:
            numbers = self.deltas.rows(weight, start, stop).add_(numbers)
        if weight not in self.quantized:
            return numbers.to(self.dtype(weight))
        try:
            values, scales = quantize_mxfp8(numbers)
        except ValueError as error:
            raise ValueError(f"{stored.file}: {weight} cannot be stored in MXFP8. {error}") from error
        return scales if name.endswith(SCALE_SUFFIX) else values
