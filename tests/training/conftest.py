"""Fixtures for runs of `scale_out_worker.py`, on CPUs and on GPUs."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

from ..forked_processes import run_python, run_script

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # gloo, whatever the machine has
WORKER = Path(__file__).with_name("scale_out_worker.py")
# A shape that the CUDA kernels take. The weights' values are so large that a wrong expert, or none, changes the loss;
# the embeddings, the head and the experts have so many that ZeRO-3 cuts them (it keeps what has fewer than 100,000).
TEXT = {
    "head_dim": 64,
    "index_head_dim": 64,
    "hidden_size": 128,
    "index_block_size": 64,
    "index_topk_blocks": 2,
    "intermediate_size": 128,
    "vocab_size": 1024,
    "num_hidden_layers": 3,
    "initializer_range": 0.1,
    "output_router_logits": True,
    "indexer_loss_coef": 0.1,
}


@pytest.fixture(scope="session")
def scale_out_models(tmp_path_factory) -> Path:
    """A folder with "text" and "composite"; the latter's weights have other names on disk, and are fused on loading.

    They are in bfloat16, so that an engine that computes in it starts from the same numbers as one that casts to it.
    """
    folder = tmp_path_factory.mktemp("scale_out_models")
    config = tiny_config(text=TEXT)
    torch.manual_seed(0)
    MiniMaxM3VLForCausalLM(config.text_config).to(torch.bfloat16).save_pretrained(folder / "text")
    MiniMaxM3SparseForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder / "composite")
    return folder


@pytest.fixture(scope="module")
def train(scale_out_models, tmp_path_factory) -> Callable[..., dict]:
    """`train(engine, config=..., processes=..., VARIABLE=...)`: the worker's report of its run.

    It is started by `accelerate launch` with that configuration of ours, or by `torchrun`, or as a single process. With
    `on_cpu` the latter two are forked.
    """

    def run(
        engine: str, *, config: str | None = None, processes: int = 1, on_cpu: bool = False, **environment: str
    ) -> dict:
        output = tmp_path_factory.mktemp(engine) / "found.json"
        arguments = [engine, str(scale_out_models), str(output)]
        if on_cpu:
            environment |= ON_CPU
        if on_cpu and config is None:
            run_script(WORKER, *arguments, folder=output.parent, processes=processes, **environment)
            return json.loads(output.read_text())
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher = []
        if config is not None:
            path = str(CONFIGS / f"{config}.yaml")
            launcher = ["-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", port]
        elif processes > 1:
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
        command = [*launcher, str(WORKER), *arguments]
        if on_cpu:
            done = run_python(*command, folder=output.parent, **environment)
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(output.read_text())

    return run
