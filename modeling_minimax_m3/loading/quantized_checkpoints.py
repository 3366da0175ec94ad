"""Repairs of a quantized model after Transformers and bitsandbytes have loaded it."""

import torch
from transformers import PreTrainedModel


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
