"""What `generate` needs of both language models: masks of compiled steps, and drafts by the first layers alone."""

import torch
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EarlyExitCandidateGenerator,
)

from ..runtime.captured_decoding import obstacle_of_cache, obstacle_of_model
from ..runtime.layout_building import create_masks_for_generate
from ..runtime.transformers_versions import CACHE_NAME, GenerationMixin


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
