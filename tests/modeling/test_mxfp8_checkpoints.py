"""Checkpoints in MXFP8, as MiniMax-M3 is released: E4M3 values, and one power of two for each 32 of a row.

Where no GPU computes in that format, Transformers dequantizes them while loading.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.loading.fused_projections import ConcatenateWhole

pytestmark = pytest.mark.compatibility

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


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in the released layout, and what its tensors mean in bfloat16."""
    folder = tmp_path_factory.mktemp("mxfp8")
    torch.manual_seed(0)
    MiniMaxM3SparseForConditionalGeneration(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    stored, meant = {}, {}
    for name, tensor in tensors_in(folder).items():
        stored[name] = meant[name] = tensor
        if is_quantized(name, tensor):
            stored[name], stored[name + "_scale_inv"] = quantize(tensor)
            meant[name] = dequantize(stored[name], stored[name + "_scale_inv"])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP],
        "scale_fmt": "ue8m0",
        "ignored_layers": NOT_QUANTIZED,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, meant


def load(folder: Path, model_class=MiniMaxM3SparseForConditionalGeneration, **options):
    # Asked for by name, so that the test does the same where there is a GPU.
    options.setdefault("quantization_config", FineGrainedFP8Config(dequantize=True))
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert info == NOTHING
    return model.eval()


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**{name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}).logits


@pytest.fixture
def inputs(make_inputs):
    return make_inputs(tiny_config(), images=[[1, 4, 6]], videos=[[2, 4, 4]], length=120)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_saved_as_plain_bfloat16(released, stock, inputs, sharded, tmp_path):
    folder, meant = released
    model = load(folder)
    model.save_pretrained(tmp_path, **({"max_shard_size": "200KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    torch.testing.assert_close(tensors_in(tmp_path), meant, rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"

    again = load(tmp_path, quantization_config=None)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    options = {"quantization_config": None, "dtype": torch.float32}
    theirs = load(tmp_path, stock.MiniMaxM3SparseForConditionalGeneration, **options)
    torch.testing.assert_close(
        logits_of(load(tmp_path, **options), inputs), logits_of(theirs, inputs), rtol=1e-5, atol=1e-5
    )


def test_saved_with_module_names(released, inputs, tmp_path):
    model = load(released[0])
    model.save_pretrained(tmp_path, save_original_format=False)
    assert set(tensors_in(tmp_path)) == set(model.state_dict())
    assert torch.equal(logits_of(load(tmp_path, quantization_config=None), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(released, inputs, dtype, tmp_path):
    """All weights come in the requested dtype."""
    folder, meant = released
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits_of(model, inputs).isfinite().all()
    model.save_pretrained(tmp_path)
    saved = tensors_in(tmp_path)
    torch.testing.assert_close(saved, {name: value.to(dtype) for name, value in meant.items()}, rtol=0, atol=0)


def test_float32_routers(released, inputs, tmp_path):
    """So they are released. They follow the rest of the model, as they do when its file is plain."""
    folder, _ = released
    tensors = tensors_in(folder)
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name] = tensor.float() + 1e-6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", quantization_config=None)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_fused_projection_of_which_a_process_holds_a_piece():
    """The rule for MXFP8 files names six tensors, of which two are left when the values are dequantized."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        target = DTensor.from_local(torch.zeros(4, 8), DeviceMesh("cpu", [0, 1]), [Shard(0)])  # of 8 rows in all

        class Model:
            def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
                return target

        parts = [f".{part}_proj.weight" for part in ("gate", "up")]
        fused = ConcatenateWhole(dim=0).convert(
            {part: [torch.ones(2, 8)] for part in parts},
            [part + suffix for part in parts for suffix in ("", "_scale_inv", "_activation_scale")],
            [".gate_up_proj.weight"],
            full_layer_name="mlp.gate_up_proj.weight",
            model=Model(),
        )
        # The values of the other process are not there; that rows come in the right order is tested with two processes.
        assert {name: tensor.shape for name, tensor in fused.items()} == {".gate_up_proj.weight": (4, 8)}
    finally:
        torch.distributed.destroy_process_group()
