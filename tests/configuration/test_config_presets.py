"""The presets: the released geometry, and the tiny model of tests and demonstrations."""

import pytest

from configuration_minimax_m3 import released_config, tiny_config
from processing_minimax_m3.special_tokens import FIRST_SPECIAL_TOKEN_ID, SPECIAL_TOKENS


def test_released_geometry():
    config = released_config()
    text, vision = config.text_config, config.vision_config
    assert text.layer_types == ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    assert text.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 57
    assert text.max_position_embeddings == 1048576
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert text.rotary_width == 64
    assert (text.index_n_heads, text.index_head_dim) == (4, 128)
    assert (text.index_block_size, text.index_topk_blocks) == (128, 16)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (64, 4, 128)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads) == (32, 1280, 16)
    assert config.merged_hidden_size == 4 * 6144


def test_released_geometry_has_the_announced_size():
    """The fields give about 428e9 parameters in all.

    One token multiplies with about 23e9 of them, besides the two embedding tables.
    """
    text = released_config().text_config
    hidden, head_dim = text.hidden_size, text.head_dim
    attention = hidden * head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    indexer = hidden * text.index_head_dim * (text.index_n_heads + 1)
    expert = 3 * hidden * text.intermediate_size
    num_sparse = text.mlp_layer_types.count("sparse")
    num_dense = text.mlp_layer_types.count("dense")

    def in_layers(experts_per_layer: int) -> int:
        moe = experts_per_layer * expert + 3 * hidden * text.shared_intermediate_size
        dense = 3 * hidden * text.dense_intermediate_size
        return text.num_hidden_layers * attention + num_sparse * (indexer + moe) + num_dense * dense

    embeddings = 2 * text.vocab_size * hidden
    assert in_layers(text.num_local_experts) + embeddings == pytest.approx(428e9, rel=0.01)
    assert in_layers(text.num_experts_per_tok) == pytest.approx(23e9, rel=0.03)


def test_tiny_has_every_kind_of_layer():
    text = tiny_config().text_config
    assert set(text.layer_types) == {"full_attention", "minimax_m3_sparse"}
    assert set(text.mlp_layer_types) == {"dense", "sparse"}


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_tiny_lists_follow_the_number_of_layers(num_layers):
    text = tiny_config(text={"num_hidden_layers": num_layers}).text_config
    assert len(text.layer_types) == len(text.mlp_layer_types) == num_layers
    assert "minimax_m3_sparse" in text.layer_types
    assert "sparse" in text.mlp_layer_types


@pytest.mark.parametrize("vocab_size", [512, 1000])
def test_tiny_special_tokens_keep_the_released_order(vocab_size):
    config = tiny_config(text={"vocab_size": vocab_size})
    released = released_config()
    offset = vocab_size - released.text_config.vocab_size
    assert config.image_token_id == released.image_token_id + offset
    assert config.video_token_id == released.video_token_id + offset
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(config.text_config, name) == getattr(released.text_config, name) + offset
    assert SPECIAL_TOKENS[config.text_config.pad_token_id - offset - FIRST_SPECIAL_TOKEN_ID] == "]!p~["


def test_tiny_overrides_reach_every_part():
    config = tiny_config(text={"index_topk_blocks": 2}, vision={"patch_size": 7}, projector_hidden_size=32)
    assert config.text_config.index_topk_blocks == 2
    assert config.vision_config.patch_size == 7
    assert config.projector_hidden_size == 32
