"""Scores of whole sequences, as for reward models: a linear head on the last real token of each sequence."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

from ..runtime.layout_building import build_layout
from ..runtime.transformers_versions import output_fields, takes_cache
from .pretrained import MiniMaxM3VLPreTrainedModel


class SequenceClassificationHead(GenericForSequenceClassification):
    """Stock's head, which reads the last real token of each sequence wherever padding and packed sequences lie."""

    # Of the model.
    config: PreTrainedConfig
    model: nn.Module
    loss_function: Callable[..., torch.Tensor]

    def pooled(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        cu_seq_lens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The hidden state (sequences, hidden) of the last real token of each sequence, of states (B, T, hidden).

        The sequences are those of the model: `cu_seq_lens` if given, else those of a (B, S) mask, else those that
        restart `position_ids`. Where nothing marks padding, tokens with the id of `pad_token_id` at the end of a row
        are padding.

        Raises:
            ValueError: Nothing says where the sequences of a batch end.
        """
        batch, num_new = hidden_states.shape[:2]
        device = hidden_states.device
        if cu_seq_lens is not None:
            last = (cu_seq_lens[1:] - 1)[cu_seq_lens.diff() > 0]
            return hidden_states.flatten(0, 1)[last.to(device)]
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
        if mask is None and position_ids is not None and cache is None:
            layout = build_layout(None, position_ids, None, batch, num_new, device)
            if layout.is_packed and layout.cu_seqlens is not None:
                return hidden_states.flatten(0, 1)[layout.cu_seqlens[1:] - 1]
        pad_token_id = self.config.get_text_config().pad_token_id
        if mask is not None:
            is_real = mask[:, -num_new:] != 0
        elif input_ids is None or (batch == 1 and pad_token_id is None):
            return hidden_states[:, -1]
        elif pad_token_id is None:
            raise ValueError(
                f"`attention_mask` must mark the padding of a batch of {batch} where the config has no `pad_token_id`."
            )
        else:
            is_real = input_ids != pad_token_id
        last = (is_real.to(device) * torch.arange(num_new, device=device)).argmax(-1)
        return hidden_states[torch.arange(batch, device=device), last]

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Run the model. The model without a head documents the inputs that are not listed here.

        Args:
            labels (`torch.Tensor`, *optional*): One for each sequence: (sequences,) class indices, or numbers for
                regression where `config.num_labels` is 1, or (sequences, num_labels) for several labels at once. With
                labels the model returns the loss.

        Returns:
            `logits` (sequences, num_labels). The sequences are the rows, or the documents of packed rows.

        Raises:
            ValueError: The inputs contradict each other, or `labels` has another number of sequences.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        if cu_seq_lens is None:
            cu_seq_lens = kwargs.get("cu_seq_lens_k")
        logits = self.score(
            self.pooled(outputs.last_hidden_state, input_ids, attention_mask, position_ids, cache, cu_seq_lens)
        )
        loss = None
        if labels is not None:
            if labels.shape[:1] != logits.shape[:1]:
                raise ValueError(
                    f"`labels` must have one entry for each of the {logits.shape[0]} sequences, got shape "
                    f"{tuple(labels.shape)}."
                )
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            **output_fields(
                loss=loss,
                logits=logits,
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        )


class MiniMaxM3VLTextForSequenceClassification(SequenceClassificationHead, MiniMaxM3VLPreTrainedModel):
    """The language model with a head for scores of whole texts."""

    config: MiniMaxM3VLTextConfig
    input_modalities = ("text",)


class MiniMaxM3VLForSequenceClassification(SequenceClassificationHead, MiniMaxM3VLPreTrainedModel):
    """MiniMax-M3 with a head for scores of whole sequences, images and videos included."""

    config: MiniMaxM3VLConfig

    @takes_cache
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
        labels: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Run the model. See `SequenceClassificationHead.forward` and `MiniMaxM3VLModel.forward`."""
        # Under their names, because `Trainer` finds the columns that a model reads in this signature.
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )
