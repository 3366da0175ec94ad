"""Answers by hand, and random conversations with the messages that parsing their answers must give."""

import random
from typing import Any

from processing_minimax_m3 import MiniMaxM3ResponseParser
from processing_minimax_m3.special_tokens import SPECIAL_TOKENS

N = "]<]minimax[>["
START, END = f"{N}<tool_call>\n", f"{N}</tool_call>"
ANSWER_TAG = "]~b]ai\n"
MARKUP = (
    *SPECIAL_TOKENS,
    f"{N}<tool_call>\n",
    f'{N}<invoke name="f">',
    f"{N}</invoke>",
    f"{N}</tool_call>",
    f"{N}<item>",
    f"{N}</item>",
    "]~b]ai\n",
    "]~b]user\n",
)
TEXT = (
    "<b>bold</b>", "</item>", "<item>", "<invoke name=\"x\">", "&lt;", '{"a": [1, null]}', "[]", "{}", "12", "-0.5", "true",
    "null", "None", " ", "\n", "\t", '"', "'", "\\", "\\n", "a", "word ", "Straße ", "你好", "😀", "🇩🇪", "e\u0301", "\u200b",
    "]", "<", "[", ">", "]<", "]<]", "[e", "<mm", "%", "{{ x }}", "{% if %}", "x < y", "list[0]", "\u00a0", "\ufeff", "ا",
)  # fmt: skip
KEYS = (
    "a",
    "b",
    "city",
    "item",
    "items",
    "invoke",
    "tool_call",
    "name",
    "arguments",
    "über",
    "日本",
    "a b",
    "x-1",
    "$id",
    "@t",
    "0",
)
LEAVES = ("string", "string", "string", "integer", "number", "boolean", "enum", "union", "nullable")


def tool(name, **properties):
    required = [key for key, schema in properties.items() if schema.pop("required", False)]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def invoke(name, arguments):
    return f'{N}<invoke name="{name}">{arguments}{N}</invoke>\n'


def argument(name, value):
    return f"{N}<{name}>{value}{N}</{name}>"


