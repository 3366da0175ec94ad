"""LoRA adapters for the modules of the language model that the loss reaches."""

import copy
import itertools
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

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
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot make the adapters: {error}") from error


def check_adapters(config: PreTrainedConfig, lora: LoraArguments, with_media: bool, given_options: set[str]) -> None:
    """Raises ValueError for adapters that cannot be made, or if an option needs adapters that are missing."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # the model's structure without its weights
        model = auto_class(config)._model_mapping[type(config)](copy.deepcopy(config))
        model = add_adapters(model, lora, with_media)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    refuse_idle(given_options, no_adapted_indexers=not any(".indexer." in name for name in trained))
