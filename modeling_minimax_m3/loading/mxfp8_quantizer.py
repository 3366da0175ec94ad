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
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.modeling_utils import LoadStateDictInfo
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..layers.indexer import MiniMaxM3VLIndexer
from ..layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts, MiniMaxM3VLTopKRouter
from ..layers.mxfp8 import SCALE_SUFFIX, Mxfp8Experts, Mxfp8Linear, Mxfp8Module
from ..mxfp8 import GROUP_SIZE, dequantize_mxfp8, quantize_mxfp8

METHOD = "mxfp8"


def mxfp8_config(modules_to_not_convert: list[str] | None = None, dequantize: bool = False) -> FineGrainedFP8Config:
    """The `quantization_config` of `from_pretrained` that keeps experts and linear layers in MXFP8.

    A checkpoint in MXFP8 needs none: it is kept so by default. For any other checkpoint the weights are quantized while
    they are loaded.

    Args:
        modules_to_not_convert (`list[str]`, *optional*): Names of modules, in the checkpoint or in the model, that stay
            as they are; a name stands for all that it contains. Default: those of the checkpoint, and for a checkpoint
            that is not quantized those that the released one leaves in bfloat16: head, embeddings, routers, indexers,
            vision tower and projector.
        dequantize (`bool`): Whether a checkpoint in MXFP8 is loaded as a plain model.
    """
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
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        is_ours = any(isinstance(module, MiniMaxM3VLExperts | MiniMaxM3VLDenseMLP) for module in model.modules())
        self._dequantizes_ours = is_ours and config.dequantize and self.pre_quantized
        self._keeps_mxfp8 = is_ours and not self._dequantizes_ours
        if not self._keeps_mxfp8:
            args, options = self._environment
            super().validate_environment(*args, **options)
            super()._process_model_before_weight_loading(model, dtype=dtype, **kwargs)
            return
        if config.weight_block_size is None or tuple(config.weight_block_size) != (1, GROUP_SIZE):
            raise ValueError(
                f"`weight_block_size` of MXFP8 must be (1, {GROUP_SIZE}), got {config.weight_block_size}. Is the "
                "checkpoint in another format? `quantization_config=mxfp8_config(dequantize=True)` loads what "
                "Transformers can read."
            )
        unquantized = config.modules_to_not_convert
        if unquantized is None:
            unquantized = _unquantized_as_released(model)
        _replace_layers(model, unquantized, dtype or model.dtype)
        config.modules_to_not_convert = unquantized
        config.ignored_layers = unquantized  # the released config's name for it, which other loaders read

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
                for parameter in module.parameters(recurse=False):
                    if parameter.element_size() == 1:
                        parameter.requires_grad_(False)  # Transformers makes every floating-point parameter trainable
                module.shows_numbers = not hasattr(module, "_hf_hook")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.config.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, Mxfp8Module):
                model.set_submodule(name, _dequantized(module, dtype))
        return model


class Mxfp8Quantization(ConversionOps):
    """From a weight that is being loaded to its values and scales."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, torch.Tensor | list[torch.Tensor]], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """As in Transformers.

        Args:
            input_dict (`dict`): A weight, under its name in the model.
            **kwargs: Not used.
        """
        quantized = {}
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            quantized[name], quantized[name + SCALE_SUFFIX] = quantize_mxfp8(tensor)
        return quantized


class Mxfp8Dequantization(ConversionOps):
    """From values and scales of experts, under the names that they have in the model, to their weight."""

    def __init__(self, hf_quantizer: Mxfp8Quantizer):
        self.hf_quantizer = hf_quantizer  # tells Transformers to leave the bytes as they are until `convert`

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As in Transformers.

        Args:
            input_dict (`dict`): Values and scales, or a weight that is not quantized.
            source_patterns, target_patterns (`list[str]`): Names of values and scales, and of the weight.
            full_layer_name (`str`): Name of the weight in `model`.
            model (`PreTrainedModel`): Its parameter of that name tells the dtype.
            **kwargs: Not used.
        """
        dtype = model.get_parameter(full_layer_name).dtype
        (values,), scales = input_dict[source_patterns[0]], input_dict.get(source_patterns[1])
        weight = values.to(dtype) if scales is None else dequantize_mxfp8(values, scales[0], dtype)
        return {target_patterns[0]: weight}

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
            "`quantization_config` says that the layer is in MXFP8. Layers that are not belong into `ignored_layers`."
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
    modules = dict(model.named_modules())
    names_on_disk = _names_on_disk(model, list(modules))
    fused = _fused_projections(model, unquantized)
    for (name, module), name_on_disk in zip(modules.items(), names_on_disk, strict=True):
        if any(_is_named(known, unquantized) for known in (name, name_on_disk)) or name in fused:
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
                    f"{name} has rows of {width} values, and MXFP8 has a scale for {GROUP_SIZE} values each. Name the "
                    "module in `modules_to_not_convert`."
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
        with torch.device("meta"):
            plain = MiniMaxM3VLExperts(module.config)
        plain._is_expert_parallel = module._is_expert_parallel
    for name in module.weight_names:
        setattr(plain, name, nn.Parameter(dequantize_mxfp8(*module.stored(name), dtype)))
    return plain.train(module.training)


def _unquantized_as_released(model: PreTrainedModel) -> list[str]:
    """Modules, by their names in a checkpoint, that the released one leaves in bfloat16."""
    names: list[str] = []
    whole: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{parent}.") for parent in names):
            continue
        if isinstance(module, MiniMaxM3VLTopKRouter | nn.Embedding):
            names.append(name)
        elif isinstance(module, MiniMaxM3VLIndexer):
            names += [f"{name}.{child}" for child, layer in module.named_children() if type(layer) is nn.Linear]
        elif name.rpartition(".")[2] == "lm_head":
            names.append(name)
        elif name.rpartition(".")[2] in ("vision_tower", "multi_modal_projector"):
            parts = [f"{name}.{child}" for child, layer in module.named_modules() if type(layer) is nn.Linear]
            whole.update(part.split(".")[0] for part in _names_on_disk(model, parts))
    return [*_names_on_disk(model, names), *sorted(whole)]


def _is_named(module: str, names: list[str]) -> bool:
    """Whether a module is named, or is part of a module that is. A name may be a regular expression, as elsewhere."""
    return any(f".{name}." in f".{module}." for name in names) or not should_convert_module(module, names)


def _fused_projections(model: PreTrainedModel, names: list[str]) -> set[str]:
    """The fused layers whose parts are named as on disk."""
    rules = get_model_conversion_mapping(model)
    fused = set()
    for name in names:
        renamed = f"{name}.weight"
        for rule in rules:
            renamed, _ = rule.rename_source_key(renamed)
        fused.add(renamed.removesuffix(".weight"))
    return fused


def _names_on_disk(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Names of modules in the model as those in a checkpoint. A fused layer, which has none there, keeps its last part."""
    renamings = [
        conversion.reverse_transform()
        for conversion in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if type(conversion) is WeightRenaming
    ]
    found = []
    for name in names:
        renamed = name + "."
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        found.append(renamed.removesuffix("."))
    return found


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
