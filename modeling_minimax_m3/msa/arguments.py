"""The base class of every operator's arguments; `reference` has one frozen dataclass for each operator.

The fields of a dataclass have the names and the order of the operator's arguments in `torch.library`, unless its
docstring says otherwise.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of one call, which the public function has checked.

    Sequence offsets, cache lengths and block ids are int32. All tensors are on one device.
    """

    def values(self) -> tuple[Any, ...]:
        """The arguments in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def queries(self) -> torch.Tensor:
        """The first tensor of the call, or of the forward's call: its device and dtype decide which backend runs."""
        first = next(iter(vars(self).values()))
        return first.queries if isinstance(first, Arguments) else first

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors that derivatives pass through."""
        return ()

    def form(self, most_decode_tokens: int) -> str:
        """Which form of the operator runs: "packed", "decode" (few new tokens of cached rows) or "by position".

        Args:
            most_decode_tokens (int): The largest number of new tokens per row that the backend's decode form takes.
        """
        return "packed"
