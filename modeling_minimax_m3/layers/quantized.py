"""Routed experts, and what other layers share with them, whose weights stay in a format of fewer bits.

A weight has several parameters: the packed values under its usual name, and what belongs to them under that name with a
suffix. None is trained or cast. What a pass needs is dequantized for it (`fused.quantized_products`).

E is the number of experts, K of experts per token, F an intermediate size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor
from transformers.utils import is_torchdynamo_compiling

from ..fused import experts as many_tokens
from ..fused import quantized_products
from ..fused.few_tokens import MAX_TOKENS
from ..fused.weight_formats import StoredWeight, WeightFormat
from .expert_adapters import add_updates
from .moe import MiniMaxM3VLExperts
from .quantized_weight import QuantizedWeight


class QuantizedModule(nn.Module):
    """Parameters that keep their dtypes, and weights that others see as numbers.

    Attributes:
        weight_format (`WeightFormat`): How the weights are stored.
        compute_dtype (`torch.dtype`): Dtype of the products.
        shows_numbers (`bool`): Whether `module.weight` is a `QuantizedWeight`, as adapters need it. While the model is
            loaded, and where Accelerate moves weights between host and device, it is the stored tensor.
        shows_shards (`bool`): Whether it is a `QuantizedWeight` too while FSDP2 has it in shards. FSDP2 itself reads the
            stored tensors, so this is true within `numbers_of_shards` alone.
    """

    weight_names: tuple[str, ...] = ()
    shows_numbers = False
    shows_shards = False

    def __init__(self, weight_format: WeightFormat, compute_dtype: torch.dtype):
        nn.Module.__init__(self)  # not that of a subclass's other base, which would make plain weights
        self.weight_format = weight_format
        self.compute_dtype = compute_dtype
        # Tensor parallelism has to hand over local tensors: the products take no DTensor.
        self._hf_quantized_needs_local_tp = True

    def _register_weight(self, name: str, *shape: int) -> None:
        for suffix, tensor in zip(self.weight_format.suffixes, self.weight_format.empty(shape), strict=True):
            self.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))

    def stored_names(self) -> list[str]:
        """The names of all tensors of the weights."""
        return [name + suffix for name in self.weight_names for suffix in self.weight_format.suffixes]

    def stored_weight(self, name: str) -> StoredWeight:
        """A weight as it is stored."""
        tensors: list[Any] = [self._parameters[name + suffix] for suffix in self.weight_format.suffixes]
        return StoredWeight(self.weight_format, self.weight_format.restored(tensors))

    def finish_loading(self) -> None:
        """Freeze the stored tensors, and show numbers where the weights stay on their device."""
        for parameter in (self._parameters[name] for name in self.stored_names()):
            assert parameter is not None
            parameter.requires_grad_(False)  # Transformers makes every floating-point parameter trainable
        # Accelerate keeps weights that it moves on "meta" between calls.
        self.shows_numbers = not any(parameter.is_meta for parameter in self.parameters(recurse=False))

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        if name in self.weight_names and self.shows_numbers and (self.shows_shards or not is_dtensor(found)):
            return QuantizedWeight(self.stored_weight(name), self.compute_dtype, parameter=found)
        return found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # PEFT takes a weight away while an adapted layer runs, and puts back what it has seen.
        super().register_parameter(name, param.parameter if isinstance(param, QuantizedWeight) else param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Moves parameters, and leaves the dtypes of stored tensors alone. Casts of 8-bit values see bytes."""
        stored = {id(self._parameters.get(name)) for name in self.stored_names()}

        def keeping_dtypes(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in stored:
                return fn(tensor)
            if tensor.element_size() == 1:
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtypes, recurse)


@contextmanager
def numbers_of_shards(model: nn.Module) -> Iterator[None]:
    """While it lasts, weights in shards have the dtype of their products. PEFT rounds new adapters to a weight's dtype."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    for module in modules:
        module.shows_shards = True
    try:
        yield
    finally:
        for module in modules:
            module.shows_shards = False


def stored_names_of(model: nn.Module) -> set[str]:
    """The names in `model` of all tensors of quantized weights."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name in module.stored_names()
    }


