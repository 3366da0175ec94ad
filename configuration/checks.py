"""Small checks that the config classes share. Each names the field, what came and what is allowed."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


def require_at_least(config: PreTrainedConfig, minimum: int, names: Iterable[str]) -> None:
    """Raise `ValueError` unless every named integer field of `config` is `minimum` or more."""
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value}.")


def require_divisible(config: PreTrainedConfig, name: str, divisor: str) -> None:
    """Raise `ValueError` unless field `name` of `config` is a multiple of field `divisor`."""
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise ValueError(f"`{name}` must be a multiple of `{divisor}`, got {name}={value} and {divisor}={by}.")


def require_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ValueError` unless `value`, which came for field `name`, is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
