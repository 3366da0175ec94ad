"""In which precision a checkpoint is saved, by its configuration alone."""

from typing import Any

import torch

from ..loading.mxfp8_names import layers_of_names
from .request import DTYPES, Config
from .weights import QUANTIZABLE_PARTS, UNQUANTIZED_PARTS, meta_model, part_of

# The names under which quantizers save the list of modules that they leave alone.
_LISTS = ("ignored_layers", "modules_to_not_convert", "llm_int8_skip_modules")
# The configs of torchao that take experts.
_TORCHAO_CONFIGS_OF_EXPERTS = ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig")


def saved_precision(config: Config) -> str:
    """The precision in which the checkpoint of a configuration is saved, a key of `PRECISIONS`.

    Raises:
        ValueError: The checkpoint is quantized in a way that the planner does not know.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        dtype = _dtype_of(config)
        return "bf16" if dtype is None else DTYPES.get(dtype, "bf16")
    method, entries = method_and_entries(quantization)
    if method in ("mxfp8", "fp8"):
        return "mxfp8"
    if method == "bitsandbytes":
        if entries.get("load_in_8bit"):
            return "int8"
        return "nf4-double" if entries.get("bnb_4bit_use_double_quant") else "nf4"
    if method == "torchao":
        return "int8" if "int8" in str(entries.get("quant_type")).lower() else "fp8"
    raise ValueError(f"`precision` must be given: the checkpoint's quantization {method!r} is unknown to the planner")


def saved_unquantized_parts(config: Config) -> tuple[str, ...]:
    """The parts that the quantizer of a checkpoint has left alone, for `MemoryRequest.unquantized_parts`.

    A part counts as left alone if the quantizer's list names most of it. A list that is not saved is taken for the one
    of the released MXFP8 checkpoint. Experts count as left alone where the quantizer never takes them.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return UNQUANTIZED_PARTS
    method, entries = method_and_entries(quantization)
    named = next((entries[name] for name in _LISTS if entries.get(name) is not None), None)
    parts = set(UNQUANTIZED_PARTS) if named is None else _parts_named(config, list(named))
    if not _takes_experts(method, entries):
        parts.add("routed experts")
    return tuple(part for part in QUANTIZABLE_PARTS if part in parts)


def method_and_entries(quantization: Any) -> tuple[str, dict[str, Any]]:
    """The method of a quantization config, by Transformers' name, and all of its entries."""
    entries = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return str(getattr(entries.get("quant_method"), "value", entries.get("quant_method"))), entries


def _takes_experts(method: str, entries: dict[str, Any]) -> bool:
    if method == "bitsandbytes":
        return not entries.get("load_in_8bit")
    if method == "torchao":
        return any(name in str(entries.get("quant_type")) for name in _TORCHAO_CONFIGS_OF_EXPERTS)
    return True


def _parts_named(config: Config, names: list[str]) -> set[str]:
    """The parts whose linear layers and experts are for the most part in a list of modules."""
    model = meta_model(config)
    named = layers_of_names(model, names)
    balance = dict.fromkeys(QUANTIZABLE_PARTS, 0)
    for layer in layers_of_names(model, [".*"]):
        part = part_of(f"{layer}.weight")
        size = sum(parameter.numel() for parameter in model.get_submodule(layer).parameters())
        balance[part] += size if layer in named else -size
    return {part for part, more in balance.items() if more > 0}


def _dtype_of(config: Config) -> torch.dtype | None:
    for part in (config, config.get_text_config()):
        dtype = getattr(torch, part.dtype, None) if isinstance(part.dtype, str) else part.dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
