"""`generate` of a model that two processes share: tensor and expert parallelism, on two CPUs or two GPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

from ..forked_processes import TIMEOUT, run_script

WORKER = Path(__file__).with_name("parallel_generation_worker.py")
TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64, "index_topk_blocks": 3}
PLANS = ["tensor_parallel", "expert_and_tensor_parallel", "tokens_exchanged"]


@pytest.fixture(scope="module")
def generate(make_pair, make_inputs, tmp_path_factory):
    """Runs the worker with one plan in two processes."""
    config = tiny_config(text=TEXT)
    folder = tmp_path_factory.mktemp("parallel_generation")
    make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1].save_pretrained(folder / "model")
    inputs = make_inputs(config, images=[[1, 4, 6], [1, 4, 4]], videos=[[2, 4, 4]], length=60)
    torch.save(inputs, folder / "inputs.pt")

    def run(plan: str, on_gpu: bool = False) -> None:
        arguments = [plan, str(folder / "model"), str(folder / "inputs.pt")]
        if not on_gpu:
            return run_script(WORKER, *arguments, folder=tmp_path_factory.mktemp(plan))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes(generate, plan):
    generate(plan)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("plan", PLANS)
def test_two_gpus(generate, plan):
    generate(plan, on_gpu=True)