class QuantizedExperts(QuantizedModule, MiniMaxM3VLExperts):
    """Routed experts whose weights stay in a format of fewer bits.

    Many tokens are sorted by expert, and meet the experts that have tokens in groups of
    `quantized_products.DEQUANTIZED_BYTES`. For a few tokens on a GPU, each pair of a token and an expert gets the weight
    of that expert, because this never waits for the GPU, as a CUDA graph requires. With `batched_mm`, which `generate`
    names for decoding, a CPU does the same.

    Args:
        experts (`MiniMaxM3VLExperts`): The experts that these replace. Their weights are not read.
        weight_format (`WeightFormat`): How the weights are stored.
        compute_dtype (`torch.dtype`): Dtype of the products.

    Raises:
        ValueError: The format has no weights of these shapes.
    """

    weight_names = ("gate_up_proj", "down_proj")
    weights_are_quantized = True

    def __init__(self, experts: MiniMaxM3VLExperts, weight_format: WeightFormat, compute_dtype: torch.dtype):
        QuantizedModule.__init__(self, weight_format, compute_dtype)
        for name, value in vars(experts).items():
            if name not in vars(self):  # sizes, constants, and what Transformers' decorator sets
                setattr(self, name, value)
        for name in self.weight_names:
            self._register_weight(name, *getattr(experts, name).shape)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, with arguments and result as in `MiniMaxM3VLExperts`."""
        tokens = hidden_states.to(self.compute_dtype)
        if self._has_adapters():
            routed = self._grouped(tokens, top_k_index, top_k_weights, self._product_with_adapters)
        elif self.config._experts_implementation == "eager":
            routed = self._one_by_one(tokens, top_k_index, top_k_weights)
        elif self._runs_pairs(tokens):
            routed = self._paired(tokens, top_k_index, top_k_weights)
        else:
            routed = self._grouped(tokens, top_k_index, top_k_weights, self._product)
        return routed.to(hidden_states.dtype)

    def few_token_weights(self) -> Any:
        """None: the kernels for few tokens read no such weights."""
        return None

    def _has_adapters(self) -> bool:
        return nn.utils.parametrize.is_parametrized(self)

    def _runs_pairs(self, tokens: torch.Tensor) -> bool:
        if is_torchdynamo_compiling():
            return False  # no graph is guarded on the number of tokens
        if tokens.is_cuda:
            return len(tokens) <= MAX_TOKENS or torch.cuda.is_current_stream_capturing()
        return self.config._experts_implementation == "batched_mm"

    def _grouped(
        self,
        tokens: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        product: Callable[[torch.Tensor, str, many_tokens.ExpertOrder, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        order = many_tokens.plan(top_k_index, self.num_experts)
        ends = order.offsets.cpu()
        states = many_tokens.permute(tokens, order)
        states = self._apply_gate(product(states, "gate_up_proj", order, ends))
        states = product(states, "down_proj", order, ends)
        return many_tokens.unpermute(states, top_k_weights.float(), 1.0, order)

    def _product(
        self, states: torch.Tensor, name: str, order: many_tokens.ExpertOrder, ends: torch.Tensor
    ) -> torch.Tensor:
        return quantized_products.grouped_product(states, self.stored_weight(name), ends)

    def _product_with_adapters(
        self, states: torch.Tensor, name: str, order: many_tokens.ExpertOrder, ends: torch.Tensor
    ) -> torch.Tensor:
        weight = getattr(self, name) if nn.utils.parametrize.is_parametrized(self, name) else None
        if weight is None:
            return self._product(states, name, order, ends)
        if not isinstance(weight, QuantizedWeight):
            if not self.shows_numbers:
                raise NotImplementedError(
                    f"`target_parameters` must not name {name}: its experts are in {self.weight_format.label} and their weights "
                    "are moved between host and device by Accelerate. Keep them on their devices, or load them dequantized."
                )
            return many_tokens.grouped_product(states, weight, order)
        product = quantized_products.grouped_product(states, weight.stored, ends)
        return add_updates(
            product, weight.updates, order, lambda other: many_tokens.grouped_product(states, other, order)
        )

    def _paired(self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        choices = top_k_index.shape[1]
        ids = top_k_index.flatten()
        states = tokens.repeat_interleave(choices, dim=0)
        known = ids.clamp(0, self.num_experts - 1)  # expert parallelism marks pairs of other ranks by other ids
        states = self._apply_gate(quantized_products.paired_product(states, self.stored_weight("gate_up_proj"), known))
        states = quantized_products.paired_product(states, self.stored_weight("down_proj"), known)
        weights = top_k_weights.flatten().masked_fill(ids != known, 0)
        return (states * weights[:, None]).unflatten(0, (-1, choices)).sum(1).to(tokens.dtype)

    def _one_by_one(
        self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the eager path of the base class, which multiplies and rounds in this order."""
        output = torch.zeros_like(tokens)
        gate_up, down = self.stored_weight("gate_up_proj"), self.stored_weight("down_proj")
        chosen = [expert for expert in torch.unique(top_k_index).tolist() if expert < self.num_experts]
        for expert in chosen or [0]:
            token, choice = torch.nonzero(top_k_index == expert, as_tuple=True)
            states = quantized_products.linear(tokens[token], gate_up.of_expert(expert))
            states = quantized_products.linear(self._apply_gate(states), down.of_expert(expert))
            weighted = states * top_k_weights[token, choice, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output
