"""What the models return. The fields not named here are those of Transformers, under its names.

B is the batch size, T the number of tokens of this pass, H the hidden size of the language model.

`cache` is the cache, extended by this pass. `hidden_states` are `(B, T, H)` after the embedding and after every layer,
`attentions` `(B, heads, T, keys)` probabilities of every layer, `router_logits` `(B * T, experts)` of each layer with
experts. `image_outputs` and `video_outputs` are the vision tower's, whose `pooler_output` holds the projected features
`(merged patches, H)` of each image, or each row of `video_grid_thw`. `loss` is the language-modelling loss, with the
weighted `aux_loss` (load balancing) and `indexer_loss` added where these were asked for. `logits` are
`(B, kept tokens, vocabulary)`, None where the loss was computed without them: see `skip_logits` of `forward`.
"""

from dataclasses import dataclass

import torch

from ..runtime.transformers_versions import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    MultimodalCausalLMOutputWithPast,
    MultimodalOutputWithPast,
)


@dataclass
class MiniMaxM3VLTextModelOutputWithPast(MoeModelOutputWithPast):
    """Output of `MiniMaxM3VLTextModel`.

    Args:
        indexer_divergence (`torch.Tensor`, *optional*): `(B, T)` float32: the KL divergence of the indexers from the
            main attention, in nats, mean over index heads and sparse layers. Unspecified at pads.
    """

    indexer_divergence: torch.Tensor | None = None


@dataclass
class MiniMaxM3VLTextCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of `MiniMaxM3VLForCausalLM`.

    Args:
        indexer_loss (`torch.Tensor`, *optional*): Scalar, before its coefficient: the divergence of the indexers from
            the main attention, in nats, over the tokens that the language loss counts.
    """

    indexer_loss: torch.Tensor | None = None


@dataclass
class MiniMaxM3VLModelOutputWithPast(MultimodalOutputWithPast):
    """Output of `MiniMaxM3VLModel`.

    Args:
        indexer_divergence (`torch.Tensor`, *optional*): As in `MiniMaxM3VLTextModelOutputWithPast`.
    """

    indexer_divergence: torch.Tensor | None = None


@dataclass
class MiniMaxM3VLCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    """Output of `MiniMaxM3SparseForConditionalGeneration`.

    Args:
        indexer_loss (`torch.Tensor`, *optional*): As in `MiniMaxM3VLTextCausalLMOutputWithPast`.
    """

    indexer_loss: torch.Tensor | None = None
