"""Which layers of a model are in MXFP8, from the lists in configs and from the tensors in files.

A list may have the names on disk or those of modules, whole or in part, as the released config does.
"""

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.quantizers_utils import should_convert_module

from ..layers.moe import MiniMaxM3VLExperts, MiniMaxM3VLTopKRouter
from ..layers.mxfp8 import SCALE_SUFFIX, Mxfp8Experts


def layers_of_names(model: PreTrainedModel, names: list[str]) -> set[str]:
    """The linear layers and experts that a list of modules names, by their names in the model.

    Args:
        model (`PreTrainedModel`): The model, whose layers may be without weights.
        names (`list[str]`): Names of modules, or regular expressions as elsewhere in Transformers. A name stands for all
            that the module contains.
    """
    layers = _layers(model)
    prefix = f"{model.base_model_prefix}."  # which a model without a head lacks
    fused = {name_in_model(model, f"{name}.weight").removesuffix(".weight") for name in names}
    found = set()
    for layer, *on_disk in zip(
        layers, _names_on_disk(model, layers), _names_on_disk(model, [prefix + name for name in layers]), strict=True
    ):
        known = (layer, *on_disk)
        if not fused.isdisjoint((layer, prefix + layer)) or any(_is_named(name, names) for name in known):
            found.add(layer)
    return found


def unquantized_as_released(model: PreTrainedModel) -> list[str]:
    """Modules, by their names in a checkpoint, that the released one leaves in bfloat16."""
    names: list[str] = []
    whole: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{parent}.") for parent in names):
            continue
        if isinstance(module, MiniMaxM3VLTopKRouter | nn.Embedding) or name.rpartition(".")[2] == "lm_head":
            names.append(name)
        elif name.rpartition(".")[2] in ("vision_tower", "multi_modal_projector"):
            parts = [f"{name}.{child}" for child, layer in module.named_modules() if type(layer) is nn.Linear]
            whole.update(part.split(".")[0] for part in _names_on_disk(model, parts))
    return [*_names_on_disk(model, names), *sorted(whole)]


def unquantized_in_files(model: PreTrainedModel, files: list[str]) -> list[str]:
    """Modules, by their names in a checkpoint, whose weights have no scales there.

    Args:
        model (`PreTrainedModel`): The model that is to be loaded.
        files (`list[str]`): Those of the checkpoint. Files of another kind than safetensors are taken for released.
    """
    if not all(file.endswith(".safetensors") for file in files):
        return unquantized_as_released(model)
    prefix = f"{model.base_model_prefix}."
    with_scales: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            scales = [key for key in opened.keys() if key.endswith(SCALE_SUFFIX)]  # noqa: SIM118
        with_scales.update(name_in_model(model, key.removesuffix(SCALE_SUFFIX)).removeprefix(prefix) for key in scales)
    weights = ("weight", *Mxfp8Experts.weight_names)
    plain = [
        layer
        for layer in _layers(model)
        if with_scales.isdisjoint(f"{layer}.{weight}".removeprefix(prefix) for weight in weights)
    ]
    names = [name for name in unquantized_as_released(model) if layers_of_names(model, [name]) <= set(plain)]
    named = layers_of_names(model, names)
    return [*names, *_names_on_disk(model, [layer for layer in plain if layer not in named])]


def name_in_model(model: PreTrainedModel, weight: str) -> str:
    """A weight's name on disk as that in the model. A name in the model stays."""
    for rule in get_model_conversion_mapping(model):
        weight, _ = rule.rename_source_key(weight)
    return weight


def _layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, MiniMaxM3VLExperts)]


def _is_named(module: str, names: list[str]) -> bool:
    return any(f".{name}." in f".{module}." for name in names) or not should_convert_module(module, names)


def _names_on_disk(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Names of modules as in a checkpoint. Experts and fused layers, which have other names there, keep their last part."""
    renamings = [
        rule.reverse_transform()
        for rule in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if type(rule) is WeightRenaming
    ]
    found = []
    for name in names:
        renamed = f"{name}."
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        found.append(renamed.removesuffix("."))
    return found
