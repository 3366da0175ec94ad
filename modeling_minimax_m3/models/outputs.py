"""What the models return. The fields not named here are those of Transformers, under its names.

B is the number of rows, T the number of tokens of this pass, S the number of keys.

- `cache`: the cache, extended by this pass.
- `hidden_states`: (B, T, hidden), after the embedding and after every layer.
- `attentions`: (B, H_q, T, S) probabilities of every layer.
- `router_logits`: (B * T, experts) of each layer with experts.
- `image_outputs`, `video_outputs`: outputs of the vision tower. Their `pooler_output` holds the projected features
  (merged patches, hidden) of each image, or of each row of `video_grid_thw`.
- `loss`: the language-modelling loss, plus the weighted `aux_loss` (load balancing) and `indexer_loss` where these
  were requested.
- `logits`: (B, kept tokens, vocabulary). None where the loss was computed without them: see `skip_logits` of
  `forward`.
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
        indexer_divergence (`torch.Tensor`, *optional*): (B, T) float32, the KL divergence of the indexers from the
            main attention, in nats, the mean over index heads and sparse layers. Unspecified at padding.
    """

    indexer_divergence: torch.Tensor | None = None


@dataclass
class MiniMaxM3VLTextCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of `MiniMaxM3VLForCausalLM`.

    Args:
        indexer_loss (`torch.Tensor`, *optional*): Scalar without its coefficient: the divergence of the indexers from
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
