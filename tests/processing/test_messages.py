"""Malformed chats are refused before any media is loaded, with the place of the mistake. Unusual chats pass."""

import dataclasses

import pytest
from transformers.utils.chat_template_utils import Chat

from processing_minimax_m3 import load_chat_template

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi."}
HALF = "\ud83d"


def parts(*content):
    return [USER, {"role": "user", "content": list(content)}]


def calls(*tool_calls):
    return [USER, {"role": "assistant", "tool_calls": list(tool_calls)}]


REFUSED = {
    # the chat itself
    "empty": ([], "`conversation` must hold at least one message"),
    "dict": (USER, "`conversation` must be a list of messages, got dict"),
    "string": ("Hello", "`conversation` must be a list of messages, got str"),
    "number": (5, "`conversation` must be a list of messages, or of such lists, got 5"),
    "string message": ([USER, "Hello"], "message 1 of conversation 0 must be a mapping .* got 'Hello'"),
    "none message": ([USER, None], "message 1 of conversation 0 must be a mapping .* got None"),
    "empty in batch": ([[USER], []], "conversation 1 must hold at least one message"),
    "message in batch": ([[USER], USER], "conversation 1 must be a list of messages"),
    "second of batch": (
        [[USER], [USER, ANSWER, {"role": "user", "content": 5}]],
        "message 2 of conversation 1: `cont",
    ),
    # role and content
    "no role": ([{"content": "Hello"}], "message 0 of conversation 0: `role` must be a string .* got None"),
    "number role": ([{**USER, "role": 5}], "message 0 of conversation 0: `role` must be a string .* got 5"),
    "number content": ([USER, {**USER, "content": 5}], "message 1 .*: `content` must be a string or .* got 5"),
    "dict content": ([{**USER, "content": {"type": "text"}}], "message 0 .*: `content` must be .* got {'type'"),
    "no content": ([USER, {"role": "user"}], "message 1 .*: `content` must be .* got None"),
    "none for system": ([{"role": "system", "content": None}, USER], "message 0 .*: `content` must be .* got None"),
    "none for tool": ([USER, {"role": "tool", "content": None}], "message 1 .*: `content` must be .* got None"),
    "reasoning": ([{**ANSWER, "reasoning_content": ["why"]}], "message 0 .*: `reasoning_content` must be a string"),
    "surrogate": (
        [USER, {**USER, "content": f"a{HALF}"}],
        r"message 1 .*: `content` must be text, but holds '.ud83d'",
    ),
    "surrogate part": (parts({"type": "text", "text": HALF}), "message 1 .*: `content` must be text, but"),
    "surrogate reasoning": ([{**ANSWER, "reasoning_content": HALF}], "`reasoning_content` must be text, but holds"),
    "surrogate argument": (
        calls({"name": "f", "arguments": {"a": [HALF]}}),
        "message 1 .*: `tool_calls` must be text",
    ),
    # parts
    "number part": (parts("a", 5), r"message 1 .*: `content\[1\]` must be a string or a mapping with a 'type', got 5"),
    "list part": (parts(["a"]), r"message 1 .*: `content\[0\]` must be a string or a mapping"),
    "no type": (parts({"text": "a"}), r"message 1 .*: `content\[0\]` must be a string or a mapping with a 'type'"),
    "number type": (parts({"type": 5}), r"message 1 .*: `content\[0\]` must be a string or a mapping with a 'type'"),
    "no text": (parts({"type": "text"}), r"message 1 .*: `content\[0\]`: `text` must be a string, got None"),
    "number text": (parts({"type": "text", "text": 5}), r"message 1 .*: `content\[0\]`: `text` must be .* got 5"),
    "audio": (parts({"type": "audio", "url": "x.wav"}), r"message 1 .*: `content\[0\]` must be a text, an image or a"),
    # tool calls
    "calls": ([USER, {"role": "assistant", "tool_calls": "x"}], "message 1 .*: `tool_calls` must be a list, got 'x'"),
    "call": (calls("x"), r"message 1 .*: `tool_calls\[0\]` must be a mapping with a `name`.* got 'x'"),
    "function": (calls({"function": "f"}), r"message 1 .*: `tool_calls\[0\]` must be a mapping with a `name`"),
    "nameless": (calls({"function": {"arguments": {}}}), r"message 1 .*: `tool_calls\[0\]` must have a `name`"),
    "empty name": (calls({"name": ""}), r"message 1 .*: `tool_calls\[0\]` must have a `name`"),
    "number name": (calls({"name": "f"}, {"name": 5}), r"message 1 .*: `tool_calls\[1\]` must have a `name`"),
    "empty call": (calls({}), r"message 1 .*: `tool_calls\[0\]` must have a `name`"),
    "json": (calls({"name": "f", "arguments": "{}"}), r"`tool_calls\[0\]`: `arguments` must be a mapping .parse JSON"),
    "arguments": (calls({"function": {"name": "f", "arguments": ["a"]}}), "`arguments` must be a mapping"),
}
for kind in ("image", "video"):
    for name, address in {"none": None, "empty": "", "dict": {}, "none in dict": {"url": None}, "number": 5}.items():
        REFUSED[f"{kind} address {name}"] = (
            parts("a", {"type": f"{kind}_url", f"{kind}_url": address}),
            rf"message 1 of conversation 0: `content\[1\]`: `{kind}_url` must be an address, or a mapping",
        )
    for source in (kind, "url", "path"):
        for name, item in {"empty": "", "dict": {}, "number": 5}.items():
            REFUSED[f"{kind} {source} {name}"] = (
                parts({"type": kind, source: item}),
                rf"message 1 .*: `content\[0\]`: `{source}` must hold the {kind} or its source, got",
            )


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_place(name, processor, monkeypatch):
    chat, message = REFUSED[name]
    monkeypatch.setattr(type(processor), "_multimodal_inputs_from_conversations", None)  # nothing gets as far
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "`tools` must be a list of functions or mappings, got 'x'"),
        ({"name": "f"}, "`tools` must be a list of functions or mappings, got {'name': 'f'}"),
        (["x"], r"`tools\[0\]` must be a mapping with a `name`"),
        ([None], r"`tools\[0\]` must be a mapping with a `name`"),
        ([{"name": "f"}, {}], r"`tools\[1\]` must have a `name`"),
        ([{"type": "function", "function": {"name": None}}], r"`tools\[0\]` must have a `name`"),
        ([{"type": "function", "function": "f"}], r"`tools\[0\]` must be a mapping with a `name`"),
        ([{"name": "f", "parameters": {HALF: {}}}], r"`tools\[0\]` must be text, but holds"),
    ],
)
def test_tools_that_are_refused(tools, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([USER], tools=tools)


def test_identity_with_half_a_surrogate_pair(processor):
    with pytest.raises(ValueError, match="`model_identity` or `documents` must be text"):
        processor.apply_chat_template([USER], model_identity=HALF)


def test_what_is_odd_but_legal(processor):
    """The processor makes the same prompt as the chat template alone."""
    call = {"id": "1", "type": "function", "function": {"name": "f"}, "index": None}
    chat = [
        {"role": "system", "content": [], "name": "s"},
        {"role": "user", "content": "", "extra": object(), "tool_calls": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call, {"name": "g", "arguments": None}]},
        {"role": "tool", "content": [{"output": None}, {"type": "json", "a": 1}, {"b": 2}, "c"], "tool_call_id": "1"},
        {"role": "assistant", "content": "Hi.", "reasoning_content": None, "tool_calls": [], "refusal": None},
        {"role": "assistant", "reasoning": "why", "content": "so"},
        {"role": "user", "content": ({"type": "image", "image": None, "text": None}, {"type": "video_url"})},
    ]
    expected = processor.tokenizer.apply_chat_template(chat, chat_template=load_chat_template(), tokenize=False)
    assert processor.apply_chat_template(tuple(chat), tools=[]) == expected
    assert processor.apply_chat_template((chat, chat)) == [expected, expected]
    assert processor.apply_chat_template(iter(chat)) == expected


