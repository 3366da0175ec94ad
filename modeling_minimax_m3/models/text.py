"""The text model: decoder layers over dense or sparse attention, and the causal language model."""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..fused.rms_norm import add_rms_norm
from ..fused.shards import arrived
from ..fused.support import is_watched, runs_as_written
from ..layers import token_parts
from ..layers.attention import MiniMaxM3VLAttention
from ..layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLSparseMoeBlock, MiniMaxM3VLTopKRouter
from ..layers.normalization import MiniMaxM3VLRMSNorm
from ..layers.rotary import MiniMaxM3VLRotaryEmbedding
from ..layers.token_parts import last_tokens, may_run_in_parts, parts_of
from ..runtime.cache import MiniMaxM3VLDynamicLayer
from ..runtime.layout_building import build_layout
from ..runtime.sequence_layout import SequenceLayout, uniform_layout
from ..runtime.transformers_versions import output_fields, takes_cache
from .cache_adoption import adopt_cache
from .language_modeling_head import LanguageModelingHead
from .outputs import MiniMaxM3VLTextCausalLMOutputWithPast, MiniMaxM3VLTextModelOutputWithPast
from .pretrained import MiniMaxM3VLPreTrainedModel
from .text_generation import MiniMaxM3GenerationMixin

logger = logging.get_logger(__name__)


class MiniMaxM3VLDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP with residual connections."""

    def __init__(self, config: MiniMaxM3VLTextConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = MiniMaxM3VLAttention(config, layer_idx)
        is_moe = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = MiniMaxM3VLSparseMoeBlock(config) if is_moe else MiniMaxM3VLDenseMLP(config)
        self.input_layernorm = MiniMaxM3VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MiniMaxM3VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: SequenceLayout,
        cache: Cache | None = None,
        output_indexer_loss: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden states (B, T, hidden) to those of the tokens that attend, which `MiniMaxM3VLAttention` explains.

        With `output_indexer_loss` it also returns `indexer_kl` (B, T), None where there is no indexer.
        """
        attended, _, indexer_kl = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            output_indexer_loss=output_indexer_loss,
            **kwargs,
        )
        hidden_states = last_tokens(hidden_states, attended.shape[1])
        norm = self.post_attention_layernorm
        if runs_as_written(norm, MiniMaxM3VLRMSNorm) and norm.weight.device == attended.device:
            normalized, hidden_states = add_rms_norm(hidden_states, attended, norm.weight, norm.eps)
        else:
            hidden_states = hidden_states + attended
            normalized = norm(hidden_states)
        del attended  # as large as the hidden states
        if self._adds_in_parts(normalized):
            hidden_states = hidden_states.contiguous()
            self.mlp.add_in_parts(hidden_states, normalized)
        else:
            hidden_states = hidden_states + self.mlp(normalized)
        # Gradient checkpointing sees what is returned alone, not what a hook or an attribute collects.
        return (hidden_states, indexer_kl) if output_indexer_loss else hidden_states

    def _adds_in_parts(self, normalized: torch.Tensor) -> bool:
        """Whether the MLP adds to the residual in place. Nothing else holds that sum, unless the norm has a hook."""
        return (
            type(self.mlp) in (MiniMaxM3VLDenseMLP, MiniMaxM3VLSparseMoeBlock)
            and self.mlp.runs_in_parts(normalized.shape[:-1].numel())
            and not is_watched(self.post_attention_layernorm)
        )


def _is_as_written(layer: nn.Module) -> bool:
    """Whether the layer's modules are our own. What others put in their place may read the output of all tokens."""
    return (
        type(layer) is MiniMaxM3VLDecoderLayer
        and type(layer.self_attn) is MiniMaxM3VLAttention
        and type(layer.mlp) in (MiniMaxM3VLDenseMLP, MiniMaxM3VLSparseMoeBlock)
        and type(layer.post_attention_layernorm) is MiniMaxM3VLRMSNorm
    )


