"""Each kind of bad data is an error that names file, row and field: in a check, and before `train` loads any weights."""

import json
import re

import pytest
from datasets import Dataset
from transformers import AutoModelForImageTextToText

from modeling_minimax_m3.commands import check, train
from processing_minimax_m3.data import Encoder, Reading, Rows, checking, open_rows
from processing_minimax_m3.data.checking import check_rows

ASK, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}
GOOD = {"messages": [ASK, ANSWER]}
LOOK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


def call(arguments, **more):
    return chat(
        ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments, **more}}]}
    )


def look(*images):
    return chat(LOOK, ANSWER, images=list(images))


# Name: the row, the field and the problem. {folder} is where pictures are.
CASES = {
    "half a line": (b'{"messages": [', "", "the line is not JSON: Expecting value at character 16"),
    "no object": ([1, 2], "", "a row must be an object of columns and values, got list"),
    "Latin-1": ('{"text": "Grüße"}'.encode("latin-1"), "", r"byte 13 is 0xfc. As Latin-1 it reads '.*Grüße"),
    "unknown columns": ({"body": "Hi."}, "", "the row has the columns body, but needs 'messages'"),
    "text that is a number": ({"text": 7}, "text", "must be a text, got 7"),
    "half a surrogate pair": ({"text": "a \ud83d b"}, "text", "one half of a surrogate pair"),
    "messages that are a mapping": ({"messages": ASK}, "messages", "must be a list of messages, got dict"),
    "messages that are no JSON": ({"messages": '[{"role":'}, "messages", "must be a list as JSON text, got .*, which is not JSON: Expecting"),
    "no message": (chat(), "messages", "must hold at least one message, got none"),
    "message that is a text": (chat(ASK, "Ho."), "messages[1]", "must be a message with `role` and `content`, got 'Ho.'"),
    "no role": (chat({"content": "Hi."}, ANSWER), "messages[0].role", "must be a string such as 'user', got None"),
    "unknown role": (chat({**ASK, "role": "human"}, ANSWER), "messages[0]", 'role must be one of .* got "human"'),
    "late system": (chat(ASK, {"role": "system", "content": "Be kind."}), "messages[1]", "must come first"),
    "no content": (chat({"role": "user"}, ANSWER), "messages[0].content", "must be a string or a list of parts, got None"),
    "content that is a number": (chat({**ASK, "content": 3}), "messages[0].content", "must be a string or a list"),
    "part without a type": (chat({**ASK, "content": [{"text": "Hi."}]}), "messages[0].content[0]", "with a 'type'"),
    "part without its text": (chat({**ASK, "content": [{"type": "text"}]}), "messages[0].content[0].text", "got None"),
    "audio": (chat({**ASK, "content": [{"type": "audio"}]}), "messages[0].content[0]", "got one of type 'audio'"),
    "weight": (chat(ASK, {**ANSWER, "weight": 2}), "messages[1].weight", r"must be 0 \(not learned\) or 1, got 2"),
    "calls that are a mapping": (chat(ASK, {**ANSWER, "tool_calls": {}}), "messages[1].tool_calls", "must be a list"),
    "call without a name": (call({}, name=""), "messages[1].tool_calls[0]", "must have a `name`"),
    "arguments that are no JSON": (call('{"a": '), "messages[1].tool_calls[0].function.arguments", "which is not JSON: Expecting value"),
    "arguments that are a list": (call("[1]"), "messages[1].tool_calls[0].function.arguments", "must be an object"),
    "tools that are no JSON": (chat(ASK, ANSWER, tools="look"), "tools", "must be a list, or a list as JSON text"),
    "tool without a name": (chat(ASK, ANSWER, tools=[{"type": "function"}]), "tools[0]", "must have a `name`"),
    "thinking mode": (
        chat(ASK, ANSWER, chat_template_kwargs={"thinking_mode": "on"}),
        "chat_template_kwargs.thinking_mode",
        "must be one of adaptive, enabled, disabled, got 'on'",
    ),
    "switch of another model": (
        chat(ASK, ANSWER, chat_template_kwargs={"enable_thinking": False}),
        "chat_template_kwargs.enable_thinking",
        "is no variable of the chat template.*Write thinking_mode",
    ),
    "tools as a variable": (
        chat(ASK, ANSWER, chat_template_kwargs={"tools": []}),
        "chat_template_kwargs.tools",
        "is no variable of the chat template.*a column of its own",
    ),
    "prompt of an answer": (
        chat(ASK, ANSWER, chat_template_kwargs={"add_generation_prompt": True}),
        "chat_template_kwargs.add_generation_prompt",
        "is no variable of the chat template.*Leave it out",
    ),
    "author of ShareGPT": ({"conversations": [{"from": "me", "value": "Hi."}]}, "conversations[0].from", "got 'me'"),
    "no value of ShareGPT": ({"conversations": [{"from": "human"}]}, "conversations[0].value", "must be a text, got None"),
    "no completion": ({"prompt": "Hi."}, "completion", "is missing"),
    "prompt and completion of two kinds": ({"prompt": [ASK], "completion": "Ho."}, "completion", "must be a list of messages, as `prompt` is, got 'Ho.'"),
    "message of a completion": ({"prompt": [ASK], "completion": ["Ho."]}, "completion[0]", "must be a message"),
    "no output": ({"instruction": "Hi."}, "output", "must be a text, got None"),
    "too few images": (look(), "images", "each part of type 'image' without a source, 1 in all, got 0"),
    "too many images": (look("{folder}/grey.png", "{folder}/grey.png"), "images", "without a source, 1 in all, got 2"),
    "too few images for markers": (
        chat({**ASK, "content": "<image><image>"}, ANSWER, images=["{folder}/grey.png"]),
        "images",
        "without a source, 2 in all, got 1",
    ),
    "image that is None": (look(None), "images", "must not hold None"),
    "image that is a number": (look(7), "messages[0].content[0].image", "must hold the image or its source, got 7"),
    "missing image": (look("nowhere.png"), "images[0]", "the image 'nowhere.png' cannot be read: there is no such file.*--media_folder"),
    "missing image in a message": (
        chat({**ASK, "content": [{"type": "image", "path": "nowhere.png"}]}, ANSWER),
        "messages[0].content[0]",
        "the image 'nowhere.png' cannot be read",
    ),
    "empty image": (look("{folder}/empty.png"), "images[0]", "it is empty: 0 bytes"),
    "image that is a text": (look("{folder}/text.png"), "images[0]", "it is no image in a format that Pillow reads"),
    "truncated image": (look("{folder}/cut.jpg"), "images[0]", r"cut.jpg' cannot be read: .*truncated"),
    "very long image": (look("{folder}/long.png"), "images[0]", "one side may be at most 200 times the other"),
    "missing video": (
        chat({**ASK, "content": [{"type": "video"}]}, ANSWER, videos=["nowhere.mp4"]),
        "videos[0]",
        "must be an existing file or an http",
    ),
    "placeholder in a text": (chat({**ASK, "content": "]<]image[>["}, ANSWER), "messages", "has 0 images and videos, but its prompt has 1 placeholders"),
}  # fmt: skip
NEEDS_DECODING = {"truncated image"}


