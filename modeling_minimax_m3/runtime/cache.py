"""Cache layers: keys and values stored token-major, index keys beside them.

Transformers shows a layer's keys and values as (B, H_kv, S, D). Here they are views of buffers stored (B, S, H_kv, D),
so that one token's heads are contiguous and the attention operators read the cache in place.

The dynamic layers reserve room ahead: a buffer of twice the size replaces a full one. So a token costs constant time
on average, and memory is at most twice what is in use. `StaticCache` reserves exactly what it is told, which suits the
longest contexts.
"""

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import is_torchdynamo_compiling

from ..fused.attention_input import CacheSlots


class _GrowingBuffer:
    """Tokens along dim 1 of a (B, capacity, ...) tensor, of which the first `length` are in use."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.length = 0

    @property
    def used(self) -> torch.Tensor:
        return self.data[:, : self.length]

    def append(self, states: torch.Tensor) -> torch.Tensor:
        """Add `states` (B, T, ...) and return all tokens (B, S, ...)."""
        if self.data is None:
            self.data = states[:, :0]
        # Writing in place would change tensors that autograd may have saved, at least for the queries' gradient.
        if torch.is_grad_enabled():
            self.data = torch.cat((self.used, states), dim=1)
            self.length = self.data.shape[1]
            return self.data
        needed = self.length + states.shape[1]
        self.reserve(needed)
        self.data[:, self.length : needed] = states
        self.length = needed
        return self.used

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        if tokens > self.data.shape[1]:
            capacity = max(tokens, 2 * self.data.shape[1])
            data = self.data.new_empty((self.data.shape[0], capacity, *self.data.shape[2:]))
            data[:, : self.length] = self.used
            # A decoding step in a CUDA graph computes over all slots and masks the unused ones: 0 * NaN would remain.
            data[:, self.length :] = 0
            self.data = data

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.length = max(0, self.length - tokens)

    def map_rows(self, function) -> None:
        """Replace the buffer, spare room included, by `function` of it, which may move, select or repeat rows."""
        if self.data is not None:
            self.data = function(self.data)


class MiniMaxM3VLDynamicLayer(DynamicLayer):
    """Growing cache layer of keys and values."""

    def __init__(self, **kwargs):
        super().__init__()
        self._buffers = self._new_buffers()

    def _new_buffers(self) -> dict[str, _GrowingBuffer]:
        return {"keys": _GrowingBuffer(), "values": _GrowingBuffer()}

    def buffers(self) -> list[_GrowingBuffer]:
        """All buffers of the layer. Each holds the same tokens."""
        return list(self._buffers.values())

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, once the layer holds some."""
        for buffer in self.buffers():
            buffer.reserve(tokens)

    def as_static_layer(self, room: int) -> "MiniMaxM3VLStaticLayer":
        """A static layer over the memory of this one, with room for at least `room` more tokens.

        Its tokens become tokens of this layer when the caller raises the length of every buffer.
        """
        buffers = self.buffers()
        self.reserve(self.get_seq_length() + room)
        layer = self._new_static_layer(min(buffer.data.shape[1] for buffer in buffers))
        layer.adopt_memory(*(buffer.data.transpose(1, 2) for buffer in buffers), length=self.get_seq_length())
        return layer

    def _new_static_layer(self, max_cache_len: int) -> "MiniMaxM3VLStaticLayer":
        return MiniMaxM3VLStaticLayer(max_cache_len)

    # Transformers reads these two, which are views of the buffers. Its base class sets them to None at the start.

    @property
    def keys(self) -> torch.Tensor | None:
        return self._view("keys")

    @keys.setter
    def keys(self, states: None) -> None:
        _check_not_set("keys", states)

    @property
    def values(self) -> torch.Tensor | None:
        return self._view("values")

    @values.setter
    def values(self, states: None) -> None:
        _check_not_set("values", states)

    def _view(self, name: str) -> torch.Tensor | None:
        return self._buffers[name].used.transpose(1, 2) if self.is_initialized else None

    def _map_rows(self, function) -> None:
        if self.is_initialized:
            for buffer in self._buffers.values():
                buffer.map_rows(function)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers["keys"].append(key_states[..., :0, :].transpose(1, 2))
        self._buffers["values"].append(value_states[..., :0, :].transpose(1, 2))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, H_kv, T, D) states and return all of them (B, H_kv, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._buffers["keys"].append(key_states.transpose(1, 2))
        self._buffers["values"].append(value_states.transpose(1, 2))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._buffers["keys"].length

    def reset(self) -> None:
        self._buffers = self._new_buffers()
        super().reset()

    def offload(self) -> None:
        self._map_rows(lambda data: data.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            self._map_rows(lambda data: data.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. The argument is negative or 0, as everywhere in Transformers."""
        _check_crop(tokens_to_remove)
        if self.is_initialized:
            for buffer in self._buffers.values():
                buffer.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda data: data.index_select(0, beam_idx.to(data.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda data: data.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda data: data[indices])


class MiniMaxM3VLSparseDynamicLayer(MiniMaxM3VLDynamicLayer):
    """Growing cache layer of keys and values, and of the index keys of every token.

    Offloading leaves the index keys on the device, because every step scores all of them. They are a small part: 256
    of 2304 bytes per token in the released geometry.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._index_buffer = _GrowingBuffer()

    def update_index(self, index_key: torch.Tensor) -> torch.Tensor:
        """Add (B, 1, T, D_idx) index keys and return all of them (B, 1, S, D_idx)."""
        return self._index_buffer.append(index_key.transpose(1, 2)).transpose(1, 2)

    def buffers(self) -> list[_GrowingBuffer]:
        return [*super().buffers(), self._index_buffer]

    def _new_static_layer(self, max_cache_len: int) -> "MiniMaxM3VLStaticLayer":
        return MiniMaxM3VLSparseStaticLayer(max_cache_len)

    def _map_index_rows(self, function) -> None:
        self._index_buffer.map_rows(function)

    def reset(self) -> None:
        super().reset()
        self._index_buffer = _GrowingBuffer()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._index_buffer.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_index_rows(lambda data: data.index_select(0, beam_idx.to(data.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_index_rows(lambda data: data.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_index_rows(lambda data: data[indices])


class MiniMaxM3VLStaticLayer(StaticLayer):
    """Preallocated cache layer of keys and values, written in place so that CUDA graphs can replay it."""

    is_croppable = True
    counts_tokens = True  # False: whoever lends the memory adds new tokens to `cumulative_length`

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (
            states.new_zeros((self.batch_size, self.max_cache_len, self.num_heads, states.shape[-1])).transpose(1, 2)
            for states in (key_states, value_states)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        _mark_static(self.keys, self.values, self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H_kv, T, D) states after those in use, and return all slots (B, H_kv, S, D)."""
        # Reading the length would wait for a device. There, other checks refuse `generate` and masks that are too
        # long.
        if key_states.device.type == "cpu" and not is_torchdynamo_compiling():
            self.check_room(int(self.cumulative_length) + key_states.shape[-2])
        if self.counts_tokens:
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.cumulative_length
        self.cumulative_length = length.clone()
        states = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length = length
        return states

    def slots(self) -> CacheSlots:
        """The memory, token-major, for a kernel that writes the next tokens; `count_tokens` follows."""
        return CacheSlots(self.cumulative_length, self.keys.transpose(1, 2), self.values.transpose(1, 2), None)

    def count_tokens(self, num_new: int) -> None:
        """Count tokens that a kernel has written."""
        if self.counts_tokens:
            self.cumulative_length.add_(num_new)

    def check_room(self, tokens: int) -> None:
        """Raise ValueError unless the layer can hold `tokens` tokens in all."""
        if tokens > self.max_cache_len:
            raise ValueError(
                f"the static cache has {self.max_cache_len} slots, got tokens for {tokens}: make it with a larger "
                "`max_cache_len`"
            )

    def adopt_memory(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Use (B, H_kv, S, D) tensors as this layer's own. Their first `length` slots are in use."""
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size, self.num_heads = keys.shape[:2]
        self.k_head_dim, self.v_head_dim = keys.shape[-1], values.shape[-1]
        self.keys, self.values = keys, values
        self.cumulative_length = torch.tensor(length, device=keys.device)
        self.is_initialized = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # In place, because a captured graph goes on reading the same memory.
        if self.is_initialized:
            for states in (self.keys, self.values):
                states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, whose slots the next tokens take."""
        _check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row. The buffers change their size and place: a captured graph must be captured again."""
        self._replace_rows(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows. The buffers change their size and place: a captured graph must be captured again."""
        self._replace_rows(lambda states: states[indices])

    def _replace_rows(self, function) -> None:
        if self.is_initialized:
            # Over the token-major buffers, so that they stay token-major.
            self.keys, self.values = (
                function(states.transpose(1, 2)).transpose(1, 2) for states in (self.keys, self.values)
            )
            self.batch_size = len(self.keys)
            _mark_static(self.keys, self.values)


class MiniMaxM3VLSparseStaticLayer(MiniMaxM3VLStaticLayer):
    """Preallocated cache layer of keys and values, and of the index keys of every token."""

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len, **kwargs)
        self.index_keys: torch.Tensor | None = None

    def update_index(self, index_key: torch.Tensor) -> torch.Tensor:
        """Write (B, 1, T, D_idx) index keys of the tokens that `update` wrote last, and return the whole buffer."""
        batch, _, num_new, index_dim = index_key.shape
        if self.index_keys is None:
            self.index_keys = index_key.new_zeros((batch, 1, self.max_cache_len, index_dim))
            _mark_static(self.index_keys)
        slots = self.cumulative_length + torch.arange(num_new, device=index_key.device)
        if self.counts_tokens:
            slots = slots - num_new
        self.index_keys.index_copy_(2, slots, index_key)
        return self.index_keys

    def slots(self) -> CacheSlots:
        index_keys = None if self.index_keys is None else self.index_keys.transpose(1, 2)
        return super().slots()._replace(index_keys=index_keys)

    def adopt_memory(self, keys: torch.Tensor, values: torch.Tensor, index_keys: torch.Tensor, length: int) -> None:
        """Use these tensors as this layer's own, (B, 1, S, D_idx) index keys among them."""
        super().adopt_memory(keys, values, length)
        self.index_keys = index_keys

    def _replace_rows(self, function) -> None:
        super()._replace_rows(function)
        if self.index_keys is not None:
            self.index_keys = function(self.index_keys)
            _mark_static(self.index_keys)

    def reset(self) -> None:
        super().reset()
        if self.index_keys is not None:
            self.index_keys.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.index_keys is not None:
            self.index_keys.copy_(self.index_keys.index_select(0, beam_idx.to(self.index_keys.device)))


def _check_not_set(name: str, states: torch.Tensor | None) -> None:
    if states is not None:
        raise AttributeError(f"`{name}` of this cache layer are views of its buffers: add tokens by `update`")


def _check_crop(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            f"`tokens_to_remove` must be 0 or negative (-n removes the last n tokens), got {tokens_to_remove}"
        )


def _mark_static(*tensors: torch.Tensor) -> None:
    """Tell the compiler that these tensors keep their address. CUDA graphs would copy them otherwise."""
    if not is_torchdynamo_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
