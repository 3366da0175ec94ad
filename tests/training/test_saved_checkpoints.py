"""Which checkpoints of a run are complete, and from which one it continues."""

import importlib
import json
import shutil

import pytest
from transformers import AutoModelForImageTextToText

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--save_steps", "2"]


@pytest.fixture(scope="module")
def train():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture(scope="module")
def saved():
    return importlib.import_module("modeling_minimax_m3.commands.saved_checkpoints")


@pytest.fixture(scope="module")
def flags(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"Block {i}."}) + "\n" for i in range(8)))
    return ["--model", str(tiny_checkpoint), "--dataset", str(folder / "rows.jsonl"), *QUICK]


@pytest.fixture(scope="module")
def finished(train, flags, tmp_path_factory):
    """A run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main([*flags, "--max_steps", "4", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


DAMAGE = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "half a state": (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "the weights are missing"),
    "half of the weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is cut off"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is cut off"),
    "half an optimizer": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "a shard is missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "model-2.safetensors is missing",
    ),
    "half an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": '),
        "model.safetensors.index.json is cut off",
    ),
}  # fmt: skip


def test_a_whole_checkpoint_has_no_fault(saved, run):
    assert [saved.find_fault(run / f"checkpoint-{step}") for step in (2, 4)] == [None, None]
    assert saved.last_complete(run) == (run / "checkpoint-4", [])
    (run / "checkpoint-10").mkdir()  # the number counts, not the order of letters
    assert saved.last_complete(run) == (
        run / "checkpoint-4",
        ["checkpoint-10 is incomplete (trainer_state.json is missing)"],
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_interrupted_save_is_named(saved, run, damage):
    harm, fault = DAMAGE[damage]
    harm(run / "checkpoint-4")
    assert saved.find_fault(run / "checkpoint-4") == fault
    assert saved.checkpoint_to_resume("true", run) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-4 is incomplete .*{fault}.*; the last complete .*checkpoint-2"):
        saved.checkpoint_to_resume(str(run / "checkpoint-4"), run)
    with pytest.raises(ValueError, match="checkpoint-2 of an earlier run; checkpoint-4 is incomplete"):
        saved.checkpoint_to_resume(None, run)
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(ValueError, match=f"no complete checkpoint in .*; checkpoint-4 is incomplete .{fault}"):
        saved.checkpoint_to_resume("true", run)
    with pytest.raises(
        ValueError, match="holds a run without a complete checkpoint; checkpoint-4 is incomplete .*Name another"
    ):
        saved.checkpoint_to_resume(None, run)


@pytest.mark.parametrize("damage", ["no state", "half of the weights"])
def test_a_run_continues_from_the_last_complete_checkpoint(train, flags, run, finished, caplog, damage):
    DAMAGE[damage][0](run / "checkpoint-4")
    trainer = train.main([*flags, "--max_steps", "4", "--output_dir", str(run), "--resume_from_checkpoint", "true"])
    assert "checkpoint-4 is incomplete" in caplog.text
    assert "the run continues from checkpoint-2" in caplog.text
    assert trainer.state.global_step == 4
    whole = (finished / "checkpoint-4" / "model.safetensors").read_bytes()
    assert (run / "checkpoint-4" / "model.safetensors").read_bytes() == whole


def test_a_finished_run_takes_no_further_step(train, flags, run):
    resume = [*flags, "--output_dir", str(run), "--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit, match="--max_steps 4: the run is finished, .*checkpoint-4 is at step 4"):
        train.main([*resume, "--max_steps", "4"])
    assert train.main([*resume, "--max_steps", "5"]).state.global_step == 5


@pytest.fixture(scope="module")
def adapted(train, flags, tmp_path_factory):
    """A run with adapters, and its options."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    options = ["--lora", "--lora_rank", "4", "--lora_targets", "q_proj", "--lora_save", "norm"]
    train.main([*flags, "--max_steps", "2", "--output_dir", str(folder), *options])
    return folder, options


def test_a_run_with_adapters_continues(train, flags, adapted, tmp_path):
    folder, options = adapted
    shutil.copytree(folder, tmp_path / "run")
    resume = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert train.main([*flags, *options, *resume]).state.global_step == 3


@pytest.mark.parametrize(
    "changed, message",
    [
        (None, "has an adapter: add the options of its run, such as --lora"),
        (["--lora_rank", "8"], "--lora_rank is 8, but the adapter in .*checkpoint-2 has 4"),
        (["--lora_alpha", "5"], "--lora_alpha is 5.0, but the adapter in .* has 32"),
        (["--lora_targets", "k_proj"], "--lora_targets is .'k_proj'., but the adapter in .* has .'q_proj'."),
        (["--lora_experts"], "--lora_experts is True, but the adapter in .* has False"),
    ],
)
def test_a_run_continues_with_the_adapters_that_it_had(train, flags, adapted, changed, message, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # no weights are loaded
    folder, options = adapted
    given = [] if changed is None else [*options, *changed]
    resume = ["--output_dir", str(folder), "--resume_from_checkpoint", "true", "--max_steps", "3"]
    with pytest.raises(SystemExit, match=message):
        train.main([*flags, *given, *resume])


def test_a_whole_model_does_not_continue_with_adapters(train, flags, run, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    resume = ["--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "6"]
    with pytest.raises(SystemExit, match="checkpoint-4 has no adapter: leave --lora and --adapter out"):
        train.main([*flags, *resume, "--lora"])
