"""Linear layers and experts whose weights stay in MXFP8, as they are released.

A weight has two parameters: the E4M3 values under its usual name, and the scales under that name with `_scale_inv`.
"""

import torch
from torch import nn

from ..fused import quantized_products
from ..fused.shards import local_part, runs_as_planned
from ..fused.weight_formats import MXFP8
from ..mxfp8 import Mxfp8Tensors
from .moe import MiniMaxM3VLExperts
from .quantized import QuantizedExperts, QuantizedModule

SCALE_SUFFIX = MXFP8.suffixes[1]


class Mxfp8Module(QuantizedModule):
    """What both have in common."""

    def stored(self, name: str) -> Mxfp8Tensors:
        """Values and scales of a weight."""
        return Mxfp8Tensors(*self.stored_weight(name).tensors)

    def local(self, name: str) -> Mxfp8Tensors:
        """The same, of the part that this process has."""
        return Mxfp8Tensors(*map(local_part, self.stored(name)))


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
        Mxfp8Module.__init__(self, MXFP8, compute_dtype)
        self.in_features, self.out_features = in_features, out_features
        self._register_weight("weight", out_features, in_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=compute_dtype)) if bias else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = quantized_products.linear(input.to(self.compute_dtype), self.stored_weight("weight"))
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(input.dtype)

    def few_token_weight(self) -> Mxfp8Tensors | None:
        """See `fused.few_tokens.weight_of`."""
        return self.local("weight") if runs_as_planned(self, Mxfp8Linear) and self.bias is None else None


class Mxfp8Experts(Mxfp8Module, QuantizedExperts):
    """Routed experts whose weights are in MXFP8. For few tokens there is a kernel that reads these.

    Args:
        experts (`MiniMaxM3VLExperts`): The experts that these replace. Their weights are not read.
        compute_dtype (`torch.dtype`): Dtype of the products, that in which the model was loaded.
    """

    def __init__(self, experts: MiniMaxM3VLExperts, compute_dtype: torch.dtype):
        QuantizedExperts.__init__(self, experts, MXFP8, compute_dtype)

    def few_token_weights(self) -> tuple[Mxfp8Tensors, Mxfp8Tensors] | None:
        """Both weights; None where the experts do more than their class says."""
        if not runs_as_planned(self, Mxfp8Experts):
            return None
        return self.local("gate_up_proj"), self.local("down_proj")
