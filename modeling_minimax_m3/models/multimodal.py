"""The whole model: vision features take the place of their placeholder tokens, and the language model does the rest.

B is the batch size, T the number of tokens of this pass, H the hidden size of the language model.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging, torch_compilable_check
from transformers.utils.generic import accepts_precomputed_kwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling

from configuration_minimax_m3 import MiniMaxM3VLConfig

from ..layers.indexer import indexer_loss
from ..layers.moe import load_balancing_loss
from ..runtime.sequence_layout import real_tokens
from ..runtime.transformers_versions import output_fields, takes_cache
from ..training.language_loss import LanguageModelingHead, batch_share, without_targets_of_padding
from .multimodal_generation import PIXEL_NAMES, TOKEN_TYPES, MultimodalGenerationMixin
from .outputs import MiniMaxM3VLCausalLMOutputWithPast, MiniMaxM3VLModelOutputWithPast
from .pretrained import MiniMaxM3VLPreTrainedModel
from .text import MiniMaxM3VLTextModel
from .vision import MiniMaxM3VLMultiModalProjector, MiniMaxM3VLVisionModel

logger = logging.get_logger(__name__)


def _check_one_feature_per_placeholder(
    modality: str, num_placeholders: torch.Tensor, num_features: int, token_id: int, hint: str
) -> None:
    # The beginning is Transformers' wording, by which other tools know the error.
    mismatch = f"{modality.capitalize()} features and {modality} tokens do not match"
    place = f"one {modality} token (id {token_id}) for each {modality} feature"
    expected = f"input_ids (or inputs_embeds) must hold {place}.{hint}"
    agree = num_placeholders == num_features
    if torch.compiler.is_compiling():
        # Transformers' check makes a symbol of the number, with which PyTorch 2.10 to 2.12 cannot compile this.
        torch._assert_async(agree, f"{mismatch}: {expected}")
        return
    torch_compilable_check(
        agree, lambda: f"{mismatch}, tokens: {int(num_placeholders)}, features: {num_features}: {expected}"
    )


def _check_grid_is_given(modality: str, grid_thw: torch.Tensor | None) -> None:
    if grid_thw is None:
        raise ValueError(f"{PIXEL_NAMES[modality]} needs {modality}_grid_thw, as the processor returns it, got None.")


def _pop_precomputed(modality: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what the tower gets with `modality` out of `kwargs`."""
    # Everything else in kwargs is the language model's (packing, output flags) and means nothing to the tower.
    return {name: kwargs.pop(name) for name in tuple(kwargs) if name.startswith(f"{modality}_")}


