"""Say whether a MiniMax-M3 fits on the devices, before anything is loaded.

    python scripts/plan_memory.py CHECKPOINT --precision mxfp8 --context 131072
    python scripts/plan_memory.py released --precision mxfp8 --devices 8 --device_gib 80
    python scripts/plan_memory.py CHECKPOINT --training lora --gradient_checkpointing --devices 8 --device_gib 141

The first argument is a `config.json`, the folder of a checkpoint, its name on the Hub, or `released` for the released
geometry. Weights are not read. The exit status is 1 where the plan does not fit. docs/memory.md explains the rows.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from modeling_minimax_m3 import memory_plan as planner


def _share_or_size(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# Flags by the names of `MemoryRequest`'s fields, which takes its own defaults for those that are left out.
FLAGS: dict[str, dict[str, Any]] = {
    "precision": {"choices": planner.PRECISIONS, "help": "of the loaded weights; default: as saved, else bf16"},
    "unquantized_parts": {
        "nargs": "*",
        "choices": planner.QUANTIZABLE_PARTS,
        "help": f"what a quantized precision leaves in bf16; default: {' '.join(planner.UNQUANTIZED_PARTS)}",
    },
    "context": {"type": int, "help": "tokens of a row: prompt and generated ones, or a row of training"},
    "new_tokens": {"type": int, "help": "generated tokens of a row"},
    "batch_size": {"type": int, "help": "rows of a pass; of each process in data-parallel training"},
    "training": {"choices": planner.TRAINING, "help": "what is trained; none is generation"},
    "train_vision": {"action": "store_true", "help": "also train the vision tower, in a full training"},
    "lora_rank": {"type": int, "help": "rank of the adapters"},
    "lora_targets": {"nargs": "*", "help": "ends of the names of linear layers that get adapters"},
    "lora_experts": {"action": "store_true", "help": "also put adapters on the routed experts"},
    "lora_save": {"nargs": "*", "help": "ends of the names of modules that LoRA trains whole"},
    "autocast": {"action": "store_true", "help": "train weights in float32, computing in bfloat16"},
    "prepared_for_kbit": {"action": "store_true", "help": "after PEFT's prepare_model_for_kbit_training"},
    "optimizer": {"choices": planner.OPTIMIZERS, "help": "the states of a paged one are in host memory"},
    "gradient_checkpointing": {
        "action": "store_true",
        "help": "of each layer keep only its input, and run it again in the backward",
    },
    "gradient_accumulation_steps": {"type": int, "help": "passes for each step of the optimizer"},
    "loss_chunk": {"type": int, "help": "tokens whose logits exist at the same time in training"},
    "cache": {"choices": planner.CACHES, "help": "the dynamic one doubles its size when it is full"},
    "prefill_chunk": {"type": int, "help": "tokens of a row that generate reads at a time"},
    "devices": {"type": int, "help": "number of devices; default: those of this machine, else 1"},
    "device_gib": {"type": float, "help": "GiB of each device; default: that of this machine's devices"},
    "strategy": {
        "choices": planner.STRATEGIES,
        "help": "default with several devices: device_map for generation, fsdp2 for training",
    },
    "experts_on_device": {
        "type": _share_or_size,
        "help": "keep the experts on the host, and this part on the device: a share such as 0.25, or a size such as 20GiB",
    },
    "host_gib": {
        "type": float,
        "help": "GiB of the host for each process; default with experts there: this machine's",
    },
    "margin": {"type": float, "help": "share of a device that stays free"},
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file, a folder, a name on the Hub, or `released`")
    parser.add_argument("--layers", type=int, help="keep only the first LAYERS layers")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    for name, options in FLAGS.items():
        default = planner.MemoryRequest.__dataclass_fields__[name].default
        if "default" not in options["help"] and default not in (None, False, ()):
            value = " ".join(default) if isinstance(default, tuple) else default
            options = options | {"help": f"{options['help']}; default: {value}"}
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    return parser.parse_args(argv)


def request_of(arguments: argparse.Namespace, config: planner.Config) -> planner.MemoryRequest:
    """The request of the command line, with defaults of this machine and of the checkpoint."""
    given = {name: value for name, value in vars(arguments).items() if name in FLAGS}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if "precision" not in given:
        given["precision"] = planner.saved_precision(config)
        given.setdefault("unquantized_parts", planner.saved_unquantized_parts(config))
    detected = planner.detected_devices()
    if detected is not None:
        if "experts_on_device" in given:
            given.setdefault("devices", 1)
            given.setdefault("host_gib", planner.detected_host_gib())
        given.setdefault("devices", detected[0])
        given.setdefault("device_gib", detected[1])
    if "context" in given and given.get("training", "none") == "none":
        default = planner.MemoryRequest.__dataclass_fields__["new_tokens"].default
        given.setdefault("new_tokens", max(0, min(default, given["context"] - 1)))
    if given.get("devices", 1) > 1:
        given.setdefault("strategy", "device_map" if given.get("training", "none") == "none" else "fsdp2")
    return planner.MemoryRequest(**given)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        config = planner.read_config(arguments.config, arguments.layers)
        plan = planner.plan_memory(config, request_of(arguments, config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"plan_memory.py: {error}") from error
    print(json.dumps(planner.as_dict(plan), indent=2) if arguments.json else plan.table())
    return int(plan.fits is False)


if __name__ == "__main__":
    sys.exit(main())
