"""Weights that `train` shards over processes while it loads them: the options `--fsdp_size` and `--ep_size`.

Each process reads only its own part of a checkpoint, so that no machine has to hold the whole model once for each
process. Transformers' `DistributedConfig` does the work.
"""

import os
import re
from importlib import metadata
from typing import Any

from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from ..conversion.adapters import CHANGED_BASES, OTHER_KINDS

_SAVED = re.compile(r"\.lora_|\.(embed_tokens|lm_head)\.base_layer\.")  # what is saved of a model with adapters
_OLDEST_PEFT = Version("0.21")  # earlier ones call the model's `forward` alone, without FSDP2's hooks around it
_OWN_FORM = "mxfp8"  # of quantized weights, the one whose parts can be sharded


def check_sharding(
    model: Any,
    lora: Any,
    training: TrainingArguments,
    config: PreTrainedConfig,
    quantization: str | None,
    adapter: Any = None,
) -> None:
    """Raises ValueError if weights cannot be sharded so, before any is loaded.

    Args:
        model, lora (`ModelArguments`, `LoraArguments`): Of the command.
        training (TrainingArguments): Where weights are sharded, its checkpoints are set to hold the model alone.
        config (PreTrainedConfig): Of the checkpoint.
        quantization (str, optional): The form of its weights, or the one that they get: "mxfp8", "nf4", ...
        adapter (`peft.LoraConfig`, optional): Of the adapter that is trained further.
    """
    for name in ("fsdp_size", "ep_size"):
        if getattr(model, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(model, name)}")
    if model.fsdp_size == 1:
        if model.ep_size > 1:
            raise ValueError(f"--ep_size {model.ep_size} needs --fsdp_size, the number of all processes")
        return
    if model.fsdp_size != training.world_size:
        raise ValueError(
            f"--fsdp_size must be the number of processes, which is {training.world_size}, got {model.fsdp_size}: "
            f"start them by torchrun --nproc_per_node {model.fsdp_size}"
        )
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        raise ValueError("--fsdp_size cannot go with FSDP or DeepSpeed of accelerate launch: start with torchrun")
    for name in ("fsdp", "deepspeed", "load_best_model_at_end", "resume_from_checkpoint"):
        if getattr(training, name):
            raise ValueError(f"--{name} cannot go with --fsdp_size")
    if quantization not in (None, _OWN_FORM):
        raise ValueError(
            f"--fsdp_size can shard weights that are plain or in {_OWN_FORM}, and these are {quantization}"
        )
    experts = config.get_text_config().num_local_experts
    if model.fsdp_size % model.ep_size or experts % model.ep_size:
        raise ValueError(
            f"--ep_size must divide --fsdp_size, {model.fsdp_size}, and the {experts} experts of a layer, got "
            f"{model.ep_size}"
        )
    if adapter is not None:
        _check_kind(lora.adapter, adapter)
    elif not lora.lora:
        _check_optimizer(training)
    if lora.lora or lora.adapter:
        if training.torch_compile:
            raise ValueError(
                "--torch_compile cannot go with --fsdp_size and adapters: Trainer averages their gradients in the order in "
                "which a process computes them, and compiled processes differ in it"
            )
        if lora.lora_save:
            raise ValueError(
                "--lora_save cannot go with --fsdp_size, which shards whole modules before they are copied"
            )
        if lora.lora_experts and model.ep_size > 1:
            raise ValueError(
                "--lora_experts, or an adapter on experts, cannot go with --ep_size: each process would adapt its experts "
                "alone"
            )
        if (version := Version(metadata.version("peft"))) < _OLDEST_PEFT:
            raise ValueError(
                f"--fsdp_size with adapters needs PEFT {_OLDEST_PEFT} or newer, got {version}: pip install -U peft"
            )
    if training.save_strategy != "no" and not training.save_only_model:
        training.save_only_model = True
        if training.process_index == 0:
            print("with --fsdp_size checkpoints hold the model alone, and no run can be resumed from them")


def _check_optimizer(training: TrainingArguments) -> None:
    """Raises ValueError for an optimizer that cannot step on shards of weights. Adapters are whole in each process."""
    try:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError):  # some need the model
        return
    if kind.__module__.partition(".")[0] in ("bitsandbytes", "transformers"):
        name = getattr(training.optim, "value", training.optim)
        raise ValueError(
            f"--optim {name} cannot go with --fsdp_size without --lora: it takes no shards of weights. Those of PyTorch "
            "do, such as adamw_torch_fused"
        )


def _check_kind(folder: str, adapter: Any) -> None:
    """Raises ValueError for an adapter that PEFT makes from whole weights, and fails to make from sharded ones."""
    if found := [name for name in OTHER_KINDS if getattr(adapter, name, None)]:
        raise ValueError(f"--adapter {folder} has `{found[0]}`, which cannot go with --fsdp_size")
    start = adapter.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise ValueError(
            f"--adapter {folder} has `init_lora_weights` {start!r}, which changes the weights of the model and cannot go "
            "with --fsdp_size"
        )


def sharding_options(arguments: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that shard the weights; none with one process."""
    if arguments.fsdp_size == 1:
        return {}
    return {"distributed_config": DistributedConfig(fsdp_size=arguments.fsdp_size, ep_size=arguments.ep_size)}


def adapter_weights(model: Any) -> dict[str, Any]:
    """The state of the adapters, and of embeddings and head under one, which PEFT saves with it.

    All processes have to call it. PEFT would gather the whole model, in every process.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if _SAVED.search(name)}
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
