"""An MXFP8 weight as other libraries see it: a tensor of numbers, which is dequantized where it is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..mxfp8 import dequantize_mxfp8


class Mxfp8Weight(torch.Tensor):
    """The numbers of an MXFP8 weight, in the dtype that its layer computes in. It holds the stored tensors, no copy.

    Adapters ask a layer's weight for its shape, dtype and device, and add to it. An operation that reads the weight
    dequantizes it, one that writes to it raises. A low-rank update that PEFT adds by `torch.baddbmm` is kept beside the
    weight, so that experts need not be dequantized for it.

    Args:
        values (torch.Tensor): (..., columns) in float8_e4m3fn.
        scales (torch.Tensor): (..., columns / 32) in uint8.
        dtype (torch.dtype): Of the numbers.
        updates (sequence of `(left, right, factor)`): What is added: `factor * left @ right`, of (E, rows, rank) and
            (E, rank, columns).
        parameter (`torch.nn.Parameter`, *optional*): That of the layer, which holds the values.
    """

    _is_param = True  # makes `isinstance(weight, torch.nn.Parameter)` true, as libraries expect of a weight

    mxfp8_values: torch.Tensor
    mxfp8_scales: torch.Tensor
    updates: tuple[tuple[torch.Tensor, torch.Tensor, float], ...]

    @staticmethod
    def __new__(cls, values, scales, dtype, updates=(), parameter=None):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        updates: Sequence[tuple[torch.Tensor, torch.Tensor, float]] = (),
        parameter: torch.nn.Parameter | None = None,
    ):
        self.mxfp8_values, self.mxfp8_scales, self.updates = values, scales, tuple(updates)
        self.parameter = parameter

    def dequantize(self) -> torch.Tensor:
        """The numbers as a plain tensor, updates included."""
        numbers = dequantize_mxfp8(self.mxfp8_values.detach(), self.mxfp8_scales, self.dtype)
        for left, right, factor in self.updates:
            numbers = torch.baddbmm(numbers, left, right, alpha=factor)
        return numbers

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.baddbmm and set(kwargs) <= {"alpha"} and type(args[0]) is cls:
            weight, left, right = args
            update = (left, right, kwargs.get("alpha", 1.0))
            return cls(weight.mxfp8_values, weight.mxfp8_scales, weight.dtype, (*weight.updates, update))
        if func in (torch.Tensor.dequantize, torch.Tensor.__repr__):
            return getattr(cls, func.__name__)(*args)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _writing_is_refused()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            weight = args[0]
            return cls(weight.mxfp8_values, weight.mxfp8_scales, weight.dtype, weight.updates)
        device = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and device is not None and device != args[0].device:
            raise TypeError(
                "a weight in MXFP8 moves with its layer, not alone. Where it is to lie on the host or on several devices, "
                "name the devices in `from_pretrained(..., device_map=...)`."
            )
        if func is torch.ops.aten.set_.source_Tensor and args[0] is args[1]:
            return args[0]  # `torch.nn.utils.parametrize` does this, and changes nothing
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            written = [
                given.get(argument.name)
                for argument in func._schema.arguments
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            if any(isinstance(value, cls) for value in written):
                raise _writing_is_refused()
        args, kwargs = tree_map_only(cls, cls.dequantize, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _writing_is_refused() -> TypeError:
    return TypeError(
        "a weight in MXFP8 cannot be changed, as merging an adapter would do. Load the model with "
        "`quantization_config=mxfp8_config(dequantize=True)`, and merge into that."
    )
