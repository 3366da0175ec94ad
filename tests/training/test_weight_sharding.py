"""`train` in several processes beside one: weights sharded while they load (`--fsdp_size`, `--ep_size`), or whole."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, mxfp8_config
from modeling_minimax_m3.commands import weight_sharding
from modeling_minimax_m3.commands.train_arguments import LoraArguments, ModelArguments

from ..forked_processes import run_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
OPTIONS = (
    *("--max_steps", "3", "--optim", "sgd", "--learning_rate", "1e-1", "--logging_steps", "1", "--report_to", "none"),
    *("--use_cpu", "--disable_tqdm", "true", "--dataloader_drop_last", "true"),
)  # fmt: skip


def skip_with_old_peft() -> None:
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip("this PEFT calls the model without the hooks that gather its weights")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Four chats. The first has an image, so that one process of two has one in its first step, and the other none."""
    folder = tmp_path_factory.mktemp("rows")
    Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(folder / "photo.png")
    chats = []
    for number, answer in enumerate(("Grey.", "A tiny model.", "Another answer, a longer one.", "Three.")):
        question = [{"type": "text", "text": f"Question {number}?"}]
        images = [str(folder / "photo.png")] if number == 0 else []
        turns = [
            {"role": "user", "content": [{"type": "image"}] * len(images) + question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        chats.append({"messages": turns, "images": images})
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder / "rows.jsonl"


def train(
    checkpoint: Path, rows: Path, folder: Path, processes: int, *options: str, rows_a_step: int = 2
) -> list[dict[str, float]]:
    """The log of a run on so many rows a step, by default two, whatever the number of processes."""
    batch = str(rows_a_step // processes)
    given = ("--model", str(checkpoint), "--dataset", str(rows), "--output_dir", str(folder / "run"))
    given += ("--per_device_train_batch_size", batch, *OPTIONS, *options)
    run_script(SCRIPT, *given, folder=folder, processes=processes, ACCELERATE_USE_CPU="true")
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("processes", "options", "sharing"),
    [
        (2, "--lora", "--fsdp_size 2 --ep_size 2"),
        (2, "--lora --lora_experts", "--fsdp_size 2"),
        (2, "--lora --lora_experts --quantization mxfp8", "--fsdp_size 2"),
        (2, "--lora --quantization mxfp8", "--fsdp_size 2 --ep_size 2"),
        (2, "--train_vision", "--fsdp_size 2 --ep_size 2"),
        (3, "--lora --quantization mxfp8", "--fsdp_size 3"),  # the third has none of the four experts
        (4, "--train_vision", "--fsdp_size 4 --ep_size 2"),  # two have the same experts, one of them each
        (2, "--lora --quantization mxfp8", ""),  # whole in each process, and gloo sends no 8-bit floats
    ],
)
def test_processes_train_as_one(tiny_checkpoint, rows, tmp_path, processes, options, sharing):
    """Losses, gradients, and the saved weights, of which an ordinary checkpoint or adapter comes out."""
    if "--lora" in options and sharing:
        skip_with_old_peft()
    options, sharing, rows_a_step = options.split(), sharing.split(), max(2, processes)
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    given = (*options, "--save_strategy", "no")
    expected = train(tiny_checkpoint, rows, tmp_path / "one", 1, *given, rows_a_step=rows_a_step)
    given = (*options, *sharing, "--save_steps", "2")
    found = train(tiny_checkpoint, rows, tmp_path / "several", processes, *given, rows_a_step=rows_a_step)
    assert len(found) == len(expected) == 3
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], rel=1e-4)
    file = "adapter_model.safetensors" if "--lora" in options else "model.safetensors"
    before, after = (load_file(tmp_path / name / "run" / file) for name in ("one", "several"))
    assert before.keys() == after.keys()
    distance = sum((after[name] - tensor).double().square().sum() for name, tensor in before.items()).sqrt()
    assert distance < 1e-4 * sum(tensor.double().square().sum() for tensor in before.values()).sqrt()
    checkpoint = tmp_path / "several" / "run" / "checkpoint-2"
    assert (checkpoint / file).is_file()
    assert (checkpoint / "optimizer.pt").exists() == (not sharing)


def test_a_saved_adapter_fits_the_whole_model_and_trains_further(tiny_checkpoint, rows, tmp_path):
    """One on the head too, with which PEFT saves the weight under it."""
    skip_with_old_peft()
    targets = ("--lora_targets", "q_proj", "lm_head")
    train(tiny_checkpoint, rows, tmp_path, 2, "--lora", *targets, "--fsdp_size", "2", "--save_strategy", "no")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    assert saved["base_model.model.lm_head.base_layer.weight"].equal(model.lm_head.weight)
    first = dict(PeftModel.from_pretrained(model, tmp_path / "run").named_parameters())
    assert any(parameter.abs().sum() > 0 for name, parameter in first.items() if "lora_B" in name)
    (tmp_path / "further").mkdir()
    adapter = ("--adapter", str(tmp_path / "run"), "--fsdp_size", "2", "--save_strategy", "no")
    train(tiny_checkpoint, rows, tmp_path / "further", 2, *adapter)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    second = dict(PeftModel.from_pretrained(model, tmp_path / "further" / "run").named_parameters())
    steps = [(second[name] - first[name]).abs().max().item() for name in first if "lora_B" in name]
    assert 0 < max(steps) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sharing", [("--fsdp_size", "2"), ("--fsdp_size", "2", "--ep_size", "2")], ids=" ".join)
