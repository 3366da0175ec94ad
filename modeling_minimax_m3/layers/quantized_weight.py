"""A quantized weight as other libraries see it: a tensor of numbers, which is dequantized where it is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..fused.weight_formats import StoredWeight


class QuantizedWeight(torch.Tensor):
    """The numbers of a quantized weight, in the dtype that its layer computes in. It holds the stored tensors, no copy.

    Adapters ask a layer's weight for its shape, dtype and device, and add to it. An operation that reads the weight
    dequantizes it, one that writes to it raises. A low-rank update that PEFT adds by `torch.baddbmm` is kept beside the
    weight, so that experts need not be dequantized for it.

    Args:
        stored (StoredWeight): The weight, or the weights of all experts.
        dtype (torch.dtype): Of the numbers.
        updates (sequence of `(left, right, factor)`): What is added: `factor * left @ right`, of (E, rows, rank) and
            (E, rank, columns).
        parameter (`torch.nn.Parameter`, *optional*): That of the layer, which holds the values.
    """

    _is_param = True  # makes `isinstance(weight, torch.nn.Parameter)` true, as libraries expect of a weight

    stored: StoredWeight
    updates: tuple[tuple[torch.Tensor, torch.Tensor, float], ...]

    @staticmethod
    def __new__(cls, stored, dtype, updates=(), parameter=None):
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=dtype, device=stored.tensors[0].device)

    def __init__(
        self,
        stored: StoredWeight,
        dtype: torch.dtype,
        updates: Sequence[tuple[torch.Tensor, torch.Tensor, float]] = (),
        parameter: torch.nn.Parameter | None = None,
    ):
        self.stored, self.updates = stored, tuple(updates)
        self.parameter = parameter

    def dequantize(self) -> torch.Tensor:
        """The numbers as a plain tensor, updates included."""
        stored = StoredWeight(self.stored.format, tuple(tensor.detach() for tensor in self.stored.tensors))
        numbers = stored.dequantize(self.dtype)
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
            return cls(weight.stored, weight.dtype, (*weight.updates, update))
        if func in (torch.Tensor.dequantize, torch.Tensor.__repr__):
            return getattr(cls, func.__name__)(*args)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _writing_is_refused(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            weight = args[0]
            return cls(weight.stored, weight.dtype, weight.updates)
        device = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and device is not None and device != args[0].device:
            raise TypeError(
                f"a weight in {args[0].stored.format.label} moves with its layer, not alone. Where it is to lie on the host "
                "or on several devices, name the devices in `from_pretrained(..., device_map=...)`."
            )
        if func is torch.ops.aten.set_.source_Tensor and args[0] is args[1]:
            return args[0]  # `torch.nn.utils.parametrize` does this, and changes nothing
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = given.get(argument.name)
                    if isinstance(written, cls):
                        raise _writing_is_refused(written)
        args, kwargs = tree_map_only(cls, cls.dequantize, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _writing_is_refused(weight: QuantizedWeight) -> TypeError:
    stored_as = weight.stored.format
    return TypeError(
        f"a weight in {stored_as.label} cannot be changed, as merging an adapter would do. {stored_as.plain_weights}"
    )