class MiniMaxM3VLTextModel(MiniMaxM3VLPreTrainedModel):
    """The language model without a head.

    Each token gets the output that it has in an unpadded run of its own sequence. That holds for padding on either
    side, for packing (`cu_seq_lens_q` / `cu_seq_lens_k`, or `position_ids` that restart), for chunked prefill and for
    caching.
    """

    config: MiniMaxM3VLTextConfig
    input_modalities = ("text",)
    _no_split_modules = ["MiniMaxM3VLDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MiniMaxM3VLTopKRouter, index=0),
        "hidden_states": MiniMaxM3VLDecoderLayer,
        "attentions": MiniMaxM3VLAttention,
    }

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MiniMaxM3VLDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = MiniMaxM3VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniMaxM3VLRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        output_indexer_loss: bool | None = None,
        outputs_to_keep: int = 0,
        **kwargs,
    ) -> MiniMaxM3VLTextModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, T). Exactly one of this and `inputs_embeds` is given.
            attention_mask (`torch.Tensor`, *optional*): (B, S) with 1 for real tokens, cached ones included; or a
                (B, heads, T, S) mask of your own, boolean or additive, which makes every layer quadratic in tokens.
            position_ids (`torch.LongTensor`, *optional*): (B, T), for the rotary embedding. Without a mask and a
                cache, a position that does not grow starts a new packed sequence.
            cache (`Cache`, *optional*): Keys and values of earlier tokens. It receives those of this pass.
            inputs_embeds (`torch.FloatTensor`, *optional*): (B, T, hidden).
            use_cache (`bool`, *optional*): Whether to return a cache. Packed sequences never make one.
            cu_seq_lens_q, cu_seq_lens_k (`torch.Tensor`, *optional*): (sequences + 1,) offsets of packed sequences
                among the B * T tokens.
            output_indexer_loss (`bool`, *optional*): Whether to return the indexers' KL divergence. Default: whether
                `config.indexer_loss_coef` is above 0 and the model is in training mode.
            outputs_to_keep (`int`): How many of the last tokens need a `last_hidden_state`. 0: all. Of the others, a
                long pass with a cache computes only keys and values in the last layer, and then returns
                `last_hidden_state` (B, outputs_to_keep, hidden). Any other pass returns that of all tokens.

        Raises:
            ValueError: The inputs have a wrong shape, or contradict each other.
            TypeError: A cache comes under another name.
        """
        for name, value in kwargs.items():
            if isinstance(value, Cache):  # another release of Transformers may use that name; the past would be lost
                raise TypeError(f"`{name}` is no argument of this model: pass the cache as `cache`")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        if inputs_embeds is None:
            if input_ids.dim() != 2:
                raise ValueError(f"`input_ids` must have shape (batch, tokens), got {tuple(input_ids.shape)}")
            inputs_embeds = self.embed_tokens(input_ids)
        batch, num_new = inputs_embeds.shape[:2]
        if batch == 0 or num_new == 0:
            raise ValueError(f"the input must hold at least one token, got batch {batch} and {num_new} tokens")
        if cache is not None:
            cache = self._usable_cache(cache, batch)
        kwargs.setdefault("output_attentions", bool(self.config.output_attentions))
        layout = build_layout(
            attention_mask,
            position_ids,
            cache,
            batch,
            num_new,
            inputs_embeds.device,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            may_be_packed=cache is None,
            num_heads=self.config.num_attention_heads,
            whole_cache=kwargs["output_attentions"],
        )
        self._warn_past_context_length(cache, layout)
        if use_cache and cache is None and not layout.is_packed:
            cache = DynamicCache(config=self.config)
            adopt_cache(cache, self._layer_types(), batch)
        if position_ids is None:
            position_ids = layout.positions()
        elif (
            position_ids.dim() != 2
            or position_ids.shape[0] not in (1, batch)
            or position_ids.shape[1] != num_new
            or position_ids.is_floating_point()
        ):
            raise ValueError(
                f"`position_ids` must be integers of shape (batch {batch} or 1, tokens {num_new}), "
                f"got {position_ids.dtype} of shape {tuple(position_ids.shape)}"
            )

        hidden_states = arrived(inputs_embeds)
        del inputs_embeds  # so that they are freed after the first layer
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        if output_indexer_loss is None:
            output_indexer_loss = self.training and self.config.indexer_loss_coef > 0
            if output_indexer_loss and not is_torchdynamo_compiling():
                # The models with a head pass the flag. Trainers that call this model alone do not know the loss.
                logger.warning_once(
                    "`indexer_loss_coef` is above 0, but the model was called without its head (as the trainers of TRL "
                    "do), so nothing adds the indexers' loss to the language loss. Add `indexer_divergence` of the "
                    "output yourself (with `output_indexer_loss=True`, which also ends this warning), train with "
                    "`Trainer`, or set the coefficient to 0."
                )
        indexer_kls = []
        layers = self.layers[: self.config.num_hidden_layers]
        layouts = [layout] * len(layers)
        if not output_indexer_loss and not kwargs["output_attentions"] and self._takes_parts(layout, cache):
            num_whole = len(layers)
            if self._shortens_last_layer(layout, outputs_to_keep):
                layouts[-1] = layout.of_last_tokens(outputs_to_keep)
                num_whole -= 1
            if self._runs_in_parts(layout):
                hidden_states = hidden_states.clone()  # they may be the caller's
                self._run_in_parts(layers[:num_whole], hidden_states, position_embeddings, cache, use_cache, **kwargs)
                layers, layouts = layers[num_whole:], layouts[num_whole:]
        for layer, its_layout in zip(layers, layouts):
            outputs = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=its_layout,
                cache=cache,
                use_cache=use_cache,
                output_indexer_loss=output_indexer_loss,
                **kwargs,
            )
            hidden_states, indexer_kl = outputs if output_indexer_loss else (outputs, None)
            if indexer_kl is not None:
                indexer_kls.append(indexer_kl)
        indexer_kl = None
        if indexer_kls:
            indexer_kl = sum(other.to(hidden_states.device) for other in indexer_kls) / len(indexer_kls)
            self._warn_of_frozen_indexers(indexer_kl)
        return MiniMaxM3VLTextModelOutputWithPast(
            **output_fields(last_hidden_state=self.norm(hidden_states), cache=cache, indexer_divergence=indexer_kl)
        )

    def _takes_parts(self, layout: SequenceLayout, cache: Cache | None) -> bool:
        """Whether a layer can read some of the tokens alone, because the cache holds the keys of those before them."""
        return (
            not is_torchdynamo_compiling()  # first, so that no graph is guarded on the number of rows
            and cache is not None
            and (layout.is_uniform or layout.is_cached)
            and not getattr(cache, "offloading", False)
            and len(cache.layers) >= self.config.num_hidden_layers
            and all(isinstance(layer, MiniMaxM3VLDynamicLayer) for layer in cache.layers)
        )

    def _runs_in_parts(self, layout: SequenceLayout) -> bool:
        """Whether each layer reads the tokens in parts. A pass that continues a cache reads them at once."""
        return layout.is_uniform and may_run_in_parts(
            layout.num_new, self._part_of_row(layout.batch), self.layers.modules()
        )

    def _shortens_last_layer(self, layout: SequenceLayout, outputs_to_keep: int) -> bool:
        """Whether the last layer attends from the tokens alone that are asked for an output. No GPU has run this yet."""
        last_layer = self.layers[self.config.num_hidden_layers - 1]
        return (
            self.device.type == "cpu"
            and 0 < outputs_to_keep < layout.num_new
            and layout.query_order is None
            and _is_as_written(last_layer)
            and type(self.norm) is MiniMaxM3VLRMSNorm
            and may_run_in_parts(layout.num_new, token_parts.TOKENS_OF_A_LAST_LAYER, last_layer.modules())
            and not is_watched(self)  # a hook may read the output of all tokens
            and not is_watched(self.norm)
        )

    @staticmethod
    def _part_of_row(batch: int) -> int:
        """Tokens of each row that pass a layer at a time."""
        return max(token_parts.TOKENS_OF_A_LAYER // batch, token_parts.TOKENS_OF_A_LAYER // 8)

    def _run_in_parts(
        self,
        layers: nn.ModuleList,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache,
        use_cache: bool | None,
        **kwargs,
    ) -> None:
        """Put the layers' output in place of their input. A layer reads all parts before the next layer does."""
        batch, num_new = hidden_states.shape[:2]
        for layer, cache_layer in zip(layers, cache.layers):
            for part in parts_of(num_new, self._part_of_row(batch)):
                num_part = part.stop - part.start
                layout = uniform_layout(batch, part.stop, hidden_states.device)
                if part.start > 0:
                    layout = layout.of_last_tokens(num_part)
                hidden_states[:, part] = layer(
                    hidden_states[:, part],
                    position_embeddings=tuple(states[:, part] for states in position_embeddings),
                    attention_mask=layout,
                    cache=cache,
                    use_cache=use_cache,
                    **kwargs,
                )
                cache_layer.reserve(num_new)

    def _layer_types(self) -> list[str]:
        # `generate` lowers the number of layers while the first ones draft for all of them.
        return self.config.layer_types[: self.config.num_hidden_layers]

    def _usable_cache(self, cache: Cache, batch: int) -> Cache | None:
        adopt_cache(cache, self._layer_types(), batch)
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        # The backward runs each layer again, and would write to the cache again.
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"`cache` holds {int(cache.get_seq_length())} tokens, which gradient checkpointing cannot read in a "
                "forward with gradients. Call the model under `torch.no_grad()` or in evaluation mode, or switch "
                "gradient checkpointing off with `model.gradient_checkpointing_disable()`."
            )
        logger.warning_once("`cache` is not filled: gradient checkpointing cannot be combined with it.")
        return None

    def _warn_of_frozen_indexers(self, indexer_kl: torch.Tensor) -> None:
        """Warn once of a loss that trains nothing, because its gradient reaches frozen indexers alone."""
        if not self.training or not torch.is_grad_enabled() or indexer_kl.requires_grad or is_torchdynamo_compiling():
            return
        coef = self.config.indexer_loss_coef
        if coef > 0:
            logger.warning_once(
                f"`indexer_loss_coef` is {coef}, but the indexers' parameters are frozen, so the indexers' loss is added "
                f"and trains nothing. `model.set_indexer_training({coef})`, before adapters and the optimizer are made, "
                "trains them; `model.set_indexer_training(0)` leaves the loss out."
            )

    def _warn_past_context_length(self, cache: Cache | None, layout: SequenceLayout) -> None:
        """Warn once of sequences longer than the config says, as `generate` does. They run all the same."""
        limit = self.config.max_position_embeddings
        # The dynamic type stretches as far as needed.
        if is_torchdynamo_compiling() or self.config.rope_parameters["rope_type"] == "dynamic":
            return
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, torch.Tensor):  # a static cache has its own bound, and reading it waits for the device
            past = 0
        # Rows of that length may still consist of shorter sequences and padding.
        if past + layout.num_new <= limit:
            return
        longest = past + layout.num_new if layout.is_uniform else layout.longest_sequence()
        if longest > limit:
            logger.warning_once(
                f"The input has sequences of more than `config.max_position_embeddings` = {limit} tokens. Expect worse "
                "output past it, unless `config.rope_parameters` stretch the positions or the model was trained further."
            )


