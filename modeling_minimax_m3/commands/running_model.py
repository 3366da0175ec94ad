"""Loads a checkpoint, with an adapter or without, to run it: for `evaluate` and `chat`."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .adapters import check_fit, open_adapter_config
from .checkpoint import auto_class
from .quantization import HELP, check_quantization, loading_options, quantization_of
from .train_arguments import SHORT_DTYPES, LoraArguments


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", help="folder of an adapter of PEFT to put on the model")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto (as saved), bf16, fp16 or fp32")
    parser.add_argument("--quantization", help=HELP)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: all GPUs, or the CPU)")


def check_model_options(arguments: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Raises ValueError for options that would fail after the weights are loaded."""
    check_quantization(arguments.quantization, config)
    dtypes = ("auto", *SHORT_DTYPES, *SHORT_DTYPES.values())
    if arguments.dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {arguments.dtype!r}")
    if arguments.adapter is not None:
        check_adapter(arguments.adapter, config, bool(arguments.quantization or quantization_of(config)))
    if arguments.device is not None:
        try:
            torch.device(arguments.device)
        except RuntimeError as error:
            raise ValueError(f"--device must be the name of a device, got {arguments.device!r}") from error


def check_adapter(folder: str, config: PreTrainedConfig, quantized: bool) -> None:
    """Raises ValueError for an adapter that PEFT could not load."""
    if find_spec("peft") is None:
        raise ValueError("--adapter needs PEFT: pip install peft")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"--adapter {folder} holds no adapter_config.json")
    if (Path(folder) / "adapter_model.bin").is_file():  # of old versions of PEFT, which reads it
        return
    try:
        kind = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--adapter {folder}: adapter_config.json cannot be read: {error!r}") from error
    if kind == "LORA":
        adapter, _ = open_adapter_config(folder, LoraArguments(lora=True))
        check_fit(config, folder, adapter, set(), quantized)
    elif not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(f"--adapter {folder} holds no adapter_model.safetensors")


def load_running_model(name: str, arguments: argparse.Namespace, config: PreTrainedConfig) -> Any:
    """The model in evaluation mode.

    Raises:
        ValueError: The adapter does not fit.
    """
    has_gpu = torch.cuda.is_available()
    dtype = SHORT_DTYPES.get(arguments.dtype, arguments.dtype)
    model: Any = auto_class(config).from_pretrained(
        name,
        dtype=dtype,
        device_map=arguments.device or ("auto" if has_gpu else None),
        **loading_options(arguments.quantization, dtype, config),
    )
    if arguments.adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, arguments.adapter)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--adapter {arguments.adapter} does not fit {name}: {error}") from error
    return model.eval()
