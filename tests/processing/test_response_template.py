"""The ways to parse an answer: text or ids, processor or tokenizer, all at once or while `generate` runs."""

import copy
import json
import pickle
import queue
import random
import threading

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing import parse_response as stock_parse_response

from processing_minimax_m3 import (
    RESPONSE_TEMPLATE,
    MiniMaxM3ResponseParser,
    MiniMaxM3ResponseStreamer,
    add_response_template,
)

from .response_cases import ANSWER_TAG, END, START, Case, N, argument, call, invoke, parse, pieces, tool


def test_token_ids_tell_markers_from_text(processor):
    text = f'Write {START}{N}<invoke name="f">{N}</invoke> or <mm:think> and [e~[.'
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": text, "reasoning_content": text}]
    options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    ids = processor.apply_chat_template(messages, **options)["input_ids"][0]
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, **options)["input_ids"][0]
    assert processor.parse_response(ids[len(prompt) :], prefix=prompt) == messages[1]
    assert processor.parse_response(ids[len(prompt) :], prefix=f"{ANSWER_TAG}") == messages[1]


def test_forms_of_responses_and_prompts(processor):
    texts = ["</mm:think>one[e~[", "<mm:think>x</mm:think>two[e~["]
    expected = [
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "x"},
    ]
    ids = [processor.tokenizer(text)["input_ids"] for text in texts]
    padded = torch.tensor([row + [processor.tokenizer.pad_token_id] * (max(map(len, ids)) - len(row)) for row in ids])
    for responses in (texts, ids, padded, padded.numpy(), [torch.tensor(row) for row in ids]):
        assert processor.parse_response(responses, prefix="") == expected
        assert processor.parse_response(responses, prefix=["", ""]) == expected
        assert processor.parse_response(responses[0], prefix=[]) == expected[0]
    parser = MiniMaxM3ResponseParser(torch.tensor(ids[0]), tokenizer=processor.tokenizer)
    parser.feed_tokens(padded[1])
    assert parser.finalize()[0] == expected[1]
    prompt = processor.tokenizer(f"{ANSWER_TAG}<mm:think>")["input_ids"]
    for prefix in (prompt, [prompt], torch.tensor([prompt]), f"{ANSWER_TAG}<mm:think>"):
        assert processor.parse_response("y</mm:think>z", prefix=prefix)["reasoning_content"] == "y"
    assert processor.parse_response([], prefix="") == []
    assert processor.parse_response(list(padded.numpy()[1]), prefix="") == expected[1]
    for wrong in ([[0.5]], [1.5], [None], ["a", None], [1, "a"], None, 3, b"x", {"a": 1}):
        with pytest.raises(ValueError, match="`response` must be text, token ids"):
            processor.parse_response(wrong, prefix="")
    with pytest.raises(ValueError, match="needs the prompt as `prefix`"):
        processor.parse_response("x")
    with pytest.raises(ValueError, match="got 3 for 2"):
        processor.parse_response(texts, prefix=["", "", ""])
    with pytest.raises(ValueError, match=r"`tools\[0\]` must be a mapping"):
        processor.parse_response("x", prefix="", tools=["f"])


def test_functions_are_tools(processor):
    def f(numbers: list[int], name: str | None = None):
        """Does it.

        Args:
            numbers: Some.
            name: One.
        """

    text = START + invoke("f", argument("numbers", argument("item", "1")) + argument("name", "2")) + END
    message = processor.parse_response(text, prefix="", tools=[f])
    assert message["tool_calls"] == [call("f", numbers=[1], name="2")]


def test_the_tokenizer_parses_too(processor, tmp_path):
    text = START + invoke("f", argument("x", argument("item", "1"))) + END
    for tokenizer in (
        processor.tokenizer,
        copy.deepcopy(processor.tokenizer),
        pickle.loads(pickle.dumps(processor.tokenizer)),
    ):
        assert tokenizer.parse_response(text, prefix="")["tool_calls"] == [call("f", x=["1"])]
        assert tokenizer.parse_response.args == (tokenizer,)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["response_template"] == RESPONSE_TEMPLATE
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert alone.parse_response(text, prefix="")["tool_calls"] != [call("f", x=["1"])]
    assert add_response_template(alone) is alone
    assert alone.parse_response(text, prefix="")["tool_calls"] == [call("f", x=["1"])]


