"""Rotary parameters that are valid one by one but cannot work together, and parameters that stock reads."""

import copy

import pytest
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, tiny_config

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 65536}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 65536}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
ERRORS = {
    "one set per layer type": (
        {"rope_parameters": NESTED},
        r"`rope_parameters` must be one set.*\['full_attention'\]",
    ),
    "nothing per layer type": ({"rope_parameters": {"minimax_m3_sparse": 5}}, "`rope_parameters` must be one set"),
    "older name": ({"rope_scaling": NESTED}, "`rope_scaling` must be one set"),
    "no logarithm": ({"rope_parameters": YARN | {"rope_theta": 1}}, r"\['rope_theta'\]` must be above 1 if"),
    "field of the config": (
        {"rope_parameters": YARN, "original_max_position_embeddings": "x"},
        r"\['original_max_position_embeddings'\]` must be a number from 2 to .*, got 'x'",
    ),
    "two channels": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 1 / 16}},
        r"more than 2 channels of a head.*got 0.0625 of 32 channels",
    ),
    "frequencies in the wrong order": (
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        r"\['high_freq_factor'\]` must be above .*\['low_freq_factor'\]`, got 4.0 and 4.0",
    ),
    "too few factors": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 16}},
        r"\['short_factor'\]` must be a list of 16 numbers",
    ),
    "index heads that cannot rotate": (
        # this type rotates all channels of a head, whatever the factor
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}, "index_head_dim": 16},
        "`index_head_dim` must be at least the rotary width 32",
    ),
}


@pytest.mark.parametrize(("fields", "message"), ERRORS.values(), ids=ERRORS)
def test_parameters_that_cannot_work_are_refused(fields, message):
    text = tiny_config().to_dict()["text_config"]
    del text["rope_parameters"]
    with pytest.raises(Exception, match=message):
        MiniMaxM3VLTextConfig(**(text | copy.deepcopy(fields)))


READ_AS_STOCK = {
    "unused keys of other types": {"rope_type": "default", "factor": None, "beta_fast": -1.0},
    "factor below one": {"rope_type": "linear", "factor": 0.5},
    "one factor from the two lengths": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 4096,
    },
    "all keys of yarn": YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "truncate": False},
    "whole numbers": LLAMA3 | {"low_freq_factor": 1, "high_freq_factor": 4, "factor": 8},
    "older key": {"type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("rope", READ_AS_STOCK.values(), ids=READ_AS_STOCK)
def test_parameters_of_stock_are_read(rope):
    ours = MiniMaxM3VLTextConfig(rope_parameters=copy.deepcopy(rope))
    assert ours.rope_parameters == stock.MiniMaxM3VLTextConfig(rope_parameters=copy.deepcopy(rope)).rope_parameters


def test_change_in_place_is_checked():
    config = tiny_config().text_config
    config.rope_parameters["rope_theta"] = float("nan")
    with pytest.raises(Exception, match=r"`rope_parameters\['rope_theta'\]` must be a number"):
        config.validate()
