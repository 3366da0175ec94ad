"""Several GPUs: a model laid out over two of them, and data parallelism over NCCL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.text import MiniMaxM3VLForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WORKER = Path(__file__).with_name("data_parallel_worker_gpu.py")
TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "index_block_size": 64, "index_topk_blocks": 2}
LENGTH = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(text={**TEXT, "indexer_loss_coef": 0.1}).text_config
    MiniMaxM3VLForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def halves(model):
    """The first half of the layers on one device, the rest and the head on the other."""
    count = len(model.model.layers)
    layers = {f"model.layers.{i}": int(i >= count // 2) for i in range(count)}
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1, **layers}


@pytest.fixture(scope="module")
def models(checkpoint):
    """The same model on one device and on two."""
    one = MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map={"": 0})
    two = MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map=halves(one))
    assert {parameter.device.index for parameter in two.parameters()} == {0, 1}
    return one, two


@pytest.fixture
def batch():
    """Two rows on the first device, one of them padded on the left."""
    ids = torch.randint(2, 400, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: tensor.to("cuda:0") for name, tensor in rows.items()}


def test_a_model_over_two_devices(models, batch, kernels):
    """The same kernels on the same numbers, whichever device they are on."""
    real = batch["attention_mask"] == 1
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        one, two = (model.eval()(**given).logits.to("cuda:0") for model in models)
    torch.testing.assert_close(two[real], one[real], rtol=0, atol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    one, two = (model.generate(**given, **options) for model in models)
    assert torch.equal(one, two)


def test_gradients_over_two_devices(models, batch, kernels):
    losses, gradients = [], []
    for model in models:
        model.train().zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.to("cuda:0") for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, expected in gradients[0].items():
        # Gradients of embeddings and experts are summed by atomics, in any order.
        difference = (gradients[1][name].float() - expected.float()).norm()
        assert difference <= 1e-2 * expected.float().norm() + 1e-6, name


def run(checkpoint, output, world):
    port = str(29500 + os.getpid() % 400 + world)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", port]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(checkpoint), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_data_parallelism(checkpoint, tmp_path):
    """Two processes with half of each batch train as one with all of it."""
    one = run(checkpoint, tmp_path / "one.json", 1)
    two = run(checkpoint, tmp_path / "two.json", 2)
    assert one["backend"] == two["backend"] == ["cuda"], "the sparse layers ran on other kernels"
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-2, atol=0)
    assert one["losses"][-1] < one["losses"][0]
    assert two["same_weights"]
