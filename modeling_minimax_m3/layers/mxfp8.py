"""Linear layers and experts whose weights stay in MXFP8, as they are released.

A weight has two parameters: the E4M3 values under its usual name, and the scales under that name with `_scale_inv`.
Neither is trained or cast. What a pass needs is dequantized for it (`fused.mxfp8_products`).

E is the number of experts, K of experts per token, F an intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor
from transformers.utils import is_torchdynamo_compiling

from ..fused import experts as many_tokens
from ..fused import mxfp8_products
from ..fused.few_tokens import MAX_TOKENS
from ..mxfp8 import GROUP_SIZE, SCALE_DTYPE, VALUE_DTYPE
from .moe import MiniMaxM3VLExperts
from .mxfp8_weight import Mxfp8Weight

SCALE_SUFFIX = "_scale_inv"


class Mxfp8Module(nn.Module):
    """What both have in common: parameters that keep their dtypes, and weights that others see as numbers.

    Attributes:
        compute_dtype (`torch.dtype`): Dtype of the products, that in which the model was loaded.
        shows_numbers (`bool`): Whether `module.weight` is an `Mxfp8Weight`, as adapters need it. While the model is
            loaded, and where Accelerate moves weights between host and device, it is the stored tensor.
    """

    weight_names: tuple[str, ...] = ()
    shows_numbers = False

    def __init__(self, compute_dtype: torch.dtype):
        nn.Module.__init__(self)  # not that of a subclass's other base, which would make plain weights
        self.compute_dtype = compute_dtype
        # Tensor parallelism has to hand over local tensors: the products take no DTensor.
        self._hf_quantized_needs_local_tp = True

    def _register_weight(self, name: str, *shape: int) -> None:
        values = torch.empty(shape, dtype=VALUE_DTYPE)
        scales = torch.empty((*shape[:-1], shape[-1] // GROUP_SIZE), dtype=SCALE_DTYPE)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.register_parameter(name + SCALE_SUFFIX, nn.Parameter(scales, requires_grad=False))

    def stored(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales of a weight."""
        values, scales = self._parameters[name], self._parameters[name + SCALE_SUFFIX]
        assert values is not None and scales is not None
        return _as_values(values), scales

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        if name in self.weight_names and self.shows_numbers and not is_dtensor(found):
            return Mxfp8Weight(*self.stored(name), self.compute_dtype, parameter=found)
        return found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # PEFT takes a weight away while an adapted layer runs, and puts back what it has seen.
        super().register_parameter(name, param.parameter if isinstance(param, Mxfp8Weight) else param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Moves parameters. Casts see bytes, which they leave alone."""

        def on_bytes(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype != VALUE_DTYPE:
                return fn(tensor)
            return fn(tensor.view(torch.uint8)).view(VALUE_DTYPE)

        return super()._apply(on_bytes, recurse)


def _as_values(tensor: torch.Tensor) -> torch.Tensor:
    """Undoes the cast of FSDP2, whose mixed precision casts all floating-point parameters. It changes no value."""
    return tensor if tensor.dtype == VALUE_DTYPE else tensor.detach().to(VALUE_DTYPE)


class Mxfp8Linear(Mxfp8Module, nn.Linear):
    """A linear layer whose weight is in MXFP8. Its result has the dtype of its input.

    Args:
        in_features (`int`): A multiple of 32.
        out_features (`int`): Width of the result.
        bias (`bool`): Whether there is a bias, which is not quantized.
        compute_dtype (`torch.dtype`): Dtype of the product.
    """

    weight_names = ("weight",)

    def __init__(self, in_features: int, out_features: int, bias: bool, compute_dtype: torch.dtype):
        Mxfp8Module.__init__(self, compute_dtype)
        self.in_features, self.out_features = in_features, out_features
        self._register_weight("weight", out_features, in_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=compute_dtype)) if bias else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = mxfp8_products.linear(input.to(self.compute_dtype), *self.stored("weight"))
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(input.dtype)


class Mxfp8Experts(Mxfp8Module, MiniMaxM3VLExperts):
    """Routed experts whose weights are in MXFP8.

    Many tokens are sorted by expert, and meet the experts that have tokens in groups of
    `mxfp8_products.DEQUANTIZED_BYTES`. For a few tokens on a GPU, each pair of a token and an expert gets the weight of
    that expert, because this never waits for the GPU, as a CUDA graph requires. With `batched_mm`, which `generate`
    names for decoding, a CPU does the same.

    Args:
        experts (`MiniMaxM3VLExperts`): The experts that these replace. Their weights are not read.
        compute_dtype (`torch.dtype`): Dtype of the products.
    """

    weight_names = ("gate_up_proj", "down_proj")

    def __init__(self, experts: MiniMaxM3VLExperts, compute_dtype: torch.dtype):
        Mxfp8Module.__init__(self, compute_dtype)
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
        product: Callable[[torch.Tensor, str, many_tokens.ExpertOrder], torch.Tensor],
    ) -> torch.Tensor:
        order = many_tokens.plan(top_k_index, self.num_experts)
        states = many_tokens.permute(tokens, order)
        states = self._apply_gate(product(states, "gate_up_proj", order))
        states = product(states, "down_proj", order)
        return many_tokens.unpermute(states, top_k_weights.float(), 1.0, order)

    def _product(self, states: torch.Tensor, name: str, order: many_tokens.ExpertOrder) -> torch.Tensor:
        return mxfp8_products.grouped_product(states, *self.stored(name), order.offsets)

    def _product_with_adapters(self, states: torch.Tensor, name: str, order: many_tokens.ExpertOrder) -> torch.Tensor:
        weight = getattr(self, name) if nn.utils.parametrize.is_parametrized(self, name) else None
        if weight is None:
            return self._product(states, name, order)
        if not isinstance(weight, Mxfp8Weight):
            if not self.shows_numbers:
                raise NotImplementedError(
                    f"`target_parameters` must not name {name}: its experts are in MXFP8 and their weights are moved "
                    "between host and device by Accelerate. Keep them on their devices, or load them dequantized."
                )
            return many_tokens.grouped_product(states, weight, order)
        product = mxfp8_products.grouped_product(states, weight.mxfp8_values, weight.mxfp8_scales, order.offsets)
        for left, right, factor in weight.updates:
            # Grouped products read contiguous tensors 16 bytes at a time, so the rank is padded to a multiple of 8.
            padding = -left.shape[-1] % 8
            left = nn.functional.pad(left, (0, padding)).contiguous()
            right = nn.functional.pad(right, (0, 0, 0, padding)).contiguous()
            update = many_tokens.grouped_product(many_tokens.grouped_product(states, right, order), left, order)
            product = torch.add(product, update, alpha=factor)
        return product

    def _paired(self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        choices = top_k_index.shape[1]
        ids = top_k_index.flatten()
        states = tokens.repeat_interleave(choices, dim=0)
        known = ids.clamp(0, self.num_experts - 1)  # expert parallelism marks pairs of other ranks by other ids
        states = self._apply_gate(mxfp8_products.paired_product(states, *self.stored("gate_up_proj"), known))
        states = mxfp8_products.paired_product(states, *self.stored("down_proj"), known)
        weights = top_k_weights.flatten().masked_fill(ids != known, 0)
        return (states * weights[:, None]).unflatten(0, (-1, choices)).sum(1).to(tokens.dtype)

    def _one_by_one(
        self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the eager path of the base class, which multiplies and rounds in this order."""
        output = torch.zeros_like(tokens)
        gate_up, down = self.stored("gate_up_proj"), self.stored("down_proj")
        chosen = [expert for expert in torch.unique(top_k_index).tolist() if expert < self.num_experts]
        for expert in chosen or [0]:
            token, choice = torch.nonzero(top_k_index == expert, as_tuple=True)
            states = mxfp8_products.linear(tokens[token], *(tensor[expert] for tensor in gate_up))
            states = mxfp8_products.linear(self._apply_gate(states), *(tensor[expert] for tensor in down))
            weighted = states * top_k_weights[token, choice, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output
