"""Checks of `rope_parameters`.

Transformers only warns about a value that its computation cannot use, and then computes with it. The model's output
becomes NaN, or an error follows that names no field.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from transformers import PreTrainedConfig

from .checks import MAX_FACTOR, require_one_of

# The keys that each type reads besides `rope_theta` and `partial_rotary_factor`: first the required keys, then the
# keys that may be absent or None.
_KEYS = {
    "default": ((), ()),
    "axial": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "proportional": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
_RANGE_OF_FACTORS = (1 / MAX_FACTOR, MAX_FACTOR)
_RANGES = {
    "rope_theta": (1, 1e18),
    "partial_rotary_factor": (0, 1),
    "original_max_position_embeddings": (2, 2**63 - 1),
    "attention_factor": (0, MAX_FACTOR),
    "mscale": (0, MAX_FACTOR),
    "mscale_all_dim": (0, MAX_FACTOR),
}


def check_rope_is_one_set(config: PreTrainedConfig, kwargs: Mapping[str, Any], layer_types: tuple[str, ...]) -> None:
    """Raises `ValueError` unless the rotary parameters are one set for all layers.

    Args:
        config (`PreTrainedConfig`): The config whose `__post_init__` runs.
        kwargs (`Mapping`): The arguments of `__post_init__`. `rope_scaling` is the older name of `rope_parameters`.
        layer_types (`tuple[str, ...]`): Keys of a set per layer type, which no model here reads.
    """
    for name, rope in (("rope_parameters", config.rope_parameters), ("rope_scaling", kwargs.get("rope_scaling"))):
        if rope and not isinstance(rope, dict):
            raise ValueError(f"`{name}` must be a dict, got {rope!r}.")
        if nested := [layer_type for layer_type in layer_types if layer_type in (rope or ())]:
            raise ValueError(
                f"`{name}` must be one set of parameters for all layers, got one per layer type: {nested}."
            )


def check_rope_parameters(config: PreTrainedConfig, types: tuple[str, ...], head_dim: int) -> None:
    """Raises `ValueError` unless the frequencies that `config.rope_parameters` describes are finite numbers.

    Args:
        config (`PreTrainedConfig`): The config with `rope_parameters`, and with `original_max_position_embeddings` in
            some models.
        types (`tuple[str, ...]`): The allowed values of `rope_type`.
        head_dim (`int`): Channels of one head.
    """
    if not isinstance(config.rope_parameters, dict):
        raise ValueError(f"`rope_parameters` must be a dict, got {config.rope_parameters!r}.")
    rope = dict(config.rope_parameters)
    require_one_of("rope_parameters['rope_type']", rope.get("rope_type"), types)
    # Transformers prefers the field of the config, if the config has one.
    if hasattr(config, "original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings

    rope.setdefault("partial_rotary_factor", 1.0)
    if rope["rope_type"] == "proportional":
        rope.setdefault("factor", 1.0)

    required, optional = _KEYS.get(rope["rope_type"], ((), ()))  # a type that a user registered reads unknown keys
    for name in ("rope_theta", "partial_rotary_factor", *required, *optional):
        value = rope.get(name)
        if name in optional and value is None:
            continue
        if name in ("short_factor", "long_factor"):
            _check_list(name, value, length=(_channels(rope, head_dim) + 1) // 2)
        else:
            _check_number(name, value)
    if rope["rope_type"] == "yarn" and rope["rope_theta"] == 1:
        raise ValueError("`rope_parameters['rope_theta']` must be above 1 if `rope_type` is 'yarn', got 1.")
    if rope["rope_type"] == "dynamic" and _channels(rope, head_dim) == 2:
        raise ValueError(
            "`rope_parameters['partial_rotary_factor']` must let more than 2 channels of a head rotate if `rope_type` "
            f"is 'dynamic', got {rope['partial_rotary_factor']} of {head_dim} channels."
        )
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            "`rope_parameters['high_freq_factor']` must be above `rope_parameters['low_freq_factor']`, got "
            f"{rope['high_freq_factor']} and {rope['low_freq_factor']}."
        )


def _channels(rope: dict[str, Any], head_dim: int) -> int:
    return int(head_dim * rope["partial_rotary_factor"])


def _check_number(name: str, value: Any) -> None:
    minimum, maximum = _RANGES.get(name, _RANGE_OF_FACTORS)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum:
        raise ValueError(f"`rope_parameters['{name}']` must be a number from {minimum} to {maximum}, got {value!r}.")


def _check_list(name: str, values: Any, length: int) -> None:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(
            f"`rope_parameters['{name}']` must be a list of {length} numbers, one for each pair of channels that "
            f"rotates (a `partial_rotary_factor` of `head_dim`), got {values!r}."
        )
    for value in values:
        _check_number(name, value)
