"""What the chat template writes, the response parser reads: random conversations, whole, in pieces, cut and damaged.

`RESPONSE_ROUND_TRIPS=10000` in the environment runs that many conversations in place of 2,000.
"""

import os
import random
import time

import pytest

from processing_minimax_m3 import MiniMaxM3ResponseParser

from .response_cases import MARKUP, Case, N, pieces

COUNT = int(os.environ.get("RESPONSE_ROUND_TRIPS", 2000))
SEEDS = {"fixed": 0, "fresh": int(time.time())}
PARTS = 4  # so that several processes share the work


def cases(seed: int, part: int, count: int, kinds: int = 4):
    for number in range(part, count, PARTS):
        kind = number // PARTS % kinds
        yield f"seed {seed}, conversation {number}", Case(f"{seed}:{number}", is_typed=kind != 1, has_markup=kind == 3)


def parse_pieces(parser, parts, content_has_markup=True):
    """The message, after checks that the events tell the same."""
    feed = parser.feed if parts and isinstance(parts[0], str) else parser.feed_tokens
    events = list(parser.initial_events)
    for part in parts:
        events += feed(part)
    message, last = parser.finalize()
    told = {}
    for event in [*events, *last]:
        if event["type"] == "region_chunk" and not event["dirty"]:
            told[event["field"]] = told.get(event["field"], "") + event["text"]
        elif event["type"] == "region_close" and event["field"] == "content":
            assert content_has_markup or N not in event["value"]
        elif event["type"] == "region_close" and event["field"].endswith("tool_calls"):
            told.setdefault(event["field"], []).append(event["value"])
    assert {"role": "assistant", "content": "", **told} == message
    return message


def text_answers(case, processor):
    for number, expected in case.expected.items():
        options = {"tools": case.tools, "thinking_mode": case.mode(number)}
        prompt = processor.apply_chat_template(case.messages[:number], add_generation_prompt=True, **options)
        whole = processor.apply_chat_template(case.messages[: number + 1], **options)
        assert whole.startswith(prompt)
        yield prompt, whole[len(prompt) :], expected


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_answers_come_back(processor, seed, part):
    generator = random.Random(seed)
    done = 0
    for name, case in cases(seed, part, COUNT // len(SEEDS)):
        tools = case.tools if case.is_typed else None
        if not case.has_markup:
            for prompt, answer, expected in text_answers(case, processor):
                assert processor.parse_response(answer, prefix=prompt, tools=tools) == expected, name
                parser = processor.tokenizer.get_response_parser(prefix=prompt, tools=tools)
                assert parse_pieces(parser, pieces(answer, generator)) == expected, name
        options = {"sanitize_control_tokens": True, "tokenize": True, "return_dict": True}
        number, expected = generator.choice(list(case.expected.items()))
        options |= {"tools": case.tools, "thinking_mode": case.mode(number)}
        prompt = processor.apply_chat_template(case.messages[:number], add_generation_prompt=True, **options)
        ids = processor.apply_chat_template(case.messages[: number + 1], **options)["input_ids"][0]
        prompt = prompt["input_ids"][0]
        answer = ids[len(prompt) :]
        assert ids[: len(prompt)] == prompt
        assert processor.parse_response(answer, prefix=prompt, tools=tools) == expected, name
        parser = MiniMaxM3ResponseParser(prompt, tools=tools, tokenizer=processor.tokenizer)
        assert parse_pieces(parser, pieces(answer, generator)) == expected, name
        done += 1
    assert done == len(range(part, COUNT // len(SEEDS), PARTS))


def check_cut(message, expected, name):
    """What a cut answer gives is a beginning of what the whole answer gives."""
    calls = message.get("tool_calls", [])
    assert calls == expected.get("tool_calls", [])[: len(calls)], name
    for field in ("content", "reasoning_content"):
        found, whole = message.get(field, ""), expected.get(field, "")
        # one or two characters of a marker that was cut may as well be text
        assert any(whole.startswith(found[: len(found) - extra]) for extra in range(3)), (name, found, whole)
        assert N not in found, name


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_cut_answers(processor, seed):
    generator = random.Random(seed)
    for name, case in cases(seed, 0, 160, kinds=2):
        tools = case.tools if case.is_typed else None
        for prompt, answer, expected in text_answers(case, processor):
            for end in generator.sample(range(len(answer)), min(len(answer), 8)):
                message = processor.parse_response(answer[:end], prefix=prompt, tools=tools)
                check_cut(message, expected, name)
                parser = MiniMaxM3ResponseParser(prompt, tools=tools)
                assert parse_pieces(parser, pieces(answer[:end], generator)) == message, name


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_damaged_answers(processor, seed):
    generator = random.Random(seed)
    fields = {"role", "content", "reasoning_content", "tool_calls", "invalid_tool_calls"}
    for name, case in cases(seed, 1, 240):
        case.has_markup = False
        for prompt, answer, _ in text_answers(case, processor):
            for _ in range(3):
                for _ in range(generator.choice([1, 1, 3])):
                    start = generator.randint(0, len(answer))
                    new = generator.choice(["", "", generator.choice(MARKUP)])
                    answer = answer[:start] + new + answer[start + generator.choice([0, 1, 5, 13]) :]
                message = processor.parse_response(answer, prefix=prompt, tools=case.tools)
                assert message.keys() <= fields, name
                for call in message.get("tool_calls", []):
                    assert call["type"] == "function" and isinstance(call["function"]["arguments"], dict), name
                for call in message.get("invalid_tool_calls", []):
                    assert call.keys() == {"name", "arguments", "error"} and call["error"], name
                parser = MiniMaxM3ResponseParser(prompt, tools=case.tools)
                assert parse_pieces(parser, pieces(answer, generator), content_has_markup=False) == message, name