@pytest.fixture
def folder(tmp_path, picture):
    from PIL import Image

    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("This is no image.")
    Image.new("RGB", (1000, 2)).save(tmp_path / "long.png")
    return tmp_path


@pytest.fixture
def bad_file(folder, write_rows):
    """A good row, a bad one in the third line, and a good one."""

    def write(row):
        if not isinstance(row, bytes):
            row = json.dumps(row).replace("{folder}", str(folder)).encode()
        return write_rows(GOOD, b"", row, GOOD)

    return write


def test_there_are_many_kinds():
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES)
def test_check_names_file_row_and_field(bad_file, processor, case):
    row, field, problem = CASES[case]
    path = bad_file(row)
    encoder = Encoder(processor, decode_media=case in NEEDS_DECODING)
    report = check_rows(Rows(open_rows([str(path)])), encoder, Reading(), 4096, num_proc=1, shows_progress=False)
    (fault,) = report.faults
    assert (fault.file, fault.row, fault.field) == (str(path), 3, field)
    assert re.search(problem, fault.problem)
    assert report.rows == 3
    assert report.kinds == {"chat": 2}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("case", CASES)
def test_training_names_them_before_weights_are_loaded(
    bad_file, tiny_checkpoint, tmp_path, monkeypatch, case, streaming
):
    row, field, problem = CASES[case]
    path = bad_file(row)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    flags = [
        "--model",
        str(tiny_checkpoint),
        "--dataset",
        str(path),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
    ]
    flags += ["--max_steps", "1", *(["--streaming"] if streaming else [])]
    place = re.escape(f"train: {path}, row 3: " + (f"`{field}`: " if field else ""))
    with pytest.raises(SystemExit, match=f"{place}.*{problem}"):
        train.main(flags)


