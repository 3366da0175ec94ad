"""Experts on the host, some of them in slots on the device: copies, and the order of copies and use.

Copies run on a stream of their own. The stream that computes waits for the copies that it needs, and a copy into a slot
waits for the last use of the expert that was there. On a CPU, which tests use in place of a GPU, all of it runs in
order.

S is the number of slots.
"""

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn

from .expert_slots import ExpertSlots
from .pinned_memory import PinnedMemory

# Experts that are on their way while one computes. For many tokens, the copy of an expert takes longer than its
# products. Two would do, and more even out experts with many tokens.
_AHEAD = 4


@dataclass
class OffloadStats:
    """What the passes since the last `reset` needed. Each expert of a layer counts once a pass.

    Attributes:
        hits (`int`): Experts that were on the device, or on the way to it.
        misses (`int`): Experts that had to be copied when they were needed.
        prefetched (`int`): Experts that were copied because a prediction asked for them.
        bytes_copied (`int`): From the host to the device.
        waits (`int`): Layers that had to wait for a copy.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    bytes_copied: int = 0
    waits: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of hits; 0 where no expert was needed yet."""
        return self.hits / max(1, self.hits + self.misses)

    def reset(self) -> None:
        """Counts from 0 again."""
        for field in fields(self):
            setattr(self, field.name, 0)


class Placement(NamedTuple):
    """Experts of a layer and their slots.

    Attributes:
        layer (int): The number of the layer.
        slots (dict of int): The slot of each expert.
        missing (list of int): Experts whose weights are not there yet.
    """

    layer: int
    slots: dict[int, int]
    missing: list[int]


