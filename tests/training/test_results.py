"""From a file of chats with pictures to an adapter, a merged checkpoint and answers: the commands of `minimax-m3`."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.__main__ import main
from modeling_minimax_m3.checkpoint_conversion import verify
from modeling_minimax_m3.commands.model_card import ModelCard, hide_in_command, hide_secrets
from modeling_minimax_m3.conversion.tensor_files import hash_file

from ..forked_processes import run_python

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no"]
# Stock Transformers alone: the logits of a checkpoint for given tokens and pixels.
STOCK = """
import sys
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
assert type(model).__module__.startswith("transformers.")
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def run(name: str, *arguments) -> None:
    main([name, *map(str, arguments)])


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Chats, of which some have a picture."""
    folder = tmp_path_factory.mktemp("chats")
    Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(folder / "photo.png")
    look = [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "Grey."}]
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A tiny model."}]
    rows = [{"messages": look, "images": [str(folder / "photo.png")]}] * 3 + [{"messages": talk}] * 3
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def adapter(chats, tiny_checkpoint, tmp_path_factory) -> Path:
    """An adapter on attention and experts."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    flags = ["--lora", "--lora_experts", "--lora_rank", "4", "--learning_rate", "0.02", "--max_steps", "2"]
    data = ["--dataset", chats, "--eval_dataset", chats, "--sample_tokens", "4", "--hub_token", "hf_secret"]
    run("train", "--model", tiny_checkpoint, *data, "--output_dir", folder, *flags, *QUICK)
    return folder


