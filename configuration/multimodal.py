"""Configuration of the whole model: language model, vision tower and the projector between them."""

import json
import os
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .auto_class import AutoClassByImport
from .checks import (
    MAX_TOKENS,
    MAX_WIDTH,
    Converted,
    check_inherited_keys,
    check_renamed_fields,
    converted,
    integer,
)
from .serving import (
    add_serving_keys,
    checked_text_keys,
    forget_serving_keys,
    text_serving_keys,
    vision_serving_keys,
)
from .text import MiniMaxM3VLTextConfig
from .vision import MiniMaxM3VLVisionConfig


@strict
class MiniMaxM3VLConfig(AutoClassByImport, PreTrainedConfig):
    """Configuration of MiniMax-M3 with its vision tower.

    Args:
        text_config (`dict` or `MiniMaxM3VLTextConfig`, *optional*):
            Configuration of the language model.
        vision_config (`dict` or `MiniMaxM3VLVisionConfig`, *optional*):
            Configuration of the vision tower.
        image_token_index (`int`, *optional*, defaults to 200025):
            Token that stands for one merged patch of an image; also readable as `image_token_id`.
        video_token_index (`int`, *optional*, defaults to 200026):
            Token that stands for one merged patch of a video; also readable as `video_token_id`.
        projector_hidden_size (`int`, *optional*, defaults to 6144):
            Width of the hidden layers of the two projector MLPs.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the input and output embeddings share one weight; follows the language model's switch.

    `merged_hidden_size`, the width of one group of projected patches before it is merged, follows from the two
    parts.

    Raises:
        TypeError: A part is a configuration of another model.
        huggingface_hub.errors.StrictDataclassError: A field has the wrong type, or the fields do not fit together.
    """

    model_type = "minimax_m3_vl"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}  # the parts have theirs
    # `Trainer.predict` joins the outputs of all batches, but the shape of these differs between batches.
    keys_to_ignore_at_inference = [
        *MiniMaxM3VLTextConfig.keys_to_ignore_at_inference,
        *("image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states"),
    ]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": MiniMaxM3VLTextConfig,
        "vision_config": MiniMaxM3VLVisionConfig,
    }
    attribute_map = {
        "image_token_id": "image_token_index",
        "video_token_id": "video_token_index",
    }

    text_config: Converted[dict | PreTrainedConfig | None, MiniMaxM3VLTextConfig] = converted()
    vision_config: Converted[dict | PreTrainedConfig | None, MiniMaxM3VLVisionConfig] = converted()
    image_token_index: int = integer(200025, 0, MAX_TOKENS)
    video_token_index: int = integer(200026, 0, MAX_TOKENS)
    projector_hidden_size: int = integer(6144, 1, MAX_WIDTH)
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_inherited_keys(self, kwargs)
        self._adopt_stock_sub_configs()
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings  # for a language model of that part alone
        self.merged_hidden_size = self.text_config.hidden_size * self.vision_config.spatial_merge_size**2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers. Keys that a saved file repeats for serving engines have to agree with the fields."""
        text, vision = config_dict.get("text_config"), config_dict.get("vision_config")
        if isinstance(text, dict):
            config_dict = config_dict | {"text_config": checked_text_keys(text)}
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(text, dict) and "layer_types" in text and not config.text_config.is_heterogeneous:
            forget_serving_keys(config.text_config, text_serving_keys(config.text_config))
        if isinstance(vision, dict) and "rope_parameters" in vision:
            forget_serving_keys(config.vision_config, vision_serving_keys(config.vision_config))
        return loaded

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "MiniMaxM3VLConfig":
        """Reads a file as `from_pretrained` does."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes the file as in Transformers, with the keys beside the fields that vLLM and SGLang read.

        Args:
            json_file_path (`str` or `os.PathLike`): The file.
            use_diff (`bool`, *optional*, defaults to `True`): Whether to leave out the defaults of `PreTrainedConfig`.
        """
        saved = json.loads(self.to_json_string(use_diff=use_diff))
        add_serving_keys(saved, self)
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(saved, indent=2, sort_keys=True) + "\n")

    def _adopt_stock_sub_configs(self) -> None:
        """Converts parts that were built with stock Transformers' classes to our classes, which have more fields."""
        for name, spec in self.sub_configs_defaults.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig) or isinstance(value, spec.config_class):
                continue
            if value.model_type != spec.model_type:
                raise TypeError(
                    f"`{name}` must be a dict or a configuration of type {spec.model_type!r}, got a "
                    f"{type(value).__name__} of type {value.model_type!r}."
                )
            setattr(self, name, spec.config_class(**value.to_dict()))

    def validate_architecture(self) -> None:
        """Checks the fields of the whole model. The parts check themselves."""
        check_renamed_fields(self)

    def validate_placeholder_tokens(self) -> None:
        """Checks that the image and video placeholders are two tokens of the vocabulary."""
        vocab_size = self.text_config.vocab_size
        for name in ("image_token_index", "video_token_index"):
            value = getattr(self, name)
            if not 0 <= value < vocab_size:
                raise ValueError(f"`{name}` must be between 0 and vocab_size - 1 = {vocab_size - 1}, got {value}.")
        if self.image_token_index == self.video_token_index:
            raise ValueError(
                f"`image_token_index` and `video_token_index` must differ, got {self.image_token_index} for both."
            )
