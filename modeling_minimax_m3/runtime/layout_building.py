"""Reads from a model's inputs where the sequences lie: masks, offsets of packed sequences, positions, and the cache.

Legend: B rows, T new tokens of a row, S keys of a row (cached and new), H_q query heads.
"""

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from .sequence_layout import SequenceLayout, offsets_of, uniform_layout
from .transformers_versions import takes_cache


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
    """Read the layout from a model's inputs: from `cu_seq_lens_*` if given, else the mask, else restarts of positions.

    Args:
        attention_mask (`torch.Tensor` or `dict`, *optional*): (B, S) with 1 for real tokens; or a (B, heads, T, S)
            mask, boolean (True or 1 attends) or additive (0 attends, the lowest number or -inf does not); or the dict
            that `create_masks_for_generate` returns.
        position_ids (`torch.Tensor`, *optional*): (B, T). A position that does not grow starts a new sequence.
        cache (`Cache`, *optional*): The cache that this pass appends to.
        batch (`int`), num_new (`int`): B and T.
        device (`torch.device`): Where the inputs are.
        cu_seq_lens_q, cu_seq_lens_k (`torch.Tensor`, *optional*): (sequences + 1,) offsets of packed sequences among
            the B * T tokens. Tokens after the last offset are padding.
        may_be_packed (`bool`): Whether a restart of `position_ids` starts a sequence.
        num_heads (`int`, *optional*): H_q. A 4-D mask must have that many heads, or 1.
        whole_cache (`bool`): Whether the first pass reads all slots of a static cache as keys, as every later pass
            does. Attention weights then have the same width at every pass.

    Raises:
        ValueError: The inputs' shapes or values contradict each other.
        NotImplementedError: `cu_seq_lens_*` come with a cache that holds tokens.
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
    return uniform_layout(batch, num_new, device)


def real_tokens(
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    cu_seq_lens: torch.Tensor | None,
    batch: int,
    num_new: int,
) -> torch.Tensor | None:
    """Which of the new tokens are real, by a model's inputs.

    Args:
        attention_mask (`torch.Tensor` or `dict`, *optional*): As in `build_layout`. Only a (B, S) mask says which
            tokens are padding; its last T columns belong to this pass.
        cu_seq_lens (`torch.Tensor`, *optional*): Offsets of packed sequences among the B * T tokens. Tokens after the
            last offset are padding.
        batch (`int`), num_new (`int`): B and T.

    Returns:
        Boolean (B, T), False at padding; None where the inputs mark no padding.
    """
    real = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        real = attention_mask[:, -num_new:] != 0
    if cu_seq_lens is not None:
        packed = (torch.arange(batch * num_new, device=cu_seq_lens.device) < cu_seq_lens[-1]).view(batch, num_new)
        real = packed if real is None else real & packed.to(real.device)
    return real


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
    # Padding after the last offset is one more sequence, an empty one where there is no padding.
    cu_seqlens = torch.nn.functional.pad(
        cu_seqlens.to(device=device, dtype=torch.int32), (0, 1), value=batch * num_new
    )
    return SequenceLayout(batch, num_new, cu_seqlens=cu_seqlens, is_packed=True)


def _restarting_layout(restarts: torch.Tensor, batch: int, num_new: int) -> SequenceLayout:
    """Packed sequences from flags (B, T - 1) on every token but the first of each row."""
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True).flatten()
    total = batch * num_new
    if is_torchdynamo_compiling():
        # As many offsets as tokens, so that the shape does not depend on the data. Surplus offsets are empty
        # sequences.
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
            return uniform_layout(batch, num_new, attention_mask.device, padding_mask=attention_mask)
        length = real.sum(1)
        first = real.int().argmax(dim=1)
        slot = torch.arange(num_new, device=real.device)
        span = (slot >= first[:, None]) & (slot < (first + length)[:, None])
        if torch.equal(span, real):
            lengths = torch.stack((first, length, num_new - first - length), dim=1)
            return SequenceLayout(
                batch, num_new, cu_seqlens=offsets_of(lengths.flatten()), padding_mask=attention_mask
            )
    # Real tokens with padding between them. While compiling, any other mask too: shapes may not depend on values.
    length = real.sum(1)
    lengths = torch.stack((length, num_new - length), dim=1)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return SequenceLayout(
        batch, num_new, cu_seqlens=offsets_of(lengths.flatten()), query_order=order, padding_mask=attention_mask
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
    # A static cache returns all of its slots, a dynamic one those in use.
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
    # A static cache counts its tokens in place while the layers run. The copy keeps the number from the pass's start.
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
    """The fields of a layout with a cache, from a (B, S) mask of the slots, of which the first `used` are in use."""
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
    # Padding between real tokens. While compiling, any other mask too: shapes may not depend on values. Keys move to
    # the front and queries to the back, because positions are counted from there.
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
    """Replaces Transformers' function of that name, which builds 4-D masks for static caches.

    `generate` calls this before every compiled step. Here the host may still look at values, so the layout of cached
    rows is built here, as tensors whose shape stays the same from step to step. A step that a CUDA graph holds needs
    the layout once.
    """
    if getattr(cache, "is_captured", False):
        return attention_mask
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
