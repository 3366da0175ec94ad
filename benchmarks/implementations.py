"""Stock Transformers' model and ours behind one interface, so that every scenario runs the same code for both.

The functions import what they need, so that a measuring process loads only one of the two.
"""

from types import ModuleType
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

STOCK, OURS = "stock", "ours"


def text_config(implementation: str, config: MiniMaxM3VLTextConfig) -> Any:
    """The configuration class of the implementation with the fields of `config`, and sdpa as attention."""
    if implementation == STOCK:
        from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig as StockTextConfig

        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = StockTextConfig(**fields)
    config._attn_implementation = "sdpa"
    return config


def classes(implementation: str) -> ModuleType:
    """The module with the text classes of the implementation. Both use the same class names."""
    if implementation == STOCK:
        from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl

        return modeling_minimax_m3_vl
    from modeling_minimax_m3.models import text

    return text


def load_same_weights(module: torch.nn.Module, seed: int = 0, std: float = 0.02) -> None:
    """Fills each parameter of `module` from a seed and its name, so that both implementations get the same weights."""
    weights = {}
    for name, tensor in sorted(module.state_dict().items()):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        weights[name] = torch.randn(tensor.shape, generator=generator) * std
    module.load_state_dict(weights, strict=True)
