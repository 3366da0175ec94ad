"""Where the sequences of a batch lie: padded, packed or cached input, described once per forward for all layers.

Attention layers work on real sequences, never on padding. Without a cache a batch (B, T) is read as B * T tokens one
after the other with offsets `cu_seqlens`; padding becomes sequences of its own, whose outputs nobody uses. With a
cache each row has a number of slots in use and a left padding. Only where the real tokens of a row do not lie next to
each other are they moved together first, by a gather.

Dimension legend: B rows, T new tokens per row, S keys per row (cached and new).
"""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from ..msa.sequences import sequence_of
from .transformers_versions import takes_cache


@dataclass
class SequenceLayout:
    """The sequences of one forward pass.

    Attributes:
        batch (`int`), num_new (`int`): B and T.
        cu_seqlens (`torch.Tensor`, *optional*): int32 offsets of the sequences among the B * T tokens. Set when the
            keys are those of this pass, None when they come from a cache.
        is_uniform (`bool`): Whether every row is one sequence without padding.
        is_packed (`bool`): Whether a row may hold several sequences, which no cache could continue.
        cache_seqlens (`torch.Tensor`, *optional*): int32 (B,), slots in use per row, left padding and new tokens
            included. Set when the keys come from a cache.
        cache_leftpad (`torch.Tensor`, *optional*): int32 (B,), slots of padding at the start of each row.
        query_order (`torch.Tensor`, *optional*): int64 (B, T), which new token of a row comes i-th, when they must be
            moved: real ones first without a cache, real ones last with one.
        key_order (`torch.Tensor`, *optional*): int64 (B, S), which slot of a row holds the i-th key: real ones first.
        allowed (`torch.Tensor`, *optional*): bool (B or 1, heads or 1, T, S), a mask of the caller's own that
            replaces everything above: every layer then materialises it.
        past (`int` or `torch.Tensor`): Slots in use before this pass, where `allowed` is set.
        padding_mask (`torch.Tensor`, *optional*): (B, S), the caller's mask, for attention functions that take one.
        num_keys (`int`, *optional*): S where all slots of a cache are in use; None where the host does not know.
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
        return self.cache_seqlens is not None

    @cached_property
    def sequence_bounds(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return self.cu_seqlens.tolist()

    @property
    def max_seqlen(self) -> int:
        """An upper bound of the longest sequence without a cache, in tokens, known without asking the device."""
        return self.num_new if self.is_uniform else self.batch * self.num_new

    def order_queries(self, states: torch.Tensor) -> torch.Tensor:
        """Moves (B, T, ...) per-token states of this pass into the order that the operators work in."""
        return _take(states, self.query_order)

    def order_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Moves (B, S, ...) states of the keys into the order that the operators work in."""
        return _take(states, self.key_order if self.is_cached else self.query_order)

    def restore_order(self, states: torch.Tensor) -> torch.Tensor:
        """Undoes `order_queries`."""
        return states if self.query_order is None else _take(states, self.query_order.argsort(dim=1))

    def restore_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Brings (B, heads, T, S) attention weights from working order back to the caller's, on both axes."""
        weights = self.restore_order(weights.transpose(1, 2)).transpose(1, 2)
        order = self.key_order if self.is_cached else self.query_order
        return (
            weights if order is None else _take(weights.permute(0, 3, 1, 2), order.argsort(dim=1)).permute(0, 2, 3, 1)
        )

    def positions(self) -> torch.Tensor:
        """Position (B, T) of every token in its own sequence, in the caller's order; padding counts as position 0."""
        return self.restore_order(self.working_positions()).clamp(min=0)

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, padding not counted. Waits for the device."""
        if self.allowed is not None:
            return int(self.past) + self.num_new
        if self.padding_mask is not None:
            return int((self.padding_mask != 0).sum(1).max())
        return int((self.cache_seqlens if self.is_cached else self.cu_seqlens.diff()).max())

    def working_positions(self) -> torch.Tensor:
        """As `positions`, in working order, and negative for padding before a cached sequence."""
        if self.allowed is not None:
            return (self.past + torch.arange(self.num_new, device=self.allowed.device)).expand(self.batch, -1)
        if self.is_cached:
            return self.cached_positions()
        return self._packed_coordinates()[1].view(self.batch, self.num_new)

    def as_one_document(self) -> "SequenceLayout":
        """The layout that reads each row of packed documents as one sequence; others are returned as they are."""
        return _uniform_layout(self.batch, self.num_new, self.cu_seqlens.device) if self.is_packed else self

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
        """Which keys each query may attend to, bool (B, heads or 1, T, S), and each key's position (B, S) in its
        sequence, in working order. Quadratic in tokens: for paths that return weights or apply a mask."""
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
        """A copy on `device`: accelerate calls this where the layers of a model lie on several devices."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return SequenceLayout(**moved)

    def packed_offsets(self, num_keys: int) -> dict[str, torch.Tensor]:
        """The offsets of all sequences, as operators take them, where (B, T, ...) queries and (B, S, ...) keys are flattened.

        With a cache, a row gives three sequences: its left padding, its tokens, and the slots after them.
        """
        if not self.is_cached:
            return {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens}
        leftpad = self._leftpad()
        real = self.cache_seqlens - leftpad
        padded_queries = (self.num_new - real).clamp(min=0)
        lengths_q = torch.stack((padded_queries, self.num_new - padded_queries, torch.zeros_like(real)), dim=1)
        lengths_k = torch.stack((leftpad, real, num_keys - self.cache_seqlens), dim=1)
        return {"cu_seqlens_q": _offsets(lengths_q.flatten()), "cu_seqlens_k": _offsets(lengths_k.flatten())}


