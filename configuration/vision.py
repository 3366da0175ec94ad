"""Configuration of the vision tower."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .auto_class import AutoClassByImport
from .checks import (
    MAX_COUNT,
    MAX_DROPOUT,
    MAX_FACTOR,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_STANDARD_DEVIATION,
    MAX_WIDTH,
    MIN_EPSILON,
    Converted,
    check_inherited_keys,
    converted,
    integer,
    number,
    require_divisible,
    require_one_of,
)
from .rope import check_rope_is_one_set, check_rope_parameters
from .serving import forget_serving_keys, vision_serving_keys

# time, height and width each rotate at least one pair of channels
MINIMUM_HEAD_DIM = 6


@strict
class MiniMaxM3VLVisionConfig(AutoClassByImport, PreTrainedConfig):
    """Configuration of the MiniMax-M3 vision tower. The defaults are the released geometry.

    Args:
        hidden_size (`int`, *optional*, defaults to 1280):
            Width of the tower.
        intermediate_size (`int`, *optional*, defaults to 5120):
            Width of the MLPs.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of attention heads. It must divide `hidden_size` into heads of at least 6 channels, so that each of
            the three rotary axes has a pair of channels.
        num_channels (`int`, *optional*, defaults to 3):
            Colour channels of the input.
        image_size (`int`, *optional*, defaults to 2016):
            Largest image side in pixels that the tower was trained with. The model does not enforce it.
        patch_size (`int`, *optional*, defaults to 14):
            Side of a square patch in pixels.
        temporal_patch_size (`int`, *optional*, defaults to 2):
            Frames that one patch spans; a still image is repeated to fill it.
        spatial_merge_size (`int`, *optional*, defaults to 2):
            Side of the square of patches that becomes one token of the language model.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs, by its name in Transformers.
        layer_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the layer norms.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities while training.
        rope_parameters (`dict`, *optional*):
            Rotary parameters. `rope_type` can only be `"axial"` (three axes: time, height, width); `rope_theta`
            defaults to 10000.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.

    If the file has `img_token_compression_config`, as the released file does, the `temporal_patch_size` and
    `spatial_merge_size` in it take precedence.
    """

    model_type = "minimax_m3_vl_vision"
    # FSDP2 gathers the tower together with what has no unit of its own. With units of their own, its layers would have
    # to run in all processes, also in those whose rows have no images.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}
    base_config_key = "vision_config"
    default_rope_type = "axial"
    default_theta = 10000.0

    hidden_size: int = integer(1280, 1, MAX_WIDTH)
    intermediate_size: int = integer(5120, 1, MAX_WIDTH)
    num_hidden_layers: int = integer(32, 1, MAX_LAYERS)
    num_attention_heads: int = integer(16, 1, MAX_COUNT)
    num_channels: int = integer(3, 1, MAX_COUNT)
    image_size: int = integer(2016, 1, MAX_WIDTH)
    patch_size: int = integer(14, 1, MAX_SIDE)
    temporal_patch_size: int = integer(2, 1, MAX_SIDE)
    spatial_merge_size: int = integer(2, 1, MAX_SIDE)
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = number(1e-05, MIN_EPSILON, MAX_FACTOR)
    attention_dropout: float | int = number(0.0, 0, MAX_DROPOUT)
    rope_parameters: Converted[RopeParameters | dict | None, dict[str, Any]] = converted()
    initializer_range: float | int = number(0.02, 0, MAX_STANDARD_DEVIATION)

    def __post_init__(self, **kwargs: Any) -> None:
        check_inherited_keys(self, kwargs)
        check_rope_is_one_set(self, kwargs, ())
        # The key stays on the config, because serving engines read it there.
        compression = kwargs.get("img_token_compression_config") or {}
        if not isinstance(compression, dict):
            raise ValueError(f"`img_token_compression_config` must be a dict, got {compression!r}.")
        for name in ("temporal_patch_size", "spatial_merge_size"):
            if name in compression:
                setattr(self, name, compression[name])
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, without the keys that a saved file repeats for serving engines."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "rope_parameters" in config_dict:
            forget_serving_keys(config, vision_serving_keys(config))
        return loaded

    def validate_architecture(self) -> None:
        """Checks that the tower can be built. Runs after construction and before saving."""
        require_one_of("hidden_act", self.hidden_act, ACT2FN)
        require_divisible(self, "hidden_size", "num_attention_heads")
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim < MINIMUM_HEAD_DIM:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` of the vision tower must be >= {MINIMUM_HEAD_DIM}, so that each "
                f"of the 3 rotary axes has a pair of channels, got {self.hidden_size} / {self.num_attention_heads} = "
                f"{head_dim}."
            )
        check_rope_parameters(self, ("axial",), head_dim)
