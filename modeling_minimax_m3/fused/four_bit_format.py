"""Weights in 4 bits as bitsandbytes stores them, one expert at a time.

64 values share a scale, the largest absolute value among them. A value is the index of one of 16 numbers (NF4 or FP4);
a byte holds two, the first in its high half. With double quantization a scale is a byte as well: 256 scales of an
expert share a factor, and all scales of an expert an offset. Blocks run through the rows of an expert and never from
one expert into the next, so experts can be picked. It also keeps each call of bitsandbytes, which counts elements in
32 bits, far below 2 ** 31.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from .weight_formats import WeightFormat, register_format

BLOCK = 64  # values that share a scale
SCALES_OF_A_FACTOR = 256  # with double quantization


class FourBitFormat(WeightFormat):
    """NF4 or FP4.

    A stack of shape (E, rows, columns) has these tensors, with B = rows * columns / 64:

    - `name`: (E, rows, columns / 2), uint8;
    - `name_absmax`: (E, B) scales, float32, or bytes with double quantization;
    - with double quantization `name_nested_absmax`: (E, B / 256 rounded up), float32, and `name_nested_offset`: (E,),
      float32. A scale is `table[byte] * nested_absmax + nested_offset`, with the table of bitsandbytes.

    Args:
        quant_type (str): "nf4" or "fp4".
        double (bool): Whether scales are quantized too.
    """

    plain_weights = "`model.dequantize()`, before adapters are added, makes a plain model. Merge into that."

    def __init__(self, quant_type: str, double: bool):
        self.quant_type, self.double = quant_type, double
        self.name = f"{quant_type}-double" if double else quant_type
        self.label = quant_type.upper()
        nested = ("_nested_absmax", "_nested_offset") if double else ()
        self.suffixes = ("", "_absmax", *nested)

    def empty(self, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """As in the base class. Columns are even, and a matrix has a multiple of 64 elements."""
        *stack, rows, columns = shape
        blocks, rest = divmod(rows * columns, BLOCK)
        if rest or columns % 2:
            raise ValueError(
                f"{self.label} needs matrices of a multiple of {BLOCK} elements with an even number of columns, got "
                f"{rows} x {columns}"
            )
        tensors = [
            torch.empty((*stack, rows, columns // 2), dtype=torch.uint8),
            torch.empty((*stack, blocks), dtype=torch.uint8 if self.double else torch.float32),
        ]
        if self.double:
            tensors.append(torch.empty((*stack, math.ceil(blocks / SCALES_OF_A_FACTOR)), dtype=torch.float32))
            tensors.append(torch.empty(tuple(stack), dtype=torch.float32))
        return tuple(tensors)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in the base class, by bitsandbytes, expert by expert."""
        from bitsandbytes.functional import quantize_4bit

        with torch.device(weight.device):
            stored = self.empty(weight.shape)
        for expert, matrix in enumerate(weight.detach()):
            packed, state = quantize_4bit(
                matrix.contiguous(), blocksize=BLOCK, compress_statistics=self.double, quant_type=self.quant_type
            )
            parts = [packed, state.absmax]
            if self.double:
                parts += [state.state2.absmax, state.offset]
            for tensor, part in zip(stored, parts, strict=True):
                tensor[expert] = part.view(tensor.shape[1:])
        return stored

    def dequantize(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """As in the base class, by bitsandbytes."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = self.shape(tensors)
        scales = self._scales(*tensors[1:])
        exact = dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
        # A block may begin within a row, which the CPU's kernel takes in vectors only.
        flat = shape if shape[-1] % BLOCK == 0 else (shape.numel(),)
        state = QuantState(scales.flatten(), flat, blocksize=BLOCK, quant_type=self.quant_type, dtype=exact)
        # A pass on the meta device or of a tracer never comes here: the operators have a form for it.
        return dequantize_4bit(tensors[0].contiguous().view(-1, 1), state).view(shape).to(dtype)

    def shape(self, tensors: Sequence[torch.Tensor]) -> torch.Size:
        """As in the base class."""
        *rows, half = tensors[0].shape
        return torch.Size((*rows, 2 * half))

    def restored(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As in the base class. A cast of the scales, as mixed precision of FSDP2 makes it, is an error."""
        dtypes = [torch.uint8, torch.uint8 if self.double else torch.float32, torch.float32, torch.float32]
        for suffix, tensor, dtype in zip(self.suffixes, tensors, dtypes, strict=False):
            if tensor.dtype != dtype:
                raise TypeError(
                    f"the tensor {suffix!r} of a weight in {self.label} must be in {dtype}, got {tensor.dtype}: "
                    "something has cast it, as mixed precision of FSDP2 does, and its numbers are lost"
                )
        return tuple(tensors)

    def _scales(self, scales: torch.Tensor, *nested: torch.Tensor) -> torch.Tensor:
        if not self.double:
            return scales
        factors, offset = nested
        factors = factors.repeat_interleave(SCALES_OF_A_FACTOR, -1)[..., : scales.shape[-1]]
        return (_table(scales.device)[scales.int()] * factors).add_(offset.unsqueeze(-1))


@lru_cache(maxsize=16)
def _table(device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


FOUR_BIT_FORMATS = {(kind, double): FourBitFormat(kind, double) for kind in ("nf4", "fp4") for double in (False, True)}
for _format in FOUR_BIT_FORMATS.values():
    register_format(_format)
