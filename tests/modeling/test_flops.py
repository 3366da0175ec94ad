"""The counted operations, checked against a counter of operators and against the keys that layers attend to."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration_minimax_m3 import released_config, tiny_config
from modeling_minimax_m3 import msa
from modeling_minimax_m3.flops import attended_keys, forward_flops
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

STRUCTURED = {
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "structured_local_blocks": 1,
    "structured_anchor_blocks": 2,
    "structured_anchor_stride": 2,
    "structured_random_blocks": 2,
}
CONFIG = tiny_config(
    text=STRUCTURED | {"layer_types": ["full_attention", "minimax_m3_structured", *["minimax_m3_sparse"] * 2]}
).text_config


def keys_of(block_indices, tokens, block_size):
    """Keys at or before each query in its listed blocks, one by one, for the first head."""
    listed = [set(row.tolist()) for row in block_indices[:, 0]]
    return sum(key // block_size in listed[t] for t in range(tokens) for key in range(t + 1))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11, 12, 13, 20, 61])
def test_attended_keys_are_those_of_the_lists(tokens):
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    generator = torch.Generator().manual_seed(tokens)
    index = (torch.randn(tokens, 1, 8, generator=generator), torch.randn(tokens, 8, generator=generator))
    learned = msa.select_blocks(*index, **lengths, block_size=4, topk=3)
    structured = msa.structured_blocks(
        **lengths, num_kv_heads=1, block_size=4, local_blocks=1, anchor_blocks=2, anchor_stride=2, random_blocks=2,
        seed=0, layer_idx=1,
    )  # fmt: skip
    assert attended_keys(CONFIG, "minimax_m3_sparse", tokens) == keys_of(learned, tokens, 4)
    assert attended_keys(CONFIG, "minimax_m3_structured", tokens) == keys_of(structured, tokens, 4)
    assert attended_keys(CONFIG, "full_attention", tokens) == sum(range(tokens + 1))


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_products_with_weights_are_those_that_operators_count(experts):
    """The counter counts products with weights. It leaves out the sparse operators and the dense layer's sdpa."""
    tokens = 61
    model = MiniMaxM3VLForCausalLM(CONFIG).eval()
    model.config._experts_implementation = experts
    model.config._attn_implementation = "sdpa"
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        model(torch.arange(tokens)[None], use_cache=False)
    by_operator = counted.get_flop_counts()["Global"]
    products = sum(count for operator, count in by_operator.items() if "attention" not in str(operator))
    flops = forward_flops(model.config, tokens)
    assert products == sum(flops.values()) - flops["attention"] - flops["index scores"]


def test_parts_between_tokens():
    tokens, heads, head_dim = 61, CONFIG.num_attention_heads, CONFIG.head_dim
    keys = {kind: attended_keys(CONFIG, kind, tokens) for kind in CONFIG.layer_types}
    flops = forward_flops(CONFIG, tokens)
    assert flops["attention"] == 4 * heads * head_dim * sum(keys[kind] for kind in CONFIG.layer_types)
    assert flops["index scores"] == 2 * (2 * CONFIG.index_n_heads * CONFIG.index_head_dim) * keys["full_attention"]


def test_released_geometry():
    """About 23B parameters act on a token, without those of the embeddings."""
    flops = forward_flops(released_config().text_config, 1)
    by_weights = ("attention projections", "indexer projections", "mlp")
    assert sum(flops[part] for part in by_weights) / 2 == pytest.approx(23e9, rel=0.03)
