"""What a checkpoint is: a language model alone or a composite model, and how it reads its inputs."""

from pathlib import Path
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
        ValueError: There is no such checkpoint, or it is an adapter.
    """
    folder = Path(checkpoint)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"--model {checkpoint} is an adapter: pass it as --adapter, and the checkpoint that it was trained on as --model"
        )
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"--model {checkpoint} cannot be read: {error}") from error
        raise ValueError(
            f"--model {checkpoint} is no folder here, and cannot be read from the Hub: {error}"
        ) from error


def load_processor(checkpoint: str, config: PreTrainedConfig | None = None) -> Any:
    """The processor of a composite checkpoint, or the tokenizer of a language model.

    Raises:
        ValueError: The folder of the checkpoint has none, or its files cannot be read.
    """
    config = read_config(checkpoint) if config is None else config
    # The tokenizer of a text model names the processor of the composite model, for which a text model has no files.
    loader, kind = (AutoProcessor, "processor") if is_composite(config) else (AutoTokenizer, "tokenizer")
    try:
        return loader.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {checkpoint}: its {kind} cannot be read. `{kind}.save_pretrained({checkpoint!r})` writes that of "
            f"another checkpoint there: {error}"
        ) from error
