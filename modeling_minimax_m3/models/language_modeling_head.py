"""The end of a language model's forward, shared by the text-only and the composite model: logits, and all losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import is_torchdynamo_compiling

from ..fused.support import is_watched
from ..runtime.layout_building import real_tokens
from ..training.indexer_loss import indexer_loss
from ..training.language_loss import batch_share, causal_lm_loss, without_targets_of_padding
from ..training.router_loss import load_balancing_loss
from .outputs import MiniMaxM3VLModelOutputWithPast, MiniMaxM3VLTextModelOutputWithPast


class LanguageModelingHead:
    """The end of a language model's forward: logits, loss, or both. A mixin for models that have an `lm_head`.

    Attributes:
        skip_logits (`bool`, *optional*): Default of `skip_logits` of `forward`. None: in training mode a call with
            labels computes the loss without logits, and any other call returns logits. True: every call with labels
            does without logits, evaluation included. False: every call returns logits.
    """

    skip_logits: bool | None = None
    # Of the model.
    config: PreTrainedConfig
    training: bool
    model: nn.Module
    lm_head: nn.Module
    loss_function: Callable[..., torch.Tensor]

    def logits_and_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, vocabulary) of hidden states (B, T, hidden), and their loss against labels (B, T).

        Raises:
            ValueError: `labels` have another shape, or `skip_logits` is True where logits are needed.
        """
        if labels is None:
            if skip_logits:
                raise ValueError("`skip_logits=True` asks for the loss alone, which needs `labels`, got None")
            return self.lm_head(hidden_states), None
        if labels.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`labels` must have one id per token with logits, shape {tuple(hidden_states.shape[:2])}, got "
                f"{tuple(labels.shape)}. `logits_to_keep` keeps logits of fewer tokens: leave it out where there are "
                "labels."
            )
        wanted = self.skip_logits if skip_logits is None else skip_logits
        is_standard = self.loss_function is ForCausalLMLoss
        if wanted and not is_standard:
            raise ValueError(
                "`skip_logits=True` computes the standard causal language-modelling loss, but the model's "
                f"`loss_function` is {self.loss_function}, which needs logits"
            )
        if wanted or (wanted is None and self.training and is_standard):
            return None, causal_lm_loss(self.lm_head, hidden_states, labels, **kwargs)
        logits = self.lm_head(hidden_states)
        return logits, self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def flags_of_losses(
        self, labels: torch.Tensor | None, output_router_logits: bool | None, output_indexer_loss: bool | None
    ) -> dict[str, bool]:
        """The two flags of `forward`. The config decides about one that is None."""
        config = self.config.get_text_config()
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        if output_indexer_loss is None:
            output_indexer_loss = config.indexer_loss_coef > 0 and (self.training or labels is not None)
        return {"output_router_logits": output_router_logits, "output_indexer_loss": output_indexer_loss}

    def outputs_to_keep(self, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor) -> dict[str, int]:
        """What tells the model below that some of the last tokens alone are read. A loss and hooks read all of them."""
        if is_torchdynamo_compiling() or not isinstance(logits_to_keep, int) or logits_to_keep <= 0:
            return {}
        reads_all = labels is not None or is_watched(self.model)
        return {} if reads_all else {"outputs_to_keep": int(logits_to_keep)}  # True counts as 1

    def logits_and_losses(
        self,
        outputs: MiniMaxM3VLTextModelOutputWithPast | MiniMaxM3VLModelOutputWithPast,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        *,
        output_router_logits: bool,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """What the head adds to the outputs of the model below it.

        Args:
            outputs (model output): `last_hidden_state` (B, T, hidden), and `router_logits` and `indexer_divergence`
                where they were computed.
            labels (`torch.Tensor`, *optional*): (B, T), not shifted. None: there is no loss to add anything to.
            attention_mask: As the model got it; only a (B, S) mask tells which tokens are padding.
            output_router_logits (`bool`): Whether to compute the routers' loss.
            logits_to_keep (`int` or `torch.Tensor`): How many of the last tokens, or which ones, get logits. 0: all.
            skip_logits (`bool`, *optional*): See the class.
            **kwargs: Those of the loss function, and `cu_seq_lens_q`.

        Returns:
            `logits`, `loss` (the weighted sum of all), `aux_loss` (the routers') and `indexer_loss`, each None where
            it was not computed.
        """
        config = self.config.get_text_config()
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            labels = without_targets_of_padding(labels, attention_mask, kwargs.get("ignore_index", -100))
        kept = slice_logits_to_keep(hidden_states, logits_to_keep)
        logits, loss = self.logits_and_loss(kept, labels, skip_logits, **kwargs)

        real = None
        if output_router_logits or outputs.indexer_divergence is not None:
            real = real_tokens(attention_mask, kwargs.get("cu_seq_lens_q"), *hidden_states.shape[:2])
        router_loss = None
        if output_router_logits:
            num_experts, top_k = config.num_local_experts, config.num_experts_per_tok
            router_loss = load_balancing_loss(outputs.router_logits, num_experts, top_k, real)
            if loss is not None:
                share = batch_share(labels, loss.device, **kwargs)
                loss = loss + config.router_aux_loss_coef * router_loss.to(loss.device) * share

        kl_loss = None
        if outputs.indexer_divergence is not None:
            kl_loss = indexer_loss(outputs.indexer_divergence, real, labels, logits_to_keep=logits_to_keep, **kwargs)
            if loss is not None:
                loss = loss + config.indexer_loss_coef * kl_loss.to(loss.device)
        return {"logits": logits, "loss": loss, "aux_loss": router_loss, "indexer_loss": kl_loss}