def test_two_gpus_train_as_one(tiny_checkpoint, rows, tmp_path, sharing):
    skip_with_old_peft()
    losses = []
    for processes, options in ((1, ()), (2, sharing)):
        folder = tmp_path / str(processes)
        given = ["--model", str(tiny_checkpoint), "--dataset", str(rows), "--output_dir", str(folder), "--lora"]
        given += ["--per_device_train_batch_size", str(2 // processes), "--save_strategy", "no", *options]
        given += [option for option in OPTIONS if option != "--use_cpu"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        one_gpu = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {}
        done = subprocess.run([*launch, str(SCRIPT), *given], env=os.environ | one_gpu, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_units_of_the_composite_model():
    """Each rule fits a module, and none is in the vision tower, which only rows with images need."""
    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(tiny_config())
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) <= names
    assert "model.language_model.layers.*" in model.fsdp_plan
    assert not any("vision_tower" in rule for rule in model.fsdp_plan)


def arguments(**changes):
    given = vars(TrainingArguments("run", use_cpu=True, save_strategy="steps"))
    training = SimpleNamespace(**given | {"world_size": 2, "process_index": 0})
    model, lora = ModelArguments(model="folder", fsdp_size=2), LoraArguments()
    for name, value in changes.items():
        setattr(next(part for part in (training, model, lora) if hasattr(part, name)), name, value)
    return model, lora, training


@pytest.fixture
def config(tiny_checkpoint):
    return importlib.import_module("modeling_minimax_m3.commands.checkpoint").read_config(str(tiny_checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_size": 0}, "--fsdp_size must be at least 1, got 0"),
        ({"ep_size": -1}, "--ep_size must be at least 1, got -1"),
        ({"fsdp_size": 1, "ep_size": 2}, "--ep_size 2 needs --fsdp_size"),
        ({"fsdp_size": 4}, "must be the number of processes, which is 2, got 4: .* torchrun --nproc_per_node 4"),
        ({"fsdp": "full_shard"}, "--fsdp cannot go with --fsdp_size"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end cannot go with"),
        ({"optim": "adafactor"}, "--optim adafactor cannot go with --fsdp_size without --lora: .*adamw_torch_fused"),
        ({"resume_from_checkpoint": "run"}, "--resume_from_checkpoint cannot go with"),
        ({"world_size": 3, "fsdp_size": 3, "ep_size": 2}, "--ep_size must divide --fsdp_size, 3, .* got 2"),
        ({"world_size": 7, "fsdp_size": 7, "ep_size": 7}, "--ep_size must divide .* experts of a layer, got 7"),
        ({"lora": True, "torch_compile": True}, "--torch_compile cannot go with --fsdp_size and adapters"),
        ({"adapter": "folder", "torch_compile": True}, "--torch_compile cannot go with --fsdp_size and adapters"),
        ({"lora": True, "lora_save": ["lm_head"]}, "--lora_save cannot go with"),
        (
            {"lora": True, "lora_experts": True, "ep_size": 2},
            "--lora_experts, or an adapter on experts, cannot go with --ep_size",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        weight_sharding.check_sharding(*arguments(**changes), config, None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"use_dora": True}, "--adapter folder has `use_dora`, which cannot go with --fsdp_size"),
        ({"trainable_token_indices": [1]}, "has `trainable_token_indices`"),
        ({"modules_to_save": ["lm_head"]}, "has `modules_to_save`"),
        ({"init_lora_weights": "pissa"}, "has `init_lora_weights` 'pissa', which changes the weights of the model"),
    ],
)
def test_adapters_that_are_made_from_whole_weights_are_refused(config, kind, message):
    skip_with_old_peft()
    given = arguments(adapter="folder", optim="adafactor")  # adapters are whole, so each optimizer takes them
    weight_sharding.check_sharding(*given, config, None, LoraConfig())
    with pytest.raises(ValueError, match=message):
        weight_sharding.check_sharding(*given, config, None, LoraConfig(**kind))


def test_other_launchers_and_forms_of_weights_are_refused(config, monkeypatch):
    skip_with_old_peft()
    weight_sharding.check_sharding(*arguments(lora=True), config, "mxfp8")
    with pytest.raises(ValueError, match="plain or in mxfp8, and these are nf4"):
        weight_sharding.check_sharding(*arguments(lora=True), config, "nf4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot go with FSDP or DeepSpeed of accelerate launch"):
        weight_sharding.check_sharding(*arguments(lora=True), config, None)


def test_an_old_peft_is_refused(config, monkeypatch):
    monkeypatch.setattr(weight_sharding.metadata, "version", lambda package: "0.20.0")
    with pytest.raises(ValueError, match="--fsdp_size with adapters needs PEFT 0.21 or newer, got 0.20.0"):
        weight_sharding.check_sharding(*arguments(lora=True), config, None)
    weight_sharding.check_sharding(*arguments(), config, None)


def test_checkpoints_hold_the_model_alone(config, capsys):
    model, lora, training = arguments()
    weight_sharding.check_sharding(model, lora, training, config, None)
    assert training.save_only_model
    assert "no run can be resumed" in capsys.readouterr().out
    weight_sharding.check_sharding(model, lora, training, config, None)
    model, lora, training = arguments(fsdp_size=1)
    weight_sharding.check_sharding(model, lora, training, config, None)
    assert not training.save_only_model and not capsys.readouterr().out
    assert weight_sharding.sharding_options(model) == {}


def test_the_form_of_a_checkpoint_is_told():
    quantization = importlib.import_module("modeling_minimax_m3.commands.quantization")
    assert quantization.quantization_of(SimpleNamespace()) is None
    assert quantization.quantization_of(SimpleNamespace(quantization_config=mxfp8_config())) == "mxfp8"
    saved = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"})
    assert quantization.quantization_of(saved) == "bitsandbytes"
