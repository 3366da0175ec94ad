"""What a checkpoint is: a language model alone or a composite model, and how it reads its inputs."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)

import modeling_minimax_m3  # noqa: F401  (registers the classes)


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration reads images and videos too."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: PreTrainedConfig) -> type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]:
    """The Auto class that loads a model of this configuration."""
    return AutoModelForImageTextToText if is_composite(config) else AutoModelForCausalLM


def read_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ValueError: There is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"--model {checkpoint} cannot be read: {error}") from error


def load_processor(checkpoint: str, config: PreTrainedConfig | None = None) -> Any:
    """The processor of a composite checkpoint, or the tokenizer of a language model."""
    config = read_config(checkpoint) if config is None else config
    # The tokenizer of a text model names the processor of the composite model, for which a text model has no files.
    return (AutoProcessor if is_composite(config) else AutoTokenizer).from_pretrained(checkpoint)
