"""Vision tower and projector in several processes, some of whose rows have images, some videos, some neither."""

import json
import runpy
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ..forked_processes import run_python, run_script

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("vision_scale_out_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        ("ddp", ["checkpointing"]),
        ("fsdp2", []),
        ("fsdp2", ["frozen", "checkpointing"]),
        ("zero3", []),
    ],
    ids=["data parallelism", "fsdp2", "fsdp2 frozen", "zero3"],
)
def test_two_processes_train_as_one(tmp_path, engine, flags, monkeypatch):
    """Losses of every micro-batch and of an evaluation, and the vision weights at the end."""
    if engine == "zero3":
        if find_spec("deepspeed") is None:  # not imported here: it changes what other packages do
            pytest.skip("DeepSpeed is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    output = tmp_path / "result.json"
    run_script(WORKER, engine, str(output), *flags, folder=tmp_path, ACCELERATE_USE_CPU="true")
    losses, norm = json.loads(output.read_text())
    expected_losses, expected_norm = runpy.run_path(str(WORKER))["in_one_process"](flags)
    assert len(losses) == len(expected_losses)
    # DeepSpeed's second accumulated step is not quite that of one process where every row has an image, either.
    compared = 4 if engine == "zero3" else len(losses)
    torch.testing.assert_close(
        torch.tensor(losses[:compared]), torch.tensor(expected_losses[:compared]), rtol=0, atol=1e-4
    )
    if engine != "zero3":
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.slow
def test_the_script_with_an_image_in_one_process_only(tiny_checkpoint, tmp_path):
    """Without activation checkpointing, `Trainer` would search for parameters without a gradient, and not wait."""
    from PIL import Image

    Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(tmp_path / "photo.png")
    question, answer = ({"type": "text", "text": text} for text in ("What is this?", "Grey."))
    turns = [{"role": "user", "content": [question]}, {"role": "assistant", "content": [answer]}]
    rows = [{"messages": turns, "images": [str(tmp_path / "photo.png")] if number == 2 else []} for number in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ROOT / "examples" / "accelerate" / "ddp.yaml"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port]
    options = {
        "model": tiny_checkpoint,
        "dataset": data,
        "output_dir": tmp_path / "run",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    flags += ["--train_vision", "--activation_checkpointing", "--use_cpu"]
    # gloo, whatever the machine has
    script = str(ROOT / "scripts" / "finetune.py")
    done = run_python("-m", *launcher, script, *flags, folder=tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 2
