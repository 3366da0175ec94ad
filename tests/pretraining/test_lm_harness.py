"""The tasks of `examples/lm_eval` in the lm-eval harness, through `scripts/lm_harness.py`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

TASKS = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location("minimax_m3_lm_eval_utils", TASKS / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["recall", "thinking", "image"])
def test_documents_are_first_questions_with_their_answers(utils, task):
    rows = utils.load(task, rows=3, version=1.0)["test"]
    assert len(rows) == 3
    for row in rows:
        (answer, *_) = row["answers"]
        assert row["answer"] == answer
        message = json.loads(row["messages"])[0]
        assert row["prompt"].count("<image>") == row["num_images"] == len(utils.pictures(row))
        if isinstance(message["content"], list):
            assert row["prompt"].endswith(message["content"][-1]["text"])
        thoughts = "<mm:think>1 + 1 = 2.</mm:think>" if task == "thinking" else "</mm:think>"
        assert utils.score(row, [thoughts + answer]) == {"exact_match": 1.0}
        assert utils.score(row, [thoughts + answer + "0"]) == {"exact_match": 0.0}
        assert utils.score(row, [""]) == {"exact_match": 0.0}


def test_every_task_has_a_name_of_its_own():
    files = sorted(TASKS.glob("minimax_m3_*.yaml"))
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)
    found = [yaml.load(file.read_text(), loader)["task"] for file in files]
    assert found == [file.stem for file in files]
    assert len(found) >= 5


def test_our_tasks_join_the_commands_that_read_tasks(load_script):
    add = load_script("lm_harness").with_our_tasks
    assert add(["run", "--tasks", "a"]) == ["run", "--tasks", "a", "--include_path", str(TASKS)]
    assert add(["ls", "tasks", "--include_path", "mine"]) == ["ls", "tasks", "--include_path", "mine"]
    assert add(["run", "--include_path=mine"]) == ["run", "--include_path=mine"]
    assert add(["--help"]) == ["--help"] and add([]) == []


def test_missing_harness_is_named(load_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match="the harness is not installed: `pip install lm-eval`"):
        load_script("lm_harness").main(["ls", "tasks"])


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"vocab_size": 1024})).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_harness(load_script, monkeypatch, folder, checkpoint, model, tasks):
    """The results of the harness, and its samples by task."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    load_script("lm_harness").main(
        ["run", "--model", model, "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", tasks]
        + ["--limit", "2", "--batch_size", "1", "--device", "cpu", "--apply_chat_template"]
        + ["--output_path", str(folder), "--log_samples"]
    )
    (results,) = folder.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for file in folder.rglob(f"samples_{task}_*.jsonl") for line in file.open()]
        for task in tasks.split(",")
    }
    return json.loads(results.read_text())["results"], samples


@pytest.mark.parametrize(("harness_model", "task"), [("hf", "thinking"), ("hf-multimodal", "image")])
def test_harness_reads_chats_as_the_model_does(
    load_script, monkeypatch, tmp_path, checkpoint, processor, utils, harness_model, task
):
    """What the harness gets is what `generate` writes for the same chat."""
    pytest.importorskip("lm_eval", reason="the lm-eval harness is not installed")
    name = f"minimax_m3_{task}"
    results, samples = run_harness(load_script, monkeypatch, tmp_path, checkpoint, harness_model, name)
    assert results[name]["exact_match,none"] == 0, "the weights are random"
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(checkpoint).eval()
    rows = utils.load(task, rows=2)["test"]
    assert len(samples[name]) == 2
    for sample in samples[name]:
        row = rows[sample["doc_id"]]
        parts = [{"type": "image", "image": picture} for picture in utils.pictures(row)]
        parts.append({"type": "text", "text": row["prompt"].replace("<image>", "")})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts if task == "image" else row["prompt"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        written = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert written.startswith(sample["resps"][0][0]) and sample["resps"][0][0]


def test_harness_measures_the_perplexity_of_code(load_script, monkeypatch, tmp_path, checkpoint, processor, utils):
    """Against the loss of one pass over each document."""
    pytest.importorskip("lm_eval", reason="the lm-eval harness is not installed")
    results, _ = run_harness(load_script, monkeypatch, tmp_path, checkpoint, "hf", "minimax_m3_code")
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(checkpoint).eval()
    nats, size = 0.0, 0
    for row in utils.load("code", rows=2, characters=8000)["test"]:
        tokenizer = processor.tokenizer
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(row["text"])["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
        size += len(row["text"].encode())
    assert results["minimax_m3_code"]["bits_per_byte,none"] == pytest.approx(nats / size / 0.693147, rel=0.01)
