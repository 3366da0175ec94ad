"""Loads checkpoints in MXFP8 as they are released, and quantizes others to MXFP8 while they are loaded.

Transformers reads the format as well: on a CPU it dequantizes everything, on a GPU it runs kernels that it downloads
and that quantize the activations too. Here the weights of our models stay in MXFP8, and are dequantized for the
products. Other models, and `dequantize=True`, go Transformers' way.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.modeling_utils import LoadStateDictInfo
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts
from ..layers.mxfp8 import SCALE_SUFFIX, Mxfp8Experts, Mxfp8Linear, Mxfp8Module
from ..mxfp8 import GROUP_SIZE, dequantize_mxfp8, quantize_mxfp8
from ..runtime.expert_cache import has_offloaded_experts
from .expert_quantization import plain_experts
from .mxfp8_names import layers_of_names, unquantized_as_released, unquantized_in_files

METHOD = "mxfp8"


def mxfp8_config(modules_to_not_convert: list[str] | None = None, dequantize: bool = False) -> FineGrainedFP8Config:
    """The `quantization_config` of `from_pretrained` that keeps experts and linear layers in MXFP8.

    A checkpoint in MXFP8 needs none: it is kept so by default. For any other checkpoint the weights are quantized while
    they are loaded.

    Args:
        modules_to_not_convert (`list[str]`, *optional*): Names of modules, in the checkpoint or in the model, that stay
            as they are; a name stands for all that it contains. Default: those of the checkpoint, and for a checkpoint
            that is not quantized those that the released one leaves in bfloat16: head, embeddings, routers,
            vision tower and projector.
        dequantize (`bool`): Whether a checkpoint in MXFP8 is loaded as a plain model.

    Raises:
        ValueError: `modules_to_not_convert` is a text, whose letters would be taken for names.
    """
    if isinstance(modules_to_not_convert, str):
        raise ValueError(f"`modules_to_not_convert` must be a list of names, got {modules_to_not_convert!r}")
    return FineGrainedFP8Config(
        quant_method=METHOD,
        weight_block_size=(1, GROUP_SIZE),
        scale_fmt="ue8m0",
        modules_to_not_convert=modules_to_not_convert,
        dequantize=dequantize,
    )


def register_quantizer() -> None:
    """Make Transformers load MXFP8 by `Mxfp8Quantizer`. Calling it again changes nothing."""
    AUTO_QUANTIZER_MAPPING[METHOD] = Mxfp8Quantizer


class Mxfp8Quantizer(FineGrainedFP8HfQuantizer):
    """Transformers' quantizer of this format, with our layers in our models."""

    _keeps_mxfp8 = _dequantizes_ours = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # Transformers' demands on the device hold for its kernels. Which layers run is known when the model is there.
        self._environment = (args, kwargs)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        is_ours = any(isinstance(module, MiniMaxM3VLExperts | MiniMaxM3VLDenseMLP) for module in model.modules())
        self._dequantizes_ours = is_ours and config.dequantize and self.pre_quantized
        self._keeps_mxfp8 = is_ours and not self._dequantizes_ours
        if not self._keeps_mxfp8:
            args, options = self._environment
            super().validate_environment(*args, **options)
            super()._process_model_before_weight_loading(
                model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs
            )
            return
        if config.dequantize:
            raise ValueError(
                "`dequantize=True` is for checkpoints in MXFP8, and this one is not quantized. Load it without a "
                "`quantization_config`."
            )
        if config.weight_block_size is None or tuple(config.weight_block_size) != (1, GROUP_SIZE):
            raise ValueError(
                f"`weight_block_size` of MXFP8 must be (1, {GROUP_SIZE}), got {config.weight_block_size}. Is the "
                "checkpoint in another format? `quantization_config=mxfp8_config(dequantize=True)` loads what "
                "Transformers can read."
            )
        unquantized = config.modules_to_not_convert
        if unquantized is None:
            # A `quantization_config` of the user's without a list takes away that of the checkpoint.
            files = checkpoint_files if self.pre_quantized else None
            unquantized = unquantized_in_files(model, files) if files else unquantized_as_released(model)
        _replace_layers(model, unquantized, dtype or model.dtype)
        config.modules_to_not_convert = unquantized
        config.ignored_layers = unquantized  # type: ignore[attr-defined]  # its released name, which other loaders read

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if not self._keeps_mxfp8:
            return super().param_needs_quantization(model, param_name, **kwargs)
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, Mxfp8Module) and name in module.weight_names

    def get_quantize_ops(self) -> ConversionOps:
        return Mxfp8Quantization() if self._keeps_mxfp8 else super().get_quantize_ops()

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        if self._dequantizes_ours:
            # Transformers knows the experts of a checkpoint as separate weights only. With the names of modules they
            # are one tensor, as in a language model that was saved alone.
            for name in Mxfp8Experts.weight_names:
                sources = [f".experts.{name}", f".experts.{name}{SCALE_SUFFIX}"]
                conversions.append(WeightConverter(sources, sources[0], [Mxfp8Dequantization(self)]))
        return conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self._keeps_mxfp8:
            return super()._process_model_after_weight_loading(model, **kwargs)
        _keep_rules_of_scales(model, self)
        for module in model.modules():
            if isinstance(module, Mxfp8Module):
                module.finish_loading()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if has_offloaded_experts(model):
            raise ValueError(
                "the experts are offloaded to the host; call `remove()` of the offload before `dequantize`"
            )
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, Mxfp8Module):
                model.set_submodule(name, _dequantized(module, dtype))
        return model


