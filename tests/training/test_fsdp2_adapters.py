"""LoRA under FSDP2 as Accelerate applies it with our configuration, in two processes and in one."""

import json
from pathlib import Path

import pytest
import torch

from ..forked_processes import run_script

WORKER = Path(__file__).with_name("fsdp2_adapters_worker.py")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_train_adapters_as_one(tmp_path, dtype):
    run_script(WORKER, dtype, str(tmp_path), folder=tmp_path, GLOO_SOCKET_IFNAME="lo")
    found = json.loads((tmp_path / "result.json").read_text())
    is_exact = dtype == "float32"
    # Under FSDP2 Accelerate rounds the loss to bfloat16.
    torch.testing.assert_close(
        torch.tensor(found["losses"]), torch.tensor(found["expected"]), rtol=1e-5 if is_exact else 2**-8, atol=0
    )
    # Rounding to bfloat16 lets routers choose other experts. Gradients that are not averaged would give 1.
    assert found["error_of_update"] < (1e-4 if is_exact else 0.4)
    assert found["error_of_saved"] == 0
    assert found["frozen"] == [f"torch.{dtype}"]
    assert found["trained"] == ["torch.float32"]
    # Each layer for the forward and for the backward, the embeddings too, the head once, and once all that is left: also
    # the vision tower, which runs for the image of one process alone.
    assert found["gathers"] == [2 * found["layers"] + 4] * len(found["losses"])
    assert found["reduced"] == [found["layers"]] * len(found["losses"])  # of adapters, and of no frozen weight
