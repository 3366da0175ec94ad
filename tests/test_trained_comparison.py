"""`examples/trained_comparison`: the made-up text is consistent, and a few steps of every arm train."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "examples" / "trained_comparison" / "compare.py"
SPEC = importlib.util.spec_from_file_location("trained_comparison", PATH)
trained_comparison = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trained_comparison)

TASK = trained_comparison.Task(tokens=512, facts=6, questions=40)


def test_each_answer_is_the_value_of_its_fact():
    sample = TASK.sample(8, torch.Generator().manual_seed(0))
    first_name, first_value = TASK.plain, TASK.plain + TASK.names
    first_fact = first_value + TASK.values
    questions = 0
    for row in range(8):
        known = {}
        ids = sample["ids"][row].tolist()
        for t, token in enumerate(ids):
            if token >= first_fact:
                name, value = divmod(token - first_fact, TASK.values)
                assert name not in known
                known[name] = (value, t)
            is_question = first_name <= token < first_value
            assert is_question == sample["answer"][row, t].item()
            if is_question:
                value, fact = known[token - first_name]
                assert sample["targets"][row, t] == first_value + value
                assert sample["distance"][row, t] == t - fact
                questions += 1
        assert len(known) == TASK.facts
    assert questions > 100
    is_value = (sample["ids"] >= first_value) & (sample["ids"] < first_fact)
    assert not is_value.any(), "only a fact states a value"


def test_other_targets_follow_from_the_two_tokens_before():
    sample = TASK.sample(8, torch.Generator().manual_seed(0))
    ids, targets = sample["ids"], sample["targets"]
    counted = (targets >= 0) & ~sample["answer"]
    assert counted.float().mean() > 0.3
    assert torch.equal(targets[counted], ids.roll(-1, 1)[counted])
    assert torch.equal(targets[counted], ((2 * ids - ids.roll(1, 1)) % TASK.plain)[counted])


@pytest.mark.parametrize("arm", trained_comparison.ARMS)
def test_every_arm_trains(arm, tmp_path, monkeypatch):
    output = tmp_path / f"{arm}.json"
    options = "--steps 4 --batch 1 --tokens 512 --blocks 4 --log-every 1 --evaluate-every 4 --evaluation-batches 1"
    monkeypatch.setattr("sys.argv", ["x", "train", arm, "--output", str(output), *options.split()])
    trained_comparison.main()
    record = json.loads(output.read_text())
    losses = [row[1] for row in record["curve"]]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (record["curve"][0][2] > 0) == (arm in ("learned", "mixed")), "only learned layers have an indexer loss"
    if arm == "learned":
        assert len(record["selection"]) == trained_comparison.LAYERS
    arguments = ["x", "plot", str(output), "--picture", str(tmp_path / "picture.png")]
    if arm == "learned":
        arguments += ["--selection-picture", str(tmp_path / "selection.png")]
    monkeypatch.setattr("sys.argv", arguments)
    trained_comparison.main()
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert (tmp_path / "selection.png").exists() == (arm == "learned")
