"""Answers as models write them, whole and broken: what the parser makes of them, and its events."""

import pytest

from processing_minimax_m3 import MiniMaxM3ResponseParser

from .response_cases import ANSWER_TAG, END, START, N, argument, call, invoke, parse, tool


def invalid(message):
    return [(call["name"], call["arguments"]) for call in message.get("invalid_tool_calls", [])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello[e~[", {"content": "hello"}),
        ("</mm:think>hello[e~[\n", {"content": "hello"}),
        ("<mm:think>\nHm. </mm:think>\n\nhello[e~[", {"reasoning_content": "\nHm. ", "content": "\n\nhello"}),
        ("<mm:think></mm:think>hello", {"content": "hello"}),
        ("<mm:think>a</mm:think>b<mm:think>c</mm:think>d", {"reasoning_content": "a\nc", "content": "bd"}),
        ("<mm:think>a<mm:think>b</mm:think>c", {"reasoning_content": "ab", "content": "c"}),
        ("hello[e~[]!p~[]!p~[", {"content": "hello"}),
        ("hello]~b]user\nAnd now?[e~[", {"content": "hello"}),
        ("", {"content": ""}),
    ],
)  # fmt: skip
def test_reasoning_and_content(text, expected):
    assert parse(text) == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (f"[e~[\n{ANSWER_TAG}<mm:think>", {"reasoning_content": "a", "content": "b"}),
        (f"[e~[\n{ANSWER_TAG}", {"content": "ab"}),
        ("<mm:think>", {"reasoning_content": "a", "content": "b"}),
        (f"{ANSWER_TAG}<mm:think>of old</mm:think>x[e~[\n]~b]tool\n<response>y</response>[e~[\n", {"content": "ab"}),
        (f"{ANSWER_TAG}<mm:think>of old</mm:think>x[e~[\n", {"content": "ab"}),
        (f"{ANSWER_TAG}</mm:think>begun ", {"content": "begun ab"}),
    ],
)
def test_the_prompt_may_begin_the_answer(prefix, expected):
    assert parse("a</mm:think>b[e~[", prefix) == {"role": "assistant", **expected}


def test_events_of_the_prompt_come_first():
    parser = MiniMaxM3ResponseParser(f"{ANSWER_TAG}<mm:think>Well")
    assert [event["type"] for event in parser.initial_events] == ["region_open", "region_chunk"]
    assert parser.initial_events[1]["text"] == "Well"


def test_types_of_arguments():
    tools = [
        tool(
            "f",
            text={"type": "string"},
            number={"type": "number"},
            integer={"type": "integer"},
            whole={"type": "integer"},
            flag={"type": "boolean"},
            optional={"anyOf": [{"type": "integer"}, {"type": "null"}]},
            missing={"type": ["string", "null"], "required": True},
            left_out={"type": ["string", "null"]},
            listed={"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
            pair={"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
            open={"type": "object", "additionalProperties": {"type": "number"}},
            either={"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "boolean"}}]},
            choice={"enum": ["1", 2, None]},
            node={"$ref": "#/$defs/node"},
            anything={},
            empty={"type": "array"},
        )
    ]
    parameters = tools[0]["function"]["parameters"]
    parameters["$defs"] = {
        "node": {
            "properties": {"id": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}
        }
    }
    inner = argument("id", "2") + argument("next", argument("id", "3"))
    arguments = "".join(
        [
            argument("text", "12"), argument("number", "-2.50"), argument("integer", "007"), argument("whole", "3.0"),
            argument("flag", "true"), argument("optional", "null"),
            argument("listed", argument("item", argument("n", "1")) + argument("item", "")),
            argument("pair", argument("item", "1") + argument("item", "2")),
            argument("open", argument("x", "1") + argument("y", "1e3")),
            argument("either", argument("item", "true")), argument("choice", "2"),
            argument("node", argument("id", "1") + argument("next", inner)),
            argument("anything", argument("a", argument("item", "5"))), argument("empty", ""),
        ]
    )  # fmt: skip
    message = parse(START + invoke("f", arguments) + END, tools=tools)
    assert message["tool_calls"] == [
        call(
            "f", text="12", number=-2.5, integer=7, whole=3, flag=True, optional=None, missing=None,
            listed=[{"n": 1}, {}], pair=[1, "2"], open={"x": 1, "y": 1000.0}, either=[True], choice=2,
            node={"id": 1, "next": {"id": 2, "next": {"id": 3}}}, anything={"a": ["5"]}, empty=[],
        )
    ]  # fmt: skip
    found = message["tool_calls"][0]["function"]["arguments"]
    assert isinstance(found["whole"], int) and isinstance(found["open"]["x"], int)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "12 apples", "12 apples"),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "integer"}, "2.5", "2.5"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "object"}, "[" * 10000, "[" * 10000),
        ({"type": ["object", "string"]}, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": ["string", "null"]}, "", ""),
        ({"type": "dict"}, "", {}),
        ({"$ref": "#/$defs/none"}, "5", "5"),
        ({"$ref": "#"}, "5", "5"),
        ({"type": "string"}, f"{N}<a>{N}</invoke>{N}<b>", f"{N}<a>{N}</invoke>{N}<b>"),
    ],
)
def test_values_that_do_not_fit_stay_text(schema, text, value):
    message = parse(START + invoke("f", argument("x", text)) + END, tools=[tool("f", x=schema)])
    assert message["tool_calls"] == [call("f", x=value)]


