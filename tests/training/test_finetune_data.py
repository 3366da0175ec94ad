"""How train splits, packs and orders its data, and data whose images come late."""

import importlib
import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Trainer, TrainingArguments

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def train():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grey.png"
    Image.linear_gradient("L").resize((84, 56)).convert("RGB").save(path)
    return path


@pytest.fixture
def arguments(tiny_checkpoint, tmp_path):
    """The flags of a run on these rows."""

    def write(rows, *flags):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = ["--model", str(tiny_checkpoint), "--dataset", str(path), "--output_dir", str(tmp_path / "run")]
        return [*paths, *QUICK, *flags]

    return write


def texts(count):
    return [{"text": f"Block {number} holds keys. " * (1 + number * 7 % 13)} for number in range(count)]


def shown(trainer, name):
    decode = trainer.processing_class.tokenizer.decode
    return {decode(row["input_ids"]) for row in getattr(trainer, f"{name}_dataset")}


def test_a_fraction_is_held_out(train, arguments):
    rows = texts(40)
    trainer = train.prepare(arguments(rows, "--eval_fraction", "0.2"))
    trained, held = shown(trainer, "train"), shown(trainer, "eval")
    assert (len(trained), len(held)) == (32, 8)
    assert trained | held == {row["text"] + "[e~[" for row in rows}
    assert shown(train.prepare(arguments(rows, "--eval_fraction", "0.2")), "eval") == held
    assert shown(train.prepare(arguments(rows, "--eval_fraction", "0.2", "--seed", "7")), "eval") != held
    assert len(shown(train.prepare(arguments(rows, "--eval_fraction", "0.001")), "eval")) == 1
    limited = train.prepare(arguments(rows, "--eval_fraction", "0.5", "--max_rows", "10"))
    assert shown(limited, "train") | shown(limited, "eval") == {row["text"] + "[e~[" for row in rows[:10]}


