"""Configuration of the language model: dense and sparse attention layers, dense and mixture-of-experts MLPs."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

from .auto_class import AutoClassByImport
from .checks import (
    MAX_COUNT,
    MAX_DROPOUT,
    MAX_FACTOR,
    MAX_LAYERS,
    MAX_STANDARD_DEVIATION,
    MAX_TOKENS,
    MAX_WIDTH,
    MIN_EPSILON,
    Converted,
    check_inherited_keys,
    check_renamed_fields,
    converted,
    integer,
    number,
    require_divisible,
    require_one_of,
)
from .layer_types import FULL_ATTENTION, LAYER_TYPES, LEARNED_SPARSE
from .rope import check_rope_is_one_set, check_rope_parameters
from .serving import (
    FIXED_FEATURES,
    LEGACY_SPARSE_FIELDS,
    checked_text_keys,
    forget_serving_keys,
    text_serving_keys,
)

logger = logging.get_logger(__name__)

MLP_LAYER_TYPES = ("dense", "sparse")
MSA_BACKENDS = ("auto", "reference", "torch", "cuda")

_LEGACY_SPARSE_SWITCHES = (
    "use_sparse_attention",
    "sparse_attention_freq",
    "sparse_score_type",
    "sparse_disable_index_value",
)


@strict
class MiniMaxM3VLTextConfig(AutoClassByImport, PreTrainedConfig):
    """Configuration of the MiniMax-M3 language model.

    The defaults are the defaults of Transformers: every layer has dense attention and a mixture of experts. See
    `configuration_minimax_m3.released_config` for the released geometry.

    Args:
        vocab_size (`int`, *optional*, defaults to 200064):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to 6144):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of one routed expert.
        dense_intermediate_size (`int`, *optional*, defaults to 12288):
            Width of the MLP of layers whose `mlp_layer_types` entry is `"dense"`.
        shared_intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the shared expert.
        num_hidden_layers (`int`, *optional*, defaults to 60):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 64):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 4):
            Number of key/value heads; must divide `num_attention_heads`.
        head_dim (`int`, *optional*, defaults to 128):
            Channels of one attention head.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            `"silu"`, or `"swigluoai"` as in the released file. Both mean the clamped gate that `swiglu_alpha` and
            `swiglu_limit` describe. After construction the field is always `"silu"`.
        max_position_embeddings (`int`, *optional*, defaults to 524288):
            Context length in tokens.
        layer_types (`list[str]`, *optional*):
            Attention of each layer: `"full_attention"`, `"minimax_m3_sparse"` (learned selection of key blocks) or
            `"minimax_m3_structured"` (selection by position alone, which stock Transformers does not have). All dense
            by default.
        mlp_layer_types (`list[str]`, *optional*):
            MLP of each layer: `"dense"`, or `"sparse"` for a mixture of experts. All `"sparse"` by default.
        num_local_experts (`int`, *optional*, defaults to 128):
            Number of routed experts.
        num_experts_per_tok (`int`, *optional*, defaults to 4):
            Routed experts that each token uses.
        routed_scaling_factor (`float`, *optional*, defaults to 2.0):
            Factor on the normalised weights of the routed experts.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether to return the router logits and to add the load-balancing loss.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the load-balancing loss.
        router_jitter_noise (`float`, *optional*, defaults to 0.0):
            Kept for other readers of the file. The router adds no noise, as in stock Transformers.
        swiglu_alpha (`float`, *optional*, defaults to 1.702):
            Slope of the gate's sigmoid.
        swiglu_limit (`float`, *optional*, defaults to 7.0):
            Bound at which the gate and the up projection are clamped.
        rope_parameters (`dict`, *optional*):
            Rotary parameters, one set for all layers. `rope_theta` defaults to 5e6. `partial_rotary_factor` is the
            share of `head_dim` that rotates, by default all of it.
        rotary_dim (`int`, *optional*, defaults to 64):
            Kept for other readers of the file. The rotary width comes only from `rope_parameters`.
        index_n_heads (`int`, *optional*, defaults to 4):
            Query heads of the indexer of a sparse layer, one per key/value head.
        index_head_dim (`int`, *optional*, defaults to 128):
            Channels of an indexer head; at least the rotary width.
        index_block_size (`int`, *optional*, defaults to 128):
            Keys in one block.
        index_topk_blocks (`int`, *optional*, defaults to 16):
            Number of blocks that each query attends to, the forced blocks included.
        index_local_blocks (`int`, *optional*, defaults to 1):
            Number of blocks that a query always attends to, counted back from its own block.
        index_init_blocks (`int`, *optional*, defaults to 0):
            Number of blocks at the start of the sequence that a query always attends to. The file holds this field
            only if it is not 0, because stock Transformers does not know it.
        structured_local_blocks (`int`, *optional*, defaults to 2):
            Number of latest blocks that a query of a structured layer attends to, its own block included.
        structured_anchor_blocks (`int`, *optional*, defaults to 6):
            Largest number of anchors, which are blocks at regular intervals from the start of the sequence.
        structured_anchor_stride (`int`, *optional*, defaults to 8):
            Smallest interval between anchors, in blocks. It doubles until the anchors are few enough.
        structured_random_blocks (`int`, *optional*, defaults to 8):
            Number of random blocks. Places that local blocks and anchors leave free are random too.
        structured_seed (`int`, *optional*, defaults to 0):
            64-bit seed of the random blocks, which also differ between layers and key/value heads.
        structured_cross_document (`bool`, *optional*, defaults to `False`):
            Whether structured layers read packed documents as one sequence, so that anchors and random blocks reach
            earlier documents. Only this switch makes packing change the output of a token. The file holds the
            structured fields only if they are not at their default.
        indexer_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the indexers' loss, the KL divergence of their scores from the main attention. This loss trains
            only the indexers. With 0 the indexers are frozen, because no other loss reaches them.
        indexer_warmup (`bool`, *optional*, defaults to `False`):
            Whether sparse layers attend to all keys, and the indexers' loss runs over all keys. This is for indexers
            that cannot select yet, and costs as much as dense attention. The file holds `indexer_loss_coef` and
            `indexer_warmup` only if they are not at their default.
        msa_backend (`str`, *optional*, defaults to `"auto"`):
            Backend of the sparse layers: `"auto"`, `"reference"`, `"torch"` or `"cuda"`. The file holds this field
            only if it is not `"auto"`.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the RMS norms.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities of dense layers in training. Other layers apply none.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether `forward` builds a key/value cache if the caller passes none.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the input and output embeddings share one weight.
        pad_token_id (`int`, *optional*):
            Token that fills up shorter rows of a batch.
        bos_token_id (`int`, *optional*, defaults to 200034):
            Token at the start of a sequence.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 200020):
            Token, or tokens, at which generation ends.

    The class also reads the older keys of the released file: `moe_layer_freq` (1 for a mixture of experts) and
    `sparse_attention_config` with `use_sparse_attention`, `sparse_attention_freq` (1 for sparse attention),
    `sparse_num_index_heads`, `sparse_index_dim`, `sparse_block_size`, `sparse_topk_blocks`, `sparse_init_block`,
    `sparse_local_block`, `sparse_score_type` (only `"max"` exists) and `sparse_disable_index_value` (1 on every
    sparse layer: an indexer has no value path).

    Numbers have bounds far above any model that exists. So a mistake such as `index_block_size=2**31` is an error
    here, instead of an allocation of hundreds of gigabytes later.

    Raises:
        ValueError: A key of the file that is not a field describes a feature that this architecture does not have.
        huggingface_hub.errors.StrictDataclassError: A field has the wrong type or is out of bounds, or the fields do
            not fit together.
    """

    model_type = "minimax_m3_vl_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "indexer_loss"]
    attribute_map = {"num_experts": "num_local_experts"}
    default_theta = 5000000.0

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    # Fields that stock Transformers does not have. The file leaves them out while they are at their default.
    fields_beyond_stock = (
        "index_init_blocks",
        "structured_local_blocks",
        "structured_anchor_blocks",
        "structured_anchor_stride",
        "structured_random_blocks",
        "structured_seed",
        "structured_cross_document",
        "indexer_loss_coef",
        "indexer_warmup",
        "msa_backend",
    )

    vocab_size: int = integer(200064, 1, MAX_TOKENS)
    hidden_size: int = integer(6144, 1, MAX_WIDTH)
    intermediate_size: int = integer(3072, 1, MAX_WIDTH)
    dense_intermediate_size: int = integer(12288, 1, MAX_WIDTH)
    shared_intermediate_size: int = integer(3072, 1, MAX_WIDTH)
    num_hidden_layers: int = integer(60, 1, MAX_LAYERS)
    num_attention_heads: int = integer(64, 1, MAX_COUNT)
    num_key_value_heads: int = integer(4, 1, MAX_COUNT)
    head_dim: int = integer(128, 1, MAX_WIDTH)
    hidden_act: str = "silu"
    max_position_embeddings: int = integer(524288, 1, 2**63 - 1)
    layer_types: Converted[list[str] | None, list[str]] = converted()
    mlp_layer_types: Converted[list[str] | None, list[str]] = converted()
    num_local_experts: int = integer(128, 1, MAX_COUNT)
    num_experts_per_tok: int = integer(4, 1, MAX_COUNT)
    routed_scaling_factor: float | int = number(2.0, MIN_EPSILON, MAX_FACTOR)
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = number(0.001, 0, MAX_FACTOR)
    router_jitter_noise: float | int = number(0.0, 0, MAX_FACTOR)
    swiglu_alpha: float | int = number(1.702, -MAX_FACTOR, MAX_FACTOR)
    swiglu_limit: float | int = number(7.0, MIN_EPSILON, 1e30)
    rope_parameters: Converted[RopeParameters | dict | None, dict[str, Any]] = converted()
    rotary_dim: int = 64
    index_n_heads: int = integer(4, 1, MAX_COUNT)
    index_head_dim: int = integer(128, 1, MAX_WIDTH)
    index_block_size: int = integer(128, 1, MAX_COUNT)
    index_topk_blocks: int = integer(16, 1, MAX_COUNT)
    index_local_blocks: int = integer(1, 0, MAX_COUNT)
    index_init_blocks: int = integer(0, 0, MAX_COUNT)
    structured_local_blocks: int = integer(2, 1, MAX_COUNT)
    structured_anchor_blocks: int = integer(6, 0, MAX_COUNT)
    structured_anchor_stride: int = integer(8, 1, MAX_COUNT)
    structured_random_blocks: int = integer(8, 0, MAX_COUNT)
    structured_seed: int = integer(0, 0, 2**64 - 1)
    structured_cross_document: bool = False
    indexer_loss_coef: float | int = number(0.0, 0, MAX_FACTOR)
    indexer_warmup: bool = False
    msa_backend: str = "auto"
    rms_norm_eps: float | int = number(1e-06, MIN_EPSILON, MAX_FACTOR)
    attention_dropout: float | int = number(0.0, 0, MAX_DROPOUT)
    initializer_range: float | int = number(0.02, 0, MAX_STANDARD_DEVIATION)
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = integer(None, 0, MAX_TOKENS)
    bos_token_id: int | None = 200034
    eos_token_id: int | list[int] | None = 200020

    def __post_init__(self, **kwargs: Any) -> None:
        sparse_attention_config = kwargs.pop("sparse_attention_config", None) or {}
        moe_layer_freq = kwargs.pop("moe_layer_freq", None)
        for name, only_value in FIXED_FEATURES.items():
            require_one_of(name, kwargs.get(name, only_value), (only_value,))
        check_inherited_keys(self, kwargs)
        check_rope_is_one_set(self, kwargs, tuple(LAYER_TYPES))

        super().__post_init__(**kwargs)

        # The model computes the gate from swiglu_alpha and swiglu_limit. The field has to name a plain activation.
        require_one_of("hidden_act", self.hidden_act, ("silu", "swigluoai"))
        self.hidden_act = "silu"

        self._read_legacy_sparse_attention(sparse_attention_config)
        if self.layer_types is None:
            self.layer_types = [FULL_ATTENTION.name] * self.num_hidden_layers
        if self.mlp_layer_types is None and moe_layer_freq is not None:
            flags = self._per_layer("moe_layer_freq", moe_layer_freq)
            self.mlp_layer_types = ["sparse" if is_moe else "dense" for is_moe in flags]
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a file as in Transformers. A whole model's `tie_word_embeddings` counts for its language model too."""
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        text_config = config_dict.get(cls.base_config_key)
        if isinstance(text_config, dict) and config_dict.get("tie_word_embeddings"):
            text_config["tie_word_embeddings"] = True
        return config_dict, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers. Keys that a saved file repeats for serving engines have to agree with the fields."""
        loaded = super().from_dict(checked_text_keys(config_dict), **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "layer_types" in config_dict and not config.is_heterogeneous:
            forget_serving_keys(config, text_serving_keys(config))
        return loaded

    def _per_layer(self, name: str, flags: Any) -> list[int]:
        """One flag for each layer; a single 0 or 1 stands for all layers."""
        if not isinstance(flags, (list, tuple)):
            flags = [flags] * self.num_hidden_layers
        if len(flags) != self.num_hidden_layers:
            raise ValueError(
                f"`{name}` must have one entry per layer, got {len(flags)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}."
            )
        for flag in flags:
            require_one_of(name, flag, (0, 1))
        return list(flags)

    def _read_legacy_sparse_attention(self, legacy: dict[str, Any]) -> None:
        if not isinstance(legacy, dict):
            raise ValueError(f"`sparse_attention_config` must be a dict, got {type(legacy).__name__}.")
        unknown = sorted(set(legacy) - set(LEGACY_SPARSE_FIELDS) - set(_LEGACY_SPARSE_SWITCHES))
        if unknown:
            logger.warning_once(f"`sparse_attention_config` has unknown keys, which are ignored: {unknown}.")

        for legacy_name, name in LEGACY_SPARSE_FIELDS.items():
            if legacy_name in legacy:
                try:
                    setattr(self, name, legacy[legacy_name])
                except StrictDataclassFieldValidationError as error:
                    raise ValueError(f"`sparse_attention_config[{legacy_name!r}]` sets `{name}`. {error}") from error
        require_one_of(
            "sparse_attention_config['sparse_score_type']", legacy.get("sparse_score_type", "max"), ("max",)
        )

        frequency = legacy.get("sparse_attention_freq")
        if legacy.get("use_sparse_attention") and frequency is None and self.layer_types is None:
            raise ValueError(
                "`sparse_attention_config['sparse_attention_freq']` must say which layers are sparse if "
                "`use_sparse_attention` is true, got None."
            )
        if not legacy.get("use_sparse_attention", True):
            frequency = None
        if self.layer_types is None and frequency is not None:
            flags = self._per_layer("sparse_attention_config['sparse_attention_freq']", frequency)
            self.layer_types = [LEARNED_SPARSE.name if is_sparse else FULL_ATTENTION.name for is_sparse in flags]
        if "sparse_disable_index_value" in legacy:
            self._check_index_value_is_disabled(legacy["sparse_disable_index_value"])

    def _check_index_value_is_disabled(self, disabled: bool | int | list[int]) -> None:
        """Checks that no sparse layer has an index value: an indexer has no value path. Dense layers do not count."""
        layer_types = self.layer_types or []
        if not isinstance(disabled, (list, tuple)):
            disabled = [disabled] * len(layer_types)
        with_value = [
            layer_idx
            for layer_idx, (name, flag) in enumerate(zip(layer_types, disabled))
            if name == LEARNED_SPARSE.name and not flag
        ]
        if with_value:
            raise ValueError(
                "`sparse_attention_config['sparse_disable_index_value']` must be 1 on every sparse layer, because an "
                f"indexer has no value path, got 0 on layers {with_value}."
            )

    @property
    def rotary_width(self) -> int:
        """Number of leading channels of a head that rotate. Channels rotate in pairs, so an odd number rounds up."""
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        # The type "proportional" turns the channels beyond the factor by an angle of 0.
        width = self.head_dim if self.rope_parameters["rope_type"] == "proportional" else int(self.head_dim * factor)
        return width + width % 2

    def validate_architecture(self) -> None:
        """Checks that a model can be built from the fields. Runs after construction and before saving."""
        if self.is_heterogeneous:
            for layer_config in self.per_layer_config:
                layer_config.validate_architecture()
            return

        check_renamed_fields(self)
        check_rope_parameters(self, ("default", *ROPE_INIT_FUNCTIONS), self.head_dim)
        require_divisible(self, "num_attention_heads", "num_key_value_heads")
        require_one_of("msa_backend", self.msa_backend, MSA_BACKENDS)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size`, got pad_token_id={self.pad_token_id} and "
                f"vocab_size={self.vocab_size}."
            )
        if "sparse" in self.mlp_layer_types and self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                "`num_experts_per_tok` must not exceed `num_local_experts`, got "
                f"num_experts_per_tok={self.num_experts_per_tok} and num_local_experts={self.num_local_experts}."
            )
        for name, kind in LAYER_TYPES.items():  # other names are refused by `validate_layer_type`
            if name in self.layer_types:
                kind.validate(self)

    def validate_layer_type(self) -> None:
        """Checks the two per-layer lists: their length and the names in them."""
        for name, allowed in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
            layers = getattr(self, name)
            if len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must have one entry per layer, got {len(layers)} entries for "
                    f"num_hidden_layers={self.num_hidden_layers}."
                )
            for layer_idx, entry in enumerate(layers):
                require_one_of(f"{name}[{layer_idx}]", entry, allowed)

    def to_dict(self) -> dict[str, Any]:
        """The fields as in Transformers, except that a field unknown to stock is left out while at its default."""
        output = super().to_dict()
        for name in self.fields_beyond_stock:
            if output.get(name) == type(self).__dataclass_fields__[name].default:
                output.pop(name, None)
        return output
