"""The routers' loss, which keeps the experts equally busy."""

from collections.abc import Sequence

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], num_experts: int, top_k: int, real: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch Transformer's load-balancing loss over the real tokens of a forward pass.

    Args:
        router_logits (`Sequence[torch.Tensor]`): One (B * T, E) tensor for each layer with experts.
        num_experts (`int`): E, the number of experts.
        top_k (`int`): Experts chosen per token.
        real (`torch.Tensor`, *optional*): (B, T) boolean, False at padding, which does not count. None: all tokens are
            real.

    Returns:
        A float32 scalar: `num_experts` times the sum over experts of the fraction of choices that go to an expert,
        times its mean probability.

    Raises:
        ValueError: `router_logits` is empty.
    """
    if not router_logits:
        raise ValueError("router_logits is empty: the model has no layer with routed experts to balance.")
    if real is not None:
        real = real.reshape(-1)
        real = (
            real | ~real.any()
        )  # of padding alone, all count: a mean over no tokens would be NaN, gradients included
    return load_balancing_loss_func(tuple(router_logits), num_experts, top_k, real)
