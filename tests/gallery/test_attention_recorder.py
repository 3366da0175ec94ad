"""What answers attended to: weights beside those that the model returns, parts of prompts, regions, facts."""

import os

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

BLOCKS = {"index_block_size": 8, "index_topk_blocks": 3, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def attention_recorder(load_script):
    return load_script("attention_recorder")


@pytest.fixture(scope="module")
def questions(load_script):
    return load_script("heldout_questions")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


def test_weights_are_those_of_the_model(attention_recorder):
    """A prompt of 61 tokens and three steps behind it: each equals the last row of `output_attentions`."""
    torch.manual_seed(0)
    config = tiny_config(text=BLOCKS).text_config
    model = MiniMaxM3VLForCausalLM(config).eval()
    ids = torch.randint(0, 200, (1, 61))
    with torch.no_grad(), attention_recorder.AttentionRecorder(model) as recorder:
        output = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(recorder.passes) == 4
    sparse = [i for i, kind in enumerate(config.layer_types) if kind != "full_attention"]
    for number, found in enumerate(recorder.passes):
        with torch.no_grad():
            expected = model(output[:, : 61 + number], output_attentions=True).attentions
        assert sorted(found) == sparse
        for layer in sparse:
            weights = expected[layer][0, :, -1]
            torch.testing.assert_close(found[layer].weights, weights, rtol=1e-3, atol=1e-5)
            group = weights.shape[0] // config.num_key_value_heads
            for head, blocks in enumerate(found[layer].blocks):
                seen = weights[head * group].nonzero().flatten() // 8
                assert blocks == sorted(set(seen.tolist()))
                assert len(blocks) == 3
    assert all(layer.selection_observer is None for layer in recorder.layers)


@pytest.mark.parametrize("setting", [None, "1", "0"])
def test_no_step_is_captured_while_it_records(attention_recorder, monkeypatch, setting):
    monkeypatch.delenv("MINIMAX_M3_CUDA_GRAPHS", raising=False)
    if setting is not None:
        monkeypatch.setenv("MINIMAX_M3_CUDA_GRAPHS", setting)
    model = MiniMaxM3VLForCausalLM(tiny_config(text=BLOCKS).text_config)
    with pytest.raises(RuntimeError), attention_recorder.AttentionRecorder(model):
        assert os.environ["MINIMAX_M3_CUDA_GRAPHS"] == "0"
        raise RuntimeError
    assert os.environ.get("MINIMAX_M3_CUDA_GRAPHS") == setting


def test_batch_is_refused(attention_recorder):
    model = MiniMaxM3VLForCausalLM(tiny_config(text=BLOCKS).text_config).eval()
    with (
        pytest.raises(ValueError, match="one sequence at a time, got a batch of 2"),
        attention_recorder.AttentionRecorder(model),
    ):
        model(torch.randint(0, 200, (2, 9)))


def test_seconds_and_regions_of_a_video(attention_recorder, questions, processor, tmp_path):
    question = questions.short_question("video", "direction", tmp_path)
    inputs = question.inputs(processor)
    media = attention_recorder.find_media(processor, inputs)
    assert [medium.second for medium in media] == list(range(len(question.frames) // 2))
    assert {(medium.rows, medium.columns) for medium in media} == {(2, 2)}
    ids = inputs["input_ids"][0]
    spans = [span for _, spans in attention_recorder.prompt_parts(ids.tolist(), media, None) for span in spans]
    assert sorted(place for start, end in spans for place in range(start, end)) == list(range(len(ids)))
    is_medium = torch.zeros(len(ids), dtype=torch.bool)
    for medium in media:
        is_medium[medium.start : medium.end] = True
    assert torch.equal(is_medium, ids == processor.video_token_id)


def test_regions_of_a_picture_and_parts_of_its_prompt(attention_recorder, questions, processor, tmp_path):
    question = questions.short_question("image", "colour", tmp_path)
    ids = question.inputs(processor)["input_ids"][0].tolist()
    (medium,) = attention_recorder.find_media(processor, question.inputs(processor))
    assert (medium.rows, medium.columns, medium.second) == (4, 4, None)
    parts = attention_recorder.prompt_parts(ids, [medium], None)
    assert [name for name, _ in parts] == ["instructions", "picture", "question"]
    assert question.text in processor.tokenizer.decode(ids[parts[-1][1][0][0] :])


@pytest.mark.parametrize("kind", ["key_value", "needle"])
def test_fact_is_found_in_the_long_text(attention_recorder, questions, processor, kind):
    question = questions.long_question(processor, kind, 2100)
    ids = question.inputs(processor)["input_ids"][0].tolist()
    assert 2100 <= len(ids) <= 2100 * 1.02 + 128
    start, end = attention_recorder.place_of(processor.tokenizer, ids, question.fact)
    assert question.fact in processor.tokenizer.decode(ids[start:end])
    assert question.fact not in processor.tokenizer.decode(ids[start + 1 : end])
    assert question.answer in question.fact
    assert question.document.count(question.fact) == 1
    with pytest.raises(ValueError, match="does not contain 'no such words'"):
        attention_recorder.place_of(processor.tokenizer, ids, "no such words")


def test_questions_that_no_row_has_are_refused(questions, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "MOST_ROWS", 5)
    with pytest.raises(ValueError, match="no row of 'image' begins with a question of kind 'direction'"):
        questions.short_question("image", "direction", tmp_path)
    with pytest.raises(ValueError, match="`kind` must be one of .* got 'variable_1'"):
        questions.long_question(processor, "variable_1", 2000)


@pytest.mark.parametrize(
    ("task", "kind", "said", "is_right"),
    [
        ("image", "colour", "{answer}[e~[", True),
        ("image", "colour", "{answer}", False),  # without its end
        ("image", "colour", "not {answer}[e~[", False),
        ("tools", "call", "{answer}[e~[", False),  # text that looks like the arguments
    ],
)
def test_answers_are_judged(questions, processor, tmp_path, task, kind, said, is_right):
    question = questions.short_question(task, kind, tmp_path)
    question.options = {"thinking_mode": "disabled"}
    prompt = question.inputs(processor)["input_ids"][0].tolist()
    written = processor.tokenizer(said.format(answer=question.answer))["input_ids"]
    assert questions.read_answer(processor, question, prompt, written)[1] is is_right


def test_right_tool_call_is_right(questions, processor, tmp_path):
    """The call as the chat template writes it in training data."""
    question = questions.short_question("tools", "call", tmp_path)
    row = questions.find_row("tools", "call", 0)[1]
    options = {"tools": row["tools"], "tokenize": True, **row["chat_template_kwargs"]}
    prompt = question.inputs(processor)["input_ids"][0].tolist()
    chat = processor.apply_chat_template(row["messages"][:2], return_dict=True, return_tensors="pt", **options)
    ids = chat["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    end = ids.index(processor.tokenizer.eos_token_id, len(prompt)) + 1
    said, is_right = questions.read_answer(processor, question, prompt, ids[len(prompt) : end])
    assert is_right, said


def test_a_record_says_where_the_attention_went(load_script, questions, tiny_checkpoint, processor, tmp_path):
    """Shares of parts add up to 1, regions to their part, and blocks to 1."""
    answers = load_script("answer_question")
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()
    for question in (
        questions.short_question("video", "direction", tmp_path),
        questions.long_question(processor, "needle", 400),
    ):
        record = answers.answer_question(model, processor, question, max_new_tokens=3)
        assert len(record["shares"]) == len(record["tokens"]) <= 3
        for token in range(len(record["tokens"])):
            shares = answers.mean_shares(record, token)
            assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
            if "media" in record:
                cells = answers.mean_cells(record, token)
                assert float(sum(grid.sum() for grid in cells)) == pytest.approx(shares["video"], abs=2e-3)
            if question.document is not None:
                assert float(answers.mean_blocks(record, token).sum()) == pytest.approx(1, abs=5e-3)
                assert record["blocks"]["fact_text"] == question.fact
        assert (shares["answer"] > 0) == (len(record["tokens"]) > 1)
