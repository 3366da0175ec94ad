"""Where the sequences of a batch lie: padded, packed or cached input, described once per forward for all layers.

Attention layers work on real sequences, never on padding. Without a cache, a batch (B, T) is read as B * T tokens one
after the other, with offsets `cu_seqlens`. Padding becomes sequences of its own, whose outputs nobody uses. With a
cache, each row has a number of slots in use and a left padding. Where the real tokens of a row do not lie next to each
other, a gather moves them together first: that order is the working order, as opposed to the caller's.

`layout_building.py` reads a layout from a model's inputs.

Legend: B rows, T new tokens of a row, S keys of a row (cached and new).
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from ..msa.sequences import sequence_of


@dataclass
class SequenceLayout:
    """The sequences of one forward pass.

    Attributes:
        batch (`int`), num_new (`int`): B and T.
        cu_seqlens (`torch.Tensor`, *optional*): int32 offsets of the sequences among the B * T tokens. Set when the
            keys are those of this pass, None when they come from a cache.
        is_uniform (`bool`): Whether every row is one sequence without padding.
        is_packed (`bool`): Whether a row may hold several sequences. No cache can continue such a row.
        cache_seqlens (`torch.Tensor`, *optional*): int32 (B,), slots in use per row, left padding and new tokens
            included. Set when the keys come from a cache.
        cache_leftpad (`torch.Tensor`, *optional*): int32 (B,), slots of padding at the start of each row.
        query_order (`torch.Tensor`, *optional*): int64 (B, T), entry i is the index of the token that stands i-th in
            working order; None if no token moves. Real tokens come first without a cache, last with one.
        key_order (`torch.Tensor`, *optional*): int64 (B, S), entry i is the slot of the key that stands i-th in working
            order; None if no key moves. Real keys come first.
        allowed (`torch.Tensor`, *optional*): bool (B or 1, heads or 1, T, S), a mask of the caller's own. It replaces
            everything above, and every layer materialises it.
        past (`int` or `torch.Tensor`): Slots in use before this pass, where `allowed` is set.
        padding_mask (`torch.Tensor`, *optional*): (B, S), the caller's mask, for attention functions that take one.
        num_keys (`int`, *optional*): S where all slots of a cache are in use. None where the host does not know.
    """

    batch: int
    num_new: int
    cu_seqlens: torch.Tensor | None = None
    is_uniform: bool = False
    is_packed: bool = False
    cache_seqlens: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    query_order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    past: int | torch.Tensor = 0
    padding_mask: torch.Tensor | None = None
    num_keys: int | None = None

    @property
    def is_cached(self) -> bool:
        """Whether the keys come from a cache."""
        return self.cache_seqlens is not None

    @cached_property
    def sequence_bounds(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return self.cu_seqlens.tolist()

    @property
    def max_seqlen(self) -> int:
        """An upper bound, in tokens, of the longest sequence without a cache. The host knows it."""
        return self.num_new if self.is_uniform else self.batch * self.num_new

    def order_queries(self, states: torch.Tensor) -> torch.Tensor:
        """Move (B, T, ...) states of this pass's tokens into working order."""
        return _take(states, self.query_order)

    def order_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Move (B, S, ...) states of the keys into working order."""
        return _take(states, self.key_order if self.is_cached else self.query_order)

    def restore_order(self, states: torch.Tensor) -> torch.Tensor:
        """Undo `order_queries`."""
        return states if self.query_order is None else _take(states, self.query_order.argsort(dim=1))

    def restore_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Move (B, heads, T, S) attention weights from working order to the caller's, on both axes."""
        weights = self.restore_order(weights.transpose(1, 2)).transpose(1, 2)
        order = self.key_order if self.is_cached else self.query_order
        return (
            weights if order is None else _take(weights.permute(0, 3, 1, 2), order.argsort(dim=1)).permute(0, 2, 3, 1)
        )

    def positions(self) -> torch.Tensor:
        """Position (B, T) of every token in its own sequence, in the caller's order. Padding has position 0."""
        if self.is_uniform and not self.is_cached:  # few launches: the GPU waits for them
            return torch.arange(self.num_new, device=self.cu_seqlens.device).expand(self.batch, -1)
        return self.restore_order(self.working_positions()).clamp(min=0)

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, without padding. Waits for the device."""
        if self.allowed is not None:
            return int(self.past) + self.num_new
        if self.padding_mask is not None:
            return int((self.padding_mask != 0).sum(1).max())
        return int((self.cache_seqlens if self.is_cached else self.cu_seqlens.diff()).max())

    def working_positions(self) -> torch.Tensor:
        """Position (B, T) of every token in working order, negative for padding before a cached sequence."""
        if self.allowed is not None:
            return (self.past + torch.arange(self.num_new, device=self.allowed.device)).expand(self.batch, -1)
        if self.is_cached:
            return self.cached_positions()
        return self._packed_coordinates()[1].view(self.batch, self.num_new)

    def as_one_document(self) -> "SequenceLayout":
        """The layout that reads each row of packed documents as one sequence. Other layouts stay as they are."""
        return uniform_layout(self.batch, self.num_new, self.cu_seqlens.device) if self.is_packed else self

    def of_last_tokens(self, count: int) -> "SequenceLayout":
        """The layout of the last `count` tokens of each row, whose keys, and those before them, a cache holds by then.

        It is for a layout with a cache, or a uniform one, in which no token moves.
        """
        if self.is_cached:
            return replace(self, num_new=count)
        lengths = torch.full((self.batch,), self.num_new, dtype=torch.int32, device=self.cu_seqlens.device)
        return SequenceLayout(self.batch, count, cache_seqlens=lengths, num_keys=self.num_new)

    def cached_positions(self) -> torch.Tensor:
        """Position (B, T) of every new token with a cache, in working order, negative for padding."""
        first = (self.cache_seqlens - self._leftpad() - self.num_new).long()
        return first[:, None] + torch.arange(self.num_new, device=first.device)

    def cached_ranks(self, num_keys: int) -> torch.Tensor:
        """Position (B, S) of every key with a cache, in working order, negative for padding."""
        return torch.arange(num_keys, device=self.cache_seqlens.device) - self._leftpad()[:, None]

    def _leftpad(self) -> torch.Tensor:
        return torch.zeros_like(self.cache_seqlens) if self.cache_leftpad is None else self.cache_leftpad

    def _packed_coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence (B * T,) and position in it (B * T,) of every token, in working order."""
        token = torch.arange(self.batch * self.num_new, device=self.cu_seqlens.device)
        sequence = sequence_of(token, self.cu_seqlens)
        return sequence, token - self.cu_seqlens[sequence]

    def visibility(self, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which keys each query may attend to, and where each key stands, in working order.

        Memory is quadratic in tokens: this is for paths that return weights or apply a mask.

        Args:
            num_keys (`int`): S.

        Returns:
            bool (B or 1, heads or 1, T, S), and each key's position (B, S) in its sequence.
        """
        if self.allowed is not None:
            return self.allowed, torch.arange(num_keys, device=self.allowed.device).expand(self.batch, -1)
        if self.is_cached:
            rank = self.cached_ranks(num_keys)
            visible = (rank[:, None] >= 0) & (rank[:, None] <= self.cached_positions()[:, :, None])
        else:
            sequence, rank = (x.view(self.batch, self.num_new) for x in self._packed_coordinates())
            visible = (sequence[:, :, None] == sequence[:, None]) & (rank[:, None] <= rank[:, :, None])
        return visible.unsqueeze(1), rank

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SequenceLayout":
        """A copy on `device`. Accelerate calls this where the layers of a model lie on several devices."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return SequenceLayout(**moved)

    def packed_offsets(self, num_keys: int) -> dict[str, Any]:
        """Offsets of all sequences among flattened (B, T, ...) queries and (B, S, ...) keys, as operators take them.

        With a cache, a row gives three sequences: its left padding, its tokens, and the slots after them.

        Args:
            num_keys (`int`): S.

        Returns:
            `cu_seqlens_q` and `cu_seqlens_k`.
        """
        if not self.is_cached:
            return {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens}
        leftpad = self._leftpad()
        real = self.cache_seqlens - leftpad
        padded_queries = (self.num_new - real).clamp(min=0)
        lengths_q = torch.stack((padded_queries, self.num_new - padded_queries, torch.zeros_like(real)), dim=1)
        lengths_k = torch.stack((leftpad, real, num_keys - self.cache_seqlens), dim=1)
        return {"cu_seqlens_q": offsets_of(lengths_q.flatten()), "cu_seqlens_k": offsets_of(lengths_k.flatten())}


def _take(states: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return states
    index = order.view(*order.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    """Offsets int32 (sequences + 1,) of sequences with these lengths (sequences,), one after the other."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def uniform_layout(batch: int, num_new: int, device: torch.device, **kwargs) -> SequenceLayout:
    """The layout in which each row is one sequence, without padding and without a cache."""
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_new
    return SequenceLayout(batch, num_new, cu_seqlens=cu_seqlens, is_uniform=True, **kwargs)