def test_the_callers_chat_stays_as_it_was(processor, pixels):
    image = pixels(28, 28, 3)
    content = ["a", {"type": "image_url", "image_url": image}]
    chat = [{"role": "user", "content": content, "name": None}]
    processor.apply_chat_template(chat, tokenize=True)
    assert chat == [{"role": "user", "content": content, "name": None}]
    assert content[0] == "a" and content[1] == {"type": "image_url", "image_url": image}


def test_a_part_named_image_url_may_hold_its_image_elsewhere(processor, pixels):
    outputs = [
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)
        for part in (
            {"type": "image", "image": pixels(28, 56, 3)},
            {"type": "image_url", "image": pixels(28, 56, 3)},
        )
    ]
    assert outputs[0] == outputs[1]


@dataclasses.dataclass
class Message:
    role: str
    content: list
    tool_calls: None = None


class Part:
    """Messages as client libraries define them, with pydantic."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return self.fields


def test_file_whose_name_is_no_text(processor, image_files, tmp_path):
    """Python represents file names in another encoding like this."""
    file = tmp_path / "\udcfc.png"
    file.write_bytes(image_files["png"].read_bytes())
    chats = [
        [{"role": "user", "content": [{"type": "image", "path": str(path)}]}] for path in (file, image_files["png"])
    ]
    ids = [processor.apply_chat_template(chat, tokenize=True) for chat in chats]
    assert ids[0] == ids[1]


def test_message_objects(processor):
    expected = processor.apply_chat_template([USER])
    message = Message("user", [Part(type="text", text="Hello")])
    assert processor.apply_chat_template([message]) == expected
    assert processor.apply_chat_template([[message]]) == [expected]
    assert processor.apply_chat_template(Chat([USER])) == expected
    assert processor.apply_chat_template([Chat([USER]), Chat([USER])]) == [expected, expected]
