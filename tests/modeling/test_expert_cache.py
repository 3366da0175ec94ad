"""The order of copies and use, on streams that this module imitates: each runs its work late, in any order allowed."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_minimax_m3.runtime import expert_cache
from modeling_minimax_m3.runtime.expert_cache import ExpertCache

LAYERS, EXPERTS, SLOTS = 2, 8, 5


class Event:
    """Done when the stream has run what was queued before `record`."""

    def __init__(self):
        self.is_done = False

    def record(self, stream: "Stream") -> None:
        stream.queue(self._finish)

    def _finish(self) -> None:
        self.is_done = True

    def query(self) -> bool:
        return self.is_done


class Stream:
    """Work that waits to run, in order."""

    def __init__(self, *_):
        self.work: deque = deque()  # functions to run, and events to wait for

    def queue(self, function: Callable[[], None]) -> None:
        self.work.append(function)

    def wait_event(self, event: Event) -> None:
        self.work.append(event)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def step(self) -> bool:
        """Runs the next piece of work, if it need not wait."""
        if not self.work or (isinstance(self.work[0], Event) and not self.work[0].is_done):
            return False
        work = self.work.popleft()
        if not isinstance(work, Event):
            work()
        return True


class Row:
    """A row of the slots, whose copies are queued."""

    def __init__(self, tensor: torch.Tensor, stream: Stream):
        self.tensor, self.stream = tensor, stream

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.stream.queue(lambda: self.tensor.copy_(source))


class Device:
    """A cache whose copies run on an imitated stream, and streams that compute."""

    def __init__(self, monkeypatch, seed: int):
        values = torch.arange(LAYERS * EXPERTS, dtype=torch.float32).view(LAYERS, EXPERTS, 1)
        self.cache = ExpertCache([{"weight": layer} for layer in values], torch.device("cpu"), SLOTS)
        self.copies, self.compute = Stream(), [Stream(), Stream()]
        self.current = self.compute[0]
        self.cache._stream = self.copies
        self.cache._rows = [{"weight": Row(self.cache.slots["weight"][slot], self.copies)} for slot in range(SLOTS)]
        self.generator = np.random.default_rng(seed)
        self.wrong: list[tuple[int, int, float]] = []
        self.reads = 0
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: _nothing())

    def read(self, layer: int, expert: int, slot: int) -> None:
        def check() -> None:
            self.reads += 1
            found = float(self.cache.slots["weight"][slot])
            if found != layer * EXPERTS + expert:
                self.wrong.append((layer, expert, found))

        self.current.queue(check)

    def run(self, steps: int | None = None) -> None:
        """Runs work of random streams, all of it without `steps`."""
        streams = [self.copies, *self.compute]
        while steps is None or steps > 0:
            order = self.generator.permutation(len(streams))
            if not any(streams[number].step() for number in order):
                break
            steps = None if steps is None else steps - 1
        assert steps is not None or not any(stream.work for stream in streams), "streams wait for each other"


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


def use(device: Device, rounds: int = 200) -> None:
    """Passes of few and of many tokens on two streams, which run now and then."""
    cache, generator = device.cache, device.generator
    for _ in range(rounds):
        device.current = device.compute[generator.integers(2)]
        layer = int(generator.integers(LAYERS))
        chosen = generator.permutation(EXPERTS)[: generator.integers(1, EXPERTS + 1)].tolist()
        with cache.lock:
            cache.count(layer, dict.fromkeys(chosen, 1), 1)
            if len(chosen) <= 3:
                placement = cache.place(layer, chosen)
                cache.fetch(placement)
                guessed = generator.permutation(EXPERTS)[:4].tolist()
                cache.prefetch(1 - layer, guessed, placement.slots.values())
                for expert, slot in placement.slots.items():
                    device.read(layer, expert, slot)
                cache.release(placement.slots.values())
            else:
                for expert, slot in cache.each(layer, chosen):
                    device.read(layer, expert, slot)
        device.run(steps=int(generator.integers(20)))
    device.run()


@pytest.mark.parametrize("seed", range(5))
def test_every_use_finds_its_expert(monkeypatch, seed):
    device = Device(monkeypatch, seed)
    use(device)
    assert device.reads > 500
    assert device.wrong == []
    assert device.cache.stats.bytes_copied == 4 * (device.cache.stats.misses + device.cache.stats.prefetched)


@pytest.mark.parametrize("forgotten", ["_wait_for", "release"])
def test_the_imitation_notices_what_is_not_waited_for(monkeypatch, forgotten):
    device = Device(monkeypatch, 0)
    monkeypatch.setattr(device.cache, forgotten, lambda slots: None)
    use(device)
    assert device.wrong


def test_uses_of_other_streams_are_waited_for(monkeypatch):
    """A slot that two streams read is overwritten when both have."""
    device = Device(monkeypatch, 0)
    cache = device.cache
    for stream in device.compute:
        device.current = stream
        placement = cache.place(0, [0])
        cache.fetch(placement)
        device.read(0, 0, placement.slots[0])
        cache.release(placement.slots.values())
    device.current = device.compute[1]
    cache.fetch(cache.place(1, range(SLOTS)))  # in every slot
    while device.copies.step() or device.compute[1].step():
        pass
    assert float(cache.slots["weight"][placement.slots[0]]) == 0
    device.run()
    assert device.wrong == []
    assert sorted(cache.slots["weight"].flatten().tolist()) == [8, 9, 10, 11, 12]


def test_copies_run_ahead_of_use(monkeypatch):
    """While the first expert computes, the next four are on their way, and no more."""
    device = Device(monkeypatch, 0)
    queued = []
    for _ in device.cache.each(0, range(EXPERTS)):
        queued.append(sum(not isinstance(work, Event) for work in device.copies.work) // 2)  # a copy, an event
    assert queued[0] == expert_cache._AHEAD + 1 == SLOTS
    assert queued[-1] == EXPERTS


def test_experts_that_are_there_come_first():
    """Else those before them would take their slots."""
    cache = ExpertCache([{"weight": torch.zeros(EXPERTS, 1)}], torch.device("cpu"), SLOTS)
    cache.fetch(cache.place(0, [5, 6, 7]))
    cache.stats.reset()
    assert sorted(expert for expert, _ in cache.each(0, range(EXPERTS))) == list(range(EXPERTS))
    assert (cache.stats.hits, cache.stats.misses) == (3, 5)


def test_an_interrupt_before_the_copies_leaves_no_wrong_expert(monkeypatch):
    cache = ExpertCache([{"weight": torch.arange(1.0, EXPERTS + 1)[:, None]}], torch.device("cpu"), SLOTS)
    cache.place(0, [1, 2])  # an interrupt, as of a notebook
    placement = cache.place(0, [2, 3])
    assert placement.missing == [2, 3]
    cache.fetch(placement)
    rows = [{"weight": SimpleNamespace(copy_=_interrupt)} for _ in range(SLOTS)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_rows", rows)
        cache.fetch(cache.place(0, [4, 5]))
    for expert in (4, 5, 1, 2, 3):
        placement = cache.place(0, [expert])
        cache.fetch(placement)
        assert float(cache.slots["weight"][placement.slots[expert]]) == expert + 1


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_release_forgets_no_use_of_another_stream(monkeypatch):
    device = Device(monkeypatch, 0)
    cache = device.cache
    placement = cache.place(0, [0])
    cache.fetch(placement)
    device.read(0, 0, placement.slots[0])
    cache.release(placement.slots.values())
    device.current = device.compute[1]
    cache.fetch(cache.place(0, [0]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Event, "record", _interrupt)
        cache.release(placement.slots.values())
    cache.fetch(cache.place(1, range(SLOTS)))  # in every slot
    while device.copies.step() or device.compute[1].step():
        pass
    assert float(cache.slots["weight"][placement.slots[0]]) == 0, "the first stream has not read it yet"
    device.run()
    assert device.reads == 1 and device.wrong == []


def test_pinning_needs_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(expert_cache, "PinnedMemory", lambda tensor: asked.append(tensor) or SimpleNamespace(tensor=0))
    weights = {"weight": torch.zeros(EXPERTS, 1)}
    cache = ExpertCache([weights], torch.device("cpu"), SLOTS)
    cache.pin(0)
    assert not asked and cache.host[0]["weight"] is weights["weight"]
    cache._stream = Stream()
    cache.pin(0)
    assert asked == [weights["weight"]] and cache.host[0]["weight"] == 0
