"""A model in MXFP8 in two processes on a CPU: FSDP2, tensor and expert parallelism, and FSDP2 with adapters."""

from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, mxfp8_config

from ..forked_processes import run_script

WORKER = Path(__file__).with_name("mxfp8_processes_worker.py")
# Tensor parallelism cuts rows into halves, which have to be multiples of 32.
TEXT = {"hidden_size": 128, "intermediate_size": 64, "shared_intermediate_size": 64, "head_dim": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mxfp8_processes")
    MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).to(torch.bfloat16).save_pretrained(folder / "plain")
    model = MiniMaxM3VLForCausalLM.from_pretrained(folder / "plain", quantization_config=mxfp8_config())
    model.save_pretrained(folder / "mxfp8")
    return folder / "mxfp8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "fsdp2",
        "expert_parallel",
        "tensor_parallel",
        "expert_and_tensor_parallel",
        "fully_shard",
        "mixed_precision",
    ],
)
def test_two_processes(checkpoint, kind, tmp_path):
    run_script(WORKER, kind, str(checkpoint), folder=tmp_path)
