"""Sparse blocks whose experts stay on the host, and are copied into slots on the device when tokens choose them.

Few tokens are multiplied by all their experts at once, in a kernel that reads the slots. Many tokens are multiplied by
one expert after the other.

The classes here replace those of blocks and experts in place, so parameters keep their names, and are saved as usual.

E is the number of experts, K of experts per token, S of slots.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..fused import experts as many_tokens
from ..fused import few_tokens, quantized_products
from ..fused.support import is_watched
from ..fused.weight_formats import MXFP8, StoredWeight
from ..mxfp8 import Mxfp8Tensors, is_ordinary
from ..runtime.expert_cache import ExpertCache
from ..runtime.graph_pieces import current_capture
from .moe import MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock, MiniMaxM3VLTopKRouter
from .mxfp8 import SCALE_SUFFIX, Mxfp8Experts

_WEIGHT_NAMES = ("gate_up_proj", "down_proj")


class HostExperts(MiniMaxM3VLExperts):
    """Experts whose weights are plain tensors on the host.

    Attributes:
        expert_cache (`ExpertCache`): Shared by all layers.
        layer (`int`): The number of this layer in it.
    """

    expert_cache: ExpertCache
    layer: int

    def _apply(self, fn, recurse=True):
        """Moves and casts nothing: the weights stay where they are when the model moves."""
        return self

    @torch.compiler.disable
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, with arguments and result as in `MiniMaxM3VLExperts`.

        Every chosen expert passes through a slot, and is multiplied by the rows of its tokens meanwhile.
        """
        check_call(self, hidden_states, top_k_weights)
        if current_capture() is not None:
            raise NotImplementedError("no graph can hold experts that pass through slots one after the other")
        order = many_tokens.plan(top_k_index, self.num_experts)
        ends = order.offsets.tolist()
        rows = {expert: slice(start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends)) if end > start}
        token_of_row = order.rows.flatten().argsort() // top_k_index.shape[1]
        outputs = hidden_states.new_empty((len(token_of_row), hidden_states.shape[1]))
        cache = self.expert_cache
        with cache.lock:
            counts = {expert: part.stop - part.start for expert, part in rows.items()}
            cache.count(self.layer, counts, max(1, len(hidden_states)))
            for expert, slot in cache.each(self.layer, rows):
                states = hidden_states[token_of_row[rows[expert]]]
                outputs[rows[expert]] = self._of_one(states, slot)
        return many_tokens.unpermute(outputs, top_k_weights.float(), 1.0, order)

    def counts_of(self, choices: list[list[int]]) -> dict[int, int]:
        """How many tokens chose each expert, of those that this layer has."""
        return Counter(expert for row in choices for expert in row if 0 <= expert < self.num_experts)

    def slot_weights(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        """Both weights (S, ...) for the kernels of few tokens; None where these must not read them."""
        slots = self.expert_cache.slots
        return slots["gate_up_proj"], slots["down_proj"]

    def _of_one(self, states: torch.Tensor, slot: int) -> torch.Tensor:
        """Outputs (rows, hidden) of the expert in a slot."""
        gate_up, down = (self.expert_cache.slots[name][slot] for name in _WEIGHT_NAMES)
        return F.linear(self._apply_gate(F.linear(states, gate_up)), down)


class HostMxfp8Experts(HostExperts, Mxfp8Experts):
    """Experts whose weights are in MXFP8 on the host, and in the slots.

    Attributes:
        are_ordinary (`bool`): Whether the kernels of few tokens may read all of them.
    """

    are_ordinary: bool

    def slot_weights(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        return self._slot_tensors() if self.are_ordinary else None

    def _slot_tensors(self) -> tuple[Mxfp8Tensors, Mxfp8Tensors]:
        slots = self.expert_cache.slots
        gate_up, down = (Mxfp8Tensors(slots[name], slots[name + SCALE_SUFFIX]) for name in _WEIGHT_NAMES)
        return gate_up, down

    def _of_one(self, states: torch.Tensor, slot: int) -> torch.Tensor:
        gate_up, down = (StoredWeight(MXFP8, weight).of_expert(slot) for weight in self._slot_tensors())
        return quantized_products.linear(self._apply_gate(quantized_products.linear(states, gate_up)), down)


_ON_HOST = {MiniMaxM3VLExperts: HostExperts, Mxfp8Experts: HostMxfp8Experts}


def check_call(experts: HostExperts, tokens: torch.Tensor, expert_weights: torch.Tensor) -> None:
    """Whether offloaded experts can take these tokens.

    Raises:
        NotImplementedError: A gradient is to be recorded, or adapters change the weights.
        ValueError: The tokens are on another device than the slots, or in another dtype than the experts.
    """
    cache = experts.expert_cache
    if nn.utils.parametrize.is_parametrized(experts):
        raise NotImplementedError(
            "adapters on experts (`target_parameters`) do not reach experts that are offloaded to the host. Call "
            "`remove()` of the offload, or merge the adapters before `offload_experts`."
        )
    if torch.is_grad_enabled() and (tokens.requires_grad or expert_weights.requires_grad):
        raise NotImplementedError(
            "no gradient passes experts that are offloaded to the host. Call the model under `torch.no_grad()`, or call "
            "`remove()` of the offload first."
        )
    if tokens.device != cache.device:
        raise ValueError(
            f"the experts are offloaded from {cache.device}, but the tokens are on {tokens.device}. Move the model back, "
            "or call `remove()` of the offload and offload it for the other device."
        )
    dtype = getattr(experts, "compute_dtype", cache.slots["gate_up_proj"].dtype)
    if tokens.dtype != dtype:
        raise ValueError(
            f"the experts were offloaded for {dtype}, but the tokens are in {tokens.dtype}. Cast the model before "
            "`offload_experts`."
        )


class HostSparseMoeBlock(MiniMaxM3VLSparseMoeBlock):
    """A sparse block whose experts are on the host.

    Attributes:
        next_block (`list`): The next such block if experts are prefetched for it, else empty. In a list, because it is
            no submodule.
    """

    experts: HostExperts
    next_block: list["HostSparseMoeBlock"]

    @torch.compiler.disable
    def _combine(self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        weights = self._weights_of_few_tokens(tokens, top_k_index, top_k_weights)
        if weights is None:
            return super()._combine(tokens, top_k_index, top_k_weights)
        experts, cache = self.experts, self.experts.expert_cache
        check_call(experts, tokens, top_k_weights)
        ids = top_k_index
        if self.next_block:
            ids = torch.cat([top_k_index, self.next_block[0].predicted(tokens)])
        slot_ids = torch.empty_like(top_k_index)
        pieces = current_capture()
        if pieces is not None:
            if top_k_index.numel() > cache.num_slots:
                raise NotImplementedError("no graph can hold experts of one pass that may have too few slots")
            in_slots = self._in_slots  # found now, as `take_from_host` changes the class
            pieces.add_host_step(lambda: in_slots(cache, ids.tolist(), slot_ids))
            return self._of_slots(weights, tokens, slot_ids, top_k_weights)
        choices = ids.tolist()  # the one time that the host waits for the GPU
        if len(experts.counts_of(choices[: len(tokens)])) > cache.num_slots:
            return super()._combine(tokens, top_k_index, top_k_weights)
        with self._in_slots(cache, choices, slot_ids):
            return self._of_slots(weights, tokens, slot_ids, top_k_weights)

    @contextmanager
    def _in_slots(self, cache: ExpertCache, choices: list[list[int]], slot_ids: torch.Tensor) -> Iterator[None]:
        """What is queued in this context finds the chosen experts in slots.

        Args:
            cache (`ExpertCache`): Whose slots it reads.
            choices (list of list of int): The K experts of each token, then those that it may choose in the next block.
            slot_ids ((tokens, K)): Gets the slots of the chosen experts; -1 for experts that this layer does not have.

        Raises:
            RuntimeError: The offload to which `cache` belongs was removed.
        """
        experts = self.experts
        if vars(experts).get("expert_cache") is not cache:
            raise RuntimeError(
                "the offload of these experts was removed while `generate` read them; call `remove()` after `generate`"
            )
        choices, predicted = choices[: len(slot_ids)], choices[len(slot_ids) :]
        counts = experts.counts_of(choices)
        with cache.lock:
            cache.count(experts.layer, counts, len(choices))
            placement = cache.place(experts.layer, counts)
            slots = placement.slots
            # Before the copies of experts: the host waits until this small copy is done, and after `fetch` the stream
            # would make it wait for the experts.
            slot_ids.copy_(torch.tensor([[slots.get(expert, -1) for expert in row] for row in choices]))
            cache.fetch(placement)
            if predicted:
                wanted = dict.fromkeys(expert for row in predicted for expert in row)
                cache.prefetch(self.next_block[0].experts.layer, wanted, slots.values())
            yield
            cache.release(slots.values())

    def _of_slots(
        self,
        weights: tuple[few_tokens.Weight, ...],
        tokens: torch.Tensor,
        slot_ids: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        gate_up, down, expert_gate_up, expert_down = weights
        return few_tokens.mlp(
            tokens,
            gate_up,
            down,
            self.experts.swiglu_alpha,
            self.experts.swiglu_limit,
            expert_gate_up,
            expert_down,
            slot_ids,
            top_k_weights,
            float(self.routed_scaling_factor),
        )

    def predicted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Expert ids (tokens, K) that this block would choose for the inputs of the block before it."""
        return MiniMaxM3VLTopKRouter.forward(self.gate, tokens)[2]  # not called: hooks record the router's outputs

    def _weights_of_few_tokens(
        self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[few_tokens.Weight, ...] | None:
        """Weights of the shared expert and of all slots, where the kernels of few tokens take the call."""
        if type(self.experts) not in _ON_HOST.values():
            return None  # adapters around them, which the experts refuse
        shared, routed = self._weights_of_shared_expert(), self.experts.slot_weights()
        if shared is None or routed is None or is_watched(self.experts):
            return None
        if self._experts_implementation not in (None, "grouped_mm", "batched_mm"):
            return None  # any other name is a user's choice
        weights = (*shared, *routed)
        return weights if few_tokens.takes_mlp(tokens, weights, top_k_index, top_k_weights) else None


def expert_weights(experts: MiniMaxM3VLExperts) -> dict[str, nn.Parameter]:
    """The parameters of experts by name, of both weights and their scales."""
    return {name: parameter for name, parameter in experts._parameters.items() if parameter is not None}


def can_be_offloaded(block: MiniMaxM3VLSparseMoeBlock) -> bool:
    """Whether block and experts are of the classes that have a twin here, and nothing watches them."""
    is_known = type(block) is MiniMaxM3VLSparseMoeBlock and type(block.experts) in _ON_HOST
    modules = (block, block.experts)
    # Another class cannot take the place of one whose forward Accelerate has bound.
    return is_known and not any(is_watched(module) or "forward" in vars(module) for module in modules)


def put_on_host(
    block: MiniMaxM3VLSparseMoeBlock, cache: ExpertCache, layer: int, next_block: list[MiniMaxM3VLSparseMoeBlock]
) -> None:
    """Makes a block read its experts from `cache`. It may already hold their weights under this number."""
    experts: Any = block.experts
    kind = type(experts)
    if kind is Mxfp8Experts:
        experts.are_ordinary = all(is_ordinary(experts.stored(name)) for name in experts.weight_names)
    experts.expert_cache, experts.layer = cache, layer
    experts.__class__ = _ON_HOST[kind]
    vars(block)["next_block"] = next_block
    block.__class__ = HostSparseMoeBlock


def take_from_host(block: MiniMaxM3VLSparseMoeBlock) -> None:
    """Undoes `put_on_host`. The weights stay on the host."""
    experts: Any = block.experts
    experts.__class__ = {on_host: plain for plain, on_host in _ON_HOST.items()}[type(experts)]
    for name in ("expert_cache", "layer", "are_ordinary"):
        experts.__dict__.pop(name, None)
    block.__dict__.pop("next_block", None)
    block.__class__ = MiniMaxM3VLSparseMoeBlock