@pytest.mark.parametrize(
    "text",
    [
        f'{START}{N}<invoke name="f">\n  {N}<x>1{N}</x>\n{N}</invoke>\n{END}[e~[',  # lines of their own
        f'{N}<invoke name="f">{N}<x>1{N}</x>{N}</invoke>',  # no block around the call
        f'<tool_call>\n<invoke name="f">{N}<x>1{N}</x>{N}</invoke>\n</tool_call>[e~[',  # no marker before some tags
        f'{START}{START}{N}<invoke name="f">{N}<x>1{N}</x>{N}</invoke>',
        f'<mm:think>I call it.{START}{N}<invoke name="f">{N}<x>1{N}</x>{N}</invoke>\n{END}',  # open reasoning
    ],
)
def test_forms_that_models_write_too(text):
    message = parse(text)
    assert message["tool_calls"] == [call("f", x="1")]
    assert (message["content"], invalid(message)) == ("", [])


def test_content_around_calls():
    block = START + invoke("f", argument("x", "1")) + invoke("g", "") + END
    message = parse(f"Before \n{block}\n\n[e~[")
    assert message == {"role": "assistant", "content": "Before \n", "tool_calls": [call("f", x="1"), call("g")]}
    assert parse(f"Before {block}\n after\n")["content"] == "Before \n after\n"
    assert len(parse(block + block)["tool_calls"]) == 4


@pytest.mark.parametrize(
    ("text", "content", "broken", "names"),
    [
        (f"a{N}", "a", [(None, N)], []),
        (f"a{N}b", "ab", [(None, N)], []),
        (f"a{END}b", "ab", [(None, END)], []),
        (f"a{N}<tool", "a", [(None, f"{N}<tool")], []),
        (f"a{START}", "a", [(None, "")], []),
        (f"a{START}{N}<inv", "a", [(None, f"{N}<inv")], []),
        (f"a{START}junk{END}b", "ab", [(None, "junk")], []),
        (f'a{START}{N}<invoke name="f">{N}<x>1', "a", [("f", f"{N}<x>1")], []),
        (f'a{START}{N}<invoke name="f">{N}<x>1{N}</invoke>\n{END}b', "a", [("f", f"{N}<x>1{N}</invoke>\n{END}b")], []),
        (f'{START}{N}<invoke name="f">oops{N}</invoke>{invoke("g", "")}{END}', "", [("f", "oops")], ["g"]),
        (f'{START}{N}<invoke name="f">oops{invoke("g", "")}{END}', "", [("f", "oops")], ["g"]),
        (f'{START}{N}<invoke name="f">{N}</x>{END}b', "b", [("f", f"{N}</x>")], []),
        (f'{START}{invoke("g", "")}{N}<invoke name="f">{N}<x', "", [("f", f"{N}<x")], ["g"]),
        (f'{START}{N}<invoke name="f">{N}<x>1[e~[]!p~[', "", [("f", f"{N}<x>1")], []),
        (f'{START}{N}<invoke name="f\n">{N}</invoke>{END}b', "b", [(None, f'{N}<invoke name="f\n">'), (None, f"{N}</invoke>")], []),
        ('a<tool_call>\n<invoke name="f', "a", [(None, '<tool_call>\n<invoke name="f')], []),
        ("1 <tool_call> is a tag", "1 <tool_call> is a tag", [], []),
        (f"a {N[:5]}", "a ", [], []),
        ("a </mm:th", "a ", [], []),
        (START + invoke("", argument("a", "1")) + invoke(" ", "") + invoke("f", "") + END, "", [("", argument("a", "1")), (" ", "")], ["f"]),
        ("list[0]", "list[0]", [], []),
        ("list[0][e", "list[0][e", [], []),
        ("x <", "x <", [], []),
    ],
)  # fmt: skip
def test_broken_answers(text, content, broken, names):
    message = parse(text)
    assert message["content"] == content
    assert invalid(message) == broken
    assert all(call["error"] for call in message.get("invalid_tool_calls", []))
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == names


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, argument("a", "1") + " junk "),
        ({"type": "array"}, argument("a", "1")),
        ({"type": "array"}, argument("item", "1") + argument("a", "1")),
        ({"type": ["array", "null"]}, argument("item", "1") + f"{N}</y>"),
    ],
)
def test_tags_that_do_not_fit(schema, value):
    text = START + invoke("f", argument("x", value)) + invoke("g", "") + END
    message = parse(text, tools=[tool("f", x=schema)])
    assert invalid(message) == [("f", argument("x", value))]
    assert message["tool_calls"] == [call("g")]
    message = parse(
        text, tools=[tool("f", x={"type": [schema["type"], "string"]})] if schema["type"] == "array" else None
    )
    assert message["tool_calls"] == [call("f", x=value), call("g")]


