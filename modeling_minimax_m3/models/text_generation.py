"""What `generate` needs of both language models: long prompts, captured steps, drafts by the first layers alone."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EarlyExitCandidateGenerator,
)
from transformers.utils import ModelOutput, logging

from ..runtime.captured_decoding import obstacle_of_cache, obstacle_of_model
from ..runtime.expert_cache import has_offloaded_experts
from ..runtime.gathered_weights import gathers_weights
from ..runtime.layout_building import create_masks_for_generate
from ..runtime.transformers_versions import CACHE_NAME, GenerationMixin

logger = logging.get_logger(__name__)

# A longer prompt is read in pieces of this many tokens where `generate` is given no `prefill_chunk_size`, except on a CPU.
_PREFILL_TOKENS = 32768
_UNDIVIDED_DEVICES = ("cpu",)

# Arguments with one entry for each token. Their last entry belongs to the prompt's last token.
_TOKEN_INPUTS = ("attention_mask", "position_ids", "mm_token_type_ids")


@dataclass
class PromptPiece:
    """Some of the tokens of a prompt that one pass reads.

    Args:
        input_ids (`torch.LongTensor`): (B, tokens up to the piece's end).
        model_kwargs (`dict`): What `generate` holds for the passes of its prompt, up to the piece's end.
        num_tokens (`int`): How many of the last tokens the pass reads.
        is_last (`bool`): Whether the prompt ends with this piece.
    """

    input_ids: torch.LongTensor
    model_kwargs: dict[str, Any]
    num_tokens: int
    is_last: bool


def count_cached_tokens(
    prompt: torch.Tensor, model_kwargs: dict[str, Any], generation_config: GenerationConfig
) -> int:
    """How many of the prompt's first tokens the cache holds. 0 where the prompt continues the cache."""
    cache = model_kwargs.get(CACHE_NAME)
    if cache is None:
        return 0
    mask = model_kwargs.get("attention_mask")
    # `generate` drops a mask without zeros and notes its length.
    mask_length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    return int(cache.get_seq_length()) if mask_length == prompt.shape[1] else 0


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

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        *,
        num_cached_tokens: int = 0,
        **kwargs,
    ) -> dict[str, Any]:
        # Transformers' assisted decoding gives its first pass the whole prompt, whatever the cache holds of it.
        if num_cached_tokens and kwargs.get("is_first_iteration"):
            next_sequence_length = input_ids.shape[1] - num_cached_tokens
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def _get_candidate_generator(self, **kwargs) -> CandidateGenerator:
        # An assistant has a cache of its own.
        model_kwargs = {name: value for name, value in kwargs["model_kwargs"].items() if name != "num_cached_tokens"}
        kwargs["model_kwargs"] = model_kwargs
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
        pieces = self._split_prompt(input_ids, generation_config, model_kwargs, is_first_iteration)
        if pieces is None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        for piece in pieces:
            outputs = self._read(piece, is_first_iteration)
        return outputs

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        logits_processor,
        stopping_criteria,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        """Reads all pieces of a prompt but the last, which the first pass of assisted decoding reads with drafts."""
        if model_kwargs.get("inputs_embeds") is None and input_ids.shape[0] == 1:
            num_cached = count_cached_tokens(input_ids, model_kwargs, generation_config)
            for piece in self._split_prompt(input_ids, generation_config, model_kwargs) or ():
                if piece.is_last:
                    model_kwargs = piece.model_kwargs
                else:
                    self._read(piece)
                    num_cached += piece.num_tokens
            if num_cached < input_ids.shape[1]:
                model_kwargs["num_cached_tokens"] = num_cached
        return super()._assisted_decoding(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
            **model_kwargs,
        )

    def _read(self, piece: PromptPiece, is_first_iteration: bool = True) -> ModelOutput:
        model_inputs = self.prepare_inputs_for_generation(
            piece.input_ids,
            next_sequence_length=piece.num_tokens,
            is_first_iteration=is_first_iteration,
            **piece.model_kwargs,
        )
        return self(**model_inputs, return_dict=True)

    def _split_prompt(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Iterator[PromptPiece] | None:
        """The pieces in which `generate` reads a prompt; None where one pass reads it.

        Their number depends on the prompt's length alone. So processes that hold parts of one model, and read the same
        prompt, make equally many passes.

        Raises:
            ValueError: `prefill_chunk_size` is no positive integer, or there is no cache for the pieces.
        """
        size = generation_config.prefill_chunk_size
        is_automatic = size is None
        if is_automatic:
            if self.device.type in _UNDIVIDED_DEVICES:
                return None
            size = _PREFILL_TOKENS
        elif isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(f"`prefill_chunk_size` must be a positive integer or None, got {size!r}")
        if model_kwargs.get(CACHE_NAME) is None or not model_kwargs.get("use_cache", True):
            if is_automatic:
                return None
            raise ValueError(f"`prefill_chunk_size={size}` needs a cache: pass `use_cache=True`")

        embeddings = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        prompt = input_ids if embeddings is None else embeddings
        num_new = prompt.shape[1] - count_cached_tokens(prompt, model_kwargs, generation_config)
        if num_new <= size:
            return None
        obstacle = self._obstacle_of_pieces(generation_config)
        if obstacle is not None:
            if not is_automatic:
                logger.warning_once(
                    f"`prefill_chunk_size={size}` has no effect, one pass reads the whole prompt: {obstacle}."
                )
            return None
        # Prompts of other lengths, on other processes, would have other numbers of passes.
        if is_automatic and gathers_weights(self):
            return None
        return self._pieces(input_ids, model_kwargs, num_new, int(size), is_first_iteration)

    def _obstacle_of_pieces(self, generation_config: GenerationConfig) -> str | None:
        """Why one pass must read the whole prompt; None where several can."""
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                return f"`{name}` returns those of all its tokens"
        if generation_config.use_mtp or generation_config.speculation_type is not None:
            return "the drafts are made from the hidden states of all its tokens"
        # PEFT puts its method in front of the model's. It finds its virtual tokens by the length of the cache.
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:
            return "PEFT puts virtual tokens in front of it"
        return None

    def _pieces(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        num_new: int,
        size: int,
        is_first_iteration: bool,
    ) -> Iterator[PromptPiece]:
        """The last `num_new` tokens of a prompt in pieces of `size` tokens."""
        for start in range(0, num_new, size):
            num_tokens = min(size, num_new - start)
            num_behind = num_new - start - num_tokens
            kwargs = dict(model_kwargs)
            for name in _TOKEN_INPUTS:
                if kwargs.get(name) is not None:
                    kwargs[name] = _without_last(kwargs[name], num_behind, dim=-1)
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = _without_last(kwargs["inputs_embeds"], num_behind, dim=1)
            yield PromptPiece(_without_last(input_ids, num_behind, dim=1), kwargs, num_tokens, num_behind == 0)

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
        if has_offloaded_experts(self) and generation_config.compile_config is None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)


def _without_last(tensor: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    return tensor.narrow(dim, 0, max(0, tensor.shape[dim] - count))