class MiniMaxM3VLForCausalLM(LanguageModelingHead, MiniMaxM3VLPreTrainedModel, MiniMaxM3GenerationMixin):
    """The language model with a head, for text-only checkpoints."""

    config: MiniMaxM3VLTextConfig
    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__(config)
        self.model = MiniMaxM3VLTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def router_aux_loss_coef(self) -> float:
        """The config's field of that name. Stock's class has it as an attribute, which callers may set."""
        return self.config.router_aux_loss_coef

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        self.config.router_aux_loss_coef = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        output_indexer_loss: bool | None = None,
        **kwargs,
    ) -> MiniMaxM3VLTextCausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, and `cu_seq_lens_q` /
                `cu_seq_lens_k` in `kwargs`: As in `MiniMaxM3VLTextModel.forward`.
            labels (`torch.LongTensor`, *optional*): (B, T) ids to predict, not shifted, -100 where there is no target.
            output_router_logits (`bool`, *optional*): Whether to return the router logits and the load-balancing loss,
                which is added, weighted, to the loss. Default: `config.output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`): How many of the last tokens, or which ones, get logits. 0: all.
            skip_logits (`bool`, *optional*): Whether a call with labels computes the loss without holding all logits,
                and returns none. Default: `self.skip_logits`, or if that is None, whether the model is in training
                mode.
            output_indexer_loss (`bool`, *optional*): Whether to return the indexers' loss, which is added to the loss
                with the weight `config.indexer_loss_coef`. Default: whether that is above 0, and there are labels or
                the model is in training mode.
        """
        flags = self.flags_of_losses(labels, output_router_logits, output_indexer_loss)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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
        return MiniMaxM3VLTextCausalLMOutputWithPast(
            **output_fields(
                **head,
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.router_logits,
            )
        )
