"""From the projections of a few tokens to what attention reads: norms of heads, partial rotary, new slots of a cache.

One kernel, without gradients. The definition is that of a layer: an RMS norm of each head by `1 + weight`, then rotary,
of queries, keys, index queries and index keys, then a write of keys, values and index keys to the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .support import HALF_DTYPES, kernels_take

_HEAD_DIMS = (64, 128)
_ROTARY_MULTIPLE = 16


class CacheSlots(NamedTuple):
    """The memory of one layer's cache.

    Attributes:
        length (scalar): int64, slots in use before this pass, on the device.
        keys, values (B, S, H_kv, D): Slots.
        index_keys ((B, S, 1, D) or None): Slots of an indexer's keys.
    """

    length: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    index_keys: torch.Tensor | None


def takes_attention_input(
    hidden_states: torch.Tensor,
    norms: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    slots: CacheSlots,
) -> bool:
    """Whether `attention_input` takes these tensors; `hidden_states` (B, T, hidden) are what is projected."""
    cos, sin = rotary
    caches = [states for states in slots[1:] if states is not None]
    return (
        kernels_take(hidden_states, *norms, *rotary, *slots[:1], *caches)
        and hidden_states.dtype in HALF_DTYPES
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *norms)))
        and norms[0].shape[0] in _HEAD_DIMS
        and all(norm.dtype == hidden_states.dtype and norm.shape == norms[0].shape for norm in norms)
        and all(states.dtype == hidden_states.dtype and states.shape[-1] == norms[0].shape[0] for states in caches)
        and all(stride % 8 == 0 for states in caches for stride in states.stride()[:-1])
        and all(states.stride(-1) == 1 and states.data_ptr() % 16 == 0 for states in caches)
        and cos.dtype == sin.dtype
        and cos.dtype in (hidden_states.dtype, torch.float32)
        and cos.shape[-1] % _ROTARY_MULTIPLE == 0
        and cos.shape[-1] <= norms[0].shape[0]
    )


def attention_input(
    projected: torch.Tensor,
    norms: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    slots: CacheSlots,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise and rotate heads, and write keys and values to the next slots.

    The caller has asked `takes_attention_input`, and adds T to `slots.length` afterwards.

    Args:
        projected (B, T, all heads * D): Projections side by side: queries, keys, values, and with an indexer its
            queries, as many heads as key/value heads, and its key.
        norms (sequence of (D,)): Weights of the norms of queries and keys, and of the index ones.
        rotary (tuple of (B or 1, T, R)): Cosines and sines.
        eps (float): Added to the mean square.
        slots (CacheSlots): Where keys and values go.

    Returns:
        Queries (B, T, H_q, D) and index queries (B, T, H_kv, D), which are empty without an indexer.
    """
    index_norms = norms[2:] or (None, None)
    cos, sin = (table.contiguous() for table in rotary)
    return torch.ops.minimax_m3_msa_cuda.attention_input(
        projected, norms[0], norms[1], *index_norms, cos, sin, eps, slots.length, slots.keys, slots.values,
        slots.index_keys,
    )  # fmt: skip


def takes_rotary_table(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> bool:
    """Whether `rotary_table` takes these tensors."""
    return (
        positions.dtype == torch.int64
        and frequencies.dtype == torch.float32
        and x.dtype in HALF_DTYPES
        and kernels_take(x, positions, frequencies)
    )


def rotary_table(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, T, R) in the dtype of `x`, of positions (B, T) times frequencies (R / 2,)."""
    return torch.ops.minimax_m3_msa_cuda.rotary_table(positions.contiguous(), frequencies.contiguous(), scaling, x)
