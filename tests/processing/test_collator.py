"""Batches for fine-tuning on chats with images and videos."""

import io

import pytest
import torch
from PIL import Image

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3 import MultimodalChatCollator

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


def chat(*user, answer="It is grey."):
    return [
        {"role": "user", "content": list(user)},
        {"role": "assistant", "content": [text(answer)]},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Still."},
    ]


@pytest.fixture
def collator(processor):
    return MultimodalChatCollator(processor)


@pytest.fixture
def picture(pixels):
    return Image.fromarray(pixels(56, 84, 3))


@pytest.fixture
def clip(pixels):
    return pixels(4, 56, 56, 3, seed=3)


@pytest.fixture
def rows(picture, clip):
    return [
        {"messages": chat(text("Hello."))},
        {"messages": chat(IMAGE, text("What is this?"), answer="A longer answer."), "images": [picture]},
        {"messages": chat(VIDEO, text("What happens?"), IMAGE), "images": [picture], "videos": [clip]},
    ]


def learned(batch, row, processor):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


def test_labels_are_the_turns_of_the_assistant(collator, rows, processor):
    batch = collator(rows)
    answers = ["It is grey.", "A longer answer.", "It is grey."]
    for row, answer in enumerate(answers):
        assert learned(batch, row, processor) == "".join(
            f"</mm:think>{words}{processor.tokenizer.eos_token}" for words in (answer, "Still.")
        )
    where = batch["labels"] != -100
    assert torch.equal(batch["labels"][where], batch["input_ids"][where])
    assert batch["attention_mask"][where].all()


@pytest.mark.parametrize("as_file", ["bytes", "path", "raw"])
def test_files_as_datasets_stores_them(collator, rows, picture, tmp_path, as_file):
    """Columns of type `datasets.Image(decode=False)`, and columns without a declared image type."""
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    picture.save(tmp_path / "picture.png")
    item = {
        "bytes": {"bytes": buffer.getvalue(), "path": None},
        "path": {"bytes": None, "path": str(tmp_path / "picture.png")},
        "raw": buffer.getvalue(),
    }[as_file]
    expected = collator([rows[1]])
    inline = {"messages": chat({"type": "image", "image": item}, text("What is this?"), answer="A longer answer.")}
    for row in ({**rows[1], "images": [item]}, {**rows[1], "images": item}, inline):
        batch = collator([row])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_tools_lose_what_arrow_added(collator, processor):
    def row(**added):
        properties = {"city": {"type": "string"}, **added}
        tool = {"type": "function", "function": {"name": "look", "parameters": {"properties": properties}}}
        return {"messages": chat(text("Hello.")), "tools": [tool]}

    assert torch.equal(collator([row(number=None)])["input_ids"], collator([row()])["input_ids"])


def test_batch_is_what_the_processor_gives_row_by_row(collator, rows, processor, picture, clip):
    batch = collator(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    assert len(batch["pixel_values"]) == 2 * 4 * 6
    inline = chat({"type": "video", "video": clip}, text("What happens?"), {"type": "image", "image": picture})
    alone = processor.apply_chat_template([inline], tokenize=True, return_dict=True, return_tensors="pt")
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][2, :length], alone["input_ids"][0])
    assert batch["attention_mask"][2].sum() == length
    torch.testing.assert_close(batch["pixel_values_videos"], alone["pixel_values_videos"], rtol=0, atol=0)
    torch.testing.assert_close(collator([rows[2]])["pixel_values"], alone["pixel_values"], rtol=0, atol=0)


def modes(batch, processor):
    """The thinking mode in the prompt of each row."""
    prompts = processor.tokenizer.batch_decode(batch["input_ids"])
    return [prompt.split("Current thinking mode: ")[1].split(".")[0] for prompt in prompts]


@pytest.mark.parametrize("default", [None, "adaptive", "enabled", "disabled"])
def test_thinking_mode_is_the_rows_or_the_collators(rows, processor, default):
    given = {} if default is None else {"chat_template_kwargs": {"thinking_mode": default}}
    collator = MultimodalChatCollator(processor, **given)
    rows[0]["chat_template_kwargs"] = {"thinking_mode": "disabled", "model_identity": "You are M."}
    rows[1]["chat_template_kwargs"] = {"thinking_mode": None}  # as `datasets` fills what only other rows have
    batch = collator([*rows, {**rows[2], "chat_template_kwargs": {"thinking_mode": "enabled"}}])
    default = default or "adaptive"
    assert modes(batch, processor) == ["disabled", default, default, "enabled"]
    assert "You are M." in processor.tokenizer.decode(batch["input_ids"][0])


def test_text_alone(collator, rows):
    batch = collator(rows[:1])
    assert not {"pixel_values", "pixel_values_videos"} & batch.keys()


