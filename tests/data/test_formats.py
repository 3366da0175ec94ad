"""Rows in the formats that people have give the same chats and texts."""

import json

import pytest

from processing_minimax_m3.data import Reading, read_example

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
ARGUMENTS = {"city": "Bern", "days": [1, {"deep": True}], "none": None}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Bern"}}}],
}
RESULT = {"role": "tool", "content": "Rain."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}}}


def text_of(row, encoder, processor, **reading):
    """The row as the model reads it, and what it learns."""
    (encoded,) = encoder([read_example(row, Reading(**reading))])
    if isinstance(encoded, ValueError):
        raise encoded
    decode = processor.tokenizer.decode
    return decode(encoded.ids), decode(encoded.ids[encoded.learned])


CHATS = {
    "messages as JSON text": {"messages": json.dumps([ASK, ANSWER])},
    "another column": {"chat": [ASK, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
    "ShareGPT in the column of messages": {
        "messages": [{"from": "user", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    },
    "conversations of OpenAI": {"conversations": [ASK, ANSWER]},
    "prompt and completion": {"prompt": [ASK], "completion": [ANSWER]},
    "instruction": {"instruction": "Who?", "output": "Me."},
    "empty input": {"instruction": "Who?", "input": "", "output": "Me."},
    "None from Arrow": {
        "messages": [{**ASK, "tool_calls": None}, {**ANSWER, "weight": None}],
        "text": None,
        "tools": None,
    },
    "empty tools": {"messages": [ASK, ANSWER], "tools": ""},
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_of_every_format_are_equal(encoder, processor, case):
    column = "chat" if case == "another column" else "messages"
    expected = processor.apply_chat_template([ASK, ANSWER], tokenize=False)
    assert text_of(CHATS[case], encoder, processor, messages_column=column) == (expected, "</mm:think>Me.[e~[")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be kind."}, ASK, ANSWER]},
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"system": "Be kind.", "instruction": "Who?", "output": "Me."},
    ],
)  # fmt: skip
def test_system_messages(encoder, processor, row):
    messages = [{"role": "system", "content": "Be kind."}, ASK, ANSWER]
    expected = processor.apply_chat_template(messages, tokenize=False)
    assert text_of(row, encoder, processor) == (expected, "</mm:think>Me.[e~[")


def as_text(call):
    function = call["tool_calls"][0]["function"]
    return {**call, "tool_calls": [{"function": {**function, "arguments": json.dumps(function["arguments"])}}]}


def with_arguments(arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, CALL, RESULT, ANSWER], "tools": [TOOL]},
        {"messages": [ASK, as_text(CALL), RESULT, ANSWER], "tools": json.dumps([TOOL])},
        {"messages": json.dumps([ASK, as_text(CALL), RESULT, ANSWER]), "tools": [TOOL]},
        {
            "conversations": [
                {"from": "human", "value": "Who?"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Bern"}}'},
                {"from": "observation", "value": "Rain."},
                {"from": "gpt", "value": "Me."},
            ],
            "tools": json.dumps([TOOL]),
        },
        {"messages": [ASK, {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])}, RESULT, ANSWER], "tools": [TOOL]},
    ],
    ids=["objects", "arguments as text", "messages as text", "ShareGPT", "calls as text"],
)
def test_tool_calls_of_every_format_are_equal(encoder, processor, row):
    expected = processor.apply_chat_template([ASK, CALL, RESULT, ANSWER], tools=[TOOL], tokenize=False)
    read, learned = text_of(row, encoder, processor)
    assert read == expected
    assert '<invoke name="look">' in learned
    assert learned.endswith("</mm:think>Me.[e~[")


def test_nested_arguments_as_text_are_those_of_the_object(encoder, processor):
    rows = [{"messages": [ASK, with_arguments(given)]} for given in (ARGUMENTS, json.dumps(ARGUMENTS))]
    first, second = (text_of(row, encoder, processor) for row in rows)
    assert first == second
    assert "<deep>true" in first[1]


def test_texts_and_completions(encoder, processor):
    assert text_of({"text": "A b c."}, encoder, processor)[0] == "A b c.[e~["
    assert text_of({"body": "A b c."}, encoder, processor, text_column="body")[0] == "A b c.[e~["
    assert text_of({"prompt": "2 + 2 =", "completion": " 4"}, encoder, processor) == ("2 + 2 = 4[e~[", " 4[e~[")


def test_only_chosen_answers_are_learned(encoder, processor):
    first = {**ANSWER, "content": "No."}
    for row in (
        {"messages": [ASK, {**first, "weight": 0}, ASK, {**ANSWER, "weight": 1}]},
        {"prompt": [ASK, first, ASK], "completion": [ANSWER]},
    ):
        read, learned = text_of(row, encoder, processor)
        assert read == processor.apply_chat_template([ASK, first, ASK, ANSWER], tokenize=False)
        assert learned == "</mm:think>Me.[e~["


def test_history_of_instructions_is_learned(encoder, processor):
    row = {"instruction": "Who?", "input": "Now.", "output": "Me.", "history": [["Hi.", "Ho."]]}
    read, learned = text_of(row, encoder, processor)
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Ho."))]
    messages += [{"role": "user", "content": "Who?\nNow."}, ANSWER]
    assert read == processor.apply_chat_template(messages, tokenize=False)
    assert learned == "</mm:think>Ho.[e~[</mm:think>Me.[e~["


def test_markers_become_parts_where_columns_have_items(picture):
    row = {
        "messages": [{"role": "user", "content": "A <image> and <image><video>."}, ANSWER],
        "images": [str(picture)] * 2,
    }
    example = read_example(row)
    assert [part.get("text", part["type"]) for part in example.messages[0]["content"]] == [
        "A ",
        "image",
        " and ",
        "image",
        "<video>.",
    ]
    assert [place for place, _ in example.media()] == ["images[0]", "images[1]"]
    assert read_example({"messages": row["messages"]}).messages[0]["content"] == "A <image> and <image><video>."
    said = {"messages": [ASK, {**ANSWER, "content": "<image>"}], "image": str(picture)}
    example = read_example(said)
    assert example.messages[1]["content"] == "<image>"
    assert example.messages[0]["content"][0]["type"] == "image"


def test_folder_of_media(picture, tmp_path, monkeypatch):
    row = {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image", "path": picture.name}]}],
        "images": [picture.name],
    }
    example = read_example(row, Reading(media_folder=str(picture.parent)))
    assert [part.get("image", part.get("path")) for _, part in example.media()] == [str(picture)] * 2
    assert [part.get("image", part.get("path")) for _, part in read_example(row).media()] == [picture.name] * 2


def test_columns_that_nothing_reads():
    assert read_example({"messages": [ASK, ANSWER], "id": 3, "tools": None, "imgs": ["a.png"]}).unused == (
        "id",
        "imgs",
    )
    assert read_example({"text": "Hi.", "images": ["a.png"]}).unused == ("images",)
