"""What every M3 model class shares: capability flags and weight initialisation."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

from .moe import MiniMaxM3VLExperts, MiniMaxM3VLTopKRouter
from .normalization import MiniMaxM3VLRMSNorm


class MiniMaxM3VLPreTrainedModel(PreTrainedModel):
    """Base class of the text, vision and composite models."""

    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMaxM3VLDecoderLayer", "MiniMaxM3VLVisionEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # The released checkpoint carries multi-token-prediction weights that no class here uses.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)mtp\..*"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Transformers decides these two by looking for its decorator and its attention table in the source of the model's
    # module. Here they stand in other modules, so without an answer of our own the experts would silently run eagerly.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def __init__(self, config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, *args, **kwargs):
        if isinstance(config, PreTrainedConfig) and not isinstance(config, self.config_class):
            raise TypeError(
                f"`config` must be a configuration_minimax_m3.{self.config_class.__name__}, got "
                f"{type(config).__module__}.{type(config).__name__}. A config of stock Transformers converts by "
                f"{self.config_class.__name__}.from_dict(config.to_dict())."
            )
        # Fields set after construction, by `from_pretrained(..., index_topk_blocks=0)` for one, were not looked at yet.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniMaxM3VLRMSNorm):
            # The norm multiplies by 1 + weight, where the base class assumes a plain weight.
            init.zeros_(module.weight)
            return
        std = self.config.get_text_config().initializer_range
        if isinstance(module, MiniMaxM3VLExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MiniMaxM3VLTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
