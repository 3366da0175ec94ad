"""From the projections of a few tokens to what attention reads: norms of heads, partial rotary, new slots of a cache.

One kernel, without gradients. The definition is that of a layer: an RMS norm of each head by `1 + weight`, then rotary,
of queries, keys, index queries and index keys, then a write of keys, values and index keys to the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import few_tokens
from .norm_rotary import norm_rotary_reference
from .support import HALF_DTYPES, as_vectors, is_vector_block, kernels_take

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
    """Whether `attention_input` takes these tensors, and no gradient is needed.

    Args:
        hidden_states (B, T, hidden): What is projected. The projections have their dtype.
        norms (sequence of (D,)): Weights of the norms of queries and keys, and of the index ones.
        rotary (tuple of (B or 1, T, R)): Cosines and sines.
        slots (CacheSlots): Where keys and values go.
    """
    cos, sin = rotary
    batch, num_new = hidden_states.shape[:2]
    caches = [states for states in slots[1:] if states is not None]
    return (
        kernels_take(hidden_states, *norms, *rotary, *slots[:1], *caches)
        and hidden_states.dtype in HALF_DTYPES
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *norms)))
        and norms[0].shape[0] in _HEAD_DIMS
        and all(norm.dtype == hidden_states.dtype and norm.shape == norms[0].shape for norm in norms)
        and all(is_vector_block(norm) for norm in norms)
        and all(states.shape[:2] == slots.keys.shape[:2] and states.shape[0] == batch for states in caches)
        and all(states.dtype == hidden_states.dtype and states.shape[-1] == norms[0].shape[0] for states in caches)
        and all(stride % 8 == 0 for states in caches for stride in states.stride()[:-1])
        and all(states.stride(-1) == 1 and states.data_ptr() % 16 == 0 for states in caches)
        and cos.dtype == sin.dtype
        and cos.shape == sin.shape
        and cos.shape[:-1] in ((batch, num_new), (1, num_new))
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

    Raises:
        RuntimeError: A token has no slot. As with PyTorch's own writes, the GPU reports it at a later call, and the
            process can no longer use it.
    """
    index_norms = norms[2:] or (None, None)
    cos, sin = (as_vectors(table.contiguous()) for table in rotary)
    return torch.ops.minimax_m3_msa_cuda.attention_input(
        projected, norms[0], norms[1], *index_norms, cos, sin, eps, slots.length, slots.keys, slots.values,
        slots.index_keys, few_tokens.are_constant(norms),
    )  # fmt: skip


def attention_input_reference(
    projected: torch.Tensor,
    norms: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    slots: CacheSlots,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `attention_input`, which also rounds between norm and rotary."""
    num_kv_heads, head_dim = slots.keys.shape[2:]
    heads = projected.unflatten(-1, (-1, head_dim))
    index_heads = [] if slots.index_keys is None else [num_kv_heads, 1]
    others = [num_kv_heads, num_kv_heads, *index_heads]
    query, key, value, *index = heads.split([heads.shape[2] - sum(others), *others], dim=2)
    new = slots.length + torch.arange(projected.shape[1], device=projected.device)

    def write(states: torch.Tensor, memory: torch.Tensor) -> None:
        memory.index_copy_(1, new, states)

    query, key = (
        norm_rotary_reference(states, norm, *rotary, eps) for states, norm in zip((query, key), norms[:2], strict=True)
    )
    write(key, slots.keys)
    write(value, slots.values)
    if slots.index_keys is None:
        return query, query[:, :, :0]
    index_query, index_key = (
        norm_rotary_reference(states, norm, *rotary, eps) for states, norm in zip(index, norms[2:], strict=True)
    )
    write(index_key, slots.index_keys)
    return query, index_query


def takes_rotary_table(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> bool:
    """Whether `rotary_table` runs as a kernel; its arguments."""
    return (
        positions.dtype == torch.int64
        and positions.dim() == 2
        and frequencies.dtype == torch.float32
        and x.dtype in HALF_DTYPES
        and kernels_take(x, positions, frequencies)
    )


def rotary_table(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of angles, which are positions times frequencies.

    Args:
        x (any shape): Gives dtype and device of the result.
        positions (B, T): Integers.
        frequencies (R / 2,): Of the first half of the channels, which the second half shares.
        scaling (float): Factor of cosines and sines.

    Returns:
        Cosines (B, T, R) and sines (B, T, R).
    """
    if not takes_rotary_table(x, positions, frequencies):
        return rotary_table_reference(x, positions, frequencies, scaling)
    return torch.ops.minimax_m3_msa_cuda.rotary_table(positions.contiguous(), frequencies.contiguous(), scaling, x)


def rotary_table_reference(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `rotary_table`, in float32 until the end."""
    angles = positions[..., None].float() * frequencies.to(device=x.device, dtype=torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return cos.to(x.dtype), sin.to(x.dtype)
