"""Weights that `train` shards over processes while it loads them: the options `--fsdp_size` and `--ep_size`.

Each process reads only its own part of a checkpoint, so that no machine has to hold the whole model once for each
process. Transformers' `DistributedConfig` does the work.
"""

import os
from typing import Any

from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

# Averages the gradients of adapters over the processes. Transformers before 5.24 lacks it, and each process would then
# train adapters of its own.
_AVERAGING = "_sync_replicated_trainable_parameters"
_OWN_FORM = "mxfp8"  # of quantized weights, the one whose parts can be sharded


def check_sharding(
    model: Any, lora: Any, training: TrainingArguments, config: PreTrainedConfig, quantization: str | None
) -> None:
    """Raises ValueError if weights cannot be sharded so, before any is loaded.

    Args:
        model, lora (`ModelArguments`, `LoraArguments`): Of the command.
        training (TrainingArguments): Where weights are sharded, its checkpoints are set to hold the model alone.
        config (PreTrainedConfig): Of the checkpoint.
        quantization (str, optional): The form of its weights, or the one that they get: "mxfp8", "nf4", ...
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
    if lora.lora or lora.adapter:
        if not hasattr(Trainer, _AVERAGING):
            raise ValueError("--lora and --adapter with --fsdp_size need Transformers 5.24 or newer")
        if lora.lora_save:
            raise ValueError(
                "--lora_save cannot go with --fsdp_size, which shards whole modules before they are copied"
            )
        if lora.lora_experts and model.ep_size > 1:
            raise ValueError("--lora_experts cannot go with --ep_size: each process would adapt its experts alone")
    if training.save_strategy != "no" and not training.save_only_model:
        training.save_only_model = True
        if training.process_index == 0:
            print("with --fsdp_size checkpoints hold the model alone, and no run can be resumed from them")


def sharding_options(arguments: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that shard the weights; none with one process."""
    if arguments.fsdp_size == 1:
        return {}
    return {"distributed_config": DistributedConfig(fsdp_size=arguments.fsdp_size, ep_size=arguments.ep_size)}


def adapter_weights(model: Any) -> dict[str, Any]:
    """The state of the adapters alone. PEFT would gather the whole model for it, in every process."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
