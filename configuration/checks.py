"""Checks that the config classes share. Each error names the field, its value and the allowed values.

The upper bounds are far above any model that exists. A number beyond them can only be a mistake. Without a bound it
would end in an allocation of many gigabytes, or in a loop of hours, with an error that names no field.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from huggingface_hub.dataclasses import validated_field
from transformers import PreTrainedConfig

MAX_LAYERS = 10_000
MAX_COUNT = 2**16  # heads, experts, blocks, keys of a block
MAX_SIDE = 2**10  # pixels, frames or smaller patches along one side of a patch
MAX_WIDTH = 2**20  # channels
MAX_TOKENS = 2**24  # tokens of a vocabulary
MAX_LABELS = 2**20

# Beyond these bounds, float32 sooner or later rounds a number to 0 or infinity, and the model's output becomes NaN.
MIN_EPSILON = 1e-30
MAX_FACTOR = 1e6
MAX_STANDARD_DEVIATION = 1e3
MAX_DROPOUT = 0.99

Given = TypeVar("Given")
Held = TypeVar("Held")

if TYPE_CHECKING:

    class Converted(Generic[Given, Held]):
        """Type of a field that takes a `Given` value, which `__post_init__` converts to a `Held` value."""

        def __get__(self, instance: object, owner: type) -> Held: ...

        def __set__(self, instance: object, value: Given) -> None: ...

else:

    class Converted:
        """At run time the annotation is the type `Given`, which Transformers checks at every assignment."""

        def __class_getitem__(cls, types):
            return types[0]


def converted() -> Any:
    """The default of a `Converted` field: None until `__post_init__` sets the value."""
    return None


def integer(default: int | None, minimum: int, maximum: int) -> Any:
    """A dataclass field for an integer from `minimum` to `maximum`, or None if its type allows None."""
    return _bounded(default, minimum, maximum, "an integer")


def number(default: float, minimum: float, maximum: float) -> Any:
    """A dataclass field for a number from `minimum` to `maximum`, which excludes NaN."""
    return _bounded(default, minimum, maximum, "a number")


def _bounded(default: float | None, minimum: float, maximum: float, kind: str) -> Any:
    def check(value: float | None) -> None:
        if value is not None and not minimum <= value <= maximum:
            raise ValueError(f"must be {kind} from {minimum} to {maximum}, got {value}.")

    return validated_field(check, default=default)


def check_renamed_fields(config: PreTrainedConfig) -> None:
    """Checks the fields that have a second name (`num_experts`): an assignment by that name skips the check."""
    for name in config.attribute_map.values():
        setattr(config, name, getattr(config, name))


def check_inherited_keys(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for keys on which `PreTrainedConfig.__post_init__` hangs or fails without naming the key.

    The `model_type` of another part, or of the whole model, is such a key too: its file has none of the fields.

    Args:
        config (`PreTrainedConfig`): The config whose `__post_init__` runs.
        kwargs (`Mapping`): The arguments of `__post_init__`.
    """
    model_type, own_type = kwargs.get("model_type"), type(config).model_type
    if model_type != own_type and str(model_type).startswith("minimax_m3_vl"):
        raise ValueError(f"`model_type` must be {own_type!r} for a {type(config).__name__}, got {model_type!r}.")
    for name, value in (("dtype", config.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
        if isinstance(value, str):
            value = getattr(torch, value, value)
        if not isinstance(value, torch.dtype | dict | None):  # a dict has a dtype for each part
            raise ValueError(f"`{name}` must be a dtype of PyTorch or its name, got {value!r}.")
    per_layer_config = kwargs.get("per_layer_config")
    for name, value in (("id2label", config.id2label), ("per_layer_config", per_layer_config)):
        if value is not None and not (isinstance(value, dict) and all(str(key).isdecimal() for key in value)):
            raise ValueError(f"`{name}` must be a dict whose keys are integers from 0, got {value!r}.")
    for layer_idx, overrides in (per_layer_config or {}).items():
        if not isinstance(overrides, dict):
            raise ValueError(f"`per_layer_config[{layer_idx}]` must be a dict of fields, got {overrides!r}.")
    num_labels = kwargs.get("num_labels", 0)
    if type(num_labels) is not int or not 0 <= num_labels <= MAX_LABELS:
        raise ValueError(f"`num_labels` must be an integer from 0 to {MAX_LABELS}, got {num_labels!r}.")


def require_divisible(config: PreTrainedConfig, name: str, divisor: str) -> None:
    """Raises `ValueError` unless field `name` of `config` is a multiple of field `divisor`."""
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise ValueError(f"`{name}` must be a multiple of `{divisor}`, got {name}={value} and {divisor}={by}.")


def require_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises `ValueError` unless `value`, the value of field `name`, is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