def call(name, /, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def parse(text, prefix="", tools=None):
    """The message of an answer, after a check that pieces of any size give the same."""
    found = []
    for size in (len(text) + 1, 1, 2, 7):
        parser = MiniMaxM3ResponseParser(prefix, tools=tools)
        for start in range(0, len(text), size):
            parser.feed(text[start : start + size])
        found.append(parser.finalize()[0])
    assert all(message == found[0] for message in found)
    return found[0]


class Case:
    """A random conversation.

    Args:
        seed (`str`): Decides everything.
        is_typed (`bool`): Whether the parser knows the tools. Without them, values come back as strings, lists and
            mappings.
        has_markup (`bool`): Whether all strings may hold control tokens and tags of the format. Else no string but those
            of tool calls do, and these lack the closing tag of their own argument.
    """

    def __init__(self, seed: str, is_typed: bool, has_markup: bool) -> None:
        self.random = random.Random(seed)
        self.is_typed, self.has_markup = is_typed, has_markup
        schemas = {f"{self.random.choice(['get', 'set', 'ns.run', 'über'])}_{i}": self._object(3) for i in range(3)}
        self.tools = [{"type": "function", "function": {"name": name, "description": self.text(), "parameters": schema}}
                      for name, schema in schemas.items()]  # fmt: skip
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": self.text()}]
        self.expected: dict[int, dict[str, Any]] = {}
        for _ in range(self.random.randint(1, 2)):
            self._add_answer(schemas)
        if "tool_calls" in self.messages[-1]:
            self._add_answer({})

    def _add_answer(self, schemas: dict[str, dict]) -> None:
        reasoning = self.text() if self.random.random() < 0.6 else ""
        message: dict[str, Any] = {"role": "assistant", "reasoning_content": reasoning, "content": self.text()}
        expected: dict[str, Any] = {"role": "assistant", "content": message["content"]}
        if reasoning:
            expected["reasoning_content"] = reasoning
        calls = []
        if schemas and self.random.random() < 0.8:
            message["tool_calls"], expected["tool_calls"] = [], []
            for name in self.random.choices(list(schemas), k=self.random.randint(1, 3)):
                arguments = self._value(schemas[name])
                calls.append({"name": name, "arguments": arguments})
                message["tool_calls"].append({"type": "function", "function": calls[-1]})
                read = as_read(arguments, schemas[name]) if self.is_typed else as_texts(arguments)
                function = {"name": name, "arguments": read}
                expected["tool_calls"].append({"type": "function", "function": function})
        self.expected[len(self.messages)] = expected
        self.messages.append(message)
        for _ in calls:
            self.messages.append({"role": "tool", "content": self.text() or "-"})
        if not calls:
            self.messages.append({"role": "user", "content": self.text()})

    def mode(self, number: int) -> str:
        """The thinking mode in which the model may have written this answer."""
        fitting = "enabled" if self.messages[number]["reasoning_content"] else "disabled"
        return random.Random(number).choice(["adaptive", fitting])

    def text(self, may_hold_markup: bool = False, without: str = "") -> str:
        parts = [self.random.choice(TEXT) for _ in range(self.random.choice([0, 1, 1, 2, 5, 20]))]
        if self.has_markup or may_hold_markup:
            for _ in range(self.random.choice([0, 0, 1, 3])):
                parts.insert(self.random.randint(0, len(parts)), self.random.choice(MARKUP))
        text = "".join(parts)
        if not self.has_markup:  # what a text cannot hold where no token ids tell its markers apart
            while without and without in text:
                text = text.replace(without, "")
            if not may_hold_markup and any(part in text for part in MARKUP):
                return ""
        return text

    def _object(self, depth: int) -> dict[str, Any]:
        keys = self.random.sample(KEYS, self.random.randint(0, 4))
        properties = {key: self._schema(depth - 1) for key in keys}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        schema["required"] = [key for key in keys if self.random.random() < 0.5]
        return schema

    def _schema(self, depth: int) -> dict[str, Any]:
        kind = self.random.choice((*LEAVES, "object", "array", "array")) if depth > 0 else self.random.choice(LEAVES)
        if kind == "object":
            return self._object(depth)
        if kind == "array":
            return {"type": "array", "items": self._schema(depth - 1)}
        return {
            "enum": {"enum": ["red", "5", 7, True, "", "x y"]},
            "union": {
                "anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}, {"type": "boolean"}]
            },
            "nullable": {"type": ["number", "null"]},
        }.get(kind, {"type": kind})

    def _value(self, schema: dict[str, Any], key: str = "") -> Any:
        choice = self.random.choice
        if "enum" in schema:
            return choice(schema["enum"])
        if "anyOf" in schema:
            return self._value(choice(schema["anyOf"]), key)
        if isinstance(schema["type"], list):
            return None if self.random.random() < 0.3 else self._value({"type": "number"})
        if schema["type"] == "object":
            required = schema["required"]
            names = [name for name in schema["properties"] if name in required or self.random.random() < 0.6]
            return {name: self._value(schema["properties"][name], name) for name in names}
        if schema["type"] == "array":
            return [self._value(schema["items"], "item") for _ in range(choice([0, 1, 2, 3]))]
        if schema["type"] == "string":
            text = self.text(may_hold_markup=True, without=f"{N}</{key}>")
            starts_a_tag = not self.is_typed and text.strip(" \t\r\n").startswith(f"{N}<")
            return "x" + text if starts_a_tag and not self.has_markup else text
        return {
            "integer": lambda: choice([0, -1, 7, 10**30, self.random.randint(-(10**6), 10**6)]),
            "number": lambda: choice([0, 3.0, -2.5, 1e-07, 1e22, self.random.random(), self.random.randint(-9, 9)]),
            "boolean": lambda: choice([True, False]),
        }[schema["type"]]()  # fmt: skip


def as_read(value: Any, schema: dict[str, Any]) -> Any:
    """A value as it comes back with its schema: the chat template leaves out keys whose value is null."""
    if isinstance(value, dict):
        return {
            name: as_read(item, schema["properties"][name])
            for name, item in value.items()
            if item is not None or name in schema["required"]
        }
    if isinstance(value, list):
        return [as_read(item, schema.get("items", {"type": "string"})) for item in value]
    return value


def as_texts(values: dict[str, Any]) -> dict[str, Any]:
    return {name: as_text(value) for name, value in values.items() if value is not None}


def as_text(value: Any) -> Any:
    """A value as it comes back without a schema: numbers as text, and what is empty as no text.

    A mapping whose only key is "item" is written like a list.
    """
    if isinstance(value, dict):
        found = as_texts(value)
        return [found["item"]] if found.keys() == {"item"} else found or ""
    if isinstance(value, list):
        return [as_text(item) for item in value] or ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def pieces(items: Any, generator: random.Random) -> list[Any]:
    """Cuts text or ids into pieces of random sizes."""
    largest = generator.choice([1, 3, 10, 40, len(items) + 1])
    cut, start = [], 0
    while start < len(items):
        end = start + generator.randint(1, largest)
        cut.append(items[start:end])
        start = end
    return cut
