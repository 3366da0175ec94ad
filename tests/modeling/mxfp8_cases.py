"""Checkpoints in MXFP8, in the layout in which MiniMax-M3 is released, with weights of a tiny random model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from configuration_minimax_m3 import MiniMaxM3VLConfig
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
GROUP = 32  # values of a row that share a scale
SCALE_BIAS = 127  # a scale is 2 to the power of its byte minus this
LAYERS = "language_model.model.layers."
NOT_QUANTIZED = [
    "language_model.lm_head",
    "language_model.model.embed_tokens",
    *(f"{LAYERS}{layer}.block_sparse_moe.gate" for layer in range(1, 4)),
    "vision_tower",
    "multi_modal_projector",
    "patch_merge_mlp",
]


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith(LAYERS) and tensor.ndim == 2 and not name.removesuffix(".weight").endswith("moe.gate")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(rows, columns)` in E4M3 and scales `(rows, columns / 32)` as bytes."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    exponents = groups.abs().amax(-1).clamp_min(2**-60).log2().floor() - 8  # the greatest value of E4M3 is below 2^9
    values = (groups * torch.exp2(-exponents)[..., None]).clamp(-448, 448)
    return values.to(torch.float8_e4m3fn).flatten(-2), (exponents + SCALE_BIAS).to(torch.uint8)


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Exact in bfloat16, whose range and precision exceed those of E4M3."""
    groups = values.float().unflatten(-1, (-1, GROUP)) * torch.exp2(scales.float() - SCALE_BIAS)[..., None]
    return groups.flatten(-2).to(torch.bfloat16)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def write_released(folder: Path, config: MiniMaxM3VLConfig) -> dict[str, torch.Tensor]:
    """Write a checkpoint in the released layout. Returns what its tensors mean in bfloat16."""
    torch.manual_seed(0)
    MiniMaxM3SparseForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    stored, meant = {}, {}
    for name, tensor in tensors_in(folder).items():
        stored[name] = meant[name] = tensor
        if is_quantized(name, tensor):
            stored[name], stored[name + "_scale_inv"] = quantize(tensor)
            meant[name] = dequantize(stored[name], stored[name + "_scale_inv"])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config_on_disk = json.loads((folder / "config.json").read_text())
    config_on_disk["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP],
        "scale_fmt": "ue8m0",
        "ignored_layers": NOT_QUANTIZED,
    }
    (folder / "config.json").write_text(json.dumps(config_on_disk))
    return meant
