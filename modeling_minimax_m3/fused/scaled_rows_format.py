"""Weights in 8 bits with one float32 scale for each row, as torchao's weight-only configs have them.

The scales are those of torchao for a weight in float32.
"""

from collections.abc import Sequence

import torch

from .weight_formats import WeightFormat, register_format


class ScaledRowsFormat(WeightFormat):
    """E4M3 or int8.

    A stack of shape (E, rows, columns) has values of this shape under `name`, and scales (E, rows, 1) in float32 under
    `name` with the suffix. A number is value times scale, rounded once to the dtype that is asked for.

    Args:
        name (str): Name of the format.
        dtype (torch.dtype): Of the values.
        divisor (float): The largest absolute number of a row, divided by this, is the scale.
        limits (tuple[float, float]): The smallest and the largest value.
    """

    plain_weights = "Load the model without a `quantization_config`, from a plain checkpoint, and merge into that."

    def __init__(self, name: str, dtype: torch.dtype, divisor: float, limits: tuple[float, float]):
        self.name, self.label, self.dtype = name, name, dtype
        self.divisor, self.limits = divisor, limits
        self.suffixes = ("", f"_{name}_scale")

    def empty(self, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """As in the base class. Every shape is taken."""
        return torch.empty(tuple(shape), dtype=self.dtype), torch.empty((*shape[:-1], 1), dtype=torch.float32)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in the base class. The values are the nearest ones; a row of zeros has the scale 1."""
        with torch.device(weight.device):
            values, scales = self.empty(weight.shape)
        for matrix, matrix_values, matrix_scales in zip(weight.detach(), values, scales, strict=True):
            numbers = matrix.float()
            largest = numbers.abs().amax(-1, keepdim=True)
            matrix_scales.copy_(torch.where(largest > 0, largest / self.divisor, 1.0))
            scaled = (numbers / matrix_scales).clamp_(*self.limits)
            matrix_values.copy_(scaled if self.dtype.is_floating_point else scaled.round_())
        return values, scales

    def dequantize(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """As in the base class."""
        values, scales = tensors
        return values.to(dtype).mul_(scales)  # 8 bits are exact in `dtype`, and the product is computed in float32

    def restored(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Undoes a cast of the values, which changes none. One of the scales is an error."""
        values, scales = tensors
        if scales.dtype != torch.float32:
            raise TypeError(
                f"the scales of a weight in {self.label} must be in torch.float32, got {scales.dtype}: something has "
                "cast them, as mixed precision of FSDP2 does, and their numbers are lost"
            )
        return values if values.dtype == self.dtype else values.detach().to(self.dtype), scales


FLOAT8_ROWS = ScaledRowsFormat("float8", torch.float8_e4m3fn, 448.0, (-448.0, 448.0))
INT8_ROWS = ScaledRowsFormat("int8", torch.int8, 127.5, (-128.0, 127.0))
for _format in (FLOAT8_ROWS, INT8_ROWS):
    register_format(_format)
