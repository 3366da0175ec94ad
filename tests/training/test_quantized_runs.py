"""`train`, `evaluate` and `merge` over weights that are quantized while they are loaded."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainingArguments

from modeling_minimax_m3.__main__ import main
from modeling_minimax_m3.checkpoint_conversion import Conversion, convert
from modeling_minimax_m3.commands.checkpoint import read_config
from modeling_minimax_m3.commands.run_memory import memory_request
from modeling_minimax_m3.commands.train_arguments import LoraArguments, ModelArguments
from modeling_minimax_m3.layers.quantized import QuantizedExperts

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
FORMATS = ["mxfp8", "nf4"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A tiny model."}]
    file.write_text((json.dumps({"messages": talk}) + "\n") * 4)
    return file


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "mxfp8"
    convert(tiny_checkpoint, folder, Conversion(precision="mxfp8"))
    return folder


def run(name, *arguments):
    return main([name, *map(str, arguments)])


@pytest.mark.parametrize("quantization", FORMATS)
def test_an_adapter_learns_over_quantized_weights(tiny_checkpoint, chats, tmp_path, monkeypatch, quantization):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    models, load = [], AutoModelForImageTextToText.from_pretrained
    keep = lambda *arguments, **options: models.append(load(*arguments, **options)) or models[-1]  # noqa: E731
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", keep)
    data = ["--dataset", chats, "--eval_dataset", chats, "--samples", "0", "--output_dir", tmp_path / "run"]
    adapters = ["--lora", "--lora_experts", "--max_steps", "2", "--learning_rate", "0.02", *QUICK]
    base = ["--model", tiny_checkpoint, "--quantization", quantization]
    run("train", *base, *data, *adapters)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(value.any() for name, value in tensors.items() if "lora_B" in name)
    trained = json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_loss"]

    output = ["--adapter", tmp_path / "run", "--device", "cpu", "--output", tmp_path / "scores.json"]
    run("evaluate", chats, *base, *output)
    (scores,) = json.loads((tmp_path / "scores.json").read_text())["files"].values()
    assert scores["loss"] == pytest.approx(trained, rel=1e-3)
    for model in models:
        experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
        assert len(experts) == model.config.text_config.mlp_layer_types.count("sparse") > 0

    run("merge", tmp_path / "run", tmp_path / "merged")  # into the checkpoint as it is, not quantized
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(
        tiny_checkpoint / "model.safetensors"
    ).keys()  # fmt: skip


def test_a_quantized_checkpoint_needs_no_option(quantized, chats, tmp_path):
    data = ["--dataset", chats, "--output_dir", tmp_path / "run", "--lora", "--max_steps", "1", *QUICK]
    run("train", "--model", quantized, *data)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


ERRORS = {
    "whole": (["train", "--quantization", "mxfp8"], "train: quantized weights cannot be trained: add --lora"),
    "whole checkpoint": (
        ["train", "--model", "{quantized}"],
        "train: quantized weights cannot be trained: add --lora",
    ),
    "twice": (
        ["train", "--model", "{quantized}", "--lora", "--quantization", "mxfp8"],
        "--quantization mxfp8 needs a checkpoint that is not quantized: leave it out",
    ),
    "name": (["train", "--lora", "--quantization", "int3"], "--quantization must be one of nf4, mxfp8, got 'int3'"),
    "package": (["train", "--lora", "--quantization", "nf4"], "--quantization nf4 needs bitsandbytes: pip install"),
    "evaluate": (["evaluate", "{chats}", "--quantization", "int3"], "evaluate: --quantization must be one of"),
    "chat": (["chat", "--prompt", "Hi.", "--quantization", "int3"], "chat: --quantization must be one of"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_the_weights(tiny_checkpoint, quantized, chats, tmp_path, monkeypatch, case):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    quantization = importlib.import_module("modeling_minimax_m3.commands.quantization")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    flags, message = ERRORS[case]
    flags = [flag.format(quantized=quantized, chats=chats) for flag in flags]
    if flags[0] == "train":
        flags += ["--dataset", chats, "--output_dir", tmp_path / "run", *QUICK]
    if "--model" not in flags:
        flags += ["--model", tiny_checkpoint]
    with pytest.raises(SystemExit, match=message):
        run(*flags)


@pytest.mark.parametrize(("quantization", "precision"), [(None, "bf16"), ("mxfp8", "mxfp8"), ("nf4", "nf4-double")])
def test_the_memory_plan_counts_quantized_weights(tiny_checkpoint, tmp_path, quantization, precision):
    model = ModelArguments(str(tiny_checkpoint), quantization=quantization)
    config = read_config(model.model)
    config.dtype = torch.bfloat16
    training = TrainingArguments(str(tmp_path / "run"), use_cpu=True)
    request = memory_request(config, model, LoraArguments(lora=True), 1000, training, (1, 80.0))
    assert (request.precision, request.training) == (precision, "lora" if quantization is None else "qlora")
