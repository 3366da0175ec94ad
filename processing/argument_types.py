"""JSON schemas of tools, as far as they decide which value a text stands for."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Names of types that some tool lists use beside those of JSON schema.
_SYNONYMS = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "tuple": "array",
}
_TYPES = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_INTEGER = re.compile(r"-?[0-9]{1,4000}", re.ASCII)  # Python refuses to read longer ones
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)
_MAX_REFERENCES = 64


class ArgumentType:
    """The type of a value: all that its JSON schema allows.

    Args:
        schemas (list of mappings): Alternatives. They may refer to definitions of `root` and hold alternatives. Without
            any, or with one that names no type, any value is allowed.
        root (`Mapping`): The schema in which `$ref` is looked up.
    """

    def __init__(self, schemas: list[Any], root: Mapping[str, Any]) -> None:
        self._root = root
        self._alternatives = [part for schema in schemas for part in self._resolve(schema)]
        self.types = self._collect_types()

    def _resolve(self, schema: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
        """The schemas that `schema` stands for, without references and unions."""
        if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
            yield {}
            return
        parts = []
        if isinstance(schema.get("$ref"), str):
            parts.append(self._look_up(schema["$ref"]))
        for union in ("anyOf", "oneOf", "allOf"):
            parts += schema[union] if isinstance(schema.get(union), list) else []
        for part in parts:
            yield from self._resolve(part, depth + 1)
        if not parts or schema.keys() & {"type", "properties", "enum", "const"}:
            yield schema
        if schema.get("nullable") is True:  # how `get_json_schema` marks Optional
            yield {"type": "null"}

    def _look_up(self, reference: str) -> Any:
        found: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def _collect_types(self) -> frozenset[str]:
        """The allowed types. Empty if any type is allowed."""
        types: set[str] = set()
        for schema in self._alternatives:
            declared = schema.get("type")
            names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
            known = {_SYNONYMS.get(name, name) for name in names if isinstance(name, str)} & _TYPES
            if not known and isinstance(schema.get("properties"), Mapping):
                known = {"object"}
            known = known or {_type_of(constant) for constant in self._constants(schema)}
            if not known:
                return frozenset()
            types |= known
        return frozenset(types)

    @staticmethod
    def _constants(schema: Mapping[str, Any]) -> list[Any]:
        constants = [schema["const"]] if "const" in schema else []
        return constants + (list(schema["enum"]) if isinstance(schema.get("enum"), list) else [])

    def allows(self, name: str) -> bool:
        """Whether a value may be of this type of JSON schema."""
        return not self.types or name in self.types

    def of_property(self, name: str) -> "ArgumentType":
        """The type of the value under a key, of an object."""
        found = []
        for schema in self._alternatives:
            properties, others = schema.get("properties"), schema.get("additionalProperties")
            if isinstance(properties, Mapping) and name in properties:
                found.append(properties[name])
            elif isinstance(others, Mapping):
                found.append(others)
        return ArgumentType(found, self._root)

    def of_item(self, index: int) -> "ArgumentType":
        """The type of an item of an array."""
        found = []
        for schema in self._alternatives:
            first, others = schema.get("prefixItems"), schema.get("items")
            if isinstance(first, list) and index < len(first):
                found.append(first[index])
            elif isinstance(others, Mapping):
                found.append(others)
        return ArgumentType(found, self._root)

    def omitted(self, names: Mapping[str, Any]) -> list[str]:
        """Required keys beside those of `names` whose value may be null. The chat template writes no null."""
        objects = [schema for schema in self._alternatives if isinstance(schema.get("properties"), Mapping)]
        required = objects[0].get("required") if len(objects) == 1 else None
        if not isinstance(required, list):
            return []
        return [
            name
            for name in required
            if isinstance(name, str) and name not in names and "null" in self.of_property(name).types
        ]

    def value_of(self, text: str) -> Any:
        """The value that the chat template writes as this text. Text that fits no allowed type stays text."""
        for constant in (value for schema in self._alternatives for value in self._constants(schema)):
            if written(constant) == text:
                return constant
        if not self.types - {"string"}:
            return text
        stripped = text.strip()
        if not stripped and "string" not in self.types:
            for name, empty in (("object", dict.fromkeys(self.omitted({}))), ("array", []), ("null", None)):
                if name in self.types:
                    return empty
        if self.types & {"integer", "number"} and (number := self._number(stripped)) is not None:
            return number
        if "boolean" in self.types and stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        if "string" not in self.types:
            # The template writes neither of these, but models do.
            if "null" in self.types and stripped in ("null", "None"):
                return None
            if self.types & {"object", "array"}:
                return self._from_json(text)
        return text

    def _number(self, text: str) -> int | float | None:
        if _INTEGER.fullmatch(text):
            return int(text)
        if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            return None
        number = float(text)
        if "number" in self.types:
            return number
        return int(number) if number.is_integer() else None

    def _from_json(self, text: str) -> Any:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value if isinstance(value, (dict, list)) and _type_of(value) in self.types else text


def _type_of(value: Any) -> str:
    by_class = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return by_class.get(type(value), "null")


def written(value: Any) -> str:
    """A value without parts, as the chat template writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
