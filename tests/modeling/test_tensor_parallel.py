"""A model whose weights two or four processes share: weights, logits, tokens and gradients are those of the whole one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import import_utils

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.msa import extension

from ..forked_processes import TIMEOUT, run_script

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
# Of each kind of attention one layer, with more blocks than a query selects. The kernels of few tokens take the sizes.
TEXT = {
    "hidden_size": 128,
    "head_dim": 64,
    "index_head_dim": 64,
    "intermediate_size": 128,
    "shared_intermediate_size": 128,
    "dense_intermediate_size": 256,
    "layer_types": ["full_attention", "minimax_m3_structured", "minimax_m3_sparse", "minimax_m3_sparse"],
    "index_block_size": 4,
    "structured_local_blocks": 1,
    "structured_anchor_blocks": 2,
    "structured_anchor_stride": 2,
    "structured_random_blocks": 4,
}
# Queries select all blocks, and tokens all experts, so that bfloat16 changes no choice.
ALL_CHOSEN = {"index_block_size": 64, "index_topk_blocks": 4, "structured_random_blocks": 1, "num_experts_per_tok": 4}
CHECKS = ["weights", "logits", "gradients", "adapters", "rules_of_the_user"]
CHECKS += ["kernels", "kernels_of_experts", "kernels_of_mxfp8", "kernels_of_many_tokens", "parts_that_no_kernel_reads"]


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs a check of the worker in some processes, with a model that has so many key/value heads."""
    folders = {}

    def checkpoint(**fields: int) -> Path:
        key = tuple(fields.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("tensor_parallel")
            heads = fields["num_key_value_heads"]
            text = {**TEXT, "index_n_heads": heads, "num_attention_heads": 2 * heads, **fields}
            model = MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
            model.save_pretrained(folders[key])
        return folders[key]

    def run(name: str, processes: int, heads: int, on_gpu: bool = False, **fields: int) -> None:
        folder = str(checkpoint(num_key_value_heads=heads, **fields))
        if not on_gpu:
            return run_script(WORKER, name, folder, folder=tmp_path_factory.mktemp(name), processes=processes)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), name, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(check, name):
    if name == "adapters" and not hasattr(import_utils, "is_transformers_dtensor_tp"):
        pytest.skip("this PEFT cuts no adapters")
    check(name, processes=2, heads=2)


@pytest.mark.slow
def test_four_processes(check):
    check("logits", processes=4, heads=4)


@pytest.mark.slow
def test_heads_that_cannot_be_shared(check):
    check("heads_that_cannot_be_shared", processes=2, heads=3)


@pytest.mark.slow
def test_shared_experts_that_cannot_be_cut(check):
    check("whole_shared_experts", processes=2, heads=2, shared_intermediate_size=66)


@pytest.mark.slow
def test_halves(check):
    check("halves", processes=2, heads=2, **ALL_CHOSEN)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_halves_on_two_gpus(check):
    reason = extension.load(build=True)
    assert reason is None, reason
    check("halves", processes=2, heads=2, on_gpu=True, **ALL_CHOSEN)
