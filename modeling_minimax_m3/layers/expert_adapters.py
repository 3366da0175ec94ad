"""Low-rank adapters on the routed experts, whose updates are multiplied apart from the experts' weights.

While a module runs, PEFT turns an adapter on its parameter (`target_parameters`) into a parametrization. Code that
reads the parameter then gets the sum of all experts' weights and updates: a second copy of the weights, and in training
a gradient as large. The code here reads the weights and the two small factors of the update instead, and adds products.

E is the number of experts, K of experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor
from transformers.utils import is_torchdynamo_compiling

from ..fused import experts as many_tokens

Update = tuple[torch.Tensor, torch.Tensor, float]  # left (E, rows, rank), right (E, rank, columns), factor
Experts = TypeVar("Experts", bound=type[nn.Module])

# Grouped products read contiguous tensors 16 bytes at a time.
_ALIGNMENT = 16
_RANK_MULTIPLE = _WEIGHT_MULTIPLE = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _AdaptedWeight:
    """What a parametrization is given in place of a weight: it notes the updates that `torch.baddbmm` adds.

    Beside that, a parametrization may ask for its dtype and its device. Anything else raises `TypeError`.
    """

    def __init__(self, weight: torch.Tensor, updates: tuple[Update, ...] = ()):
        self.weight, self.updates = weight, updates
        self.dtype, self.device = weight.dtype, weight.device

    def __getattr__(self, name: str) -> Any:
        # A method of the weight would return a tensor, which notes nothing.
        raise TypeError(f"a weight whose updates are noted has no {name}")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.baddbmm or not set(kwargs) <= {"alpha"} or type(args[0]) is not cls:
            return NotImplemented
        weight, left, right = args
        return cls(weight.weight, (*weight.updates, (left, right, kwargs.get("alpha", 1.0))))


def adapted_weight(experts: nn.Module, name: str) -> tuple[torch.Tensor, tuple[Update, ...]] | None:
    """A weight of the experts and its updates; None where a parametrization does more than add low-rank updates."""
    if not nn.utils.parametrize.is_parametrized(experts, name):
        return getattr(experts, name), ()
    parametrizations: Any = getattr(experts.parametrizations, name)
    if not parametrizations.is_tensor:  # several tensors make the weight
        return None
    weight: Any = _AdaptedWeight(parametrizations.original)
    try:
        for parametrization in parametrizations:
            weight = parametrization(weight)
    except TypeError:
        return None
    return (weight.weight, weight.updates) if type(weight) is _AdaptedWeight else None


def add_updates(
    product: torch.Tensor,
    updates: Sequence[Update],
    order: many_tokens.ExpertOrder,
    times: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The product of rows with their experts' weights and updates, from that with the weights.

    Args:
        product ((tokens * K, outputs)): The product with the weights.
        updates (sequence of `Update`): Those of the weights.
        order (`ExpertOrder`): The rows of pairs.
        times (callable): The product of the same rows with other weights, (E, outputs, channels).
    """
    for left, right, factor in updates:
        padding = -left.shape[-1] % _RANK_MULTIPLE
        left = nn.functional.pad(left, (0, padding)).contiguous()
        right = nn.functional.pad(right, (0, 0, 0, padding)).contiguous()
        product = torch.add(product, many_tokens.grouped_product(times(right), left, order), alpha=factor)
    return product


def multiplies_updates_apart(experts_class: Experts) -> Experts:
    """Class decorator of experts: their forward multiplies low-rank updates apart. Without updates it is unchanged."""
    forward: Any = experts_class.forward

    @wraps(forward)
    def with_updates(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = _weights_with_updates(self, hidden_states)
        if weights is None:
            return forward(self, hidden_states, top_k_index, top_k_weights)
        (gate_up, gate_up_updates), (down, down_updates) = weights
        order = many_tokens.plan(top_k_index, self.num_experts)
        tokens = hidden_states.to(gate_up.dtype)  # autocast may bring others, and changes no grouped product

        def of_tokens(weight: torch.Tensor) -> torch.Tensor:
            return many_tokens.gathered_product(tokens, weight, order)

        def of_rows(weight: torch.Tensor) -> torch.Tensor:
            return many_tokens.grouped_product(rows, weight, order)

        rows = self._apply_gate(add_updates(of_tokens(gate_up), gate_up_updates, order, of_tokens))
        out = add_updates(of_rows(down), down_updates, order, of_rows)
        return many_tokens.unpermute(out, top_k_weights.float(), 1.0, order).to(hidden_states.dtype)

    experts_class.forward = with_updates
    return experts_class


def _weights_with_updates(experts: Any, hidden_states: torch.Tensor) -> Any:
    """Both weights with their updates; None where there is no update, or where grouped products do not take a weight."""
    if not nn.utils.parametrize.is_parametrized(experts) or is_torchdynamo_compiling():
        return None
    if experts.config._experts_implementation not in (None, "grouped_mm", "batched_mm"):
        return None  # any other name is a user's choice
    device = hidden_states.device
    if not _has_grouped_products(device):
        return None
    found: list[tuple[torch.Tensor, tuple[Update, ...]]] = []
    for name in ("gate_up_proj", "down_proj"):
        adapted = adapted_weight(experts, name)
        if adapted is None:
            return None
        weight, _ = adapted
        if is_dtensor(weight) or weight.device != device or weight.dtype not in _DTYPES:
            return None
        if not weight.is_contiguous() or any(size % _WEIGHT_MULTIPLE for size in weight.shape[1:]):
            return None
        if weight.data_ptr() % _ALIGNMENT:  # as a checkpoint may be mapped into memory
            return None
        found.append(adapted)
    if found[0][0].dtype != found[1][0].dtype:
        return None
    return found


def _has_grouped_products(device: torch.device) -> bool:
    """Whether PyTorch's grouped products run on the device. Transformers computes them in a loop elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"
