"""A model in MXFP8 that two processes share: started by tests, not by pytest.

`mxfp8_processes_worker.py KIND CHECKPOINT`: KIND is one of `PLANS`, by which `from_pretrained` cuts the model, or
"fully_shard" or "mixed_precision": PyTorch's FSDP2 around a loaded model with adapters. CHECKPOINT is the folder of a
text model in MXFP8. Each process checks its results against those of the whole model.
"""

import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

PLANS = {
    "fsdp2": {"fsdp_size": 2},
    "expert_parallel": {"fsdp_size": 2, "ep_size": 2},
    "tensor_parallel": {"tp_size": 2, "tp_plan": "auto"},
    "expert_and_tensor_parallel": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}
LAYERS = {"target_modules": ["q_proj", "o_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def load(checkpoint: str, dtype: torch.dtype, **options):
    return MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_plan(kind: str, checkpoint: str, tokens: torch.Tensor) -> None:
    parts = load(checkpoint, torch.float32, distributed_config=DistributedConfig(**PLANS[kind]))
    for name in ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv"):
        held = parts.model.layers[3].mlp.experts._parameters[name]
        assert held.dtype == (torch.uint8 if "scale" in name else torch.float8_e4m3fn)
        assert held.to_local().numel() * 2 == held.numel(), name
    with torch.no_grad():
        expected = load(checkpoint, torch.float32)(input_ids=tokens).logits
        torch.testing.assert_close(whole(parts(input_ids=tokens).logits), expected, rtol=1e-4, atol=1e-5)


def check_adapters(kind: str, checkpoint: str, tokens: torch.Tensor) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = load(checkpoint, torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, **LAYERS, **EXPERTS))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    reference = copy.deepcopy(model)
    policy = MixedPrecisionPolicy()
    if kind == "mixed_precision":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    losses = []
    for each in (model, reference):
        loss = each(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
    # Mixed precision rounds the adapters to bfloat16, the values and scales of the base to nothing else.
    tolerance = 5e-3 if kind == "mixed_precision" else 1e-6
    assert abs(losses[0] - losses[1]) <= tolerance * losses[1], losses
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    gradients = {
        name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert gradients.keys() == expected.keys() and gradients
    if kind != "mixed_precision":
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    base = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    assert all(isinstance(parameter, DTensor) for parameter in base.values())
    assert sum(parameter.element_size() == 1 for parameter in base.values()) > 20


def main(kind: str, checkpoint: str) -> None:
    tokens = torch.randint(2, 400, (2, 70), generator=torch.Generator().manual_seed(0))
    (check_plan if kind in PLANS else check_adapters)(kind, checkpoint, tokens)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