def test_a_long_text_is_held_out_whole(train, arguments):
    rows = [{"text": letter * 400} for letter in "abcdefgh"]
    trainer = train.prepare(arguments(rows, "--eval_fraction", "0.5", "--max_length", "16"))
    letters = [{text.strip("[e~]")[:1] for text in shown(trainer, name)} - {""} for name in ("train", "eval")]
    assert not letters[0] & letters[1]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_packed_rows_train_as_rows_in_line(train, arguments, streaming, capsys):
    rows = texts(12)
    flags = ["--streaming"] if streaming else []
    plain = train.prepare(arguments(rows, "--per_device_train_batch_size", "12", *flags))
    packed = train.prepare(
        arguments(rows, "--packing", "--max_length", "512", "--per_device_train_batch_size", "1", *flags)
    )
    assert ("packs of 512 tokens, " in capsys.readouterr().out) == (not streaming)
    (everything,) = plain.get_train_dataloader()
    batches = list(packed.get_train_dataloader())
    assert 1 < len(batches) < 12
    assert all(batch["input_ids"].numel() <= 512 for batch in batches)
    tokens = [batch["input_ids"].flatten().sort().values for batch in batches]
    assert torch.equal(torch.cat(tokens).sort().values, everything["input_ids"].flatten().sort().values)
    model = packed.model.eval()
    losses = []
    for loaded in ([everything], batches):
        count = sum(int((batch["labels"] != -100).sum()) for batch in loaded)
        with torch.no_grad():
            losses.append(sum(model(**batch, num_items_in_batch=count).loss for batch in loaded).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    packed.train()


@pytest.mark.parametrize("kind", ["texts", "images", "packs"])
def test_rows_are_grouped_by_length(train, arguments, picture, kind, monkeypatch):
    rows = texts(200)
    if kind == "images":
        question = {"role": "user", "content": [{"type": "image"}]}
        rows += [
            {"messages": [question, {**ANSWER, "content": "Me. " * number}], "images": [str(picture)]}
            for number in range(100)
        ]
    flags = [
        "--train_sampling_strategy",
        "group_by_length",
        "--per_device_train_batch_size",
        "4",
        "--max_length",
        "1024",
    ]
    if kind == "packs":
        with pytest.raises(SystemExit, match="--train_sampling_strategy would do nothing with --packing"):
            train.main(arguments(rows, *flags, "--packing"))
        return
    trainer = train.prepare(arguments(rows, *flags, "--eval_fraction", "0.3"))
    spans = [batch["input_ids"].shape for batch in trainer.get_train_dataloader()]
    assert len(spans) == -(-len(trainer.train_dataset) // 4)
    sampler = trainer._get_train_sampler()
    lengths = sampler.lengths
    order = list(sampler)
    groups = [[lengths[index] for index in order[start : start + 4]] for start in range(0, len(order), 4)]
    spread = sum(max(group) - min(group) for group in groups) / len(groups)
    assert spread < (max(lengths) - min(lengths)) / 4
    trainer.train()
    trainer.evaluate()


def test_grouping_by_length_works_with_the_processor_in_a_trainer_of_ones_own(
    train, arguments, tiny_checkpoint, tmp_path
):
    trainer = train.prepare(arguments(texts(8)))
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    options = TrainingArguments(str(tmp_path / "own"), use_cpu=True, train_sampling_strategy="group_by_length")
    rows = trainer.train_dataset.remove_columns("length")
    own = Trainer(trainer.model, options, train_dataset=rows, processing_class=processor)
    assert own._get_train_sampler().lengths == [len(row["input_ids"]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_the_first_image_comes_late(train, arguments, picture, streaming):
    """Row 10,000 has columns and types that no earlier row has."""
    rows = [{"text": "Block 7."}] * 9_999
    rows.append(
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER], "images": [str(picture)], "id": "x"}
    )
    flags = ["--streaming"] if streaming else []
    trainer = train.prepare(arguments(rows, *flags))
    last = None
    for row in trainer.train_dataset:
        last = row
    batch = trainer.data_collator([{"input_ids": [5, 6], "labels": [-100, 6]}, last])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.isfinite(trainer.model(**batch).loss)


def test_a_fault_late_in_a_stream_names_its_row(train, arguments):
    rows = [*texts(120), {"text": 7}]
    with pytest.raises(SystemExit, match="rows.jsonl, row 121: `text`: must be a text, got 7"):
        train.main(arguments(rows, "--streaming", "--max_steps", "1000"))


def test_a_changed_file_is_read_again(train, arguments):
    """Datasets keeps what was read, for the next run on the same file."""
    first = shown(train.prepare(arguments(texts(3))), "train")
    again = shown(train.prepare(arguments(texts(3)[::-1])), "train")
    other = shown(train.prepare(arguments([{"text": "Other."}])), "train")
    assert first == again
    assert other == {"Other.[e~["}


def test_a_changed_picture_is_measured_again(train, arguments, picture):
    """The file of rows is as before."""
    chat = [{"role": "user", "content": [{"type": "image", "image": str(picture)}]}, ANSWER]
    given = arguments([{"messages": chat}, {"messages": [ASK, ANSWER]}])
    first, again = (train.prepare(given).train_dataset.lengths for _ in range(2))
    content = picture.read_bytes()
    Image.new("RGB", (168, 112)).save(picture)
    larger = train.prepare(given).train_dataset.lengths
    assert again == first
    assert larger == [first[0] + 18, first[1]]  # 4 x 6 tokens instead of 2 x 3
    picture.unlink()
    with pytest.raises(SystemExit, match="rows.jsonl, row 1: .*grey.png' cannot be read: there is no such file"):
        train.main(given)
    picture.write_bytes(content)
    assert train.prepare(given).train_dataset.lengths == first


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_chats_about_images_in_another_column(train, arguments, picture, streaming):
    chat = [{"role": "user", "content": "<image>What?"}, ANSWER]
    rows = [{"chat": chat, "messages": "not this", "images": [str(picture)]}, {"text": "A text."}]
    trainer = train.main(arguments(rows, "--messages_column", "chat", *(["--streaming"] if streaming else [])))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert trainer.processing_class.decode(batch["labels"][0][batch["labels"][0] >= 0]) == "</mm:think>Me.[e~["


@pytest.mark.parametrize("processes", [1, 2, 16])
def test_processes_read_the_same(train, arguments, processes):
    trainer = train.prepare(arguments(texts(9), "--num_proc", str(processes)))
    decode = trainer.processing_class.tokenizer.decode
    assert [decode(row["input_ids"]) for row in trainer.train_dataset] == [row["text"] + "[e~[" for row in texts(9)]


def test_chats_without_answers_are_counted(train, arguments, capsys):
    train.prepare(arguments([{"messages": [ASK]}, {"messages": [ASK, ANSWER]}, {"messages": [ASK]}]))
    assert "training data: left out 2 rows, which have nothing to learn within --max_length" in capsys.readouterr().out