def test_media_without_a_place_come_before_the_first_question(collator, picture):
    messages = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "Grey."}]
    placed = [{"role": "user", "content": [IMAGE, text("What is this?")]}, messages[1]]
    implicit, explicit = (collator([{"messages": m, "images": [picture]}]) for m in (messages, placed))
    assert torch.equal(implicit["input_ids"], explicit["input_ids"])
    assert messages[0]["content"] == "What is this?"  # the caller's row is as it was


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_datasets(collator, rows, streaming, tmp_path, picture):
    """Rows from a file have all columns, and their parts have all keys."""
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "picture.png"
    picture.save(file)
    records = [
        {"messages": chat(text("Hello."))[:1] + chat(text("Hello."))[1:2], "images": []},
        {"messages": chat(IMAGE, text("What is this?"))[:2], "images": [str(file)]},
    ]
    dataset = datasets.Dataset.from_list(records)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    batch = collator(list(dataset))
    expected = collator([records[0], {**records[1], "images": [picture]}])
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0)


def test_truncation_spares_media(processor, rows):
    whole = MultimodalChatCollator(processor)([rows[1]])
    end = int((whole["input_ids"][0] == processor.vision_end_token_id).nonzero()[-1]) + 1
    short = MultimodalChatCollator(processor, max_length=end + 5)
    assert short([rows[1]])["input_ids"].shape == (1, end + 5)
    assert short.fits(rows[1])
    cut = MultimodalChatCollator(processor, max_length=end - 1)
    assert not cut.fits(rows[1])
    assert cut.fits(rows[0])
    with pytest.raises(ValueError, match=rf"`max_length` is {end - 1}.*end at token {end}.*collator.fits"):
        cut([rows[1]])


def test_length_is_rounded_up(processor, rows):
    assert MultimodalChatCollator(processor, pad_to_multiple_of=64)(rows)["input_ids"].shape[1] % 64 == 0


@pytest.mark.parametrize(
    "row, message",
    [
        ({"body": "Hello."}, "the row has the columns body, but needs 'messages'"),
        ({"messages": chat(IMAGE)}, "`images` must hold one item .*, 1 in all, got 0"),
        ({"messages": chat(VIDEO), "videos": ["a.mp4", "b.mp4"]}, "`videos` must hold .*, 1 in all, got 2"),
        ({"messages": [{"role": "assistant", "content": "Hi."}], "images": ["a.png"]}, "no user message"),
        (
            {"messages": chat("Hi."), "chat_template_kwargs": {"thinking_mode": "on"}},
            "`chat_template_kwargs.thinking_mode` .*'on'",
        ),
        (
            {"messages": chat("Hi."), "chat_template_kwargs": "disabled"},
            "`chat_template_kwargs` must be an object.* got 'disabled'",
        ),
        ({"messages": [*chat("Hi."), "Bye."]}, r"`messages\[4\]` must be a message"),
        ({"messages": chat({"type": "text"})}, r"`messages\[0\]`: `content\[0\]`: `text`"),
        ({"messages": chat("Hi."), "tools": "look"}, "`tools` must be a list"),
    ],
    ids=[
        "no known column",
        "an image is missing",
        "a video too many",
        "nobody asks",
        "mode",
        "no variables",
        "no message",
        "no text",
        "no tools",
    ],
)
def test_rows_that_are_refused(collator, row, message):
    with pytest.raises(ValueError, match=f"row 1 of the batch: .*{message}"):
        collator([{"messages": chat("Hi.")}, row])


@pytest.mark.parametrize("variables", [{"thinking_mode": "never"}, {"thinking_mode": True}, "disabled"])
def test_thinking_modes_that_are_refused(processor, variables):
    with pytest.raises(ValueError, match="`chat_template_kwargs"):
        MultimodalChatCollator(processor, chat_template_kwargs=variables)


def test_part_that_waits_for_its_image_may_be_called_image_url(collator, rows):
    expected = collator([rows[1]])
    part = rows[1]["messages"][0]["content"]
    part[0] = {"type": "image_url"}
    assert torch.equal(collator([rows[1]])["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("options", [{"max_length": 0}, {"pad_to_multiple_of": 1.5}], ids=lambda o: next(iter(o)))
def test_options_that_are_refused(processor, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be a positive integer"):
        MultimodalChatCollator(processor, **options)


def test_a_training_step(collator, rows, processor):
    """The batch fits the model, and only what the assistant wrote moves it."""
    torch.manual_seed(0)
    config = tiny_config(text={"vocab_size": len(processor.tokenizer)})
    config.image_token_id, config.video_token_id = processor.image_token_id, processor.video_token_id
    model = MiniMaxM3SparseForConditionalGeneration(config)
    batch = collator(rows)
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
