"""LoRA adapters for the modules of the language model that the loss reaches."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.adapters import CHANGED_BASES
from ..layers.quantized import numbers_of_shards
from .checkpoint import auto_class
from .idle_options import refuse_idle
from .train_arguments import LoraArguments

# The modules that get adapters on request, and those that never do.
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
VISION = ("vision_tower", "multi_modal_projector")


def find_modules(
    model: PreTrainedModel, option: str, endings: list[str], is_possible: Callable[[str, torch.nn.Module], bool]
) -> list[str]:
    """Finds the full names of the possible modules whose name ends in one of the endings.

    Args:
        model (PreTrainedModel): The model.
        option (str): The option of the endings, for the message.
        endings (list[str]): Ends of module names.
        is_possible (Callable): Whether a module, by its name and itself, may be chosen.

    Returns:
        The sorted names.

    Raises:
        ValueError: No possible module has one of the endings. The message lists the possible ones.
    """
    possible = [name for name, module in model.named_modules() if is_possible(name, module)]
    found = {ending: [name for name in possible if f".{name}".endswith(f".{ending}")] for ending in endings}
    if unknown := [ending for ending, names in found.items() if not names]:
        there = sorted({last for name in possible if not (last := name.rpartition(".")[2]).isdigit()})
        raise ValueError(
            f"{option}: no module that can be trained ends in {', '.join(unknown)}; possible are "
            f"{', '.join(filter(None, there))}"
        )
    return sorted(set(itertools.chain(*found.values())))


def add_adapters(model: PreTrainedModel, arguments: LoraArguments, with_media: bool) -> PreTrainedModel:
    """Puts adapters only on modules of the language model that the loss reaches.

    Raises:
        ValueError: A name matches no such module, or PEFT refuses the configuration.
    """
    from peft import LoraConfig, get_peft_model

    unreached = {"indexer"} if model.config.get_text_config().indexer_loss_coef == 0 else set()
    parts = {name: set(name.split(".")) for name, _ in model.named_modules()}
    saved = find_modules(
        model,
        "--lora_save",
        arguments.lora_save,
        lambda name, module: (
            not parts[name] & (unreached if with_media else {*unreached, *VISION})
            and not isinstance(module, torch.nn.ModuleList)
            and any(True for _ in module.parameters())
        ),
    )
    find_modules(
        model,
        "--lora_targets",
        arguments.lora_targets,
        lambda name, module: (
            isinstance(module, torch.nn.Linear)
            and not parts[name] & {*unreached, *VISION}
            and not any(f"{name}.".startswith(f"{other}.") for other in saved)
        ),
    )
    elsewhere = [part for part in (*VISION, *unreached) if any(part in names for names in parts.values())]
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_targets,
            exclude_modules=rf".*\b({'|'.join(elsewhere)})\b.*" if elsewhere else None,
            target_parameters=list(EXPERTS) if arguments.lora_experts else None,
            modules_to_save=saved or None,
        )
        with numbers_of_shards(model):
            return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot make the adapters: {error}") from error


def open_adapter_config(folder: str, lora: LoraArguments) -> tuple[Any, LoraArguments]:
    """The configuration of the adapter in a folder, and the options that would make one like it.

    Raises:
        ValueError: There is no adapter of LoRA in the folder.
    """
    from peft import PeftConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    if missing := [name for name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME) if not (Path(folder) / name).is_file()]:  # fmt: skip
        raise ValueError(f"--adapter {folder} holds no {missing[0]}")
    try:
        adapter: Any = PeftConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--adapter {folder} cannot be read: {error}") from error
    if str(getattr(adapter.peft_type, "value", adapter.peft_type)) != "LORA":
        raise ValueError(f"--adapter {folder} must be an adapter of LoRA, got {adapter.peft_type}")
    adapter.inference_mode = False
    targets = adapter.target_modules
    names = sorted(targets) if isinstance(targets, (list, set)) else lora.lora_targets
    like = replace(
        lora,
        lora=True,
        lora_rank=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        lora_targets=names,
        lora_experts=bool(adapter.target_parameters),
        lora_save=list(adapter.modules_to_save or ()),
    )
    return adapter, like


def check_resumed(checkpoint: str, lora: LoraArguments) -> None:
    """Raises ValueError if a checkpoint of a run has other adapters than the run that is to continue from it."""
    if not (Path(checkpoint) / "adapter_config.json").is_file():
        if lora.lora or lora.adapter is not None:
            raise ValueError(
                f"{checkpoint} has no adapter: leave --lora and --adapter out, or name another --output_dir"
            )
        return
    if not lora.lora and lora.adapter is None:
        raise ValueError(f"{checkpoint} has an adapter: add the options of its run, such as --lora")
    _, saved = open_adapter_config(checkpoint, lora)
    for option in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_experts", "lora_save"):
        given, found = getattr(lora, option), getattr(saved, option)
        if option == "lora_save":  # it is saved with the full names of the modules
            differ = bool(given) != bool(found)
        else:
            differ = sorted(given) != sorted(found) if isinstance(given, list) else given != found
        if differ:
            raise ValueError(f"--{option} is {given}, but the adapter in {checkpoint} has {found}")


def check_start(folder: str, adapter: Any, is_quantized: bool) -> None:
    """Raises ValueError for an adapter whose start changes the model's weights, where PEFT cannot change them."""
    start = adapter.init_lora_weights
    if not isinstance(start, str) or not start.lower().startswith(CHANGED_BASES):
        return
    for is_impossible, weights in ((adapter.target_parameters, "routed experts"), (is_quantized, "quantized weights")):
        if is_impossible:
            raise ValueError(
                f"--adapter {folder} has `init_lora_weights` {start!r}, which changes the weights of the model, and PEFT "
                f"cannot do this with {weights}"
            )


def check_fit(
    config: PreTrainedConfig, folder: str, adapter: Any, given_options: set[str], is_quantized: bool = False
) -> None:
    """Raises ValueError if the adapter in a folder is one for another model. No weights are loaded."""
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    check_start(folder, adapter, is_quantized)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_class(config)._model_mapping[type(config)](copy.deepcopy(config))
        try:
            model = get_peft_model(model, copy.deepcopy(adapter))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"--adapter {folder} does not fit the model: {error}") from error
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"--adapter: {file} cannot be read: {error}") from error
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"--adapter {folder} does not fit the model: {name} must have the shape {expected.get(name)}, got "
                f"{found.get(name)}"
            )
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    refuse_idle(given_options, no_adapted_indexers=not any(".indexer." in name for name in trained))


def check_adapters(config: PreTrainedConfig, lora: LoraArguments, with_media: bool, given_options: set[str]) -> None:
    """Raises ValueError for adapters that cannot be made, or if an option needs adapters that are missing."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # the model's structure without its weights
        model = auto_class(config)._model_mapping[type(config)](copy.deepcopy(config))
        model = add_adapters(model, lora, with_media)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    refuse_idle(given_options, no_adapted_indexers=not any(".indexer." in name for name in trained))
