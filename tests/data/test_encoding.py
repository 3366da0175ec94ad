"""Tokens, lengths and learned tokens that headers give are those of the processor and of the collator."""

import numpy as np
import pytest
import torch
from PIL import Image

from processing_minimax_m3 import MultimodalChatCollator
from processing_minimax_m3.data import Encoder, read_example
from processing_minimax_m3.data.encoding import MEDIA_CUT, NOTHING_LEARNED

ASK = {"role": "user", "content": "Hi."}
ANSWER = {"role": "assistant", "content": "Grüße, 世界!"}


@pytest.fixture
def clip(picture, load_script, tmp_path):
    pytest.importorskip("av")
    return load_script("panning_video").write_panning_video(picture, tmp_path / "clip.mp4", seconds=3, fps=3, side=84)


@pytest.fixture
def rows(picture, clip):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 56, 84, 3)).astype(np.uint8)
    image, video = {"type": "image"}, {"type": "video"}
    question = {"type": "text", "text": "What is this?"}
    return [
        {"messages": [ASK, ANSWER, ASK, {**ANSWER, "reasoning_content": "Hm."}]},
        {"messages": [{"role": "user", "content": [image, question]}, ANSWER], "images": [str(picture)]},
        {"messages": [{"role": "user", "content": [question, image, image]}, ANSWER], "images": [Image.open(picture), pixels[0]]},
        {"messages": [ASK, ANSWER, {"role": "user", "content": [question, video]}, ANSWER], "videos": [str(clip)]},
        {"messages": [{"role": "user", "content": [video, image]}, {**ANSWER, "weight": 0}, ASK, ANSWER],
         "videos": [pixels], "images": [picture.read_bytes()]},
        {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": [image, question]}],
         "images": [str(picture)] * 2},
    ]  # fmt: skip


@pytest.mark.parametrize("decode", [False, True], ids=["header", "decode"])
def test_rows_are_those_of_the_collator(rows, processor, decode):
    collator = MultimodalChatCollator(processor)
    for row, encoded in zip(rows, Encoder(processor, decode)([read_example(row) for row in rows])):
        batch = collator([row])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert encoded.length == len(ids)
        assert encoded.num_learned() == int((labels[1:] != -100).sum())
        assert encoded.ids[encoded.learned].tolist() == labels[labels != -100].tolist()
        placeholders = torch.isin(ids, torch.tensor([processor.image_token_id, processor.video_token_id]))
        assert encoded.media_tokens == int(placeholders.sum())
        assert encoded.end_of_media == collator._end_of_media(ids)
        for length in range(1, len(ids) + 2, 7):
            assert encoded.num_learned(length) == int((labels[1:length] != -100).sum())
            fits = encoded.end_of_media <= length
            limited = MultimodalChatCollator(processor, max_length=length)
            assert limited.is_useful(row) == (encoded.why_left_out(length) == "")
            assert fits == (encoded.why_left_out(length) != MEDIA_CUT)


def test_chats_are_those_of_the_tokenizer(rows, encoder, processor):
    tokenizer = processor.tokenizer
    expected = tokenizer.apply_chat_template(
        rows[0]["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (encoded,) = encoder([read_example(rows[0])])
    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.learned.astype(int).tolist() == expected["assistant_masks"]


def test_texts_become_rows_that_hold_all_of_them(encoder, processor):
    text = "Block 7 holds the keys of its own sequence. " * 30
    (encoded,) = encoder([read_example({"text": text})])
    rows = encoded.rows(16)
    assert [token for row in rows for token in row["input_ids"]] == encoded.ids.tolist()
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in rows)
    assert all(len(row["input_ids"]) == 16 for row in rows[:-1])


def test_reasons_for_leaving_a_row_out(encoder):
    examples = [{"messages": [ASK]}, {"text": ""}, {"prompt": "Hi.", "completion": ""}, {"messages": [ASK, ANSWER]}]
    encoded = encoder([read_example(row) for row in examples])
    assert [found.why_left_out(4096) for found in encoded] == [NOTHING_LEARNED, NOTHING_LEARNED, "", ""]
    assert encoded[3].why_left_out(20) == NOTHING_LEARNED
    assert encoded[3].rows(20) == []


def test_a_tokenizer_refuses_images_and_reads_text(rows, processor):
    encoder = Encoder(processor.tokenizer)
    text, image = encoder([read_example(row) for row in rows[:2]])
    assert text.length > 100
    assert str(image) == "`images[0]` is an image or a video, but the checkpoint reads text only."


def test_a_template_without_marks_learns_nothing_and_refuses_weights(processor):
    encoder = Encoder(processor.tokenizer)
    encoder._template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    plain, weighted = encoder([read_example({"messages": [ASK, {**ANSWER, "weight": weight}]}) for weight in (1, 0)])
    assert plain.why_left_out(4096) == NOTHING_LEARNED
    assert "has 1 answers, some of which are not learned, but the chat template marks 0 as `generation`" in str(
        weighted
    )
    encoder._template = None
    (missing,) = encoder([read_example({"messages": [ASK, ANSWER]})])
    assert str(missing) == "`messages` is a chat, but the checkpoint's tokenizer has no chat template."
