"""Numbers in MXFP8, the format of the released weights: from other dtypes and back.

32 values of a row share a scale, a power of two. A value is stored in E4M3, a scale as the byte e that means
2 ** (e - 127) (E8M0). The module needs PyTorch only.
"""

from typing import NamedTuple

import torch

GROUP_SIZE = 32  # values of a row that share a scale
VALUE_DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.uint8

_SCALE_BIAS = 127
_LARGEST_SCALE = 254  # 255 means NaN
_LARGEST_ORDINARY_SCALE = 134  # 2 ** 7
_ELEMENTS_AT_A_TIME = 2**26  # 256 MiB in float32


class Mxfp8Tensors(NamedTuple):
    """A tensor in MXFP8.

    Args:
        values (torch.Tensor): (..., columns) in float8_e4m3fn.
        scales (torch.Tensor): (..., columns / 32) in uint8.
    """

    values: torch.Tensor
    scales: torch.Tensor


def quantize_mxfp8(tensor: torch.Tensor) -> Mxfp8Tensors:
    """Nearest MXFP8 values, with the smallest scales that let no value exceed E4M3's largest, 448.

    A tensor that came from `dequantize_mxfp8` keeps its numbers. Its scales may become smaller.

    Args:
        tensor (torch.Tensor): (..., rows, columns) in a floating-point dtype, all finite. The columns are a multiple of
            32.

    Returns:
        Values in float8_e4m3fn, of the tensor's shape, and scales in uint8, (..., rows, columns / 32).

    Raises:
        ValueError: The shape does not fit, or a number is not finite.
        TypeError: The tensor has no floating-point dtype, or is in 8 bits already.
    """
    _check_columns("tensor", tensor)
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise TypeError(f"`tensor` must be in a floating-point dtype of 16 bits or more, got {tensor.dtype}")
    values = torch.empty_like(tensor, dtype=VALUE_DTYPE, memory_format=torch.contiguous_format)
    scales = values.new_empty((*tensor.shape[:-1], tensor.shape[-1] // GROUP_SIZE), dtype=SCALE_DTYPE)
    if tensor.numel() == 0 or tensor.is_meta:
        return Mxfp8Tensors(values, scales)
    columns = tensor.shape[-1]
    rows = max(1, _ELEMENTS_AT_A_TIME // columns)
    parts = (tensor.reshape(-1, columns), values.view(-1, columns), scales.view(-1, columns // GROUP_SIZE))
    for part, part_values, part_scales in zip(*(part.split(rows) for part in parts), strict=True):
        groups = part.detach().float().unflatten(-1, (-1, GROUP_SIZE))
        largest = groups.abs().amax(-1)
        if not bool(largest.isfinite().all()):
            raise ValueError("`tensor` must hold finite numbers, got infinity or NaN")
        mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2 ** exponent, mantissa in [0.5, 1)
        exponent = exponent - 9 + (mantissa > 0.875)  # 448 = 0.875 * 2 ** 9
        exponent.masked_fill_(largest == 0, 0)
        part_scales.copy_((exponent + _SCALE_BIAS).clamp_(0, _LARGEST_SCALE))
        inverse = scale_factors(_LARGEST_SCALE - part_scales, torch.float32)
        part_values.copy_((groups * inverse.unsqueeze(-1)).flatten(-2))
    return Mxfp8Tensors(values, scales)


def dequantize_mxfp8(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The numbers that MXFP8 values and scales stand for.

    They are exact in bfloat16 and in float32, except below the normal numbers of those dtypes.

    Args:
        values (torch.Tensor): (..., columns) in float8_e4m3fn.
        scales (torch.Tensor): (..., columns / 32) in uint8 or float8_e8m0fnu.
        dtype (torch.dtype): Of the result.

    Returns:
        (..., columns) in `dtype`.

    Raises:
        ValueError: The shapes do not fit.
        TypeError: A dtype is another.
    """
    _check_columns("values", values)
    if values.dtype != VALUE_DTYPE:
        raise TypeError(f"`values` must be in {VALUE_DTYPE}, got {values.dtype}")
    if scales.dtype not in (SCALE_DTYPE, torch.float8_e8m0fnu):
        raise TypeError(f"`scales` must be in {SCALE_DTYPE} or torch.float8_e8m0fnu, got {scales.dtype}")
    expected = (*values.shape[:-1], values.shape[-1] // GROUP_SIZE)
    if scales.shape != expected:
        raise ValueError(
            f"`scales` must have the shape {tuple(expected)}, one for {GROUP_SIZE} values of a row, "
            f"got {tuple(scales.shape)}"
        )
    # Half precision lacks the range of the scales, so their products are rounded to it.
    exact_dtype = torch.float32 if dtype == torch.float16 else dtype
    numbers = values.to(exact_dtype)
    numbers.unflatten(-1, (-1, GROUP_SIZE)).mul_(scale_factors(scales, exact_dtype).unsqueeze(-1))
    return numbers.to(dtype)


def is_ordinary(tensor: Mxfp8Tensors) -> bool:
    """Whether no value is NaN and no scale is above 2 ** 7, as in all weights that work. It waits for a GPU once.

    The kernels that read MXFP8 directly rely on it. Weights of another kind are dequantized first.
    """
    values = tensor.values.view(torch.uint8).flatten()
    unusual = [((part & 0x7F) == 0x7F).any() for part in values.split(_ELEMENTS_AT_A_TIME)]
    unusual.append((tensor.scales > _LARGEST_ORDINARY_SCALE).any())
    return not bool(torch.stack(unusual).any())


def scale_factors(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The powers of two that the bytes `scales` stand for; NaN for the byte 255."""
    return scales.view(torch.float8_e8m0fnu).to(torch.float32).to(dtype)


def _check_columns(name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] % GROUP_SIZE:
        raise ValueError(
            f"`{name}` must have rows of a multiple of {GROUP_SIZE} values, got the shape {tuple(tensor.shape)}"
        )