def metadata(folder: Path) -> tuple[dict, str]:
    """The YAML of a card, and the text behind it."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


# ---- one command each ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_pictures_to_a_checkpoint_that_stock_transformers_loads(
    chats, adapter, tiny_checkpoint, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run("check", chats, "--model", tiny_checkpoint, "--report", tmp_path / "check.json")
    assert stopped.value.code == 0
    assert json.loads((tmp_path / "check.json").read_text())["images"] == 3
    assert (adapter / "adapter_model.safetensors").is_file()
    run("merge", adapter, tmp_path / "merged")

    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    messages = json.loads(chats.read_text().splitlines()[0])["messages"][:1]
    photo = {"type": "image", "path": str(chats.parent / "photo.png")}
    messages[0]["content"] = [photo, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    done = run_python("-c", STOCK, "merged", "inputs.pt", "logits.pt", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        before = base(**inputs).logits
        expected = PeftModel.from_pretrained(base, adapter).eval()(**inputs).logits
    found = torch.load(tmp_path / "logits.pt")
    # to the rounding of the merged weights
    tolerance = {"rtol": 0, "atol": 0.02 * float(expected.abs().max())}
    torch.testing.assert_close(found, expected, **tolerance)
    assert (expected - before).abs().max() > 5 * tolerance["atol"], "the adapter must matter"

    assert [metadata(folder)[0]["base_model"] for folder in (adapter, tmp_path / "merged")] == [
        str(tiny_checkpoint)
    ] * 2
    page = (adapter / "report.html").read_text()
    assert "<polyline" in page and "<script" not in page and "What is this?" in page
    samples = [json.loads(line) for line in (adapter / "samples.jsonl").read_text().splitlines()]
    assert [sample["reference"] for sample in samples] == ["</mm:think>Grey"] * 2  # of 4 tokens


def test_the_card_of_an_adapter(chats, adapter, tiny_checkpoint):
    head, body = metadata(adapter)
    assert head["base_model"] == str(tiny_checkpoint)
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "image-text-to-text"
    metrics = {metric["type"]: metric["value"] for metric in head["model-index"][0]["results"][0]["metrics"]}
    results = json.loads((adapter / "all_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(results["eval_loss"])
    assert set(metrics) == {"eval_loss", "eval_perplexity"}
    assert f"`{hash_file(chats)}`" in body
    assert body.count(f"| `{chats}` |") == 2  # training and evaluation
    assert "| `lora_rank` | `4` |" in body
    assert "| transformers |" in body and "minimax-m3 train --model" in body
    assert "hf_secret" not in (adapter / "README.md").read_text()


def test_the_card_of_a_merged_checkpoint(adapter, tiny_checkpoint, tmp_path, capsys):
    run("merge", adapter, tmp_path / "merged", "--precision", "bf16")
    head, body = metadata(tmp_path / "merged")
    assert head["base_model"] == str(tiny_checkpoint) and head["library_name"] == "transformers"
    assert hash_file(adapter / "adapter_model.safetensors") in body
    assert "minimax-m3 merge" in body and "`lora_rank`" in body  # the card of the adapter is in it
    assert verify(tmp_path / "merged", show_progress=False)[1], "the manifest covers the card too"
    with pytest.raises(SystemExit, match="merge: .*exists"):
        run("merge", adapter, tmp_path / "merged")
    assert "bf16, released" in capsys.readouterr().out


def test_secrets_are_in_no_card():
    assert hide_secrets({"hub_token": "x", "max_length": 3}) == {"hub_token": "(hidden)", "max_length": 3}
    command = ["train", "--hub_token", "x", "--a", "b", "--api-key=y", "--sample_tokens", "4"]
    assert hide_in_command(command) == "train --hub_token '(hidden)' --a b '--api-key=(hidden)' --sample_tokens 4"


def test_scores_without_a_number_are_no_results():
    card = ModelCard("m", "b", True, False, "u", ["c"], scores={"eval_loss": float("nan"), "steps": 3})
    assert "model-index" not in str(card)


@pytest.mark.parametrize("target", ["sglang", "vllm"])
def test_export(adapter, chats, tiny_checkpoint, tmp_path, target):
    """Adapters on experts cannot be exported; the others can for SGLang."""
    with pytest.raises(SystemExit, match="merge: .*[Mm]erge the adapter"):
        run("merge", adapter, tmp_path / "exported", "--export", target)
    if target == "sglang":
        folder = tmp_path / "attention"
        data = ["--dataset", chats, "--output_dir", folder, "--lora", "--max_steps", "1"]
        run("train", "--model", tiny_checkpoint, *data, *QUICK)
        run("merge", folder, tmp_path / "exported", "--export", target)
        assert any("qkv" in name or "q_proj" in name for name in load_file(tmp_path / "exported" / "adapter_model.safetensors"))  # fmt: skip


# ---- evaluate -----------------------------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_training(adapter, chats, tiny_checkpoint, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4"}) + "\n")
    output = tmp_path / "scores.json"
    run(
        "evaluate",
        chats,
        other,
        "--model",
        tiny_checkpoint,
        "--adapter",
        adapter,
        "--output",
        output,
        "--device",
        "cpu",
    )
    scores = json.loads(output.read_text())
    assert list(scores["files"]) == [str(chats), str(other)]
    of_chats = scores["files"][str(chats)]
    expected = json.loads((adapter / "all_results.json").read_text())["eval_loss"]
    assert of_chats["loss"] == pytest.approx(expected, rel=0.01)  # a run averages batches
    assert of_chats["perplexity"] == pytest.approx(2.718281828 ** of_chats["loss"], rel=1e-5)
    assert (of_chats["rows"], of_chats["left_out"]) == (6, 0)
    assert "learned tokens in 6 rows" in capsys.readouterr().out


def test_the_accuracy_is_that_of_the_logits(chats, tiny_checkpoint):
    evaluate = importlib.import_module("modeling_minimax_m3.commands.evaluate")
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()
    ids = torch.randint(5, 400, (2, 30))
    labels = ids.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[:, 9:]
    loss, correct, tokens = evaluate.score_batch(model, {"input_ids": ids, "labels": labels})
    assert (correct, tokens) == (int(right.sum()), 40)
    assert loss / tokens == pytest.approx(float(output.loss), rel=1e-4)


# ---- chat ---------------------------------------------------------------------------------------------------------


def test_one_answer_about_a_picture(adapter, chats, tiny_checkpoint, capsys):
    photo = chats.parent / "photo.png"
    flags = ["--image", photo, "--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]
    run("chat", "--model", tiny_checkpoint, "--adapter", adapter, "--prompt", "What is this?", *flags)
    printed = capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_checkpoint), adapter).eval()
    content = [{"type": "image", "path": str(photo)}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    message = processor.parse_response(answer, prefix=inputs["input_ids"][0])
    for text in (message["content"], message.get("reasoning_content") or ""):
        assert text.strip() in printed


def test_a_conversation(tiny_checkpoint, chats, monkeypatch, capsys):
    """Messages, a picture, errors that end nothing, and a new beginning."""
    chat = importlib.import_module("modeling_minimax_m3.commands.chat")
    photo = chats.parent / "photo.png"
    lines = iter(["Hi.", "/image nowhere.png", f"/image {photo}", "And this?", "/help", "/reset", "Again.", "/exit"])
    asked = []
    answer = chat.Chat.answer

    def note(self, text, media, printer):
        asked.append((text, list(media), len(self.messages)))
        return answer(self, text, media, printer)

    monkeypatch.setattr(chat.Chat, "answer", note)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run("chat", "--model", tiny_checkpoint, "--max_new_tokens", "3", "--device", "cpu")
    assert asked == [("Hi.", [], 0), ("And this?", [("image", str(photo))], 2), ("Again.", [], 0)]
    captured = capsys.readouterr()
    assert "there is no file 'nowhere.png'" in captured.err
    assert captured.out.count("/reset") == 2


def test_reasoning_is_shown_apart(capsys):
    chat = importlib.import_module("modeling_minimax_m3.commands.chat")
    events = [
        {"type": "region_open", "field": "reasoning_content"},
        {"type": "region_chunk", "field": "reasoning_content", "text": "Hm", "dirty": False},
        {"type": "region_chunk", "field": "reasoning_content", "text": "m.", "dirty": False},
        {"type": "region_close", "field": "reasoning_content", "value": "Hmm."},
        {"type": "region_chunk", "field": "content", "text": "Yes.", "dirty": False},
        {"type": "region_close", "field": "tool_calls", "value": {"function": {"name": "look"}}},
    ]
    for has_colour, expected in (
        (False, "thinking: Hmm.\nYes.\ntool call: {'function': {'name': 'look'}}\n"),
        (True, "\033[2mHmm.\033[0m\nYes.\ntool call: {'function': {'name': 'look'}}\n"),
    ):
        printer = chat.Printer(sys.stdout, has_colour)
        for event in events:
            printer(event)
        printer.end()
        assert capsys.readouterr().out == expected


def test_an_error_of_the_model_reaches_the_terminal(tiny_checkpoint, monkeypatch):
    def fail(self, **inputs):
        raise ValueError("no such cache")

    monkeypatch.setattr(MiniMaxM3SparseForConditionalGeneration, "generate", fail)
    with pytest.raises(SystemExit, match="chat: no such cache"):
        run("chat", "--model", tiny_checkpoint, "--prompt", "Hi.", "--device", "cpu")


# ---- an adapter that is trained further ---------------------------------------------------------------------------


def test_an_adapter_is_trained_further(adapter, chats, tiny_checkpoint, tmp_path):
    folder = tmp_path / "further"
    flags = ["--adapter", adapter, "--learning_rate", "0", "--max_steps", "1", "--output_dir", folder]
    run("train", "--model", tiny_checkpoint, "--dataset", chats, *flags, *QUICK)
    start, same = (load_file(path / "adapter_model.safetensors") for path in (adapter, folder))
    assert start.keys() == same.keys() and all(torch.equal(value, same[name]) for name, value in start.items())
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    changed = tmp_path / "changed"
    flags[3], flags[-1] = "0.02", changed
    run("train", "--model", tiny_checkpoint, "--dataset", chats, *flags, *QUICK)
    other = load_file(changed / "adapter_model.safetensors")
    assert all(not torch.equal(value, other[name]) for name, value in start.items() if "lora_B" in name)


# ---- errors, before weights are loaded ----------------------------------------------------------------------------


@pytest.fixture
def damaged(adapter, tmp_path):
    """Adapters that do not fit."""
    for name in ("empty", "wrong", "cut", "kind", "pissa", "pissa experts"):
        folder = tmp_path / name
        folder.mkdir()
        if name != "empty":
            settings = json.loads((adapter / "adapter_config.json").read_text())
            settings |= {"peft_type": "VERA"} if name == "kind" else {}
            settings |= {"init_lora_weights": "pissa"} if name.startswith("pissa") else {}
            settings |= {"target_parameters": None} if name == "pissa" else {}
            (folder / "adapter_config.json").write_text(json.dumps(settings))
            save_file(load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = min(tensors)
    save_file(
        {**tensors, name: tensors[name][..., :-1].contiguous()}, tmp_path / "wrong" / "adapter_model.safetensors"
    )
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return tmp_path


ERRORS = {
    "no adapter": (["train", "--adapter", "{damaged}/empty"], "train: --adapter .*empty holds no adapter_config.json"),
    "shape": (["train", "--adapter", "{damaged}/wrong"], "train: --adapter .* must have the shape .*, got"),
    "cut": (["train", "--adapter", "{damaged}/cut"], "train: --adapter.*adapter_model.safetensors cannot be read"),
    "kind": (["train", "--adapter", "{damaged}/kind"], "train: --adapter .*kind (must be an adapter of LoRA|cannot)"),
    "start on experts": (
        ["train", "--adapter", "{damaged}/pissa experts"],
        "train: --adapter .* has `init_lora_weights` 'pissa', .* cannot do this with routed experts",
    ),
    "start over quantized weights": (
        ["train", "--adapter", "{damaged}/pissa", "--quantization", "mxfp8"],
        "train: --adapter .* has `init_lora_weights` 'pissa', .* cannot do this with quantized weights",
    ),
    "evaluate shape": (["evaluate", "{chats}", "--adapter", "{damaged}/wrong"], "evaluate: .* must have the shape"),
    "evaluate cut": (["evaluate", "{chats}", "--adapter", "{damaged}/cut"], "safetensors cannot be read"),
    "evaluate start": (
        ["evaluate", "{chats}", "--adapter", "{damaged}/pissa", "--quantization", "mxfp8"],
        "evaluate: --adapter .* cannot do this with quantized weights",
    ),
    "chat cut": (["chat", "--prompt", "a", "--adapter", "{damaged}/cut"], "chat: .*safetensors cannot be read"),
    "rank": (
        ["train", "--adapter", "{damaged}/wrong", "--lora_rank", "8"],
        "train: --lora_rank would do nothing with --adapter, which has its own",
    ),
    "model": (["train", "--model", "{damaged}/wrong"], "train: --model .*/wrong is an adapter: pass it as --adapter"),
    "chat model": (["chat", "--model", "{damaged}/wrong", "--prompt", "a"], "chat: --model .*/wrong is an adapter"),
    "samples": (["train", "--samples", "3"], "train: --samples would do nothing without --eval_dataset"),
    "negative": (["train", "--samples", "-1"], "train: --samples must be at least 0, got -1"),
    "merge nothing": (
        ["merge", "{damaged}/empty", "out"],
        "merge: .*empty holds no adapter_config.json: the first folder must be an adapter",
    ),
    "merge base": (["merge", "{damaged}/wrong", "out", "--model", "nowhere"], "must be a folder, got 'nowhere'"),
    "merge shape": (["merge", "{damaged}/wrong", "{damaged}/out"], "merge: .*which do not fit the weight"),
    "evaluate file": (["evaluate", "nowhere.jsonl"], "evaluate: there is no file nowhere.jsonl"),
    "evaluate adapter": (["evaluate", "{chats}", "--adapter", "nowhere"], "--adapter nowhere holds no adapter_config"),
    "evaluate batch": (["evaluate", "{chats}", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    "evaluate length": (["evaluate", "{chats}", "--max_length", "20"], "no row has anything to learn within"),
    "evaluate dtype": (["evaluate", "{chats}", "--dtype", "int8"], "--dtype must be one of .*, got 'int8'"),
    "chat image": (["chat", "--prompt", "a", "--image", "nowhere.png"], "chat: there is no file 'nowhere.png'"),
    "chat device": (
        ["chat", "--prompt", "a", "--device", "moon"],
        "--device must be the name of a device, got 'moon'",
    ),
    "chat top_p": (["chat", "--top_p", "1.5"], "--top_p must be above 0 and at most 1, got 1.5"),
    "chat idle": (["chat", "--top_p", "0.5", "--temperature", "0"], "--top_p would do nothing"),
    "chat tokens": (["chat", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_the_weights(damaged, chats, tiny_checkpoint, tmp_path, monkeypatch, case):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # nothing gets as far
    flags, message = ERRORS[case]
    name, *flags = [flag.format(damaged=damaged, chats=chats) for flag in flags]
    if name == "train":
        flags += ["--dataset", chats, "--output_dir", tmp_path / "run", *QUICK]
    if name != "merge" and "--model" not in flags:
        flags += ["--model", tiny_checkpoint]
    with pytest.raises(SystemExit) as stopped:
        run(name, *flags)
    assert re.search(message, str(stopped.value))


@pytest.mark.parametrize("name", ["train", "evaluate", "chat"])
def test_a_checkpoint_without_its_processor_is_named(chats, tiny_checkpoint, tmp_path, name):
    """`save_pretrained` of a model writes none."""
    model = tmp_path / "bare"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    flags = {
        "train": ["--dataset", chats, "--output_dir", tmp_path / "run", *QUICK],
        "evaluate": [chats],
        "chat": ["--prompt", "a"],
    }
    with pytest.raises(SystemExit, match=rf"{name}: --model .*bare: its processor cannot be read. `processor.save"):
        run(name, "--model", model, *flags[name])


def test_scores_that_cannot_be_written_are_refused(chats, tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        run("evaluate", chats, "--model", tiny_checkpoint, "--output", "no/where.json")
    assert "--output: must be in a folder that can be written to: 'no' does not exist" in capsys.readouterr().err


def test_files_without_a_prompt_are_refused(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        run("chat", "--model", tiny_checkpoint, "--image", "photo.png")
    assert "--image and --video belong to --prompt" in capsys.readouterr().err
