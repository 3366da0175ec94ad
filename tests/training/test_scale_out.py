"""Two processes train as one does: data parallelism, and weights that are cut over the devices, experts among them."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("scale_out_worker.py")
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def run(launcher, engine, output):
    # gloo, whatever the machine has
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(WORKER), engine, str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(output.read_text()))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    return run([], "trainer", tmp_path_factory.mktemp("one") / "losses.json")


def test_data_parallelism(in_one_process, tmp_path):
    """Through `accelerate launch` and the configuration that we offer; router and indexer losses are on."""
    config = ROOT / "examples" / "accelerate" / "ddp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", free_port()]
    losses = run(launcher, "trainer", tmp_path / "losses.json")
    torch.testing.assert_close(losses, in_one_process, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_fully_sharded(in_one_process, tmp_path, engine, monkeypatch):
    if engine == "zero3":
        if find_spec("deepspeed") is None:  # not imported here: it changes what other packages do
            pytest.skip("DeepSpeed is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    losses = run(launcher, engine, tmp_path / "losses.json")
    torch.testing.assert_close(losses, in_one_process, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["expert_parallel", "expert_and_tensor_parallel", "tensor_parallel"])
def test_plans(in_one_process, tmp_path, engine):
    """Transformers' plans, by `from_pretrained(distributed_config=...)`. The worker also compares the weights (of the
    composite model too) and the logits with those of the whole model, and what was saved after the training."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    losses = run(launcher, engine, tmp_path / "losses.json")
    torch.testing.assert_close(losses, in_one_process, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert str(config.distributed_type.value) == yaml.safe_load(path.read_text())["distributed_type"]
