"""What Transformers and bitsandbytes leave undone when they have loaded a quantized model."""

import torch
from transformers import PreTrainedModel


def finish_loading(model: PreTrainedModel) -> None:
    """Make a model that has just been loaded by a quantizer fit to be saved and called. Others stay as they are."""
    _forget_rules_without_reverse(model)
    if getattr(model, "is_quantized", None) is False:  # dequantized; not set where there was no quantizer
        _cast_to(model, model.config.dtype)
    for module in model.modules():
        # On CPUs with AVX512-BF16, a 4-bit layer of bitsandbytes 0.50 repacks its weight in the first forward without
        # gradients, and rounds the scales. No gradient passes it from then on, not in training either, and the next
        # `state_dict()` gives its scales in the wrong order, to the file and to the layer itself.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_rules_without_reverse(model: PreTrainedModel) -> None:
    """`save_pretrained` reverses the rules by which the files were read. Those of a quantizer have no reverse, so the
    registered rules of the model are to be reversed instead. Transformers 5.24 does so for weights that it dequantized
    while loading, 5.23 never."""
    rules = getattr(model, "_weight_conversions", None) or []
    if any(hasattr(operation, "hf_quantizer") for rule in rules for operation in getattr(rule, "operations", [])):
        del model._weight_conversions


def _cast_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Transformers 5.23 gives the asked-for dtype only to the weights that it dequantizes, and leaves the others in that
    of the file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
