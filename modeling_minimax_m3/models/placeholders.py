"""Placeholder tokens of images and videos: where they are, and how features take their place.

B is the number of rows, T the number of tokens of this pass.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import logging, torch_compilable_check
from transformers.utils.import_utils import is_torchdynamo_compiling

from configuration_minimax_m3 import MiniMaxM3VLConfig

from .multimodal_generation import TOKEN_TYPES

logger = logging.get_logger(__name__)


class PlaceholderMixin:
    """Finds and fills the placeholders of a model that has `config.image_token_id` and `config.video_token_id`."""

    # Of the model.
    config: MiniMaxM3VLConfig
    training: bool
    get_input_embeddings: Callable[[], nn.Module]

    def locate_placeholders(
        self,
        modality: str,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find the placeholders of one modality.

        Args:
            modality (`str`): "image" or "video".
            input_ids (`torch.Tensor`, *optional*): (B, T).
            inputs_embeds (`torch.Tensor`, *optional*): (B, T, hidden). Needed where the other two are None.
            mm_token_type_ids (`torch.Tensor`, *optional*): (B, T). Decides alone where it is given.

        Returns:
            Boolean (B, T).
        """
        if mm_token_type_ids is not None:
            return mm_token_type_ids == TOKEN_TYPES[modality]
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        # Without ids, a placeholder is a position that holds the placeholder's own embedding.
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def check_number_of_features(
        self, modality: str, num_placeholders: torch.Tensor, num_features: int, found_by_embedding: bool
    ) -> None:
        """Raise where there is not one feature for each placeholder of one modality.

        Args:
            modality (`str`): "image" or "video".
            num_placeholders (`torch.Tensor`): Scalar.
            num_features (`int`): Rows of the features.
            found_by_embedding (`bool`): Whether neither ids nor token types said where the placeholders are.

        Raises:
            ValueError: The numbers differ.
        """
        # The beginning is Transformers' wording, by which other tools recognise the error.
        mismatch = f"{modality.capitalize()} features and {modality} tokens do not match"
        token_id = getattr(self.config, f"{modality}_token_id")
        place = f"one {modality} token (id {token_id}) for each {modality} feature"
        expected = f"input_ids (or inputs_embeds) must hold {place}."
        if found_by_embedding:
            expected += (
                " In inputs_embeds they are found by the embedding of that token, which another token may share: "
                "mm_token_type_ids (1 at image, 2 at video tokens) says which are meant."
            )
        agree = num_placeholders == num_features
        if torch.compiler.is_compiling():
            # Transformers' check makes a symbol of the number. PyTorch 2.10 to 2.12 cannot compile that.
            torch._assert_async(agree, f"{mismatch}: {expected}")
            return
        torch_compilable_check(
            agree, lambda: f"{mismatch}, tokens: {int(num_placeholders)}, features: {num_features}: {expected}"
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the image and the video placeholders, and check their numbers against the features.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, T). Without it, placeholders are found by their embedding.
            inputs_embeds (`torch.Tensor`): (B, T, hidden).
            image_features (`torch.Tensor`, *optional*): (tokens of all images, hidden).
            video_features (`torch.Tensor`, *optional*): (tokens of all videos, hidden).
            mm_token_type_ids (`torch.Tensor`, *optional*): (B, T), 1 at image and 2 at video placeholders.

        Returns:
            Two boolean masks, each (B, T, hidden).

        Raises:
            ValueError: The numbers of placeholders and of feature rows differ.
        """
        masks = []
        found_by_embedding = input_ids is None and mm_token_type_ids is None
        for modality, features in (("image", image_features), ("video", video_features)):
            mask = self.locate_placeholders(modality, input_ids, inputs_embeds, mm_token_type_ids)
            if features is not None:
                self.check_number_of_features(modality, mask.sum(), features.shape[0], found_by_embedding)
            masks.append(mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device))
        return masks[0], masks[1]

    def _fill_placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: tuple[torch.Tensor, ...] | None,
        video_features: tuple[torch.Tensor, ...] | None,
        mm_token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        if image_features is None and video_features is None:
            return inputs_embeds
        rows = [
            None if features is None else torch.cat(tuple(features)).to(inputs_embeds)
            for features in (image_features, video_features)
        ]
        masks = self.get_placeholder_mask(input_ids, inputs_embeds, *rows, mm_token_type_ids)
        for mask, features in zip(masks, rows):
            if features is not None:
                inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        return inputs_embeds

    def _warn_about_lone_placeholders(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None,
        **features: tuple[torch.Tensor, ...] | None,
    ) -> None:
        """Warn a user who forgot the pixels. Only a prompt is checked, beside which the check costs nothing."""
        if self.training or is_torchdynamo_compiling() or input_ids.shape[1] == 1:
            return
        for modality, given in features.items():
            if given is None and self.locate_placeholders(modality, input_ids, None, mm_token_type_ids).any():
                logger.warning_once(
                    f"input_ids holds {modality} tokens, but no {modality} inputs came with it (neither pixels nor "
                    f"mm_encoder_outputs['{modality}']): the model reads the tokens' own embeddings."
                )
