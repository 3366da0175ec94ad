"""Model cards: their metadata, their figures, and every example in them, which the tests run."""

import json
import re
from math import prod
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from peft import PeftModel
from safetensors import safe_open

from modeling_minimax_m3.__main__ import main

TRAINED = Path(__file__).resolve().parents[2] / "examples" / "minimax-m3-small"
SNIPPET = re.compile(r"(?:^### (?P<heading>.+?)\n\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
RECORD = {
    "command": ["python", "scripts/pretrain.py", "--output_dir", "run", "--seed", "7"],
    "seed": 7, "steps": 1234, "python": "3.11.9", "torch": "2.11.0", "device": "a device",
    "heldout": {"eval_loss": 1.25, "eval_accuracy_image": 0.875, "eval_runtime": 3.0},
}  # fmt: skip
# What the trained checkpoint answers.
PRINTED = {
    "Text": ["214"],
    "Image": ["four"],
    "Video": ["black diamond"],
    "Several conversations at once": ["19", "Rome"],
    "Tool calls": ["weather {'city': 'Bonn', 'day': 'Monday'}"],
    "Thinking": ["12 + 7 = 19.", "19"],
    "Long text": ["658"],
    "Pipeline": ["four"],
}
EXPECTED = {
    *("Text", "Image", "Video", "Several conversations at once", "Tool calls", "Thinking", "Long text"),
    *("Pipeline", "LoRA", "Quantized loading"),
}
QUESTIONS = {"count": {"accuracy": 0.99}, "which_side": {"accuracy": 0.75}}
RESULTS = {
    "answers": {"image": {"accuracy": 0.96, "interval": [0.94, 0.97], "answers": 2000, "questions": QUESTIONS}},
    "recall": [
        {"tokens": 8192, "accuracy": 1.0, "interval": [0.98, 1.0]},
        {"tokens": 16384, "accuracy": 0.99, "interval": [0.97, 1.0]},
        {"tokens": 32768, "accuracy": 0.5, "interval": [0.4, 0.6]},
    ],
    "perplexity": [{"tokens": 1024, "perplexity": 7.125}],
    "coverage": [{"tokens": 8192, "share": 0.981, "interval": [0.97, 0.99]}],
}


def read_card(text: str) -> tuple[dict, str]:
    """The metadata of a card, and the text behind it."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def snippets(text: str) -> dict[str, str]:
    """The Python of a card by heading, "" for the code at the top."""
    return {match["heading"] or "": match["code"] for match in SNIPPET.finditer(text)}


def run_snippet(text: str, heading: str) -> dict:
    codes, namespace = snippets(text), {}
    for name in ("", heading):
        exec(compile(codes[name], f"{heading}, {name}", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def folder(load_script, tiny_checkpoint, tmp_path_factory) -> Path:
    """A folder with photo.png, clip.mp4, and `small`: the trained checkpoint, or one of random weights, with its card."""
    folder = tmp_path_factory.mktemp("cards")
    is_trained = (TRAINED / "config.json").is_file()
    copytree(TRAINED if is_trained else tiny_checkpoint, folder / "small")
    if not is_trained:
        (folder / "small" / "training.json").write_text(json.dumps(RECORD))
    load_script("write_model_card").main([str(folder / "small"), "--load_as", "small"])
    load_script("example_media").draw_example_media(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter on the same checkpoint, with the card that `minimax-m3 train` writes."""
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4"}) + "\n")
    options = ["--lora", "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
    target = folder / "tuned"
    main(["train", "--model", str(folder / "small"), "--dataset", str(rows), "--output_dir", str(target), *options])
    return target


@pytest.mark.parametrize("heading", sorted(EXPECTED))
def test_example_of_the_small_checkpoint_runs(folder, heading, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    text = (folder / "small" / "README.md").read_text()
    assert set(snippets(text)) == {"", *EXPECTED}
    namespace = run_snippet(text, heading)
    if heading == "LoRA":
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    elif heading == "Quantized loading":
        assert "float8" in str({parameter.dtype for parameter in namespace["model"].parameters()})
    elif heading == "Tool calls":  # which prints calls that can be read
        assert "The weather of a day." in namespace["processor"].decode(namespace["inputs"]["input_ids"][0])
    printed = capsys.readouterr().out
    if (TRAINED / "config.json").is_file():
        assert set(PRINTED.get(heading, [])) <= set(printed.splitlines()), printed
    elif heading in PRINTED and heading != "Tool calls":
        assert printed.strip()


@pytest.mark.parametrize("heading", ["Image", "Tool calls", "Long text"])
def test_example_of_an_adapter_runs(adapter, folder, heading, monkeypatch):
    monkeypatch.chdir(folder)
    text = (adapter / "README.md").read_text()
    assert set(snippets(text)) == {"", *EXPECTED - {"Pipeline", "LoRA", "Quantized loading"}}
    assert isinstance(run_snippet(text, heading)["model"], PeftModel)


def test_released_names_stand_in_the_card_of_a_fine_tune():
    from modeling_minimax_m3.commands.model_card import usage_of

    usage = usage_of(True, 'runs/"quoted"', "MiniMaxAI/MiniMax-M3")
    assert 'from_pretrained("MiniMaxAI/MiniMax-M3", dtype="auto"' in usage["usage"]
    assert "PeftModel.from_pretrained(model, 'runs/\"quoted\"')" in usage["usage"]
    whole = usage_of(True, "tuned")
    assert set(whole["examples"]) == EXPECTED
    assert '"tuned", dtype="auto"' in whole["examples"]["Quantized loading"]
    for code in (usage["usage"], whole["usage"], *whole["examples"].values()):
        compile(code, "card", "exec")
    assert "examples" not in usage_of(False, "tuned")  # without pictures, most of them would fail


def test_figures_of_the_card_are_those_of_the_files(load_script, tiny_checkpoint, tmp_path):
    copytree(tiny_checkpoint, tmp_path / "small")
    (tmp_path / "small" / "training.json").write_text(json.dumps(RECORD))
    path = load_script("write_model_card").main([str(tmp_path / "small")])
    head, body = read_card(path.read_text())
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "image-text-to-text"
    assert head["license"] == "apache-2.0" and "base_model" not in head
    metrics = {metric["type"]: metric["value"] for metric in head["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"eval_loss": 1.25, "eval_accuracy_image": 0.875}
    assert "for 1,234 steps on a device, with seed 7" in " ".join(body.split())
    assert "python scripts/pretrain.py --output_dir run --seed 7\n" in body
    assert "| torch | 2.11.0 |" in body and "| device | a device |" in body
    with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as weights:
        size = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert f"| parameters | {size:,} |" in body
    assert HubCard(path.read_text()).data.model_name == "small"  # the Hub's own reader
    assert load_script("check_text").find_faults("README.md", path.read_text()) == []


def test_scores_of_an_evaluation_take_the_place_of_those_of_training(load_script, tiny_checkpoint, tmp_path):
    copytree(tiny_checkpoint, tmp_path / "small")
    record = RECORD | {"options": {"stages": "2048:0.4,16384:1"}}
    (tmp_path / "small" / "training.json").write_text(json.dumps(record))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    options = ["--evaluation", str(tmp_path / "results.json")]
    head, body = read_card(load_script("write_model_card").main([str(tmp_path / "small"), *options]).read_text())
    metrics = {metric["type"]: metric["value"] for metric in head["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"eval_accuracy_image": 0.96}
    for row in (
        "| image | 96.0% | 94.0% to 97.0% | 2,000 |",
        "| 16,384 | 99.0% | 97.0% to 100.0% |",
        "| 1,024 | 7.12 |",
        "| 8,192 | 98.1% |",
    ):
        assert row in body
    assert "## Scores" not in body  # a table with intervals has them
    words = " ".join(body.split())
    assert "Fewer than 90% of its answers are right to these kinds of questions: image: which side (75.0%)." in words
    assert "had up to 16,384 tokens. Recall from this length on: 99.0% at 16,384, 50.0% at 32,768." in words


def test_recall_in_longer_texts_may_come_from_another_evaluation(load_script, tiny_checkpoint, tmp_path):
    copytree(tiny_checkpoint, tmp_path / "small")
    record = RECORD | {"options": {"stages": "2048:0.4,16384:1"}}
    (tmp_path / "small" / "training.json").write_text(json.dumps(record))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    known = RESULTS["recall"][-1]
    longer = [known | {"accuracy": 0.25}, known | {"tokens": 2 * known["tokens"], "accuracy": 0.125}]
    (tmp_path / "longer.json").write_text(json.dumps({"recall": longer}))
    options = ["--evaluation", str(tmp_path / "results.json"), str(tmp_path / "longer.json")]
    body = read_card(load_script("write_model_card").main([str(tmp_path / "small"), *options]).read_text())[1]
    words = " ".join(body.split())
    assert "99.0% at 16,384, 50.0% at 32,768, 12.5% at 65,536." in words, (
        "the first file decides where both have a length"
    )


def test_runs_that_follow_each_other_are_all_told(load_script, tiny_checkpoint, tmp_path):
    copytree(tiny_checkpoint, tmp_path / "small")
    first = RECORD | {"options": {"stages": "2048:0.4,16384:1"}}
    second = RECORD | {"command": ["python", "next.py"], "seed": 8, "steps": 55, "options": {"stages": "8192:1"}}
    (tmp_path / "small" / "training.json").write_text(json.dumps(second | {"earlier_runs": [first]}))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    options = ["--evaluation", str(tmp_path / "results.json")]
    body = read_card(load_script("write_model_card").main([str(tmp_path / "small"), *options]).read_text())[1]
    words = " ".join(body.split())
    assert "for 1,234 steps on a device, with seed 7, then for 55 steps on a device, with seed 8: text" in words
    assert "Run 1 of 2: ```bash python scripts/pretrain.py --output_dir run --seed 7" in words
    assert 'The command of run 2 stands under "Made by".' in words
    assert body.split("## Made by")[1].splitlines()[3] == "python next.py"
    assert "had up to 16,384 tokens." in words  # the longest rows of all runs


def test_evaluation_without_scores_leaves_the_card_alone(load_script, tiny_checkpoint, tmp_path):
    copytree(tiny_checkpoint, tmp_path / "small")
    (tmp_path / "small" / "training.json").write_text(json.dumps(RECORD))
    (tmp_path / "small" / "README.md").write_text("a card")
    options = ["--evaluation", str(tmp_path / "small" / "config.json")]
    with pytest.raises(
        SystemExit, match="^write_model_card: `--evaluation` must be results .*config.json has no scores"
    ):
        load_script("write_model_card").main([str(tmp_path / "small"), *options])
    assert (tmp_path / "small" / "README.md").read_text() == "a card"


@pytest.mark.parametrize(
    ("record", "message"),
    [(None, "training.json"), ({"seed": 1}, "must have the fields .* but .*'command'.* are missing")],
)
def test_checkpoint_without_its_record_has_no_card(load_script, tiny_checkpoint, tmp_path, record, message):
    copytree(tiny_checkpoint, tmp_path / "small")
    if record is not None:
        (tmp_path / "small" / "training.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"write_model_card: .*{message}"):
        load_script("write_model_card").main([str(tmp_path / "small")])
    assert not (tmp_path / "small" / "README.md").exists()


@pytest.mark.skipif(
    not (TRAINED / "config.json").is_file(), reason="examples/minimax-m3-small is not in this checkout"
)
def test_card_of_the_shipped_checkpoint_is_up_to_date(load_script):
    """Its figures are those of its record: a card that was typed, or that belongs to another training, fails."""
    head, body = read_card((TRAINED / "README.md").read_text())
    record = json.loads((TRAINED / "training.json").read_text())
    folder = TRAINED.parents[1] / "benchmarks" / "results"
    results = [folder / "pretraining_scores.json", folder / "pretraining_recall_1m.json"]
    script = load_script("write_model_card")
    assert str(script.make_card(TRAINED, results, "examples/minimax-m3-small")) == (TRAINED / "README.md").read_text()
    assert f"for {record['steps']:,} steps on {record['device']}, with seed {record['seed']}" in " ".join(body.split())
    assert " ".join(record["command"][:2]) in body
    assert head["pipeline_tag"] == "image-text-to-text"
    assert script.architecture(TRAINED) in body
    assert sum(file.stat().st_size for file in TRAINED.glob("*.safetensors")) <= 16e6
