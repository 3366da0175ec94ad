"""The memory of a run of `train`, planned before weights are loaded.

`model` and `lora` are the arguments of that command: `ModelArguments` and `LoraArguments`.
"""

import os
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from modeling_minimax_m3 import memory_plan

from .quantization import PRECISIONS as QUANTIZED_PRECISIONS

logger = logging.get_logger(__name__)

# The optimizers of Transformers that the planner knows by another name. It takes all others for adamw.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), "adamw-8bit"),
    "paged_adamw_32bit": "paged-adamw",
    "paged_adamw_8bit": "paged-adamw-8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}

# The plan is an estimate, and was within 4.3% of the measured peaks (benchmarks/results/memory_plan.md). Not all cases have
# been measured, so a run whose plan exceeds a device by less starts with a warning.
CERTAINLY_TOO_MUCH = 1.2


def planned_devices(training: TrainingArguments) -> tuple[int, float] | None:
    """The number of devices of the run, and the GiB of each. None on a CPU, for which there is no plan."""
    detected = memory_plan.detected_devices()
    if detected is None or training.device.type != "cuda":
        return None
    return max(training.world_size, 1), detected[1]


def memory_request(
    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig,
    model: Any,
    lora: Any,
    longest: int,
    training: TrainingArguments,
    devices: tuple[int, float],
) -> memory_plan.MemoryRequest | None:
    """What the planner has to know of a run. None for weights that cannot be trained, which `Trainer` refuses."""
    unquantized: tuple[str, ...] = memory_plan.UNQUANTIZED_PARTS
    if model.quantization is not None:
        precision = QUANTIZED_PRECISIONS[model.quantization]
    elif model.dtype == "auto" or getattr(config, "quantization_config", None) is not None:  # which `dtype` leaves
        precision = memory_plan.saved_precision(config)
        unquantized = memory_plan.saved_unquantized_parts(config)
    else:
        dtype: Any = getattr(torch, model.dtype, None)
        precision = memory_plan.DTYPES.get(dtype, "bf16")
    is_quantized = memory_plan.PRECISIONS[precision].is_quantized
    if is_quantized and not lora.lora:
        return None
    count, device_gib = devices
    strategy = "single"
    if model.fsdp_size > 1:
        strategy = "expert_parallel" if model.ep_size == count else "fsdp2"
    elif count > 1:
        shards = os.environ.get("ACCELERATE_USE_FSDP") == "true" or bool(training.fsdp)
        is_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or bool(training.deepspeed)
        strategy = "fsdp2" if shards else "zero3" if is_zero else "ddp"
    return memory_plan.MemoryRequest(
        precision=precision,
        unquantized_parts=unquantized,
        context=longest,
        batch_size=training.per_device_train_batch_size,
        training=("qlora" if is_quantized else "lora") if lora.lora else "full",
        train_vision=model.train_vision,
        lora_rank=lora.lora_rank,
        lora_targets=tuple(lora.lora_targets),
        lora_experts=lora.lora_experts,
        lora_save=tuple(lora.lora_save),
        autocast=precision == "float32" and (training.bf16 or training.fp16),
        optimizer=OPTIMIZERS.get(getattr(training.optim, "value", training.optim), "adamw"),
        gradient_checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        devices=count,
        device_gib=device_gib,
        strategy=strategy,
    )


def check_memory(
    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig,
    model: Any,
    lora: Any,
    longest: int,
    training: TrainingArguments,
) -> None:
    """Prints what a run with rows of up to `longest` tokens needs.

    Raises:
        ValueError: That does not fit, even if the estimate is too high by a fifth.
    """
    devices = planned_devices(training)
    if devices is None:
        return
    try:
        request = memory_request(config, model, lora, longest, training, devices)
        plan = None if request is None else memory_plan.plan_memory(config, request)
    except ValueError as error:  # the run itself may work
        logger.warning(f"there is no memory plan: {error}")
        return
    if plan is None:
        return
    if training.process_index == 0:
        print(f"memory plan\n{plan.table()}", flush=True)
    if plan.fits is not False or model.ignore_plan:
        return
    message = f"the run needs about {plan.total_gib:.1f} GiB on a device of {devices[1]:.1f} GiB: see the plan above"
    if plan.total_gib > CERTAINLY_TOO_MUCH * devices[1]:
        raise ValueError(f"{message}. --ignore_plan starts it all the same")
    logger.warning(message)
