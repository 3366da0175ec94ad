"""How `generate` handles images and videos: which of them still have to be read, and which tokens are placeholders.

`generate` encodes all pixels before its first pass and gives the features to the passes that read the prompt. Two
rules are left to the model. Images that a cache already holds are not encoded again. And a placeholder token outside
the prompt (generated, or a candidate that prompt lookup copied from the prompt) is a token like any other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..runtime.transformers_versions import CACHE_NAME
from .text_generation import MiniMaxM3GenerationMixin

# What `mm_token_type_ids` holds at the placeholders of each modality; 0 is text.
TOKEN_TYPES = {"image": 1, "video": 2}
PIXEL_NAMES = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass
class PromptFeatures(BaseModelOutputWithPooling):
    """Features (`pooler_output`) of a prompt's images or videos, and the prompt's length in tokens."""

    prompt_length: int | None = None


class MultimodalGenerationMixin(MiniMaxM3GenerationMixin):
    """Generation for a model whose backbone, `self.model`, finds and fills placeholders."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        model_kwargs["mm_encoder_outputs"] = dict(model_kwargs.get("mm_encoder_outputs") or {})
        num_cached = self._count_cached_tokens(inputs_tensor, model_kwargs, generation_config)
        if num_cached:
            self._drop_cached_media(inputs_tensor, model_kwargs, num_cached)
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        encoded = model_kwargs["mm_encoder_outputs"]
        for modality, output in encoded.items():
            # An assistant gets features that the model it drafts for has prepared already.
            if modality in TOKEN_TYPES and output is not None and not isinstance(output, PromptFeatures):
                encoded[modality] = PromptFeatures(
                    pooler_output=output.pooler_output, prompt_length=inputs_tensor.shape[1]
                )
        return model_kwargs

    @staticmethod
    def _count_cached_tokens(
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

    def _drop_cached_media(self, prompt: torch.Tensor, model_kwargs: dict[str, Any], num_cached: int) -> None:
        """Keep the images and videos (or features) that have placeholders after the first `num_cached` tokens."""
        input_ids, embeddings = (prompt, None) if prompt.ndim == 2 else (None, prompt)
        encoded = model_kwargs["mm_encoder_outputs"]
        for modality, pixel_name in PIXEL_NAMES.items():
            placeholders = self.model.locate_placeholders(modality, input_ids, embeddings)
            positions = torch.arange(placeholders.shape[1], device=placeholders.device).expand_as(placeholders)
            is_new = positions[placeholders] >= num_cached

            grid_name = f"{modality}_grid_thw"
            pixels, grid_thw = model_kwargs.get(pixel_name), model_kwargs.get(grid_name)
            if pixels is not None and grid_thw is not None:
                num_patches = grid_thw.prod(-1).tolist()
                merge = self.config.vision_config.spatial_merge_size**2
                keep = find_new_entries(is_new, [count // merge for count in num_patches])
                if keep is None or sum(num_patches) != len(pixels):
                    continue
                kept = [part for part, is_kept in zip(pixels.split(num_patches), keep) if is_kept]
                if kept:
                    model_kwargs[pixel_name] = torch.cat(kept)
                    model_kwargs[grid_name] = grid_thw[torch.tensor(keep, device=grid_thw.device)]
                else:
                    del model_kwargs[pixel_name], model_kwargs[grid_name]
            elif (output := encoded.get(modality)) is not None and not isinstance(output, PromptFeatures):
                keep = find_new_entries(is_new, [len(features) for features in output.pooler_output])
                if keep is None:
                    continue
                kept = [features for features, is_kept in zip(output.pooler_output, keep) if is_kept]
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=kept) if kept else None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The inputs of one pass, with `mm_token_type_ids` where images or videos came with the prompt.

        Args:
            input_ids (`torch.LongTensor`): (B, S), the prompt and the tokens after it.
            next_sequence_length (`int`, *optional*): How many of the last tokens the pass reads. Default: all.
            inputs_embeds (`torch.Tensor`, *optional*): (B, prompt tokens, hidden), the prompt in place of its ids.
                (Transformers looks for this argument by name.)
            mm_encoder_outputs (`dict`, *optional*): As in `MiniMaxM3VLModel.forward`.
            mm_token_type_ids (`torch.Tensor`, *optional*): (B, prompt tokens) or longer. Tokens after it are text.
            **kwargs: As in Transformers.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        tokens = model_inputs.get("input_ids")
        if tokens is None:
            tokens = model_inputs["inputs_embeds"]
        elif mm_encoder_outputs and tokens.shape[1] > 1:
            if "mm_encoder_outputs" not in model_inputs:
                # An earlier pass read the features, or none does: an assistant drafts without them.
                mm_token_type_ids = torch.zeros_like(input_ids)
            elif mm_token_type_ids is None:
                mm_token_type_ids = self._mark_placeholders(input_ids, mm_encoder_outputs)
        if mm_token_type_ids is not None:
            num_behind = max(0, input_ids.shape[1] - mm_token_type_ids.shape[1])
            types = torch.nn.functional.pad(mm_token_type_ids, (0, num_behind))
            model_inputs["mm_token_type_ids"] = types[:, -tokens.shape[1] :].to(tokens.device)
        return model_inputs

    def _mark_placeholders(
        self, input_ids: torch.LongTensor, encoded: dict[str, BaseModelOutputWithPooling]
    ) -> torch.LongTensor:
        """`mm_token_type_ids` of (B, S) tokens. Placeholders outside the prompt count as text."""
        prompt_length = next((getattr(output, "prompt_length", None) for output in encoded.values() if output), None)
        types = torch.zeros_like(input_ids)
        for modality, token_type in TOKEN_TYPES.items():
            types[self.model.locate_placeholders(modality, input_ids)] = token_type
        if prompt_length is not None:
            types[:, prompt_length:] = 0
        return types


def find_new_entries(is_new: torch.Tensor, num_tokens: list[int]) -> list[bool] | None:
    """For each image or video, whether any of its placeholders is new.

    Args:
        is_new (`torch.Tensor`): (placeholders,), of all images or videos, one after the other.
        num_tokens (`list[int]`): Placeholders of each of them.

    Returns:
        One flag for each. None where the counts differ: the caller gave the new ones alone, or the model will raise.
    """
    if sum(num_tokens) != len(is_new):
        return None
    return [bool(part.any()) for part in is_new.split(num_tokens)]
