"""torchao's weight-only configs of 8 bits, with the routed experts.

`TorchAoConfig(Float8WeightOnlyConfig())` and `TorchAoConfig(Int8WeightOnlyConfig())` take the experts by default, and
`modules_to_not_convert` names experts that stay. torchao's own tensors do not pass through grouped products and
through the rules that stack experts, so experts are stored in tensors of ours, in the same format.
"""

import re
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..fused.scaled_rows_format import FLOAT8_ROWS, INT8_ROWS
from ..fused.weight_formats import WeightFormat
from ..layers.quantized import QuantizedExperts
from .expert_quantization import ExpertQuantization

METHOD = "torchao"

_FORMATS: dict[str, WeightFormat] = {"Float8WeightOnlyConfig": FLOAT8_ROWS, "Int8WeightOnlyConfig": INT8_ROWS}


def register_torchao_quantizer() -> None:
    """Make Transformers load torchao's configs by `TorchAoQuantizer`. Calling it again changes nothing."""
    AUTO_QUANTIZER_MAPPING[METHOD] = TorchAoQuantizer


class TorchAoQuantizer(ExpertQuantization, TorchAoHfQuantizer):
    """Transformers' quantizer of torchao, with the experts of our models."""

    def format_of_experts(self, name: str) -> WeightFormat | None:
        if not should_convert_module(name, self.modules_to_not_convert):
            return None
        config = self.quantization_config.quant_type
        if not hasattr(config, "fqn_to_config"):
            return _format_of(config)
        named = [_named_config(config.fqn_to_config, name, weight) for weight in QuantizedExperts.weight_names]
        if named == [None, None]:
            return _format_of(config.fqn_to_config.get("_default"))
        formats = [_format_of(choice) for choice in named]
        if formats[0] is None or formats[0] is not formats[1]:
            gate_up, down = (type(choice).__name__ for choice in named)
            raise ValueError(
                f"`quant_type` gives {gate_up} to {name}.gate_up_proj and {down} to {name}.down_proj. Experts take the "
                f"same config for both, one of {', '.join(_FORMATS)} with one scale for each row. Other configs of "
                "torchao have no product of stacked experts."
            )
        return formats[0]

    def formats_in_checkpoints(self) -> list[WeightFormat]:
        return list(_FORMATS.values())

    def how_to_leave_experts(self) -> str:
        return 'Name the experts in `modules_to_not_convert`, for example `["lm_head", "mlp.experts"]`'

    def how_to_quantize_experts(self, numbers: int) -> str | None:
        if _format_of(self.quantization_config.quant_type) is None:
            return None
        return (
            f"Take them out of `modules_to_not_convert` to store them in 8 bits, {numbers:,} bytes and their scales."
        )


def _named_config(configs: dict[str, Any], module: str, weight: str) -> Any:
    """The config of a weight, by torchao's rules: whole names come before regular expressions."""
    names = (f"{module}.{weight}", module)
    for name in names:
        if name in configs:
            return configs[name]
    for pattern, config in configs.items():
        if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], name) for name in names):
            return config
    return None


def _format_of(config: Any) -> WeightFormat | None:
    """None for configs that experts cannot take: other bits, quantized activations, groups within a row."""
    if getattr(config, "group_size", None) is not None:
        return None
    return _FORMATS.get(type(config).__name__)
