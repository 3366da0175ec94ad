"""Stock Transformers and ours behind one face, so that every scenario is the same code for both.

Imports happen inside the functions: a measuring process loads one of the two only.
"""

from types import ModuleType
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

STOCK, OURS = "stock", "ours"


def text_config(implementation: str, config: MiniMaxM3VLTextConfig) -> Any:
    """`config` as a configuration of the implementation, with the sdpa attention path."""
    if implementation == STOCK:
        from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig as StockTextConfig

        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = StockTextConfig(**fields)
    config._attn_implementation = "sdpa"
    return config


def classes(implementation: str) -> ModuleType:
    """A module that holds the implementation's text classes, under the names that both share."""
    if implementation == STOCK:
        from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl

        return modeling_minimax_m3_vl
    from modeling_minimax_m3.models import text

    return text


def load_same_weights(module: torch.nn.Module, seed: int = 0, std: float = 0.02) -> None:
    """Fills `module` from a seed, name by name, so that both implementations get the same weights."""
    weights = {}
    for name, tensor in sorted(module.state_dict().items()):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        weights[name] = torch.randn(tensor.shape, generator=generator) * std
    module.load_state_dict(weights, strict=True)
