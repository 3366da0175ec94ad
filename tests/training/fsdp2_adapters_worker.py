"""Steps of adapters in two processes and in this one: `fsdp2_adapters_worker.py DTYPE FOLDER`, started by a test.

Accelerate shards no model on a CPU, so that its function for that is called by itself, with the plugin that the
environment of `accelerate launch --config_file examples/accelerate/fsdp2.yaml` makes. DTYPE is that of the frozen
weights and of the computation. FOLDER gets `result.json`.
"""

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from vision_scale_out_worker import make_inputs  # beside this file

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

CONFIG = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
STEPS, RATE = 3, 0.3


def make_model(dtype: torch.dtype):
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config()).to(dtype).train()
    model.activation_checkpointing_enable()  # PEFT then lets the outputs of all embeddings require gradients
    targets = r"model\.language_model\..*\.self_attn\.(q|k|v|o)_proj"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def row(config, step: int, rank: int) -> dict[str, torch.Tensor]:
    """Text, with an image in the second step of the first process alone."""
    media = {"images": [[1, 2, 4]]} if (step, rank) == (1, 0) else {}
    return make_inputs(config, 10 * step + rank, **media) | {"use_cache": False}


def in_one_process(model, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the first row of each step, and the adapters at the end. The masters of the adapters are float32."""
    masters = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    model, losses = model.to(dtype), []
    for step in range(STEPS):
        for name, parameter in trained(model).items():
            parameter.data.copy_(masters[name])
        pair = [model(**row(model.config, step, rank)).loss for rank in range(2)]
        (sum(pair) / 2).backward()
        for name, parameter in trained(model).items():
            masters[name] -= RATE * parameter.grad.float()
        model.zero_grad()
        losses.append(pair[0].item())
    return losses, masters


def sharded(model, dtype: torch.dtype):
    for name, value in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["fsdp_config"].items():
        os.environ[name.upper().replace("LAYER_CLS", "CLS")] = str(value)  # as `accelerate launch` does
    plugin = FullyShardedDataParallelPlugin()
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    if precision != "no":
        plugin.set_mixed_precision(precision)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=precision,
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
    )
    return fsdp2_prepare_model(accelerator, model)


def main(dtype: torch.dtype, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = make_model(dtype)
    first = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    expected, masters = in_one_process(copy.deepcopy(model), dtype)
    model = sharded(model, dtype)
    found = {"expected": expected, "losses": [], "gathers": [], "reduced": []}
    found["layers"] = model.config.text_config.num_hidden_layers
    for kind in (True, False):
        dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad == kind}
        found["trained" if kind else "frozen"] = sorted(dtypes)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(trained(model).values(), lr=RATE)
    for step in range(STEPS):
        with CommDebugMode() as communication:
            loss = model(**row(model.config, step, rank)).loss
            loss.backward()
        counts = {str(name): count for name, count in communication.get_comm_counts().items()}
        found["gathers"].append(sum(count for name, count in counts.items() if "gather" in name))
        found["reduced"].append(sum(count for name, count in counts.items() if "reduce_scatter" in name))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    whole = {name: parameter.detach().full_tensor() for name, parameter in trained(model).items()}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)  # as `Trainer` does
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == len(whole)
        found["error_of_saved"] = max(
            (saved[name.replace(".default.", ".")] - value).abs().max().item() for name, value in whole.items()
        )
        update, wanted = (
            torch.cat([(end[name] - first[name]).flatten() for name in first]) for end in (whole, masters)
        )
        found["error_of_update"] = ((update - wanted).norm() / wanted.norm()).item()
        (folder / "result.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), Path(sys.argv[2]))
