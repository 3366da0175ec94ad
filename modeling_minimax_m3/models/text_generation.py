"""What `generate` needs of both language models: long prompts, captured steps, drafts by the first layers alone."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EarlyExitCandidateGenerator,
)
from transformers.utils import ModelOutput

from ..runtime.captured_decoding import obstacle_of_cache, obstacle_of_model
from ..runtime.layout_building import create_masks_for_generate
from ..runtime.transformers_versions import CACHE_NAME, GenerationMixin

# A longer prompt is read in pieces of this many tokens where `generate` is given no `prefill_chunk_size`, except on a CPU.
_PREFILL_TOKENS = 32768
_UNDIVIDED_DEVICES = ("cpu",)


class _EarlyExit(EarlyExitCandidateGenerator):
    """Drafts with the first layers of a language model alone, also where it is part of a composite model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        num_layers = self.assistant_model.config.get_text_config().num_hidden_layers
        if not 1 <= self.assistant_early_exit <= num_layers:
            raise ValueError(
                f"`assistant_early_exit` must name one of the model's {num_layers} layers, counted from 1, got "
                f"{self.assistant_early_exit}"
            )

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        config = self.assistant_model.config.get_text_config()
        num_layers = config.num_hidden_layers
        config.num_hidden_layers = self.assistant_early_exit
        try:
            return AssistedCandidateGenerator.get_candidates(self, input_ids)
        finally:
            config.num_hidden_layers = num_layers


class MiniMaxM3GenerationMixin(GenerationMixin):
    """Generation of the causal and the conditional language model."""

    create_masks_for_generate = staticmethod(create_masks_for_generate)

    def _get_candidate_generator(self, **kwargs) -> CandidateGenerator:
        if kwargs["generation_config"].assistant_early_exit is None:
            return super()._get_candidate_generator(**kwargs)
        names = ("input_ids", "generation_config", "model_kwargs", "inputs_tensor", "logits_processor")
        return _EarlyExit(assistant_model=self, **{name: kwargs[name] for name in names})

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> ModelOutput:
        """Reads the prompt, a long one in pieces, so that the activations of a piece are all that exist at a time."""
        # Transformers' own loop over pieces takes token ids, needs a cache, and returns the outputs of the last piece.
        returns_more = generation_config.output_attentions or generation_config.output_hidden_states
        if (
            generation_config.prefill_chunk_size is None
            and input_ids.shape[1] > _PREFILL_TOKENS
            and input_ids.device.type not in _UNDIVIDED_DEVICES
            and model_kwargs.get(CACHE_NAME) is not None
            and model_kwargs.get("use_cache", True)
            and model_kwargs.get("inputs_embeds") is None
            and not returns_more
        ):
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = _PREFILL_TOKENS
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        cache = model_kwargs.get(CACHE_NAME)
        captures = (
            not generation_config.disable_compile
            and generation_config.compile_config is None
            and obstacle_of_cache(cache) is None
            and obstacle_of_model(self) is None
        )
        if isinstance(cache, Cache):
            cache.is_captured = captures
        if captures:
            return True
        # An offloaded cache moves between devices at every step, so each step would be compiled again.
        if getattr(model_kwargs.get(CACHE_NAME), "offloading", False):
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
