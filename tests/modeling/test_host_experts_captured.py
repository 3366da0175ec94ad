"""Blocks with experts on the host, captured in pieces: on a CPU, with operators that are recorded in place of a graph."""

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, offload_experts
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.fused.swiglu import swiglu_oai_reference
from modeling_minimax_m3.layers.moe import MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.runtime.graph_pieces import GraphPieces

from .conftest import fill_with_noise

CONFIG = tiny_config(text={"num_local_experts": 8}).text_config  # three sparse layers, two experts of a token
TOKENS = 2
FEW_SLOTS = 5 / 24  # a pass of two tokens needs up to twelve experts, a layer up to four


class RecordedGraph(TorchDispatchMode):
    """Stands for a CUDA graph: its replay runs the recorded operators, and writes what they wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def capture_begin(self, pool, capture_error_mode):
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for before, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(before, torch.Tensor):
                    before.copy_(now)


def _mlp(x, gate_up, down, alpha, limit, expert_gate_up, expert_down, expert_ids, expert_weights, scale):
    """The definition of `few_tokens.mlp` in operators that do not depend on values."""

    def one(states, gate_up, down):
        return swiglu_oai_reference(states @ gate_up.mT, alpha, limit) @ down.mT

    chosen = expert_ids.clamp(0, len(expert_gate_up) - 1)  # of any bytes while they are recorded
    routed = one(x[:, None, None], expert_gate_up[chosen], expert_down[chosen])[:, :, 0]
    return one(x, gate_up, down) + scale * (routed * (expert_weights * (expert_ids >= 0))[..., None]).sum(1)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(few_tokens, "takes_mlp", lambda x, *_: len(x) <= few_tokens.MAX_TOKENS)
    monkeypatch.setattr(few_tokens, "mlp", _mlp)
    with torch.no_grad():
        yield


def blocks_of(model) -> list[MiniMaxM3VLSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, MiniMaxM3VLSparseMoeBlock)]


def offload(model, **options):
    options = {"experts_on_device": FEW_SLOTS} | options
    return offload_experts(model, device="cpu", show_progress=False, **options)


def states(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


class Captured:
    """The sparse blocks of a model, one behind the other, and their answers before the offload."""

    def __init__(self, seed: int = 0, **options):
        model = MiniMaxM3VLForCausalLM(CONFIG).eval()
        fill_with_noise(model, seed=seed)
        self.blocks = blocks_of(model)
        self.expected = [self.answer(states(seed)) for seed in range(12)]
        self.model = model
        self.offload = offload(model, **options)
        self.cache = self.blocks[0].experts.expert_cache
        self.capture()

    def answer(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def capture(self) -> None:
        self.hidden, self.pieces = states(0), GraphPieces()
        self.pieces.capture(lambda: setattr(self, "out", self.answer(self.hidden)))

    def check(self, seed: int) -> None:
        self.hidden.copy_(states(seed))
        self.out.zero_()
        self.pieces.replay()
        torch.testing.assert_close(self.out, self.expected[seed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefetch", [False, True])
def test_replays_follow_the_chosen_experts(prefetch):
    captured = Captured(prefetch=prefetch)
    assert len(captured.pieces) == 4 and captured.offload.stats.misses == 0
    for seed in range(12):
        captured.check(seed)
    assert captured.offload.stats.misses > 0
    assert (captured.offload.stats.prefetched > 0) == prefetch


def test_models_take_turns():
    first, second = Captured(seed=0), Captured(seed=1)
    for seed in range(6):
        first.check(seed)
        second.check(seed)


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["count", "place", "fetch", "_copy", "prefetch", "release", "replay"])
def test_an_interrupt_between_pieces_spoils_no_later_pass(method, monkeypatch):
    """In the second block: the first has run, and slots of the second may be given away but not filled."""
    captured = Captured(prefetch=method == "prefetch")
    captured.check(0)
    owner = captured.pieces._graphs[2] if method == "replay" else captured.cache
    calls_before = 0 if method == "replay" else 1
    for seed in range(1, 12):
        steps = iter([getattr(owner, method)] * calls_before + [_interrupt])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, method, lambda *args, steps=steps: next(steps)(*args))
            captured.check(seed)
        captured.check(seed)
    free = []
    thread = threading.Thread(target=lambda: free.append(captured.cache.lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert free == [True]


@pytest.mark.parametrize("again", [False, True], ids=["removed", "offloaded again"])
def test_a_removed_offload_is_named(again):
    """The pieces hold the slots of the old one."""
    captured = Captured()
    captured.check(0)
    captured.offload.remove()
    if again:
        offload(captured.model)
    with pytest.raises(RuntimeError, match=r"removed while `generate` read them; call `remove\(\)` after"):
        captured.check(1)
    if again:
        captured.capture()
        captured.check(1)


def test_threads_replay_pieces_of_their_own():
    """A layer of one gives the slots of another away only when that one has used them."""
    captured = Captured()
    failures = []

    def run(seeds):
        own = copy.copy(captured)
        try:
            with torch.no_grad():
                own.capture()
                for seed in 20 * seeds:
                    own.check(seed)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=([start, start + 1, start + 2],)) for start in (0, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_too_few_slots_end_the_capture():
    with pytest.raises(NotImplementedError, match="may have too few slots"):
        Captured(experts_on_device=3 / 24)
    captured = Captured(experts_on_device=4 / 24)
    for seed in range(12):
        captured.check(seed)