class Mxfp8Quantization(ConversionOps):
    """From a weight that is being loaded to its values and scales."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """As in Transformers.

        Args:
            input_dict (`dict`): A weight, under its name in the model.
            source_patterns, target_patterns (`list[str]`): Not used.
            **kwargs: Not used.
        """
        quantized: dict[str, list[torch.Tensor]] = {}
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if tensor.numel() == 0:  # the part of a process that has none of the experts: in the dtype of the result
                tensor = tensor.float()
            values, scales = quantize_mxfp8(tensor)
            quantized |= {name: [values], name + SCALE_SUFFIX: [scales]}
        return quantized


class Mxfp8Dequantization(ConversionOps):
    """From values and scales of experts, under the names that they have in the model, to their weight."""

    def __init__(self, hf_quantizer: Mxfp8Quantizer):
        self.hf_quantizer = hf_quantizer  # tells Transformers to leave the bytes as they are until `convert`

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """As in Transformers.

        Args:
            input_dict (`dict`): Values and scales, or a weight that is not quantized.
            source_patterns, target_patterns (`list[str]`): Names of values and scales, and of the weight.
            **kwargs: Among them the `model`, and the `full_layer_name` of the weight in it, which tells the dtype.
        """
        dtype = kwargs["model"].get_parameter(kwargs["full_layer_name"]).dtype
        (values,), scales = input_dict[source_patterns[0]], input_dict.get(source_patterns[1])
        weight = values.to(dtype) if scales is None else dequantize_mxfp8(values, scales[0], dtype)
        return {target_patterns[0]: [weight]}

    @property
    def reverse_op(self) -> ConversionOps:
        return Mxfp8Quantization()


def refuse_half_quantized_weights(
    model: PreTrainedModel, quantizer: HfQuantizer | None, info: LoadStateDictInfo
) -> None:
    """Raise `ValueError` where a checkpoint in MXFP8 and its list of unquantized modules disagree.

    Values without scales, and scales of a layer that is not quantized, would load without an error and mean nothing.

    Args:
        model (`PreTrainedModel`): The loaded model.
        quantizer (`HfQuantizer`, *optional*): How it was loaded.
        info (`LoadStateDictInfo`): The report of the loading.
    """
    if not isinstance(quantizer, Mxfp8Quantizer) or info.conversion_errors:  # Transformers reports those
        return
    quantized = {
        f"{name}.{weight}{suffix}" if name else f"{weight}{suffix}"
        for name, module in model.named_modules()
        if isinstance(module, Mxfp8Module)
        for weight in module.weight_names
        for suffix in ("", SCALE_SUFFIX)
    }
    missing = sorted(quantized.intersection(info.missing_keys))
    if missing:
        raise ValueError(
            f"The checkpoint has no tensor for {missing[0]} (and {len(missing) - 1} more of this kind), although its "
            "`quantization_config` says that the layer is in MXFP8. `ignored_layers` must list the layers that are not."
        )
    ignored = model._keys_to_ignore_on_load_unexpected or []
    unexpected = sorted(
        key
        for key in info.unexpected_keys
        if key.endswith(SCALE_SUFFIX) and not any(re.search(pattern, key) for pattern in ignored)
    )
    if unexpected:
        raise ValueError(
            f"The checkpoint has scales for {unexpected[0].removesuffix(SCALE_SUFFIX)} (and {len(unexpected) - 1} more "
            "of this kind), which `ignored_layers` of its `quantization_config` names as not quantized, or which the "
            "model does not have."
        )


def _replace_layers(model: PreTrainedModel, unquantized: list[str], dtype: torch.dtype) -> None:
    """Put layers with empty MXFP8 weights in the place of linear layers and experts."""
    skipped = layers_of_names(model, unquantized)
    for name, module in list(model.named_modules()):
        if name in skipped:
            continue
        if type(module) is nn.Linear:
            widths = [module.in_features]
        elif type(module) is MiniMaxM3VLExperts:
            widths = [module.hidden_dim, module.intermediate_dim]
        else:
            continue
        for width in widths:
            if width % GROUP_SIZE:
                raise ValueError(
                    f"{name} has rows of {width} values, but MXFP8 needs a multiple of {GROUP_SIZE}. Name the module "
                    "in `modules_to_not_convert`."
                )
        with torch.device("meta"):
            if isinstance(module, nn.Linear):
                new: nn.Module = Mxfp8Linear(module.in_features, module.out_features, module.bias is not None, dtype)
            else:
                new = Mxfp8Experts(module, dtype)
        model.set_submodule(name, new)


def _dequantized(module: Mxfp8Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, Mxfp8Linear):
        with torch.device("meta"):
            plain: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype))
    else:
        assert isinstance(module, Mxfp8Experts)
        return plain_experts(module, dtype)
    for name in module.weight_names:
        setattr(plain, name, nn.Parameter(dequantize_mxfp8(*module.stored(name), dtype)))
    return plain.train(module.training)


def _keep_rules_of_scales(model: PreTrainedModel, quantizer: Mxfp8Quantizer) -> None:
    """Make a save cut the scales as it cuts the values.

    Transformers saves by the rules that it used for loading. Where the weights were quantized while they were loaded,
    no rule of scales was used.
    """
    used: list[WeightTransform] = getattr(model, "_weight_conversions", None) or []
    cut = {
        tuple(rule._original_target_patterns): rule._original_source_patterns
        for rule in used
        if isinstance(rule, WeightConverter)
    }
    for rule in quantizer.update_weight_conversions(get_model_conversion_mapping(model, add_legacy=False), model):
        targets = tuple(rule._original_target_patterns)
        of_values = tuple(target.removesuffix(SCALE_SUFFIX) for target in targets)
        if isinstance(rule, WeightConverter) and targets != of_values and of_values in cut and targets not in cut:
            used.append(rule)