class ExpertCache:
    """The experts of all layers.

    Whoever uses it holds `lock`: from `place` over `fetch` to `release`, or for `each` until the last expert.

    Args:
        weights (sequence of dicts of torch.Tensor): The weights of each layer by name, each (E, ...), on the host. All
            layers have the same names, shapes and dtypes.
        device (torch.device): Where the slots are.
        num_slots (int): S.

    Attributes:
        slots (dict of torch.Tensor): (S, ...) by name.
        host (list of dicts of torch.Tensor): `weights`, page-locked where the device is a GPU.
    """

    @torch.inference_mode(False)  # slots that are made in this mode could not be written outside of it
    def __init__(self, weights: Sequence[dict[str, torch.Tensor]], device: torch.device, num_slots: int):
        self.device, self.num_slots = device, num_slots
        self.stats = OffloadStats()
        self.lock = threading.RLock()
        self.host = [dict(layer) for layer in weights]
        self._pinned: list[PinnedMemory] = []
        self.slots = {
            # Zeros in the bytes of any dtype: kernels for MXFP8 look once whether there are NaN.
            name: torch.zeros((num_slots, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            for name, tensor in weights[0].items()
        }
        num_experts = len(next(iter(weights[0].values())))
        self._unfinished: tuple[int, Collection[int]] | None = None  # experts whose copies may not be queued
        self._places = ExpertSlots(len(weights), num_experts, num_slots)
        self.expert_bytes = sum(tensor[0].nbytes for tensor in weights[0].values())
        # Writing through `data` leaves the versions of the slots as they are, so nobody looks at their values again.
        self._rows = [{name: tensor.data[slot] for name, tensor in self.slots.items()} for slot in range(num_slots)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[torch.cuda.Event | None] = [None] * num_slots
        self._used: list[tuple[torch.cuda.Stream, torch.cuda.Event] | None] = [None] * num_slots
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the zeros
            for tensor in self.slots.values():
                tensor.record_stream(self._stream)  # a copy may still run when the slots are freed

    def __reduce__(self):
        raise TypeError(
            "a model whose experts are offloaded cannot be copied or pickled; call `remove()` of the offload first"
        )

    def pin(self, layer: int) -> None:
        """Locks the pages of a layer's weights, for a GPU. `host` may then hold copies."""
        if self._stream is not None:
            for name, tensor in self.host[layer].items():
                self._pinned.append(PinnedMemory(tensor))
                self.host[layer][name] = self._pinned[-1].tensor

    def synchronize(self) -> None:
        """Waits until no copy runs any more."""
        if self._stream is not None:
            self._stream.synchronize()

    def count(self, layer: int, counts: dict[int, int], num_tokens: int) -> None:
        """See `ExpertSlots.count`."""
        self._places.count(layer, counts, num_tokens)

    def place(self, layer: int, experts: Collection[int], kept: Iterable[int] = ()) -> Placement:
        """Gives at most S experts slots, beside the slots `kept`. Their weights come with `fetch`."""
        if self._unfinished is not None:  # an interrupt came between a placement and its copies
            self._places.forget(*self._unfinished)
        self._unfinished = (layer, experts)
        return Placement(layer, *self._places.place(layer, experts, kept))

    def fetch(self, placement: Placement) -> None:
        """Copies what is missing. Work that is queued from now on finds the experts in their slots."""
        self._start(placement)
        self._wait_for(placement.slots.values())
        missing = len(placement.missing)
        self._note(len(placement.slots) - missing, missing, waits=missing > 0)

    def prefetch(self, layer: int, experts: Iterable[int], kept: Collection[int]) -> None:
        """Starts copies of experts that a pass may need soon, as many as there is room for beside the slots `kept`."""
        wanted = list(experts)[: self.num_slots - len(kept)]
        placement = self.place(layer, wanted, kept)
        self._start(placement)
        self.stats.prefetched += len(placement.missing)

    def each(self, layer: int, experts: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Any number of experts with their slots, one after the other, while the next ones are being copied.

        The slot of an expert may be used until the next one is asked for. Experts that have a slot come first.
        """
        waiting = deque(sorted(experts, key=lambda expert: not self._places.has(layer, expert)))
        ready: deque[tuple[int, int]] = deque()
        hits = misses = 0
        while waiting or ready:
            while waiting and len(ready) < min(_AHEAD + 1, self.num_slots):
                expert = waiting.popleft()
                placement = self.place(layer, [expert], [slot for _, slot in ready])
                self._start(placement)
                ready.append((expert, placement.slots[expert]))
                hits, misses = hits + (not placement.missing), misses + len(placement.missing)
            expert, slot = ready[0]
            self._wait_for([slot])
            yield expert, slot
            self.release([slot])
            ready.popleft()
        self._note(hits, misses, waits=misses > 0)

    def release(self, slots: Iterable[int]) -> None:
        """Says that all uses of `slots` are queued: a later copy into one of them waits for them."""
        if self._stream is None:
            return
        slots, stream = list(slots), torch.cuda.current_stream(self.device)
        for slot in slots:
            earlier = self._used[slot]
            if earlier is not None and earlier[0] != stream:  # of another thread
                stream.wait_event(earlier[1])
        used = stream.record_event()
        for slot in slots:  # not earlier: an interrupt would leave an event that nobody waits for
            self._used[slot] = (stream, used)

    def _start(self, placement: Placement) -> None:
        if self._stream is None:
            self._copy(placement)
        elif placement.missing:
            with torch.cuda.stream(self._stream):
                self._copy(placement)
        self._unfinished = None
        self.stats.bytes_copied += len(placement.missing) * self.expert_bytes

    def _copy(self, placement: Placement) -> None:
        for expert in placement.missing:
            slot = placement.slots[expert]
            used = self._used[slot]
            if self._stream is not None and used is not None:
                self._stream.wait_event(used[1])
            for name, row in self._rows[slot].items():
                row.copy_(self.host[placement.layer][name][expert], non_blocking=True)
            if self._stream is not None:
                self._copied[slot] = self._stream.record_event()

    def _wait_for(self, slots: Iterable[int]) -> None:
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        for slot in slots:
            copied = self._copied[slot]
            if copied is None:
                continue
            if copied.query():
                self._copied[slot] = None
            else:
                stream.wait_event(copied)

    def _note(self, hits: int, misses: int, waits: bool) -> None:
        self.stats.hits += hits
        self.stats.misses += misses
        self.stats.waits += waits


def is_offloaded(module: nn.Module) -> bool:
    """Whether `module` has its own weights on the host, as experts."""
    return "expert_cache" in vars(module)


def has_offloaded_experts(model: nn.Module) -> bool:
    """Whether experts of `model` are on the host. Such a model cannot be compiled as a whole."""
    return any(map(is_offloaded, model.modules()))
