"""Ready-made configurations: the released geometry, a small one to train, and a tiny one for tests."""

from typing import Any

from .layer_types import FULL_ATTENTION, LEARNED_SPARSE
from .multimodal import MiniMaxM3VLConfig

# The released vocabulary ends with 64 slots for special tokens; these are positions among them.
SPECIAL_TOKEN_SLOTS = 64
_PAD_SLOT, _EOS_SLOT, _IMAGE_SLOT, _VIDEO_SLOT, _BOS_SLOT = 0, 20, 25, 26, 34


def released_config() -> MiniMaxM3VLConfig:
    """The geometry of the released model: about 427B parameters. One token uses about 23B of them."""
    num_layers, num_dense = 60, 3
    num_sparse = num_layers - num_dense
    return MiniMaxM3VLConfig(
        text_config={
            "num_hidden_layers": num_layers,
            "max_position_embeddings": 1048576,
            "layer_types": [FULL_ATTENTION.name] * num_dense + [LEARNED_SPARSE.name] * num_sparse,
            "mlp_layer_types": ["dense"] * num_dense + ["sparse"] * num_sparse,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        },
    )


def tiny_config(
    *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **overrides: Any
) -> MiniMaxM3VLConfig:
    """The configuration of a model with every kind of part. A hundred tokens take milliseconds on a CPU.

    The first half of the layers has dense attention and the rest sparse attention; the first layer has a dense MLP
    (unless it is the only one) and the rest a mixture of experts. The special tokens take the last 64 ids of the
    vocabulary, in the released order.

    Args:
        text (`dict`, *optional*): Fields of the language model to change; the per-layer lists and special tokens
            follow `num_hidden_layers` and `vocab_size` unless they are given.
        vision (`dict`, *optional*): Fields of the vision tower to change.
        **overrides: Fields of the whole model to change.
    """
    text, vision = text or {}, vision or {}
    num_layers = text.get("num_hidden_layers", 4)
    num_dense_attention, num_dense_mlp = num_layers // 2, min(1, num_layers - 1)
    first_special_id = text.get("vocab_size", 512) - SPECIAL_TOKEN_SLOTS

    text_config = {
        "vocab_size": first_special_id + SPECIAL_TOKEN_SLOTS,
        "hidden_size": 64,
        "intermediate_size": 32,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 131072,
        "layer_types": [FULL_ATTENTION.name] * num_dense_attention
        + [LEARNED_SPARSE.name] * (num_layers - num_dense_attention),
        "mlp_layer_types": ["dense"] * num_dense_mlp + ["sparse"] * (num_layers - num_dense_mlp),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        "rotary_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_block_size": 16,
        "index_topk_blocks": 4,
        "pad_token_id": first_special_id + _PAD_SLOT,
        "bos_token_id": first_special_id + _BOS_SLOT,
        "eos_token_id": first_special_id + _EOS_SLOT,
    }
    vision_config = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    composite = {
        "image_token_index": first_special_id + _IMAGE_SLOT,
        "video_token_index": first_special_id + _VIDEO_SLOT,
        "projector_hidden_size": 64,
    }
    return MiniMaxM3VLConfig(
        text_config=text_config | text, vision_config=vision_config | vision, **(composite | overrides)
    )


def small_config(**text: Any) -> MiniMaxM3VLConfig:
    """The configuration of a model that trains in minutes on one GPU, and takes at most 16 MB in bfloat16.

    It has every part of the released model: a layer with dense attention and a dense MLP, then three layers with
    learned sparse attention and a mixture of experts. Blocks, their number and the heads of a group are the released
    ones (128 keys, 16 blocks, 16 query heads of 128 channels for a key/value head), so that the kernels for Hopper run
    it. Experts are balanced by the routers' loss.

    Args:
        **text: Fields of the language model to change.
    """
    width, head_dim = 192, 128
    language = {
        "vocab_size": 2048,
        "hidden_size": width,
        "intermediate_size": 128,
        "dense_intermediate_size": 512,
        "shared_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "rotary_dim": head_dim // 2,
        "max_position_embeddings": 1048576,
        "layer_types": [FULL_ATTENTION.name] + [LEARNED_SPARSE.name] * 3,
        "num_local_experts": 8,
        "index_n_heads": 1,
        "index_head_dim": head_dim,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
    }
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return tiny_config(text=language | text, vision=vision, projector_hidden_size=width)
