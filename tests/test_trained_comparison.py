"""The made-up text of the trained comparison says what it is meant to say, and one step of every arm trains."""

import json

import pytest
import torch

from benchmarks import trained_comparison

TASK = trained_comparison.Task(tokens=512, facts=6, questions=40)


def test_answers_are_those_of_the_facts():
    sample = TASK.sample(8, torch.Generator().manual_seed(0))
    first_name, first_value = TASK.plain, TASK.plain + TASK.names
    first_fact = first_value + TASK.values
    asked = 0
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
                value, told = known[token - first_name]
                assert sample["targets"][row, t] == first_value + value
                assert sample["distance"][row, t] == t - told
                asked += 1
        assert len(known) == TASK.facts
    assert asked > 100
    is_value = (sample["ids"] >= first_value) & (sample["ids"] < first_fact)
    assert not is_value.any(), "the text must not tell a value but in its fact"


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
    assert (record["curve"][0][2] > 0) == (arm in ("learned", "mixed")), "only indexers have a divergence"
    if arm == "learned":
        assert len(record["selection"]) == trained_comparison.LAYERS
    arguments = ["x", "plot", str(output), "--picture", str(tmp_path / "picture.png")]
    if arm == "learned":
        arguments += ["--selection-picture", str(tmp_path / "selection.png")]
    monkeypatch.setattr("sys.argv", arguments)
    trained_comparison.main()
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert (tmp_path / "selection.png").exists() == (arm == "learned")