class MiniMaxM3VLModel(MiniMaxM3VLPreTrainedModel):
    """Vision tower, projector and language model, without a language-modelling head.

    Several processes have to do the same things in the same order, whatever media their rows happen to have: data
    parallelism waits for a gradient of every trainable parameter, and weights that are cut over the processes (FSDP,
    ZeRO-3) are gathered by all of them at once. So where other processes may wait for the vision tower, every pass
    calls it and its projector exactly once: for images and videos together or, where there are neither, for a blank
    image of one token, which changes nothing but gives every trained weight a gradient, of zeros. That is the case in
    a run of several processes if the weights of either are cut, or if any of them is trained and the pass is one in
    training mode, with gradients.

    Two kinds of passes are left as they are, `generate`'s among them: those that get a cache, and those that get
    `mm_encoder_outputs`, an empty dict too, whose maker sees to it that all processes encode alike.
    """

    config: MiniMaxM3VLConfig

    def __init__(self, config: MiniMaxM3VLConfig):
        super().__init__(config)
        self.vision_tower = MiniMaxM3VLVisionModel(config.vision_config)
        self.multi_modal_projector = MiniMaxM3VLMultiModalProjector(config)
        self.language_model = MiniMaxM3VLTextModel(config.text_config)
        self.post_init()

    @accepts_precomputed_kwargs(modality="image")
    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode images and project them into the embedding space of the language model.

        Args:
            pixel_values (`torch.Tensor`): `(N, channels * temporal_patch * patch * patch)` patches of all images.
            image_grid_thw (`torch.Tensor`): `(images, 3)` patches along time, height and width.
            **kwargs: Passed to the vision tower, which documents the precomputed values that it takes.

        Returns:
            The vision tower's output, with `pooler_output` replaced by a tuple that holds `(merged patches, H)`
            features for each image.
        """
        return self._encode_pixels(pixel_values, image_grid_thw, **kwargs)

    @accepts_precomputed_kwargs(modality="video")
    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`, for videos: one entry of `pooler_output` for each row of `video_grid_thw`."""
        return self._encode_pixels(pixel_values_videos, video_grid_thw, **kwargs)

    def _encode_pixels(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        # The split below and the output flags need the tower's output by name, whatever the config says.
        kwargs["return_dict"] = True
        outputs = self.vision_tower(pixel_values=pixel_values, grid_thw=grid_thw, **kwargs)
        features = self.multi_modal_projector(outputs.last_hidden_state.squeeze(0))
        tokens_per_entry = grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2
        outputs.pooler_output = features.split(tokens_per_entry.tolist())
        return outputs

    def locate_placeholders(
        self,
        modality: str,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find the placeholders of `modality` ("image" or "video").

        Args:
            modality (`str`): One of the two.
            input_ids (`torch.Tensor` or `None`): `(B, T)`.
            inputs_embeds (`torch.Tensor`, *optional*): `(B, T, H)`; needed where the other two are None.
            mm_token_type_ids (`torch.Tensor`, *optional*): `(B, T)`; decides alone where it is given.

        Returns:
            `(B, T)`, boolean.
        """
        if mm_token_type_ids is not None:
            return mm_token_type_ids == TOKEN_TYPES[modality]
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        # Without ids, a placeholder is a position that holds the placeholder's own embedding.
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the image and the video placeholders, and check that they are as many as the features given.

        Args:
            input_ids (`torch.LongTensor` or `None`): `(B, T)`. Without it, positions are found by their embedding.
            inputs_embeds (`torch.Tensor`): `(B, T, H)`.
            image_features (`torch.Tensor`, *optional*): `(tokens of all images, H)`.
            video_features (`torch.Tensor`, *optional*): `(tokens of all videos, H)`.
            mm_token_type_ids (`torch.Tensor`, *optional*): `(B, T)`, 1 at image and 2 at video placeholders.

        Returns:
            Two boolean masks, each `(B, T, H)`.

        Raises:
            ValueError: The number of placeholders and of feature rows differ.
        """
        masks, hint = [], ""
        if input_ids is None and mm_token_type_ids is None:
            hint = (
                " In inputs_embeds they are found by the embedding of that token, which another token may share: "
                "mm_token_type_ids (1 at image, 2 at video tokens) says which are meant."
            )
        for modality, features in (("image", image_features), ("video", video_features)):
            mask = self.locate_placeholders(modality, input_ids, inputs_embeds, mm_token_type_ids)
            if features is not None:
                token_id = getattr(self.config, f"{modality}_token_id")
                _check_one_feature_per_placeholder(modality, mask.sum(), features.shape[0], token_id, hint)
            masks.append(mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device))
        return masks[0], masks[1]

    def _peers_wait_for_vision(self) -> bool:
        """Whether other processes wait where this one leaves out tower and projector; the class says when they do."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # not there in every build of PyTorch

        parts = (self.vision_tower, self.multi_modal_projector)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        if self.training and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return True
        if any(hasattr(parameter, "ds_id") for parameter in parameters):  # cut by ZeRO-3
            return True
        sharded = (FSDPModule, FullyShardedDataParallel)
        return any(isinstance(module, sharded) for part in parts for module in part.modules())

    def _nothing_seen(self, inputs: torch.Tensor) -> torch.Tensor:
        """A scalar zero that depends on every weight of tower and projector, on the device of `inputs`."""
        pixel_values, grid_thw = self.vision_tower.blank_image(inputs.device)
        features = self._encode_pixels(pixel_values, grid_thw).pooler_output[0]
        # A sum of no elements is zero, and sends zeros back; 0 * features would be NaN where one overflows.
        return features[:0].sum()

    def _encode_together(
        self,
        images: tuple[torch.Tensor, torch.Tensor | None],
        videos: tuple[torch.Tensor, torch.Tensor | None],
        kwargs: dict[str, Any],
    ) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """Features (`pooler_output`) of images and of videos, each given as pixels and grid, from one call of the tower."""
        tower, cu_seqlens, max_seqlens, position_ids = self.vision_tower, [], [], []
        for modality, (pixel_values, grid_thw) in (("image", images), ("video", videos)):
            _check_grid_is_given(modality, grid_thw)
            tower.check_inputs(pixel_values, grid_thw)
            given = _pop_precomputed(modality, kwargs)
            precomputed = {name.removeprefix(f"{modality}_"): value for name, value in given.items()}
            offsets, longest = tower.attention_seqlens(grid_thw, precomputed)
            cu_seqlens.append(offsets if not cu_seqlens else offsets[1:] + cu_seqlens[0][-1])
            max_seqlens.append(longest)
            position_ids.append(tower.patch_position_ids(grid_thw, precomputed))
        features = self._encode_pixels(
            *(torch.cat(pair) for pair in zip(images, videos)),
            cu_seqlens=torch.cat(cu_seqlens),
            max_seqlen=None if None in max_seqlens else max(max_seqlens),
            position_ids=torch.cat(position_ids),
        ).pooler_output
        num_images = images[1].shape[0]
        return tuple(
            BaseModelOutputWithPooling(pooler_output=part) for part in (features[:num_images], features[num_images:])
        )

    def _encode_modality(
        self,
        modality: str,
        pixel_values: torch.Tensor | None,
        grid_thw: torch.Tensor | None,
        encoded: dict[str, BaseModelOutputWithPooling],
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPooling | None:
        """The tower's output for one modality, from its pixels or already encoded; None where there are neither."""
        precomputed = _pop_precomputed(modality, kwargs)
        output, pixel_name = encoded.get(modality), PIXEL_NAMES[modality]
        if pixel_values is None:
            return output
        if output is not None:
            raise ValueError(
                f"Pass the {modality} inputs once: got both {pixel_name} and mm_encoder_outputs['{modality}']."
            )
        _check_grid_is_given(modality, grid_thw)
        encode = self.get_image_features if modality == "image" else self.get_video_features
        flags = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
        return encode(pixel_values, grid_thw, return_dict=True, **flags, **precomputed)

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
        """Run the backbone.

        Args:
            input_ids (`torch.LongTensor`, *optional*): `(B, T)`, with one placeholder for each merged patch. Exactly
                one of `input_ids` and `inputs_embeds` is given.
            pixel_values (`torch.Tensor`, *optional*): `(N, channels * temporal_patch * patch * patch)` patches of all
                images, in the order of their placeholders through the batch.
            pixel_values_videos (`torch.Tensor`, *optional*): The same for videos.
            image_grid_thw (`torch.Tensor`, *optional*): `(images, 3)` patches along time, height and width.
            video_grid_thw (`torch.Tensor`, *optional*): The same for videos, one row for each chunk that attends to
                itself alone.
            attention_mask (`torch.Tensor`, *optional*): `(B, keys)`, 0 at pads.
            position_ids (`torch.LongTensor`, *optional*): `(B, T)`.
            cache (`Cache`, *optional*): Keys and values of earlier tokens; extended in place.
            inputs_embeds (`torch.Tensor`, *optional*): `(B, T, H)`.
            mm_encoder_outputs (`dict`, *optional*): Outputs of `get_image_features` and `get_video_features` under
                `"image"` and `"video"`, in place of the pixels. Where several processes get such, it is given in every
                pass, `{}` where there is nothing: see the class.
            mm_token_type_ids (`torch.Tensor`, *optional*): `(B, T)`, as the processor returns it on request: 1 at
                image placeholders, 2 at video placeholders, 0 at text, whatever the ids there. With `inputs_embeds` it
                may be shorter: what is in front of it, such as the virtual tokens of prompt tuning, is text. Default:
                the ids (or their embeddings) say which tokens are placeholders.
            **kwargs: Passed to the language model, except names that begin with `image_` or `video_`: these are
                precomputed values for the vision tower (`image_cu_seqlens`, `video_position_ids`, ...).

        Raises:
            ValueError: The inputs do not fit together; the message says which, what came and what was expected.
        """
        if (input_ids is None) == (inputs_embeds is None):
            came = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of input_ids and inputs_embeds must be given, got {came}.")
        self._check_shapes(input_ids, inputs_embeds, mm_token_type_ids)
        if inputs_embeds is not None and mm_token_type_ids is not None:
            num_in_front = inputs_embeds.shape[1] - mm_token_type_ids.shape[1]
            mm_token_type_ids = torch.nn.functional.pad(mm_token_type_ids, (num_in_front, 0))
        encoded = mm_encoder_outputs or {}
        if unknown := sorted(set(encoded) - set(TOKEN_TYPES)):
            raise ValueError(f"mm_encoder_outputs must have no keys but 'image' and 'video', got {unknown}.")

        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        num_media = (pixel_values is not None) + (pixel_values_videos is not None)
        calls_once = cache is None and mm_encoder_outputs is None and self._peers_wait_for_vision()
        nothing = None
        if calls_once and num_media == 2:
            image_outputs, video_outputs = self._encode_together(images, videos, kwargs)
        else:
            image_outputs = self._encode_modality("image", *images, encoded, kwargs)
            video_outputs = self._encode_modality("video", *videos, encoded, kwargs)
            if calls_once and num_media == 0:
                nothing = self._nothing_seen(input_ids if inputs_embeds is None else inputs_embeds)
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
        """Tell a user who forgot the pixels; a prompt is long enough for the look at its ids to cost nothing."""
        if self.training or is_torchdynamo_compiling() or input_ids.shape[1] == 1:
            return
        for modality, given in features.items():
            if given is None and self.locate_placeholders(modality, input_ids, None, mm_token_type_ids).any():
                logger.warning_once(
                    f"input_ids holds {modality} tokens, but no {modality} inputs came with it (neither pixels nor "
                    f"mm_encoder_outputs['{modality}']): the model reads the tokens' own embeddings."
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
        """Run the model; see `MiniMaxM3VLModel.forward` for the inputs that are not listed here.

        Args:
            labels (`torch.LongTensor`, *optional*): `(B, T)` ids to predict, not shifted, -100 where nothing is. Asks
                for the loss, whose denominator is `num_items_in_batch` where that is given.
            output_router_logits (`bool`, *optional*): Return router logits and the load-balancing loss, and add that,
                weighted, to the loss. Default: `config.text_config.output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): How many last tokens get logits (0: all), or which
                positions. Default: 0.
            skip_logits (`bool`, *optional*): Whether a call with labels computes the loss without ever holding logits,
                which are then None. Default: `self.skip_logits`, and without that, whether the model is in training
                mode.
            output_indexer_loss (`bool`, *optional*): Whether to return the indexers' loss, which is added to the loss
                with the weight `config.text_config.indexer_loss_coef`. Default: whether that is above 0, and there are
                labels or the model is in training mode.
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        if output_indexer_loss is None:
            output_indexer_loss = text_config.indexer_loss_coef > 0 and (self.training or labels is not None)

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
            output_router_logits=output_router_logits,
            output_indexer_loss=output_indexer_loss,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            return_dict=True,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        if isinstance(logits_to_keep, int):
            labels = without_targets_of_padding(labels, attention_mask, kwargs.get("ignore_index", -100))
        logits, loss = self.logits_and_loss(hidden_states, labels, skip_logits, **kwargs)

        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                text_config.num_local_experts,
                text_config.num_experts_per_tok,
                attention_mask=attention_mask,
                cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            )
            if loss is not None:
                share = batch_share(labels, loss.device, **kwargs)
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device) * share

        divergence, kl_loss = outputs.indexer_divergence, None
        if divergence is not None:
            real = real_tokens(attention_mask, kwargs.get("cu_seq_lens_q"), *divergence.shape)
            kl_loss = indexer_loss(divergence, real, labels, logits_to_keep=logits_to_keep, **kwargs)
            if loss is not None:
                loss = loss + text_config.indexer_loss_coef * kl_loss.to(loss.device)

        return MiniMaxM3VLCausalLMOutputWithPast(
            **output_fields(
                loss=loss,
                aux_loss=aux_loss,
                logits=logits,
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.router_logits,
                image_outputs=outputs.image_outputs,
                video_outputs=outputs.video_outputs,
                indexer_loss=kl_loss,
            )
        )
