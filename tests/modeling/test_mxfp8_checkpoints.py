"""Checkpoints in MXFP8 that are dequantized while they are loaded, as Transformers does it.

`test_mxfp8_model.py` is about models whose weights stay in MXFP8.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.loading.fused_projections import ConcatenateWhole

from .mxfp8_cases import NOTHING, tensors_in, write_released

pytestmark = pytest.mark.compatibility


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in the released layout, and what its tensors mean in bfloat16."""
    folder = tmp_path_factory.mktemp("mxfp8")
    return folder, write_released(folder, tiny_config())


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
