"""4 bits of bitsandbytes, with the routed experts.

`BitsAndBytesConfig(load_in_4bit=True)` stands for a model in 4 bits, so it takes the experts by default.
`llm_int8_skip_modules`, which names what bitsandbytes is to leave alone, names experts too. A checkpoint holds what it
was saved with: experts in 4 bits have a tensor of scales, which tells them from others.
"""

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..fused.four_bit_format import BLOCK, FOUR_BIT_FORMATS
from ..fused.weight_formats import WeightFormat
from .expert_quantization import ExpertQuantization

METHOD = "bitsandbytes_4bit"  # Transformers' name of this quantizer


def register_bnb_quantizer() -> None:
    """Make Transformers load 4 bits of bitsandbytes by `Bnb4BitQuantizer`. Calling it again changes nothing."""
    AUTO_QUANTIZER_MAPPING[METHOD] = Bnb4BitQuantizer


class Bnb4BitQuantizer(ExpertQuantization, Bnb4BitHfQuantizer):
    """Transformers' quantizer of this format, with the experts of our models."""

    def format_of_experts(self, name: str) -> WeightFormat | None:
        if not should_convert_module(name, self.modules_to_not_convert):
            return None
        config = self.quantization_config
        return FOUR_BIT_FORMATS[config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant]

    def formats_in_checkpoints(self) -> list[WeightFormat]:
        kind = self.quantization_config.bnb_4bit_quant_type
        return [FOUR_BIT_FORMATS[kind, double] for double in (False, True)]

    def how_to_leave_experts(self) -> str:
        return 'Name the experts in `llm_int8_skip_modules`, for example `["lm_head", "mlp.experts"]`'

    def how_to_quantize_experts(self, numbers: int) -> str | None:
        double = self.quantization_config.bnb_4bit_use_double_quant
        bits = self.quantization_config.bnb_4bit_quant_type.upper()
        in_bytes = numbers // 2 + numbers // BLOCK * (1 if double else 4)
        return f"Take them out of `llm_int8_skip_modules` to store them in {bits}, {in_bytes:,} bytes."

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`bnb_4bit_compute_dtype`, or the model's dtype where that is float32, its default."""
        chosen = self.quantization_config.bnb_4bit_compute_dtype
        return dtype if chosen in (None, torch.float32) else chosen
