"""Features of images and videos, from one call of the vision tower where several processes have to stay in step."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import accepts_precomputed_kwargs, can_return_tuple, merge_with_config_defaults

from configuration_minimax_m3 import MiniMaxM3VLConfig

from ..runtime.gathered_weights import gathers_weights
from .multimodal_generation import PIXEL_NAMES
from .vision import MiniMaxM3VLMultiModalProjector, MiniMaxM3VLVisionModel


def _check_grid_is_given(modality: str, grid_thw: torch.Tensor | None) -> None:
    if grid_thw is None:
        raise ValueError(f"{PIXEL_NAMES[modality]} needs {modality}_grid_thw, as the processor returns it, got None.")


def _pop_precomputed(modality: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the tower's arguments for `modality` from `kwargs`, and return them."""
    # The rest of kwargs belongs to the language model (packing, output flags) and means nothing to the tower.
    return {name: kwargs.pop(name) for name in tuple(kwargs) if name.startswith(f"{modality}_")}


class VisionFeaturesMixin:
    """Encodes media with `self.vision_tower` and `self.multi_modal_projector`.

    Several processes have to do the same things in the same order, whatever media their rows have. Data parallelism
    waits for a gradient of every trainable parameter. Weights that are sharded over the processes (FSDP, ZeRO-3) are
    gathered by all of them at once.

    So where other processes may wait for the vision tower, every pass calls tower and projector exactly once. It
    encodes images and videos together. Where there are neither, it encodes a blank image of one token, which changes
    nothing but gives every trained weight a gradient of zeros. Other processes may wait in two cases: the weights of
    tower or projector are sharded; or one of the weights is trained, and the pass runs in training mode with
    gradients.

    Two kinds of passes are exempt: those that get a cache, as in `generate`, and those that get `mm_encoder_outputs`,
    even an empty dict. The caller then makes sure that all processes encode alike.
    """

    # Of the model.
    config: MiniMaxM3VLConfig
    training: bool
    vision_tower: MiniMaxM3VLVisionModel
    multi_modal_projector: MiniMaxM3VLMultiModalProjector

    @accepts_precomputed_kwargs(modality="image")
    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode images and project them into the embedding space of the language model.

        Args:
            pixel_values (`torch.Tensor`): (patches, channels * temporal_patch * patch * patch) patches of all images.
            image_grid_thw (`torch.Tensor`): (images, 3) patches along time, height and width.
            **kwargs: Passed to the vision tower, which documents the precomputed values that it takes.

        Returns:
            The vision tower's output. Its `pooler_output` is a tuple of features (merged patches, hidden), one entry
            for each image.
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

    def encode_media(
        self,
        images: tuple[torch.Tensor | None, torch.Tensor | None],
        videos: tuple[torch.Tensor | None, torch.Tensor | None],
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        device: torch.device,
        may_call_once: bool,
        kwargs: dict[str, Any],
    ) -> tuple[BaseModelOutputWithPooling | None, BaseModelOutputWithPooling | None, torch.Tensor | None]:
        """Encode all media of a pass.

        Args:
            images, videos (`tuple`): Pixels and grid, or twice None.
            mm_encoder_outputs (`dict`, *optional*): Outputs that were computed before, under `"image"` and `"video"`.
            device (`torch.device`): Where the tokens are.
            may_call_once (`bool`): Whether the class's rule for several processes applies to this pass.
            kwargs (`dict`): Arguments of `forward`. Those of the tower (`image_...`, `video_...`) are taken out.

        Returns:
            The outputs for images and for videos, each None where there are none; and a scalar zero that depends on
            all weights of tower and projector, or None where no other process needs it.
        """
        num_media = (images[0] is not None) + (videos[0] is not None)
        calls_once = may_call_once and mm_encoder_outputs is None and self._peers_wait_for_vision()
        if calls_once and num_media == 2:
            return *self._encode_together(images, videos, kwargs), None
        encoded = mm_encoder_outputs or {}
        image_outputs = self._encode_modality("image", *images, encoded, kwargs)
        video_outputs = self._encode_modality("video", *videos, encoded, kwargs)
        nothing = self._nothing_seen(device) if calls_once and num_media == 0 else None
        return image_outputs, video_outputs, nothing

    def _peers_wait_for_vision(self) -> bool:
        """Whether other processes would wait if this one left out tower and projector. The class says when."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return False
        parts = (self.vision_tower, self.multi_modal_projector)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        if self.training and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return True
        return gathers_weights(*parts)

    def _nothing_seen(self, device: torch.device) -> torch.Tensor:
        """A scalar zero that depends on every weight of tower and projector, on `device`."""
        pixel_values, grid_thw = self.vision_tower.blank_image(device)
        features = self._encode_pixels(pixel_values, grid_thw).pooler_output[0]
        # A sum of no elements is zero, and its gradients are zeros. 0 * features would be NaN where a feature
        # overflows.
        return features[:0].sum()

    def _encode_together(
        self,
        images: tuple[torch.Tensor, torch.Tensor | None],
        videos: tuple[torch.Tensor, torch.Tensor | None],
        kwargs: dict[str, Any],
    ) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """Features of images and of videos, each given as a pair of pixels and grid, from one call of the tower."""
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
        """The tower's output for one modality, from its pixels or already encoded. None where there are neither."""
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
