"""scripts/finetune.py and the walk-through of examples/lora."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from modeling_minimax_m3.commands.train_arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A tiny model."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes."},
]
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Block {number} holds the keys of its own sequence. " * (number + 1)} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.parquet"
    Dataset.from_list([{"messages": CHAT}] * 4).to_parquet(path)
    return path


@pytest.fixture
def images(tmp_path):
    """Chats about a photograph, and one without it."""
    photograph = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(photograph)
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    look = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]},
    ]
    talk = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    rows = [{"messages": look, "images": [str(photograph)]}, {"messages": talk, "images": []}] * 2
    path = tmp_path / "images.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def arguments(finetune, tiny_checkpoint, tmp_path):
    """Parses flags on top of those that every run needs."""

    def parse(*flags):
        return [*flags, "--model", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run"), *QUICK]

    return parse


# ---- the data -----------------------------------------------------------------------------------------------------


def test_chats_are_learned_where_the_assistant_speaks(finetune, chats, arguments, tiny_checkpoint):
    trainer = finetune.prepare(arguments("--dataset", str(chats)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learned == "</mm:think>A tiny model.[e~[</mm:think>Yes.[e~["
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_long_texts_become_several_rows(finetune, texts, arguments, tiny_checkpoint, streaming):
    flags = ["--dataset", str(texts), "--max_length", "16", *(["--streaming"] if streaming else [])]
    rows = list(finetune.prepare(arguments(*flags)).train_dataset)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert all(2 <= len(row["input_ids"]) <= 16 and row["labels"] == [-100, *row["input_ids"][1:]] for row in rows)
    written = "".join(json.loads(line)["text"] for line in texts.read_text().splitlines())
    joined = tokenizer.decode([token for row in rows for token in row["input_ids"]])
    # a last piece of one token has nothing to predict, and is left out
    assert len(written) - 10 < len(joined.replace(tokenizer.eos_token, "")) <= len(written)


def test_padding_and_putting_rows_in_line_train_the_same(finetune, texts, arguments):
    losses = []
    for padding_free in ("true", "false"):
        trainer = finetune.prepare(arguments("--dataset", str(texts), "--padding_free", padding_free))
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].shape[0] == 1) == (padding_free == "true")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_rows_beyond_the_context_are_a_warning(finetune, texts, arguments, caplog):
    finetune.prepare(arguments("--dataset", str(texts), "--max_length", "200000"))
    assert "--max_length is 200000, but `max_position_embeddings` of the model is 131072" in caplog.text


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_whole_model_from_yaml_with_evaluation_and_resuming(finetune, texts, chats, tiny_checkpoint, tmp_path):
    options = {
        "model": str(tiny_checkpoint),
        "dataset": str(texts),
        "eval_dataset": [str(chats)],
        "output_dir": str(tmp_path / "run"),
        "learning_rate": "5e-3",
        "router_aux_loss_coef": 0.01,
        "indexer_loss_coef": 0.1,
        "activation_checkpointing": True,
        "bf16": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "sample_tokens": 4,
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(options), encoding="utf-8")  # JSON is YAML
    trainer = finetune.main([str(file), "--learning_rate", "1e-3"])
    assert trainer.args.learning_rate == 1e-3
    history = trainer.state.log_history
    assert sum("eval_loss" in entry for entry in history) >= 2
    assert all(entry["indexer_loss"] > 0 for entry in history if "loss" in entry)

    with pytest.raises(SystemExit, match="checkpoint-2 of an earlier run.*--resume_from_checkpoint true"):
        finetune.main([str(file)])
    finetune.main([str(file), "--resume_from_checkpoint", "true", "--max_steps", "3"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    start = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    AutoProcessor.from_pretrained(tmp_path / "run")
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, start.get_parameter(name))}
    assert {name.split(".")[1] for name in changed if name != "lm_head.weight"} == {"language_model"}
    assert any("indexer" in name for name in changed)
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_loss"] > 0


def test_no_pass_with_labels_makes_a_cache(finetune, texts, arguments):
    trainer = finetune.prepare(arguments("--dataset", str(texts), "--eval_dataset", str(texts)))
    asked = []

    def note(model, args, kwargs):
        if "labels" in kwargs:  # samples are written with a cache
            asked.append((model.training, kwargs.get("use_cache")))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    assert set(asked) == {(True, False), (False, False)}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_memory_is_pinned_for_an_accelerator_alone(load_script, tmp_path):
    options = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    *_, training, _ = parse_arguments(["--model", "a", "--dataset", "b", *options])
    _, pretraining = load_script("pretrain").read_options(options)
    assert not training.dataloader_pin_memory
    assert not pretraining.dataloader_pin_memory


def test_adapters_reach_what_they_are_asked_to(finetune, chats, arguments):
    trainer = finetune.prepare(arguments("--dataset", str(chats), "--lora", "--lora_experts", "--lora_rank", "4"))
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name and "language_model" in name and "indexer" not in name for name in trained)
    for part in ("q_proj", "o_proj", "mlp.experts"):
        assert any(part in name for name in trained), part


@pytest.mark.parametrize("flags", [[], ["--train_vision"], ["--streaming"]], ids=["", "vision", "streaming"])
def test_images(finetune, images, arguments, tiny_checkpoint, flags):
    trainer = finetune.main(arguments("--dataset", str(images), "--eval_dataset", str(images), *flags))
    start = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    changed = {
        name for name, value in trainer.model.named_parameters() if not torch.equal(value, start.get_parameter(name))
    }
    assert any("language_model" in name for name in changed)
    assert any("vision_tower" in name for name in changed) == ("--train_vision" in flags)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["image_grid_thw"].shape == (2, 3)


def test_tools_are_those_of_the_row(finetune, arguments, tiny_checkpoint, tmp_path):
    """Arrow adds the properties of other rows' tools to a tool's schema, as None. A call may have no content."""
    rows = []
    for name in ("city", "number"):
        function = {"name": "look", "parameters": {"type": "object", "properties": {name: {"type": "string"}}}}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {name: "7"}}}]}
        rows.append({"messages": [CHAT[0], call], "tools": [{"type": "function", "function": function}]})
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    expected = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]
    parquet, jsonl = tmp_path / "tools.parquet", tmp_path / "tools.jsonl"
    Dataset.from_list(rows).to_parquet(parquet)
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (parquet, jsonl):
        read = finetune.prepare(arguments("--dataset", str(path))).train_dataset["input_ids"]
        assert [tokenizer.decode(ids) for ids in read] == expected


def test_a_chat_about_an_image_that_is_cut_before_its_answer_is_left_out(finetune, images, arguments, capsys):
    look, talk = [json.loads(line) for line in images.read_text().splitlines()[:2]]
    look["messages"][0]["content"].append({"type": "text", "text": "What? " * 400})
    images.write_text(json.dumps(look) + "\n" + json.dumps(talk) + "\n")
    trainer = finetune.prepare(arguments("--dataset", str(images), "--max_length", "700"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert len(trainer.train_dataset) == 1
    assert "pixel_values" not in batch
    assert "left out 1 rows, which have nothing to learn within --max_length" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--streaming"]], ids=["", "streaming"])
def test_a_video_and_a_row_that_does_not_fit(finetune, images, arguments, load_script, tmp_path, capsys, flags):
    pytest.importorskip("av")
    large, clip = tmp_path / "large.png", tmp_path / "clip.mp4"
    Image.linear_gradient("L").resize((1120, 1120)).convert("RGB").save(large)
    load_script("panning_video").write_panning_video(large, clip, seconds=1, fps=2, side=56)
    look = json.loads(images.read_text().splitlines()[0])
    watch = [{"role": "user", "content": [{"type": "video"}]}, look["messages"][1]]
    rows = [
        {**look, "videos": []},
        {**look, "images": [str(large)], "videos": []},
        {"messages": watch, "images": [], "videos": [str(clip)]},
    ]
    path = tmp_path / "media.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [*flags, "--max_length", "1024", "--per_device_train_batch_size", "2"]
    trainer = finetune.main(arguments("--dataset", str(path), *flags))
    assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert len(batch["video_grid_thw"]) == 1
    assert len(batch["input_ids"]) == 2
    assert ("training data: left out 1 rows, which have images" in capsys.readouterr().out) == (
        "--streaming" not in flags
    )


def test_tensorboard(finetune, texts, arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    finetune.main(arguments("--dataset", str(texts), "--report_to", "tensorboard"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_walkthrough_in_short(tmp_path, monkeypatch, capsys):
    flags = ["--output", str(tmp_path), "--use_cpu", "--num_train_epochs", "3", "--logging_steps", "3"]
    monkeypatch.setattr("sys.argv", ["walkthrough.py", *flags, "--disable_tqdm", "true"])
    monkeypatch.setattr("sys.path", list(sys.path))
    loss = runpy.run_path(str(ROOT / "examples" / "lora" / "walkthrough.py"))["main"]()
    printed = capsys.readouterr().out
    assert "What is your name?" in printed
    assert "of 8 answers learned" in printed
    assert loss < 4.5  # from 6.2


def test_files_of_several_types_and_kinds(finetune, texts, chats, images, arguments, capsys):
    """Texts, chats and chats about images in one data set, and others to evaluate on."""
    files = [str(texts), str(chats), str(images)]
    trainer = finetune.main(arguments("--dataset", *files, "--eval_dataset", str(texts)))
    assert len(trainer.train_dataset) == 6 + 4 + 4
    assert "14 rows, 2 with images or videos" in capsys.readouterr().out


# ---- errors, before any work --------------------------------------------------------------------------------------

ERRORS = {
    "file": (["--dataset", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "names": (["--dataset", "{texts}", "squad"], "a data set of several names must consist of files"),
    "column": (
        ["--dataset", "{texts}", "--text_column", "body"],
        "row 1: the row has the columns text, but needs 'messages'",
    ),
    "split": (
        ["--dataset", "{saved}", "--train_split", "dev"],
        "the split of .* must be one of train, test, got 'dev'",
    ),
    "length": (["--dataset", "{texts}", "--max_length", "1"], "--max_length must be at least 2, got 1"),
    "cut": (["--dataset", "{chats}", "--max_length", "20"], "anything to learn.* within its first 20 tokens"),
    "stream": (["--dataset", "{texts}", "--streaming", "--max_steps", "-1"], "--streaming needs --max_steps"),
    "resume": (["--dataset", "{texts}", "--resume_from_checkpoint", "true"], "there is no complete checkpoint in"),
    "no image": (
        ["--dataset", "{missing}"],
        r"missing.jsonl, row 1: `images\[0\]`: the image 'nowhere.png' cannot be read",
    ),
    "cut image": (["--dataset", "{look}", "--max_length", "300"], "no row .*learn.* within its first 300 tokens"),
    "silent": (["--dataset", "{silent}"], "no row of the training data has .*anything to learn"),
    "empty": (["--dataset", "{empty}"], "the file .*empty.jsonl is empty"),
    "no text": (["--dataset", "{holes}"], "holes.jsonl, row 2: the row has no columns, but needs"),
    "no chat": (
        ["--dataset", "{holes}", "--messages_column", "text"],
        "holes.jsonl, row 1: `text`: must be a list, .*, got 'a'",
    ),
    "split of files": (
        ["--dataset", "{texts}", "--eval_split", "test"],
        "files have only the split 'train', got 'test'",
    ),
    "resume elsewhere": (
        ["--dataset", "{texts}", "--resume_from_checkpoint", "nowhere"],
        "there is no folder nowhere",
    ),
    "role": (
        ["--dataset", "{role}"],
        r"role.jsonl, row 1: `messages\[0\]`: does not fit the chat template: role must be one of .* got .human",
    ),
    "role beside images": (
        ["--dataset", "{role}", "--eval_dataset", "{images}"],
        r"role.jsonl, row 1: `messages\[0\]`: does not fit",
    ),
    "half a line": (
        ["--dataset", "{half}"],
        "half.jsonl, row 2: the line is not JSON: Expecting value at character 10, near",
    ),
    "hole for image": (["--dataset", "{hole}"], "`images`: must not hold None"),
    "rows": (["--dataset", "{texts}", "--max_rows", "0"], "the training data has no rows"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_any_work(finetune, texts, chats, images, tiny_checkpoint, tmp_path, case, monkeypatch):
    flags, message = ERRORS[case]
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # nothing gets as far
    look = json.loads(images.read_text().splitlines()[0])
    files = {
        "look": json.dumps(look),
        "missing": json.dumps({**look, "images": ["nowhere.png"]}),
        "silent": json.dumps({**look, "messages": look["messages"][:1]}),
        "empty": "",
        "role": json.dumps({"messages": [{"role": "human", "content": "Hi"}, CHAT[1]]}),
        "half": '{"text": "a"}\n{"text": ',
        "hole": json.dumps({**look, "images": [None]}),
        "holes": '{"text": "a"}\n{"text": null}',
    }
    places = {"texts": texts, "chats": chats, "images": images, "saved": tmp_path / "saved"}
    for name, content in files.items():
        places[name] = tmp_path / f"{name}.jsonl"
        places[name].write_text(content)
    rows = Dataset.from_list([{"text": "a"}])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(places["saved"]))
    flags = [flag.format(**places) for flag in flags]
    base = ["--model", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run"), *QUICK]
    with pytest.raises(SystemExit, match=message):
        finetune.main([*base, *flags])


@pytest.mark.parametrize("package", ["peft", "tensorboard"])
def test_missing_packages_are_named(finetune, texts, arguments, package, monkeypatch):
    monkeypatch.setattr(finetune, "find_spec", lambda name: None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    flags = ["--lora"] if package == "peft" else ["--report_to", "tensorboard"]
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        finetune.main(arguments("--dataset", str(texts), *flags))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: here\nlora_rnk: 4\n", "lora_rnk"),
        ("- a\n- b\n", "must hold names and values, got list"),
        ("model: here\n3: 4\n", "has unknown options: 3"),
        ("model: here\ndataset:\noutput_dir: run\n", "arguments are required: --dataset"),
        ("model: [here\n", "cannot be read: while parsing"),
    ],
)
def test_mistakes_in_a_file_of_options(finetune, tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        finetune.main([str(file)])
    assert message in capsys.readouterr().err


def test_flags_win_over_a_file(finetune, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\ndataset: rows.jsonl\nlora_rank: 4\n")
    model, lora, data, _, given = finetune.parse_arguments(
        [str(file), "--model", "here", "--lora_rank", "8", "--output_dir", "run"]
    )
    assert (model.model, lora.lora_rank, data.dataset) == ("here", 8, ["rows.jsonl"])
    assert given == {"model", "lora_rank", "dataset", "output_dir"}
