"""Experts for quantizers of Transformers that know linear layers only.

Such a quantizer would leave the routed experts, which hold most of the weights, as they are. A subclass of it with
`ExpertQuantization` quantizes them too, in our models. Other models go the quantizer's own way.
"""

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import LoadStateDictInfo
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..fused.weight_formats import WeightFormat
from ..layers.moe import MiniMaxM3VLExperts
from ..layers.quantized import QuantizedExperts
from .mxfp8_names import name_in_model

if TYPE_CHECKING:
    _Quantizer = HfQuantizer
else:
    _Quantizer = object  # the other base class is one


class ExpertQuantization(_Quantizer):
    """What a quantizer needs so that it takes the experts. It stands before the quantizer among the base classes."""

    def format_of_experts(self, name: str) -> WeightFormat | None:
        """The format for experts that are not quantized yet, by the name of their module. None leaves them alone."""
        raise NotImplementedError

    def formats_in_checkpoints(self) -> list[WeightFormat]:
        """The formats that experts may have in a checkpoint of this quantizer."""
        raise NotImplementedError

    def how_to_leave_experts(self) -> str:
        """The sentence that names the switch which leaves experts as they are."""
        raise NotImplementedError

    def how_to_quantize_experts(self, numbers: int) -> str | None:
        """The sentence that names the switch which quantizes experts of so many numbers. None where there is none."""
        raise NotImplementedError

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the experts' products, in a model that is loaded in `dtype`."""
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        experts = {name: module for name, module in model.named_modules() if type(module) is MiniMaxM3VLExperts}
        if not experts:
            return
        if self.pre_quantized:
            in_files = _formats_in_files(model, kwargs.get("checkpoint_files") or [], self.formats_in_checkpoints())
            formats = {name: found for name, found in in_files.items() if name in experts}
        else:
            formats = {name: found for name in experts if (found := self.format_of_experts(name)) is not None}
        compute_dtype = self.compute_dtype(kwargs.get("dtype") or model.dtype)
        for name, weight_format in formats.items():
            with torch.device("meta"):
                try:
                    replacement = QuantizedExperts(experts[name], weight_format, compute_dtype)
                except ValueError as error:
                    raise ValueError(f"{name} cannot be quantized: {error}. {self.how_to_leave_experts()}") from error
            model.set_submodule(name, replacement)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return not self.pre_quantized and name in module.weight_names
        return super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        module, _ = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return param.element_size()  # its shape is that of the packed values
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizationOfExperts(super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, QuantizedExperts):
                module.finish_loading()
        return super()._process_model_after_weight_loading(model, **kwargs) or model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = super()._dequantize(model, dtype=dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedExperts):
                model.set_submodule(name, plain_experts(module, dtype or model.dtype))
        return model


class QuantizationOfExperts(ConversionOps):
    """From a weight that is being loaded to its tensors. What is not the experts' goes to the quantizer's operation."""

    def __init__(self, of_other_weights: ConversionOps):
        self.of_other_weights = of_other_weights

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """As in Transformers.

        Args:
            input_dict (`dict`): A weight, under its name in the model.
            source_patterns, target_patterns (`list[str]`): Passed to the quantizer's operation.
            **kwargs: Among them the `model` and the `full_layer_name` of the weight in it.
        """
        module, _ = get_module_from_name(kwargs["model"], kwargs["full_layer_name"])
        if not isinstance(module, QuantizedExperts):
            return self.of_other_weights.convert(
                input_dict, source_patterns=source_patterns, target_patterns=target_patterns, **kwargs
            )
        quantized: dict[str, list[torch.Tensor]] = {}
        for name, tensors in input_dict.items():
            weight = tensors[0] if isinstance(tensors, list) else tensors
            stored = module.weight_format.quantize(weight)
            for suffix, tensor in zip(module.weight_format.suffixes, stored, strict=True):
                quantized[name + suffix] = [tensor]
        return quantized


def refuse_incomplete_experts(model: PreTrainedModel, quantizer: HfQuantizer | None, info: LoadStateDictInfo) -> None:
    """Raise `ValueError` where a checkpoint lacks a tensor of quantized experts. Random bytes would mean nothing.

    Args:
        model (`PreTrainedModel`): The loaded model.
        quantizer (`HfQuantizer`, *optional*): How it was loaded.
        info (`LoadStateDictInfo`): The report of the loading.
    """
    if not isinstance(quantizer, ExpertQuantization) or info.conversion_errors:  # Transformers reports those
        return
    for path, module in model.named_modules():
        if not isinstance(module, QuantizedExperts):
            continue
        missing = [name for name in module.stored_names() if f"{path}.{name}" in info.missing_keys]
        if missing:
            raise ValueError(
                f"The checkpoint has no tensor for {path}.{missing[0]}, which experts in {module.weight_format.label} "
                "need. Is a file of the checkpoint missing?"
            )


def plain_experts(module: QuantizedExperts, dtype: torch.dtype) -> MiniMaxM3VLExperts:
    """Experts with the numbers of `module`, which are not quantized."""
    with torch.device("meta"):
        plain = MiniMaxM3VLExperts(module.config)
    plain._is_expert_parallel = module._is_expert_parallel
    for name in module.weight_names:
        setattr(plain, name, nn.Parameter(module.stored_weight(name).dequantize(dtype)))
    return plain.train(module.training)


def _formats_in_files(
    model: PreTrainedModel, files: list[str], formats: list[WeightFormat]
) -> dict[str, WeightFormat]:
    """The formats of the experts in a checkpoint, by the names of their modules. Plain ones are left out."""
    keys: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):  # `save_pretrained` writes no others
            with safe_open(file, framework="pt") as opened:
                keys.update(opened.keys())
    found: dict[str, WeightFormat] = {}
    # A format with more tensors may have all those of another one.
    for weight_format in sorted(formats, key=lambda candidate: -len(candidate.suffixes)):
        marks = weight_format.suffixes[2:] or weight_format.suffixes[1:]
        endings = tuple(f".{weight}{mark}" for weight in QuantizedExperts.weight_names for mark in marks)
        for key in keys:
            if key.endswith(endings):
                found.setdefault(_own_name(model, name_in_model(model, key).rpartition(".")[0]), weight_format)
    return found


def _own_name(model: PreTrainedModel, name: str) -> str:
    """A model without a head takes weights of one with a head, and the reverse."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    return name
