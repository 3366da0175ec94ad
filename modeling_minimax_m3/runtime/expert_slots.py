"""Which experts are on the device: a fixed number of slots for all layers, filled by how often experts are chosen.

L is the number of layers with experts, E of experts of a layer, S of slots. Nothing here holds a weight.
"""

from collections.abc import Collection, Iterable

import numpy as np

# How much a choice counts one token of its layer later, so about 100 tokens decide what stays.
DECAY = 0.99
_MOST_TOKENS = 4096  # of a pass that count; DECAY ** 4096 is still a float
_LARGEST_UNIT = 1e100


class ExpertSlots:
    """Slots, and a score for each expert: its choices, each counted less the longer ago it was (LFU with ageing).

    The expert with the lowest score gives up its slot. So the experts of a long prompt, which all pass through the
    slots, push out no expert that is chosen more often.

    Args:
        num_layers (int): L.
        num_experts (int): E.
        num_slots (int): S.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int):
        self.num_slots = num_slots
        self._num_experts = num_experts
        self._slot_of = np.full((num_layers, num_experts), -1)
        self._owner = np.full(num_slots, -1)  # layer * E + expert
        self._scores = np.zeros((num_layers, num_experts))
        self._units = np.ones(num_layers)  # what a choice counts now: scores do not decay, later choices count more

    def count(self, layer: int, counts: dict[int, int], num_tokens: int) -> None:
        """Counts the choices of a pass: `counts` of each expert, by `num_tokens` tokens."""
        kept = DECAY ** min(num_tokens, _MOST_TOKENS)
        self._units[layer] /= kept
        unit = self._units[layer] * (1 - kept) / (1 - DECAY)
        for expert, count in counts.items():
            self._scores[layer, expert] += unit * count / num_tokens
        if self._units[layer] > _LARGEST_UNIT:
            self._scores[layer] /= self._units[layer]
            self._units[layer] = 1.0

    def has(self, layer: int, expert: int) -> bool:
        """Whether the expert has a slot."""
        return bool(self._slot_of[layer, expert] >= 0)

    def place(
        self, layer: int, experts: Collection[int], kept: Iterable[int] = ()
    ) -> tuple[dict[int, int], list[int]]:
        """Gives each expert a slot.

        Args:
            layer (int): Of the experts.
            experts (collection of int): Distinct. Together with `kept` they are at most S.
            kept (iterable of int): Slots that keep their experts.

        Returns:
            The slot of each expert, and those experts whose slot is new.
        """
        slots = {expert: int(self._slot_of[layer, expert]) for expert in experts}
        missing = [expert for expert, slot in slots.items() if slot < 0]
        if missing:
            scores = (self._scores / self._units[:, None]).ravel()[self._owner]
            scores[self._owner < 0] = -1.0  # an empty slot goes first
            scores[[*kept, *(slot for slot in slots.values() if slot >= 0)]] = np.inf
            for expert, slot in zip(missing, np.argsort(scores, kind="stable").tolist()):
                if scores[slot] == np.inf:
                    raise RuntimeError(
                        f"{len(slots)} experts and the slots that are kept exceed {self.num_slots} slots"
                    )
                if self._owner[slot] >= 0:
                    self._slot_of.flat[self._owner[slot]] = -1
                self._owner[slot] = layer * self._num_experts + expert
                self._slot_of[layer, expert] = slots[expert] = slot
        return slots, missing

    def forget(self, layer: int, experts: Iterable[int]) -> None:
        """Empties the slots of experts, if they have any."""
        for expert in experts:
            slot = self._slot_of[layer, expert]
            if slot >= 0:
                self._owner[slot] = self._slot_of[layer, expert] = -1
