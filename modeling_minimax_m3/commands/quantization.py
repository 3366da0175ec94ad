"""Weights that the commands quantize while they load them: the option `--quantization`."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from ..loading.mxfp8_quantizer import mxfp8_config
from ..planning.saved_checkpoints import method_and_entries

# Values of the option, and what the memory planner calls these weights.
PRECISIONS = {"nf4": "nf4-double", "mxfp8": "mxfp8"}
HELP = (
    "Quantize linear layers and experts while they are loaded: nf4 (4 bits of bitsandbytes, scales quantized too) or "
    "mxfp8 (8 bits). Default: as the checkpoint is."
)


def check_quantization(name: str | None, config: PreTrainedConfig) -> None:
    """Raises ValueError for weights that could not be quantized, before they are loaded."""
    if name is None:
        return
    if name not in PRECISIONS:
        raise ValueError(f"--quantization must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if quantization_of(config):
        raise ValueError(f"--quantization {name} needs a checkpoint that is not quantized: leave it out")
    if name == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError("--quantization nf4 needs bitsandbytes: pip install bitsandbytes")


def quantization_of(config: PreTrainedConfig) -> str | None:
    """The quantization method of the checkpoint of a configuration, by Transformers' name; None without one."""
    given = getattr(config, "quantization_config", None)
    return None if given is None else method_and_entries(given)[0]


def loading_options(name: str | None, dtype: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the weights.

    Args:
        name (str, optional): Value of the option.
        dtype (str): Name of the dtype in which the other weights are loaded, or "auto".
        config (PreTrainedConfig): Of the checkpoint.

    Returns:
        The arguments; none without quantization.
    """
    if name is None:
        return {}
    if name == "mxfp8":
        return {"quantization_config": mxfp8_config()}
    saved = config.dtype or config.get_text_config().dtype
    compute_dtype = (saved or torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    }
