"""What every M3 model class shares: capability flags and weight initialisation."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from configuration_minimax_m3.auto_class import AutoClassByImport

from ..layers.moe import MiniMaxM3VLExperts, MiniMaxM3VLTopKRouter
from ..layers.normalization import MiniMaxM3VLRMSNorm
from ..layers.quantized import stored_names_of
from ..loading.disk_names import with_module_names
from ..loading.expert_quantization import refuse_incomplete_experts
from ..loading.fused_projections import with_joined_groups
from ..loading.mxfp8_quantizer import refuse_half_quantized_weights
from ..loading.part_loading import finish_part_loading, part_conversions, refuse_parts_without_weights
from ..loading.quantized_checkpoints import finish_loading, refuse_places
from ..loading.tensor_parallel import choose_rules, note_shards
from ..runtime.captured_decoding import CapturedDecoding, obstacle_of_model
from ..training.indexer_training import freeze_untrained_indexers, set_indexer_training


class MiniMaxM3VLPreTrainedModel(AutoClassByImport, PreTrainedModel):
    """Base class of the text, vision and composite models."""

    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # The released checkpoint carries multi-token-prediction weights that no class here uses.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)mtp\..*"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Transformers decides these two by searching the source of the model's module for its decorator and its attention
    # table. Here they stand in other modules. Without these answers the experts would silently run eagerly.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., ModelOutput]:
        """What `generate` calls for a decoding step: a CUDA graph where it can be captured, else stock's choice."""
        # A `compile_config` of the user's own asks for compiling.
        if compile_config is None and obstacle_of_model(self) is None:
            return CapturedDecoding(self)
        return super().get_compiled_call(compile_config)

    def __init__(self, config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, *args, **kwargs):
        if isinstance(config, PreTrainedConfig) and not isinstance(config, self.config_class):
            raise TypeError(
                f"`config` must be a configuration_minimax_m3.{self.config_class.__name__}, got "
                f"{type(config).__module__}.{type(config).__name__}. A config of stock Transformers converts by "
                f"{self.config_class.__name__}.from_dict(config.to_dict())."
            )
        # Fields that were set after construction, as by `from_pretrained(..., index_topk_blocks=0)`, are not checked
        # yet.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in Transformers. Indexers come frozen unless `config.indexer_loss_coef` is above 0."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        finish_loading(model)
        freeze_untrained_indexers(model)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As in Transformers, by rules with which the processes exchange less (see `loading/tensor_parallel.py`)."""
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        choose_rules(model, distributed_config)
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        note_shards(model, distributed_config, mesh_manager)
        return model

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        """As in Transformers, also where PyTorch does not join the parts of fused projections."""
        if distributed_config is not None and distributed_config.tp_size > 1 and distributed_config.dp_size == 1:
            state_dict = with_joined_groups(state_dict)
        return super().gather_sharded_state_dict_for_save(model_to_save, state_dict, distributed_config, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """What DistributedDataParallel need not send at its start: quantized weights, which each process has loaded.

        gloo could not send 8-bit floats either. PEFT's wrappers pass this on, and put a prefix before the names.
        """
        names = stored_names_of(self)
        return {prefix + name for prefix in ("", "base_model.", "base_model.model.") for name in names}

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As in Transformers. A part finds its weights in a whole model's checkpoint, or an error says so."""
        if expected_keys is not None or state_dict == {}:  # adapters, or random weights on purpose
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        refuse_places(model, load_config)
        conversions = part_conversions(model)
        load_config = replace(load_config, weight_mapping=[*conversions, *(load_config.weight_mapping or [])])
        info, disk_offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config
        )
        finish_part_loading(model, conversions, load_config, info)
        refuse_half_quantized_weights(model, load_config.hf_quantizer, info)
        refuse_incomplete_experts(model, load_config.hf_quantizer, info)
        refuse_parts_without_weights(model, info, MiniMaxM3VLPreTrainedModel)
        return info, disk_offload_index

    def set_indexer_training(self, coef: float, warmup: bool = False) -> None:
        """Change `indexer_loss_coef` and `indexer_warmup` of an existing model.

        Call it before adapters are added and before the optimizer is made.

        Args:
            coef (`float`): Weight of the indexers' loss. Above 0 makes the indexers' parameters trainable, 0 freezes
                them.
            warmup (`bool`): Whether sparse layers attend to all keys, and the loss runs over all keys.
        """
        set_indexer_training(self, coef, warmup)

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

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As in PyTorch, and also takes the names that checkpoints have on disk.

        `Trainer` resumes by passing a checkpoint's tensors here unchanged
        (https://github.com/huggingface/transformers/issues/43701). Their names are not those of the modules. Without a
        conversion, the run would start from the weights that the model happens to have, with no more than a warning.

        Raises:
            ValueError: Some of a layer's experts are missing, as in one file of several.
        """
        if not self.state_dict().keys() >= state_dict.keys():
            state_dict = with_module_names(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