def test_all_faults_are_found_in_order_by_several_processes(write_rows, encoder):
    rows = [GOOD if number % 3 else {"text": number} for number in range(1, 3000)]
    path = write_rows(*rows)
    reports = [
        check_rows(Rows(open_rows([str(path)])), encoder, Reading(), 4096, num_proc=processes, shows_progress=False)
        for processes in (1, 2)
    ]
    for report in reports:
        assert [fault.row for fault in report.faults] == list(range(3, 3000, 3))
    assert reports[0].as_dict() == reports[1].as_dict()
    assert reports[0].repeated == 1999


def check_one(path, encoder, streaming=False, processes=1):
    sources = open_rows([str(path)], streaming=streaming)
    return check_rows(
        sources if streaming else Rows(sources), encoder, Reading(), 4096, num_proc=processes, shows_progress=False
    )


def fields(report):
    return [fault.field for fault in report.faults]


ALL_FAULTS = {
    "messages, parts, calls and tools": (
        chat(
            {"role": "user", "content": [{"type": "text", "text": 7}, "good", {"type": "audio"}]},
            {"role": 5, "content": "Who?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{"}}, {"function": {}}]},
            tools=[{"name": "look"}, {"name": ""}],
        ),
        [
            "messages[2].tool_calls[0].function.arguments",
            "messages[0].content[0].text",
            "messages[0].content[2]",
            "messages[1].role",
            "messages[2].tool_calls[1]",
            "tools[1]",
        ],
    ),
    "images": (
        chat(LOOK, ANSWER, LOOK, ANSWER, LOOK, ANSWER, images=["no.png", "{folder}/whole.jpg", "none.png"]),
        ["images[0]", "images[2]"],
    ),
    "images in messages": (
        chat(
            {"role": "user", "content": [{"type": "image", "path": "no.png"}, {"type": "image", "path": "none.png"}]},
            ANSWER,
        ),
        ["messages[0].content[0]", "messages[0].content[1]"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "bot", "value": "Hi."}, {"from": "human", "value": 3}, {"from": "gpt", "value": ""}]},
        ["conversations[0].from", "conversations[1].value"],
    ),
    "variables and a message": (
        chat(ASK, {"role": "assistant", "content": 4}, chat_template_kwargs={"thinking_mode": "never"}),
        ["messages[1].content", "chat_template_kwargs.thinking_mode"],
    ),
    # a marker in the replaced message is no second fault
    "a consequence": (
        chat({"role": "user", "content": ["<image>", {"type": "audio"}]}, {"role": 1, "content": ""}, images=["no.png"]),
        ["messages[0].content[1]", "messages[1].role", "images[0]"],
    ),
    "the whole row": ({"text": 3, "images": ["no.png"]}, ["text"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ALL_FAULTS)
def test_check_names_all_faults_of_a_row(bad_file, processor, case):
    row, expected = ALL_FAULTS[case]
    report = check_one(bad_file(row), Encoder(processor))
    assert fields(report) == expected
    assert {fault.row for fault in report.faults} == {3}
    assert (report.rows, report.faulty_rows) == (3, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_streamed_check_gives_the_same_answers(write_rows, encoder, processes, monkeypatch):
    monkeypatch.setattr(checking, "ROWS_OF_A_TASK", 128)
    rows = [GOOD if number % 7 else ALL_FAULTS["ShareGPT"][0] for number in range(1, 750)]
    path = write_rows(*rows)
    streamed = check_one(path, encoder, streaming=True, processes=processes)
    assert streamed.as_dict() == check_one(path, encoder).as_dict()
    assert streamed.faulty_rows == 107
    assert len(streamed.faults) == 2 * 107


def test_a_streamed_table_gives_the_same_answers(tmp_path, encoder):
    rows = [{"text": None if number % 100 == 3 else f"Row {number}."} for number in range(3000)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    streamed = check_one(tmp_path / "rows.parquet", encoder, streaming=True)
    assert streamed.as_dict() == check_one(tmp_path / "rows.parquet", encoder).as_dict()
    assert [fault.row for fault in streamed.faults] == list(range(4, 3001, 100))


def test_the_command_streams(bad_file, tiny_checkpoint, capsys):
    path = bad_file(ALL_FAULTS["images"][0])
    printed = []
    for flags in ([], ["--streaming"]):
        with pytest.raises(SystemExit) as stopped:
            check.main([str(path), "--model", str(tiny_checkpoint), *flags])
        assert stopped.value.code == 1
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "faults     2, in rows: 1" in printed[0]
