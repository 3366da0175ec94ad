"""The attention weights that `output_attentions` returns: the output comes from them, so gradients reach them."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.layers.materialized import materialized_attention
from modeling_minimax_m3.runtime.layout_building import build_layout

pytestmark = pytest.mark.compatibility

LENGTH = 60
KINDS = {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_structured", "minimax_m3_sparse"]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config(text={"initializer_range": 0.2, **KINDS}).text_config).eval()


def causal_mask(mask):
    return (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (mask[:, None] == 1))[:, None]


LEFT, HOLES = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
LEFT[1, :17] = 0
HOLES[1, 20:33] = 0
LAYOUTS = {
    "uniform": {},
    "left padding": {"attention_mask": LEFT},
    "padding between": {"attention_mask": HOLES},
    "own mask": {"attention_mask": causal_mask(HOLES)},
    "packed": {"position_ids": torch.cat((torch.arange(23), torch.arange(37))).expand(2, -1), "use_cache": False},
}


def gradients_of(model, logits, real):
    model.zero_grad()
    # Squares, as the gradient of a sum over softmax weights is 0.
    logits[real].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_flow_through_the_weights(model, make_tokens, relative_error, name):
    """Values and gradients equal those of a pass that returns no weights."""
    tokens, layout = make_tokens(model.config, 2, LENGTH), LAYOUTS[name]
    real = HOLES == 1 if name == "own mask" else layout.get("attention_mask", torch.ones(2, LENGTH)) == 1
    usual = model(tokens, **layout).logits
    expected = gradients_of(model, usual, real)
    output = model(tokens, **layout, output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    gradients = gradients_of(model, output.logits, real)
    assert relative_error(output.logits[real], usual[real]) < 1e-5
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        # The indexers', and key norms' whose parts cancel out, are about 0.
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-4)
    assert len(output.attentions) == 4
    assert all(weights.grad.abs().max() > 0 for weights in output.attentions)


def test_gradients_of_the_weights_equal_stock(make_pair, make_tokens, relative_error):
    tokens, gradients = None, []
    for model in make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config):
        model.set_attn_implementation("eager")
        tokens = make_tokens(model.config, 2, LENGTH)
        output = model(tokens, labels=tokens, output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.loss.backward()
        gradients.append([weights.grad for weights in output.attentions])
    for theirs, ours in zip(*gradients, strict=True):
        # Stock has gradients at weights of 0 too, of keys that no query may see.
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        assert relative_error(ours[..., seen], theirs[..., seen]) < 1e-4


@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["uniform", "left padding", "padding between"])
@pytest.mark.parametrize("filled", ["new", "reset"])
@torch.no_grad()
def test_static_caches_have_one_width(model, make_tokens, relative_error, mask, filled):
    """The width covers all slots, also at the first pass. The slots in use hold the weights of a dynamic cache."""
    tokens = make_tokens(model.config, 2, LENGTH)
    outputs = {}
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=70)):
        if filled == "reset":
            model(tokens[:, :5], cache=cache)
            cache.reset()
        outputs[type(cache)] = [
            model(
                tokens[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                cache=cache,
                output_attentions=True,
            )
            for start, stop in ((0, 50), (50, 51), (51, LENGTH))
        ]
    real = torch.ones_like(tokens) == 1 if mask is None else mask == 1
    for dynamic, static, rows in zip(*outputs.values(), real.split((50, 1, 9), dim=1)):
        assert relative_error(static.logits[rows], dynamic.logits[rows]) < 1e-5
        for theirs, ours in zip(dynamic.attentions, static.attentions, strict=True):
            used = theirs.shape[-1]
            assert ours.shape == (*theirs.shape[:-1], 70)
            theirs, ours = theirs.transpose(1, 2)[rows], ours.transpose(1, 2)[rows]
            torch.testing.assert_close(ours[..., :used], theirs, rtol=1e-4, atol=1e-6)
            assert ours[..., used:].abs().max() == 0


def test_sparse_weights_of_double_precision():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 9, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    layout = build_layout(None, None, None, 1, 9, torch.device("cpu"))
    blocks = torch.arange(3, dtype=torch.int32).expand(1, 9, 2, -1)  # all of them
    out, weights = materialized_attention(query, key, value, blocks, layout, block_size=4, softmax_scale=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(states.transpose(1, 2) for states in (query, key, value)), is_causal=True, scale=0.5, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert weights.dtype == torch.float64