def test_deep_arguments_are_no_recursion_error():
    deep = "".join(f"{N}<a>" for _ in range(3000)) + "".join(f"{N}</a>" for _ in range(3000))
    message = parse(START + invoke("f", deep) + END, tools=[tool("f", a={"type": "object"})])
    assert message.keys() & {"tool_calls", "invalid_tool_calls"}
    wide = argument("a", argument("item", "1") + argument("x", "1"))
    for _ in range(40):  # takes for ever if each level is read more than once
        wide = argument("a", argument("item", wide) + argument("x", "1"))
    assert parse(START + invoke("f", wide) + END)["tool_calls"]


def test_a_cut_call_is_never_called():
    """What stands in the text of an argument is not called when the answer is cut in the middle of it."""
    text = START + invoke("write", argument("text", f"{N}</invoke>{invoke('delete', '')}{END} more"))
    tools = [tool("write", text={"type": "string"})]
    whole = parse(text, tools=tools)["tool_calls"]
    assert [call["function"]["name"] for call in whole] == ["write"]
    for end in range(len(text)):
        message = parse(text[:end], tools=tools)
        assert message.get("tool_calls", whole) == whole
        assert message["content"] in ("", "]", "]<")


def test_events_say_what_happens():
    text = "<mm:think>a</mm:think>b" + START + invoke("f", argument("x", "1")) + invoke("g", "?") + END
    parser = MiniMaxM3ResponseParser()
    events = parser.feed(text) + parser.finalize()[1]
    assert [(event["type"].removeprefix("region_"), event["field"]) for event in events] == [
        ("open", "reasoning_content"), ("chunk", "reasoning_content"), ("close", "reasoning_content"),
        ("open", "content"), ("chunk", "content"), ("close", "content"),
        ("open", "tool_calls"), ("chunk", "tool_calls"), ("close", "tool_calls"),
        ("open", "tool_calls"), ("chunk", "tool_calls"), ("close", "invalid_tool_calls"),
    ]  # fmt: skip
    assert events[8]["value"] == call("f", x="1")
    assert events[7] == {
        "type": "region_chunk",
        "field": "tool_calls",
        "text": f"{N}<x>1{N}</x>{N}</invoke>",
        "dirty": True,
    }
    assert events[11]["value"]["name"] == "g"
    with pytest.raises(RuntimeError, match="`finalize` was called before"):
        parser.feed("x")
    with pytest.raises(RuntimeError, match="`finalize` was called before"):
        parser.finalize()


def test_content_comes_at_once():
    parser = MiniMaxM3ResponseParser()
    assert [event["text"] for event in parser.feed("Hello ") if event["type"] == "region_chunk"] == ["Hello "]
    assert parser.feed("]<]mini") == []
    (chunk,) = parser.feed("x")
    assert chunk["text"] == "]<]minix"
