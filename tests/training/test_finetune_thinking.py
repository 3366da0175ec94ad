"""The thinking mode in which scripts/finetune.py teaches an answer, read from decoded batches."""

import importlib
import json

import pytest
from PIL import Image
from transformers import AutoProcessor

ANSWER = {"role": "assistant", "content": "Grey."}


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture
def prepare(finetune, tiny_checkpoint, tmp_path):
    """The decoded rows of the run's first batches."""
    image = tmp_path / "grey.png"
    Image.new("RGB", (56, 56), (99, 99, 99)).save(image)

    def run(variables, *flags, with_images=False):
        """One row for each of `variables`, which is its `chat_template_kwargs`."""
        question = {"role": "user", "content": [{"type": "text", "text": "What is this?"}]}
        row = {"messages": [question, {**ANSWER, "content": [{"type": "text", "text": "Grey."}]}]}
        if with_images:
            row["images"] = [str(image)]
            question["content"].insert(0, {"type": "image"})
        rows = [{**row, "chat_template_kwargs": own} for own in variables]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = ["--model", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
        trainer = finetune.prepare([*base, "--dataset", str(file), "--max_steps", "1", *flags])
        tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint).tokenizer
        examples = []
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            labels = batch["labels"][0]
            examples.append((tokenizer.decode(batch["input_ids"][0]), tokenizer.decode(labels[labels != -100])))
        return examples

    return run


def modes(examples):
    return [prompt.split("Current thinking mode: ")[1].split(".")[0] for prompt, _ in examples]


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("flags", [[], ["--streaming"]], ids=["", "streaming"])
@pytest.mark.parametrize("default", [None, "disabled"])
def test_mode_is_the_rows_or_the_runs(prepare, with_images, flags, default):
    given = [] if default is None else ["--thinking_mode", default]
    examples = prepare(
        [{"thinking_mode": "enabled"}, None, {"thinking_mode": None}], *given, *flags, with_images=with_images
    )
    assert modes(examples) == ["enabled", default or "adaptive", default or "adaptive"]
    written = "Grey.[e~[" if default == "disabled" else "</mm:think>Grey.[e~["
    assert [learned for _, learned in examples] == ["</mm:think>Grey.[e~[", written, written]
    assert all(("]<]image[>[" in prompt) == with_images for prompt, _ in examples)


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
def test_unknown_mode_of_a_row_is_named(prepare, with_images):
    with pytest.raises(ValueError, match="rows.jsonl, row 2: `chat_template_kwargs.thinking_mode`: must .*'on'"):
        prepare([{"thinking_mode": "disabled"}, {"thinking_mode": "on"}], with_images=with_images)


def test_unknown_mode_of_the_run_comes_before_any_work(finetune):
    with pytest.raises(SystemExit, match="--thinking_mode must be one of adaptive, enabled, disabled, got 'on'"):
        finetune.main(["--model", "nowhere", "--dataset", "x.jsonl", "--output_dir", "run", "--thinking_mode", "on"])