def test_another_template_is_left_alone(tokenizer):
    other = {"start_anchor": "A", "fields": {"content": {"content": "text"}}, "defaults": {"role": "other"}}
    tokenizer = copy.deepcopy(tokenizer)
    for name in ("parse_response", "get_response_parser"):
        tokenizer.__dict__.pop(name, None)
    tokenizer.response_template = other
    add_response_template(tokenizer)
    assert tokenizer.parse_response("x", prefix="") == {"role": "other", "content": "x"}
    tokenizer.response_template = None
    add_response_template(tokenizer)
    assert tokenizer.parse_response("x", other, prefix="") == {"role": "other", "content": "x"}
    assert isinstance(tokenizer.get_response_parser(other, prefix=""), ResponseParser)


def test_tokenizer_without_the_markers(tokenizer):
    with pytest.raises(ValueError, match="must know the markers"):
        add_response_template(
            type("Tokenizer", (), {"convert_tokens_to_ids": lambda self, tokens: [None] * len(tokens)})()
        )


def test_stock_reads_the_template():
    """What stock Transformers gives by the template alone: all but arguments that are lists or mappings."""
    generator = random.Random(0)
    flat = {
        key: {"type": kind} for key, kind in {"a": "string", "n": "integer", "r": "number", "f": "boolean"}.items()
    }
    tools = [tool("f", **flat), tool("g")]
    for number in range(200):
        case = Case(str(number), is_typed=True, has_markup=False)
        reasoning, content = case.text().strip(), case.text()
        calls = ""
        for _ in range(generator.randint(0, 2)):
            calls += invoke(
                "f", argument("a", "x y") + argument("n", "12") + argument("r", "0.5") + argument("f", "true")
            )
        text = f"<mm:think>{reasoning}" if reasoning else ""
        text += f"</mm:think>{content}" + (START + calls + END if calls else "") + "[e~[\n"
        expected = parse(text, tools=tools)
        assert stock_parse_response(text, RESPONSE_TEMPLATE, prefix="", tools=tools) == expected
        parser = ResponseParser(RESPONSE_TEMPLATE, prefix="", tools=tools)
        for piece in pieces(text, generator):
            parser.feed(piece)
        assert parser.finalize()[0] == expected


def test_streamer_gives_the_events_of_generate(processor):
    text = "<mm:think>Ünï 😀</mm:think>Hello" + START + invoke("f", argument("x", "1")) + END + "[e~["
    prompt = processor.tokenizer(f"{ANSWER_TAG}", return_tensors="pt")["input_ids"]
    ids = processor.tokenizer(text)["input_ids"]
    streamer = MiniMaxM3ResponseStreamer(processor, tools=[tool("f", x={"type": "integer"})], timeout=60)

    def generate():
        streamer.put(prompt)
        for token_id in ids:
            streamer.put(torch.tensor([token_id]))
        streamer.end()

    thread = threading.Thread(target=generate)
    thread.start()
    events = list(streamer)
    thread.join()
    told = {"reasoning_content": "", "content": ""}
    for event in events:
        if event["type"] == "region_chunk" and not event["dirty"]:
            told[event["field"]] += event["text"]
    assert told == {"reasoning_content": "Ünï 😀", "content": "Hello"}
    assert streamer.message == {"role": "assistant", **told, "tool_calls": [call("f", x=1)]}
    with pytest.raises(ValueError, match="got a batch of 2"):
        streamer.put(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(queue.Empty):
        next(MiniMaxM3ResponseStreamer(processor, timeout=0.01))


def test_parser_of_text_and_parser_of_ids(processor):
    with pytest.raises(ValueError, match="call `feed_tokens`"):
        MiniMaxM3ResponseParser(tokenizer=processor.tokenizer).feed("x")
    with pytest.raises(ValueError, match="needs a parser with a `tokenizer`"):
        MiniMaxM3ResponseParser().feed_tokens([1])
    with pytest.raises(ValueError, match="`prefix` must be a string"):
        MiniMaxM3ResponseParser([1])


def test_token_ids_come_out_at_once_but_for_half_characters(processor):
    parser = MiniMaxM3ResponseParser(tokenizer=processor.tokenizer)
    found = []
    for token_id in processor.tokenizer("Hi 😀!")["input_ids"]:
        found.append("".join(event.get("text", "") for event in parser.feed_tokens([token_id])))
    assert found == ["H", "i", " ", "", "", "", "😀", "!"]
