"""Repairs of a quantized model after Transformers and bitsandbytes have loaded it, and what its user should know."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import HfQuantizer
from transformers.utils import logging

from ..layers.moe import MiniMaxM3VLExperts
from ..layers.quantized import QuantizedExperts, QuantizedModule
from .expert_quantization import ExpertQuantization
from .mxfp8_quantizer import Mxfp8Quantizer

logger = logging.get_logger(__name__)


def finish_loading(model: PreTrainedModel) -> None:
    """Make a model that a quantizer has just loaded fit to be saved and called. Other models stay as they are."""
    _forget_rules_without_reverse(model)
    if getattr(model, "is_quantized", None) is False:  # dequantized; not set where there was no quantizer
        _cast_to(model, model.config.dtype)
    for module in model.modules():
        # On CPUs with AVX512-BF16, a 4-bit layer of bitsandbytes 0.50 repacks its weight in the first forward without
        # gradients, and rounds the scales. No gradient passes it from then on, in training either. The next
        # `state_dict()` returns the scales in the wrong order, and the layer itself keeps that order.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    _tell_of_plain_experts(model)


def refuse_places(model: PreTrainedModel, load_config: LoadStateDictConfig) -> None:
    """Raise where quantized weights are to go to places where they would be wrong without an error.

    - Weights on the disk that are quantized while they are loaded: Transformers lets the model read them from the
      checkpoint again, where they are not quantized.
    - Experts that are spread over processes: the plans cut weights, and know the scales of MXFP8 alone.

    Args:
        model (`PreTrainedModel`): The model, whose layers are replaced already.
        load_config (`LoadStateDictConfig`): How it is loaded.

    Raises:
        ValueError: The device map has the disk for such weights.
        NotImplementedError: The experts of such a format are to be spread.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    if load_config.device_mesh is not None:
        for name, module in modules.items():
            if not module.weight_format.is_split_on_disk:
                raise NotImplementedError(
                    f"{name} cannot be spread over processes, because it is in {module.weight_format.label}. Experts in "
                    "MXFP8 can: `quantization_config=mxfp8_config()`."
                )
    quantizer, device_map = load_config.hf_quantizer, load_config.device_map or {}
    if quantizer is None or quantizer.pre_quantized or "disk" not in device_map.values():
        return
    devices = expand_device_map(device_map, list(modules))
    on_disk = [name for name in modules if devices.get(name) == "disk"]
    if on_disk:
        raise ValueError(
            f"`device_map` must not put {on_disk[0]} (and {len(on_disk) - 1} more) on the disk while its weights are "
            "being quantized. Load the model without the disk, save it with `save_pretrained`, and load that."
        )


def _tell_of_plain_experts(model: PreTrainedModel) -> None:
    """Warn, once, where a quantizer has left the experts as they are. Most know linear layers only."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    weights = [
        parameter
        for module in model.modules()
        if isinstance(module, MiniMaxM3VLExperts) and not isinstance(module, QuantizedExperts)
        for parameter in module.parameters(recurse=False)
        # Quantizers put classes of their own, or integers, in the place of what they quantize.
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1
    ]
    if not weights:
        return
    stored = sum(parameter.numel() * parameter.element_size() for parameter in weights)
    logger.warning_once(
        f"{type(quantizer).__name__} leaves the routed experts in {weights[0].dtype}: {stored:,} bytes. "
        + _switch_for_experts(quantizer, sum(parameter.numel() for parameter in weights))
    )


def _switch_for_experts(quantizer: HfQuantizer, numbers: int) -> str:
    in_mxfp8 = f"MXFP8, {numbers + numbers // 32:,} bytes"
    if isinstance(quantizer, Mxfp8Quantizer):
        return f"Take them out of `modules_to_not_convert` to store them in {in_mxfp8}, and the linear layers too."
    if isinstance(quantizer, ExpertQuantization):
        switch = quantizer.how_to_quantize_experts(numbers)
        if switch is not None and quantizer.pre_quantized:
            return f"The checkpoint was saved so. For a plain checkpoint: {switch}"
        if switch is not None:
            return switch
    return (
        "`quantization_config=modeling_minimax_m3.mxfp8_config()` in place of yours stores them in "
        f"{in_mxfp8}, and the linear layers too. `BitsAndBytesConfig(load_in_4bit=True)` stores both in 4 bits."
    )


def _forget_rules_without_reverse(model: PreTrainedModel) -> None:
    """Make `save_pretrained` reverse the registered rules of the model where a quantizer's rules have no reverse.

    It would reverse the rules by which the files were read. Transformers 5.24 falls back to the registered rules for
    weights that it dequantized while loading, 5.23 never.
    """
    rules = getattr(model, "_weight_conversions", None) or []
    if any(hasattr(operation, "hf_quantizer") for rule in rules for operation in getattr(rule, "operations", [])):
        del model._weight_conversions


def _cast_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all weights. Transformers 5.23 leaves those that it does not dequantize in the file's dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