def _take(states: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return states
    index = order.view(*order.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def build_layout(
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    batch: int,
    num_new: int,
    device: torch.device,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    may_be_packed: bool = True,
    num_heads: int | None = None,
    whole_cache: bool = False,
) -> SequenceLayout:
    """Reads the layout from a model's inputs: `cu_seq_lens_*` if given, else the mask, else restarts in positions.

    Args:
        attention_mask: (B, S) with 1 for real tokens; or a (B, heads, T, S) mask, boolean (True or 1 attends) or
            additive (0 attends, the lowest number or -inf does not); or the dict that `create_masks_for_generate`
            returns; or None.
        position_ids: (B, T); one that does not grow starts a new sequence.
        cache: The cache that this pass appends to, if any.
        batch, num_new: B and T.
        device: Where the inputs are.
        cu_seq_lens_q, cu_seq_lens_k (sequences + 1): Offsets of packed sequences among the B * T tokens. Tokens after
            the last offset are padding.
        may_be_packed: Whether restarts of `position_ids` are looked for.
        num_heads: H_q, which the heads of a 4-D mask are checked against.
        whole_cache: Whether the keys of a static cache's first pass, too, are all of its slots: attention weights have
            that width at every pass.

    Raises:
        ValueError: The inputs' shapes or values contradict each other.
        NotImplementedError: `cu_seq_lens_*` together with a cache that holds tokens.
    """
    past = 0 if cache is None else cache.get_seq_length()
    holds_tokens = isinstance(past, torch.Tensor) or past > 0
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if holds_tokens:
            raise NotImplementedError(
                "`cu_seq_lens_q` / `cu_seq_lens_k` describe packed sequences without a past, but `cache` "
                "holds tokens already. Pass a 2-D `attention_mask` to continue from a cache."
            )
        return _packed_layout(cu_seq_lens_q, cu_seq_lens_k, batch, num_new, device)
    if isinstance(attention_mask, dict):
        if "cache_seqlens" not in attention_mask:  # masks that Transformers built per layer type: all causal
            attention_mask = next(iter(attention_mask.values()))
        else:
            return SequenceLayout(batch, num_new, **attention_mask)
    if attention_mask is not None and attention_mask.dim() == 4:
        return _layout_of_full_mask(attention_mask, past, cache, batch, num_new, num_heads)
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[0] != batch):
        raise ValueError(
            f"`attention_mask` must have shape (batch, tokens) or (batch, heads, new tokens, tokens) with batch {batch}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if whole_cache and cache is not None and not holds_tokens and cache.get_max_length(0) > 0:
        past, holds_tokens = torch.zeros(1, dtype=torch.long, device=device), True
    if holds_tokens:
        return _cached_layout(attention_mask, past, cache, batch, num_new, device)
    if attention_mask is not None:
        return _padded_layout(attention_mask, batch, num_new)
    if may_be_packed and position_ids is not None and num_new > 1:
        restarts = position_ids[..., 1:] <= position_ids[..., :-1]
        if is_torchdynamo_compiling() or bool(restarts.any()):
            return _restarting_layout(restarts.expand(batch, -1), batch, num_new)
    return _uniform_layout(batch, num_new, device)


def real_tokens(
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    cu_seq_lens: torch.Tensor | None,
    batch: int,
    num_new: int,
) -> torch.Tensor | None:
    """Which of the new tokens, boolean (B, T), are no padding by a model's inputs; None where these name no padding.

    Args:
        attention_mask: As in `build_layout`. Only a (B, S) mask says which tokens are padding; its last T columns
            are those of this pass.
        cu_seq_lens: Offsets of packed sequences among the B * T tokens; what follows the last one is padding.
        batch, num_new: B and T.
    """
    real = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        real = attention_mask[:, -num_new:] != 0
    if cu_seq_lens is not None:
        packed = (torch.arange(batch * num_new, device=cu_seq_lens.device) < cu_seq_lens[-1]).view(batch, num_new)
        real = packed if real is None else real & packed.to(real.device)
    return real


def _uniform_layout(batch: int, num_new: int, device: torch.device, **kwargs) -> SequenceLayout:
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_new
    return SequenceLayout(batch, num_new, cu_seqlens=cu_seqlens, is_uniform=True, **kwargs)


def _packed_layout(
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    batch: int,
    num_new: int,
    device: torch.device,
) -> SequenceLayout:
    cu_seqlens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    others = cu_seqlens if cu_seq_lens_k is None else cu_seq_lens_k
    for name, offsets in (("cu_seq_lens_q", cu_seqlens), ("cu_seq_lens_k", others)):
        if not isinstance(offsets, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor of offsets, got {type(offsets).__name__}")
        if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.is_floating_point():
            raise ValueError(
                f"`{name}` must be a 1-D integer tensor of at least two offsets, "
                f"got {offsets.dtype} of shape {tuple(offsets.shape)}"
            )
    if not is_torchdynamo_compiling() and cu_seqlens.device.type == "cpu":
        if not torch.equal(cu_seqlens, others.to(cu_seqlens.device)):
            raise ValueError(
                "`cu_seq_lens_q` and `cu_seq_lens_k` must be equal without a cache, "
                f"got {cu_seqlens.tolist()} and {others.tolist()}"
            )
        if cu_seqlens[0] != 0 or cu_seqlens[-1] > batch * num_new or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"`cu_seq_lens_q` must start at 0, never fall and not go past the number of tokens {batch * num_new}, "
                f"got {cu_seqlens.tolist()}"
            )
    # What follows the last offset is one more sequence, of padding; where nothing does, an empty one.
    cu_seqlens = torch.nn.functional.pad(
        cu_seqlens.to(device=device, dtype=torch.int32), (0, 1), value=batch * num_new
    )
    return SequenceLayout(batch, num_new, cu_seqlens=cu_seqlens, is_packed=True)


def _restarting_layout(restarts: torch.Tensor, batch: int, num_new: int) -> SequenceLayout:
    """Packed sequences from flags (B, T - 1) on every token but the first of each row."""
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True).flatten()
    total = batch * num_new
    if is_torchdynamo_compiling():
        # As many offsets as tokens, for a shape that does not depend on the data: the surplus are empty sequences.
        token = torch.arange(total, dtype=torch.int32, device=starts.device)
        cu_seqlens = torch.where(starts, token, total).sort().values
    else:
        cu_seqlens = starts.nonzero().flatten().to(torch.int32)
    cu_seqlens = torch.nn.functional.pad(cu_seqlens, (0, 1), value=total)
    return SequenceLayout(batch, num_new, cu_seqlens=cu_seqlens, is_packed=True)


def _padded_layout(attention_mask: torch.Tensor, batch: int, num_new: int) -> SequenceLayout:
    if attention_mask.shape[1] != num_new:
        raise ValueError(
            f"`attention_mask` must cover the {num_new} tokens of the input, got shape {tuple(attention_mask.shape)}"
        )
    real = attention_mask != 0
    if not is_torchdynamo_compiling():
        if bool(real.all()):
            return _uniform_layout(batch, num_new, attention_mask.device, padding_mask=attention_mask)
        length = real.sum(1)
        first = real.int().argmax(dim=1)
        slot = torch.arange(num_new, device=real.device)
        span = (slot >= first[:, None]) & (slot < (first + length)[:, None])
        if torch.equal(span, real):
            lengths = torch.stack((first, length, num_new - first - length), dim=1)
            return SequenceLayout(batch, num_new, cu_seqlens=_offsets(lengths.flatten()), padding_mask=attention_mask)
    # Real tokens with padding between them; while compiling also any other mask, as shapes may not depend on values.
    length = real.sum(1)
    lengths = torch.stack((length, num_new - length), dim=1)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return SequenceLayout(
        batch, num_new, cu_seqlens=_offsets(lengths.flatten()), query_order=order, padding_mask=attention_mask
    )


def _layout_of_full_mask(
    attention_mask: torch.Tensor,
    past: int | torch.Tensor,
    cache: Cache | None,
    batch: int,
    num_new: int,
    num_heads: int | None,
) -> SequenceLayout:
    rows, heads, queries, keys = attention_mask.shape
    # A static cache hands out all of its slots, a dynamic one those in use.
    capacity = -1 if cache is None else cache.get_max_length(0)
    expected = f"{past + num_new}" if capacity < 0 else f"at most the {capacity} of the static cache"
    fits = keys == past + num_new if capacity < 0 else keys <= capacity
    if rows not in (1, batch) or heads not in (1, num_heads or heads) or queries != num_new or not fits:
        raise ValueError(
            f"a 4-D `attention_mask` must have shape (batch {batch} or 1, heads {num_heads} or 1, new tokens {num_new}, "
            f"tokens {expected}), got {tuple(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point():
        allowed = attention_mask == 0
        hidden = attention_mask <= torch.finfo(torch.float16).min / 2
        if not is_torchdynamo_compiling() and not bool((allowed | hidden).all()):
            value = attention_mask[~(allowed | hidden)][0].item()
            raise ValueError(
                "a 4-D `attention_mask` of floating-point numbers is added to the scores: 0 attends, -inf or the "
                f"dtype's lowest number does not, and nothing between is supported, got {value}. "
                "A mask of ones and zeros must be boolean or integer."
            )
    else:
        allowed = attention_mask != 0
    if capacity > keys:
        allowed = torch.nn.functional.pad(allowed, (0, capacity - keys), value=False)
    # A static cache counts its tokens in place while the layers run: this pass keeps the number it started with.
    return SequenceLayout(batch, num_new, allowed=allowed, past=past + 0)


def _cached_layout(
    attention_mask: torch.Tensor | None,
    past: int | torch.Tensor,
    cache: Cache,
    batch: int,
    num_new: int,
    device: torch.device,
) -> SequenceLayout:
    used = past + num_new  # a tensor for static caches, so that no step waits for the device
    num_keys = used if isinstance(used, int) else None
    if attention_mask is None:
        return SequenceLayout(batch, num_new, cache_seqlens=_per_row(used, batch, device), num_keys=num_keys)
    if isinstance(past, int) and attention_mask.shape[1] != used:
        raise ValueError(
            f"`attention_mask` must cover the {past} cached and {num_new} new tokens, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if isinstance(past, torch.Tensor):
        capacity = cache.get_max_length(0)
        if attention_mask.shape[1] > capacity:
            raise ValueError(
                f"`attention_mask` must cover at most the {capacity} slots of the static cache, "
                f"got shape {tuple(attention_mask.shape)}"
            )
        attention_mask = torch.nn.functional.pad(attention_mask, (0, capacity - attention_mask.shape[1]))
    rows = _cached_rows(attention_mask, used, num_new)
    return SequenceLayout(batch, num_new, **rows, padding_mask=attention_mask, num_keys=num_keys)


def _per_row(used: int | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(used, dtype=torch.int32, device=device).reshape(1).expand(batch).contiguous()


def _cached_rows(attention_mask: torch.Tensor, used: int | torch.Tensor, num_new: int) -> dict[str, torch.Tensor]:
    """The cached part of a layout, from a (B, S) mask of the slots; those from `used` on are not in use."""
    batch, slots = attention_mask.shape
    device = attention_mask.device
    slot = torch.arange(slots, device=device)
    real = (attention_mask != 0) & (slot < used)
    length = real.sum(1)
    if not is_torchdynamo_compiling():
        leftpad = (used - length).to(torch.int32)
        if torch.equal(real, (slot >= leftpad[:, None]) & (slot < used)):
            rows = {"cache_seqlens": _per_row(used, batch, device)}
            return {**rows, "cache_leftpad": leftpad} if bool(leftpad.any()) else rows
    # Padding between real tokens; while compiling also any other mask, as shapes may not depend on values. Keys move
    # to the front and queries to the back, where positions are counted from.
    new_slot = used - num_new + torch.arange(num_new, device=device)
    return {
        "cache_seqlens": length.to(torch.int32),
        "key_order": (~real).to(torch.uint8).argsort(dim=1, stable=True),
        "query_order": real[:, new_slot].to(torch.uint8).argsort(dim=1, stable=True),
    }


@takes_cache
def create_masks_for_generate(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """Replaces Transformers' 4-D masks for static caches, with its signature.

    `generate` calls this before every compiled step. The layout of cached rows is worked out here, where values may be
    looked at, in tensors of a shape that stays the same from step to step.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if not isinstance(past, torch.Tensor) or (attention_mask is not None and attention_mask.dim() != 2):
        return attention_mask
    batch, num_new = inputs_embeds.shape[:2]
    used = past + num_new
    if attention_mask is None:
        return {"cache_seqlens": _per_row(used, batch, inputs_embeds.device)}
    capacity = cache.get_max_length(0)
    rows = _cached_rows(
        torch.nn.functional.pad(attention_mask, (0, capacity - attention_mask.shape[1])), used, num_new
    )
    if "key_order" not in rows:  # one graph for padded and unpadded batches
        rows.setdefault("cache_leftpad", torch.zeros_like(rows["cache_seqlens"]))
    return rows
