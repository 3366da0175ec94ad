"""Which experts keep their slots: the policy alone, without weights."""

import numpy as np
import pytest

from modeling_minimax_m3.runtime import expert_slots
from modeling_minimax_m3.runtime.expert_slots import ExpertSlots


def choose(slots: ExpertSlots, layer: int, *experts: int) -> list[int]:
    """One token's choice; returns what was missing."""
    slots.count(layer, dict.fromkeys(experts, 1), num_tokens=1)
    return slots.place(layer, experts)[1]


def test_every_expert_has_a_slot_of_its_own():
    slots, generator = ExpertSlots(num_layers=3, num_experts=8, num_slots=7), np.random.default_rng(0)
    held: dict[tuple[int, int], int] = {}  # expert of a layer -> slot, as the answers say
    for step in range(500):
        layer, experts = step % 3, generator.choice(8, 3, replace=False).tolist()
        slots.count(layer, dict.fromkeys(experts, 1), num_tokens=1)
        placed, missing = slots.place(layer, experts)
        assert set(placed) == set(experts)
        for expert in experts:
            assert (expert not in missing) == (held.get((layer, expert)) == placed[expert])
            held = {key: slot for key, slot in held.items() if slot != placed[expert]}
            held[layer, expert] = placed[expert]
            assert slots.has(layer, expert)
        assert len(held) <= 7
        assert all(slots.has(*key) for key in held)
    assert len(held) == 7


def test_experts_chosen_often_stay():
    slots = ExpertSlots(num_layers=1, num_experts=10, num_slots=3)
    for other in [2, 3, 4, 5] * 5:
        choose(slots, 0, 0, other)
    assert slots.has(0, 0)
    assert choose(slots, 0, 0, 1) == [1]


def test_empty_slots_are_filled_first():
    slots = ExpertSlots(num_layers=1, num_experts=4, num_slots=2)
    choose(slots, 0, 3)
    choose(slots, 0, 0)
    assert slots.has(0, 3) and slots.has(0, 0)


def test_old_choices_count_less():
    slots = ExpertSlots(num_layers=1, num_experts=4, num_slots=2)
    for _ in range(20):
        choose(slots, 0, 0)
    for _ in range(1000):
        choose(slots, 0, 1)
    choose(slots, 0, 2)
    assert [slots.has(0, expert) for expert in range(3)] == [False, True, True]


def test_a_pass_of_many_tokens_counts_as_that_many():
    one_by_one, at_once = (ExpertSlots(num_layers=1, num_experts=4, num_slots=2) for _ in range(2))
    for _ in range(30):
        one_by_one.count(0, {1: 1}, 1)
    at_once.count(0, {1: 30}, 30)
    np.testing.assert_allclose(at_once._scores / at_once._units, one_by_one._scores / one_by_one._units)


def test_scores_of_a_long_run_stay_finite():
    slots = ExpertSlots(num_layers=1, num_experts=4, num_slots=2)
    for step in range(60_000):
        slots.count(0, {step % 3: 1}, 1)
    slots.count(0, {1: 10**6}, 10**6)
    assert np.isfinite(slots._scores).all()
    assert (slots._units < 1e200).all()
    assert slots._scores[0].argmax() == 1


def test_slots_that_are_kept_are_not_taken():
    slots = ExpertSlots(num_layers=1, num_experts=8, num_slots=4)
    kept, _ = slots.place(0, [0, 1])
    for expert in range(2, 8):
        placed, _ = slots.place(0, [expert], kept.values())
        assert placed[expert] not in kept.values()
    assert slots.has(0, 0) and slots.has(0, 1)
    with pytest.raises(RuntimeError, match="exceed 4 slots"):
        slots.place(0, [4, 5, 6, 7], kept.values())


def test_the_policy_keeps_more_than_the_latest(monkeypatch):
    """On skewed choices it hits more often than with a decay so strong that only the order of use is left."""
    generator, popularity = np.random.default_rng(0), -np.log(np.arange(1, 65))
    trace = (popularity + generator.gumbel(size=(1500, 64))).argsort(-1)[:, -4:]

    def misses(decay: float) -> int:
        monkeypatch.setattr(expert_slots, "DECAY", decay)
        slots = ExpertSlots(num_layers=1, num_experts=64, num_slots=16)
        return sum(len(choose(slots, 0, *row)) for row in trace.tolist())

    assert misses(0.99) < 0.85 * misses(0.5)
