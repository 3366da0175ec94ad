"""How `generate` handles images and videos: which of them still have to be read, and which tokens are placeholders.

`generate` encodes all pixels before its first pass and gives the features to the passes that read the prompt. Three
rules are left to the model. Images that a cache already holds are not encoded again. A pass that reads a piece of the
prompt gets the features of the piece's placeholders, which may be a part of an image. And a placeholder token outside
the prompt (generated, or a candidate that prompt lookup copied from the prompt) is a token like any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .text_generation import MiniMaxM3GenerationMixin, PromptPiece, count_cached_tokens

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
        num_cached = count_cached_tokens(inputs_tensor, model_kwargs, generation_config)
        is_new = self._drop_cached_media(inputs_tensor, model_kwargs, num_cached) if num_cached else {}
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        encoded = model_kwargs["mm_encoder_outputs"]
        for modality, output in encoded.items():
            # An assistant gets features that the model it drafts for has prepared already.
            if modality in TOKEN_TYPES and output is not None and not isinstance(output, PromptFeatures):
                features = output.pooler_output
                if modality in is_new:
                    features = [part[mask.to(part.device)] for part, mask in zip(features, is_new[modality])]
                encoded[modality] = PromptFeatures(pooler_output=features, prompt_length=inputs_tensor.shape[1])
        return model_kwargs

    def _drop_cached_media(
        self, prompt: torch.Tensor, model_kwargs: dict[str, Any], num_cached: int
    ) -> dict[str, list[torch.Tensor]]:
        """Keep the images and videos (or features) that have placeholders after the first `num_cached` tokens.

        Returns:
            For each modality that the cache holds a part of, which tokens of each image or video kept are new.
        """
        input_ids, embeddings = (prompt, None) if prompt.ndim == 2 else (None, prompt)
        encoded, new_tokens = model_kwargs["mm_encoder_outputs"], {}
        for modality, pixel_name in PIXEL_NAMES.items():
            placeholders = self.model.locate_placeholders(modality, input_ids, embeddings)
            positions = torch.arange(placeholders.shape[1], device=placeholders.device).expand_as(placeholders)
            is_new = positions[placeholders] >= num_cached

            grid_name = f"{modality}_grid_thw"
            pixels, grid_thw, output = model_kwargs.get(pixel_name), model_kwargs.get(grid_name), encoded.get(modality)
            if pixels is not None and grid_thw is not None:
                num_patches = grid_thw.prod(-1).tolist()
                merge = self.config.vision_config.spatial_merge_size**2
                num_tokens = [count // merge for count in num_patches]
                if sum(num_patches) != len(pixels):
                    continue
            elif output is not None and not isinstance(output, PromptFeatures):
                num_tokens = [len(features) for features in output.pooler_output]
            else:
                continue
            if sum(num_tokens) != len(is_new):  # the caller gave the new ones alone, or the model will raise
                continue

            masks = is_new.split(num_tokens)
            keep = [bool(mask.any()) for mask in masks]
            new_tokens[modality] = [mask for mask in masks if mask.any()]
            if pixels is not None and grid_thw is not None:
                kept = [part for part, is_kept in zip(pixels.split(num_patches), keep) if is_kept]
                if kept:
                    model_kwargs[pixel_name] = torch.cat(kept)
                    model_kwargs[grid_name] = grid_thw[torch.tensor(keep, device=grid_thw.device)]
                else:
                    del model_kwargs[pixel_name], model_kwargs[grid_name]
            else:
                kept = [features for features, is_kept in zip(output.pooler_output, keep) if is_kept]
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=kept) if kept else None
        return new_tokens

    def _pieces(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        num_new: int,
        size: int,
        is_first_iteration: bool,
    ) -> Iterator[PromptPiece]:
        types, embeddings = model_kwargs.get("mm_token_type_ids"), model_kwargs.get("inputs_embeds")
        if types is not None and embeddings is None:  # tokens after them are text
            num_behind = max(0, input_ids.shape[1] - types.shape[1])
            model_kwargs = {**model_kwargs, "mm_token_type_ids": torch.nn.functional.pad(types, (0, num_behind))}
        pieces = list(super()._pieces(input_ids, model_kwargs, num_new, size, is_first_iteration))
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        encoded = {modality: output for modality, output in encoded.items() if output is not None}
        # An assistant drafts without features. The model refuses other modalities.
        if is_first_iteration and encoded and encoded.keys() <= TOKEN_TYPES.keys():
            for piece in pieces:
                piece.model_kwargs["mm_encoder_outputs"] = {}
            for modality, output in encoded.items():
                prompt_length = getattr(output, "prompt_length", None)
                for piece, features in zip(pieces, self._share_features(modality, output.pooler_output, pieces)):
                    piece.model_kwargs["mm_encoder_outputs"][modality] = PromptFeatures(
                        pooler_output=features, prompt_length=prompt_length
                    )
        yield from pieces

    def _share_features(
        self, modality: str, features: Sequence[torch.Tensor], pieces: list[PromptPiece]
    ) -> list[list[torch.Tensor]]:
        """For each piece, the features of its placeholders: of row after row, and in a row of token after token."""
        counts, types = [], None
        for piece in pieces:
            types, embeddings = (piece.model_kwargs.get(name) for name in ("mm_token_type_ids", "inputs_embeds"))
            if types is not None:
                types = types[:, -piece.num_tokens :]
            if embeddings is not None:
                embeddings = embeddings[:, -piece.num_tokens :].to(self.device)
            input_ids = piece.input_ids[:, -piece.num_tokens :] if embeddings is None else None
            counts.append(self.model.locate_placeholders(modality, input_ids, embeddings, types).sum(1))
        by_row = torch.stack(counts, dim=1)
        self.model.check_number_of_features(
            modality,
            by_row.sum(),
            sum(len(part) for part in features),
            found_by_embedding=types is None and pieces[0].model_kwargs.get("inputs_embeds") is not None,
        )
        shares = split_rows(features, by_row.flatten().tolist())
        return [[part for share in shares[index :: len(pieces)] for part in share] for index in range(len(pieces))]

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


def split_rows(parts: Sequence[torch.Tensor], sizes: list[int]) -> list[list[torch.Tensor]]:
    """Views of the rows of `parts`, all in their order: `sizes[i]` rows in the list of index i, which is never empty."""
    shares, start = [], 0
    for size in sizes:
        share, offset = [], 0
        for part in parts:
            rows = part[max(0, start - offset) : max(0, start + size - offset)]
            if len(rows):
                share.append(rows)
            offset += len(part)
        shares.append(share or [part[:0] for part in parts[:1]])
        start += size
    return shares
