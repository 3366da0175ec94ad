"""The indexers' loss: the KL divergence of their scores from the main attention, over the learned tokens."""

import torch
from torch import nn


def indexer_loss(
    indexer_kl: torch.Tensor,
    real: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs,
) -> torch.Tensor:
    """Sum of the KL divergence over the tokens that the language loss counts, divided by that loss's denominator.

    The losses of the micro-batches of an optimizer step therefore add up to the loss of their batch.

    Args:
        indexer_kl (`torch.Tensor`): (B, T), the KL divergence of each token, the mean over index heads and layers.
        real (`torch.Tensor`, *optional*): (B, T) boolean, False at padding, which never counts. None: all tokens are
            real.
        labels (`torch.Tensor`, *optional*): (B, T), not shifted. Token t counts where the label of t + 1 is not
            `ignore_index`. Without labels every real token counts.
        num_items_in_batch, ignore_index, shift_labels, **kwargs: As in Transformers' `ForCausalLMLoss`.
        logits_to_keep (`int` or `torch.Tensor`): The tokens that the labels are for: how many of the last ones (0:
            all), or which ones.

    Returns:
        A float32 scalar in nats. NaN where no token counts and `num_items_in_batch` is not given.
    """
    if real is None:
        real = torch.ones_like(indexer_kl, dtype=torch.bool)
    real = real.to(indexer_kl.device)
    if labels is not None:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        indexer_kl, real = indexer_kl[:, kept], real[:, kept]
    counted = real
    if shift_labels is None and labels is not None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if shift_labels is not None:
        counted = shift_labels.view(indexer_kl.shape).to(indexer_kl.device) != ignore_index
    if num_items_in_batch is None:
        num_items_in_batch = counted.sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(indexer_kl.device)
    return indexer_kl.masked_fill(~(counted & real), 0.0).sum() / num_items_in_batch
