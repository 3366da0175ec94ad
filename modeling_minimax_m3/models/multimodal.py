"""The whole model: vision features replace their placeholder tokens, and the language model reads the result.

B is the number of rows, T the number of tokens of this pass.
"""

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from configuration_minimax_m3 import MiniMaxM3VLConfig

from ..runtime.transformers_versions import output_fields, takes_cache
from .language_modeling_head import LanguageModelingHead
from .multimodal_generation import TOKEN_TYPES, MultimodalGenerationMixin
from .outputs import MiniMaxM3VLCausalLMOutputWithPast, MiniMaxM3VLModelOutputWithPast
from .placeholders import PlaceholderMixin
from .pretrained import MiniMaxM3VLPreTrainedModel
from .text import MiniMaxM3VLTextModel
from .vision import MiniMaxM3VLMultiModalProjector, MiniMaxM3VLVisionModel
from .vision_features import VisionFeaturesMixin

logger = logging.get_logger(__name__)


class MiniMaxM3VLModel(PlaceholderMixin, VisionFeaturesMixin, MiniMaxM3VLPreTrainedModel):
    """Vision tower, projector and language model, without a language-modelling head."""

    config: MiniMaxM3VLConfig

    def __init__(self, config: MiniMaxM3VLConfig):
        super().__init__(config)
        self.vision_tower = MiniMaxM3VLVisionModel(config.vision_config)
        self.multi_modal_projector = MiniMaxM3VLMultiModalProjector(config)
        self.language_model = MiniMaxM3VLTextModel(config.text_config)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMaxM3VLModelOutputWithPast:
        """Run vision tower, projector and language model.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, T), with one placeholder for each merged patch. Exactly one
                of `input_ids` and `inputs_embeds` is given.
            pixel_values (`torch.Tensor`, *optional*): (patches, channels * temporal_patch * patch * patch) patches of
                all images, in the order of their placeholders in the batch.
            pixel_values_videos (`torch.Tensor`, *optional*): The same for videos.
            image_grid_thw (`torch.Tensor`, *optional*): (images, 3) patches along time, height and width.
            video_grid_thw (`torch.Tensor`, *optional*): The same for videos, one row for each chunk that attends to
                itself alone.
            attention_mask (`torch.Tensor`, *optional*): (B, S), 0 at padding.
            position_ids (`torch.LongTensor`, *optional*): (B, T).
            cache (`Cache`, *optional*): Keys and values of earlier tokens, extended in place.
            inputs_embeds (`torch.Tensor`, *optional*): (B, T, hidden).
            mm_encoder_outputs (`dict`, *optional*): Outputs of `get_image_features` and `get_video_features` under
                `"image"` and `"video"`, in place of the pixels. If one of several processes gets such outputs, each
                process gets the argument in every pass, `{}` where there are none: see `VisionFeaturesMixin`.
            mm_token_type_ids (`torch.Tensor`, *optional*): (B, T), as the processor returns it on request: 1 at image
                placeholders, 2 at video placeholders, 0 at text, whatever the ids there. With `inputs_embeds` it may
                be shorter: the tokens in front of it, such as the virtual tokens of prompt tuning, are text. Default:
                the ids (or their embeddings) mark the placeholders.
            **kwargs: Passed to the language model. Names that begin with `image_` or `video_` go to the vision tower
                as precomputed values (`image_cu_seqlens`, `video_position_ids`, ...).

        Raises:
            ValueError: The inputs do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            came = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of input_ids and inputs_embeds must be given, got {came}.")
        self._check_shapes(input_ids, inputs_embeds, mm_token_type_ids)
        if inputs_embeds is not None and mm_token_type_ids is not None:
            num_in_front = inputs_embeds.shape[1] - mm_token_type_ids.shape[1]
            mm_token_type_ids = torch.nn.functional.pad(mm_token_type_ids, (num_in_front, 0))
        if unknown := sorted(set(mm_encoder_outputs or ()) - set(TOKEN_TYPES)):
            raise ValueError(f"mm_encoder_outputs must have no keys but 'image' and 'video', got {unknown}.")

        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        image_outputs, video_outputs, nothing = self.encode_media(
            images, videos, mm_encoder_outputs, tokens.device, cache is None, kwargs
        )
        image_features, video_features = (
            None if output is None else output.pooler_output for output in (image_outputs, video_outputs)
        )
        if inputs_embeds is None:
            self._warn_about_lone_placeholders(
                input_ids, mm_token_type_ids, image=image_features, video=video_features
            )
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = self._fill_placeholders(
            input_ids, inputs_embeds, image_features, video_features, mm_token_type_ids
        )
        if nothing is not None:
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return MiniMaxM3VLModelOutputWithPast(
            **output_fields(
                last_hidden_state=outputs.last_hidden_state,
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.router_logits,
                image_outputs=image_outputs,
                video_outputs=video_outputs,
                indexer_divergence=outputs.indexer_divergence,
            )
        )

    @staticmethod
    def _check_shapes(
        input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, mm_token_type_ids: torch.Tensor | None
    ) -> None:
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (batch, tokens), got {tuple(input_ids.shape)}.")
        if inputs_embeds is not None and inputs_embeds.ndim != 3:
            raise ValueError(
                f"inputs_embeds must have shape (batch, tokens, hidden), got {tuple(inputs_embeds.shape)}."
            )
        if mm_token_type_ids is None:
            return
        expected = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
        shape = mm_token_type_ids.shape
        may_be_shorter = input_ids is None and len(shape) == 2 and shape[0] == expected[0]
        if shape != expected and not (may_be_shorter and shape[1] < expected[1]):
            or_fewer = " or fewer, for the last tokens only" if input_ids is None else ""
            raise ValueError(
                f"mm_token_type_ids must have one entry for each token, that is shape {tuple(expected)}{or_fewer}, got "
                f"{tuple(shape)}."
            )


class MiniMaxM3SparseForConditionalGeneration(
    LanguageModelingHead, MiniMaxM3VLPreTrainedModel, MultimodalGenerationMixin
):
    """MiniMax-M3: the backbone with a language-modelling head."""

    config: MiniMaxM3VLConfig
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniMaxM3VLConfig):
        super().__init__(config)
        self.model = MiniMaxM3VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `MiniMaxM3VLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `MiniMaxM3VLModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        output_indexer_loss: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMaxM3VLCausalLMOutputWithPast:
        """Run the model. `MiniMaxM3VLModel.forward` documents the inputs that are not listed here.

        Args:
            labels (`torch.LongTensor`, *optional*): (B, T) ids to predict, not shifted, -100 where there is no target.
                With labels the model returns the loss, whose denominator is `num_items_in_batch` where that is given.
            output_router_logits (`bool`, *optional*): Whether to return the router logits and the load-balancing loss,
                which is added, weighted, to the loss. Default: `config.text_config.output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`): How many of the last tokens, or which ones, get logits. 0: all.
            skip_logits (`bool`, *optional*): Whether a call with labels computes the loss without holding all logits,
                and returns none. Default: `self.skip_logits`, or if that is None, whether the model is in training
                mode.
            output_indexer_loss (`bool`, *optional*): Whether to return the indexers' loss, which is added to the loss
                with the weight `config.text_config.indexer_loss_coef`. Default: whether that is above 0, and there are
                labels or the model is in training mode.
        """
        flags = self.flags_of_losses(labels, output_router_logits, output_indexer_loss)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            return_dict=True,
            **flags,
            **self.outputs_to_keep(labels, logits_to_keep),
            **kwargs,
        )
        head = self.logits_and_losses(
            outputs,
            labels,
            attention_mask,
            output_router_logits=flags["output_router_logits"],
            logits_to_keep=logits_to_keep,
            skip_logits=skip_logits,
            **kwargs,
        )
        return MiniMaxM3VLCausalLMOutputWithPast(
            **output_fields(
                **head,
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.router_logits,
                image_outputs=outputs.image_outputs,
                video_outputs=outputs.video_outputs,
            )
        )
