"""The text model against stock Transformers on unpadded input, and what its forward returns."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextModel

DENSE_ONLY = {"layer_types": ["full_attention"] * 4}
SPARSE_ONLY = {"layer_types": ["minimax_m3_sparse"] * 4, "mlp_layer_types": ["sparse"] * 4}
WIDE_SELECTION = {"index_block_size": 8, "index_topk_blocks": 5, "index_local_blocks": 2}
ALL_CHANNELS_ROTATE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}}


@pytest.mark.parametrize(
    "text",
    [{}, DENSE_ONLY, SPARSE_ONLY, WIDE_SELECTION, ALL_CHANNELS_ROTATE],
    ids=["mixed", "dense", "sparse", "wide", "rope"],
)
@pytest.mark.parametrize("length", [1, 17, 150])
def test_logits_equal_stock(make_pair, make_tokens, relative_error, text, length):
    stock, ours = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=text).text_config, seed=length)
    tokens = make_tokens(ours.config, 2, length)
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, stock(tokens).logits) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(make_pair, make_tokens, relative_error, implementation):
    stock, ours = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(ours.config, 2, 70)
    stock.set_attn_implementation(implementation)
    ours.set_attn_implementation(implementation)
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, stock(tokens).logits) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_agree(make_pair, make_tokens, relative_error, backend):
    stock, ours = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config, dtype=torch.float64)
    ours.config.msa_backend = backend
    for model in (stock, ours):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    tokens = make_tokens(ours.config, 2, 131)
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, stock(tokens).logits) < 1e-6


def test_gradients_equal_stock(make_pair, make_tokens, relative_error):
    stock, ours = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(ours.config, 2, 100)
    for model in (stock.train(), ours.train()):
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()
    theirs, compared = dict(stock.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None, name
            assert ".indexer." in name, f"{name} receives no gradient"
        else:
            assert relative_error(parameter.grad, theirs[name].grad) < 1e-4, name
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_pair, make_tokens, relative_error, use_reentrant):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 2, 60)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


def test_loss_parts_and_normalisation(make_pair, make_tokens):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 2, 40)
    labels = tokens.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        plain = model(tokens, labels=labels)
        balanced = model(tokens, labels=labels, output_router_logits=True)
        halved = model(tokens, labels=labels, num_items_in_batch=120)
    predicted = plain.logits[:, 9:-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(predicted, tokens[:, 10:].flatten())
    torch.testing.assert_close(plain.loss, expected)
    torch.testing.assert_close(halved.loss, expected * 60 / 120)
    torch.testing.assert_close(balanced.loss, plain.loss + model.config.router_aux_loss_coef * balanced.aux_loss)
    assert plain.aux_loss is None


def test_logits_to_keep(make_pair, make_tokens):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 2, 40)
    with torch.no_grad():
        every = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, every[:, -3:])
        kept = torch.tensor([0, 7, 39])
        torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, every[:, kept])


def test_recorded_outputs(make_pair, make_tokens, relative_error):
    stock, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 2, 70)
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = model(tokens, **flags), stock(tokens, **flags)
    for name in ("hidden_states", "attentions", "router_logits"):
        recorded, expected = getattr(ours, name), getattr(theirs, name)
        assert len(recorded) == len(expected)
        for layer, (a, b) in enumerate(zip(recorded, expected)):
            assert a.shape == b.shape, (name, layer)
            assert relative_error(a, b) < 1e-5, (name, layer)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)


def test_attention_weights_explain_the_output_under_padding(make_pair, make_tokens, relative_error):
    """Weights of padded input, holes included, are those of the unpadded rows."""
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens, mask = make_tokens(model.config, 1, 60), torch.zeros(1, 75, dtype=torch.long)
    mask[0, torch.randperm(75, generator=torch.Generator().manual_seed(0))[:60]] = 1
    padded = torch.zeros_like(mask)
    padded[mask == 1] = tokens[0]
    real = mask[0] == 1
    with torch.no_grad():
        alone = model(tokens, output_attentions=True).attentions
        together = model(padded, attention_mask=mask, output_attentions=True).attentions
    for layer, (a, b) in enumerate(zip(together, alone)):
        assert relative_error(a[:, :, real][..., real], b) < 1e-5, layer
        assert a[:, :, real][..., ~real].abs().max() == 0, layer


def test_full_causal_mask_equals_no_mask(make_pair, make_tokens, relative_error):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 2, 70)
    allowed = torch.ones(70, 70, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(tokens).logits
        for mask in (allowed, additive, {"full_attention": additive, "minimax_m3_sparse": additive}):
            assert relative_error(model(tokens, attention_mask=mask).logits, expected) < 1e-5


def test_own_mask_hides_keys(make_pair, make_tokens):
    """A key that a 4-D mask hides from all queries changes nothing, not even the selection."""
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 1, 70)
    allowed = torch.ones(70, 70, dtype=torch.bool).tril()
    allowed[:, 20] = False
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 100
    with torch.no_grad():
        a, b = (model(x, attention_mask=allowed[None, None]).logits for x in (tokens, other))
    torch.testing.assert_close(a[:, 21:], b[:, 21:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(make_pair, make_tokens, relative_error, dtype):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=DENSE_ONLY).text_config)
    tokens = make_tokens(model.config, 2, 50)
    with torch.no_grad():
        expected = model(tokens).logits
        logits = model.to(dtype)(tokens).logits
    assert logits.dtype == dtype
    assert relative_error(logits.float(), expected) < 5e-2


def test_autocast_runs_in_half_precision(make_pair, make_tokens, relative_error):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_experts_run_through_transformers_kernels():
    """Transformers decides by the source of the model's module, unless the class answers itself."""
    model = MiniMaxM3VLTextModel(tiny_config().text_config)
    assert model.config._experts_implementation == "grouped_mm"


def test_a_field_changed_after_construction_is_validated():
    config = tiny_config().text_config
    config.index_local_blocks = 5
    with pytest.raises(StrictDataclassError, match="`index_local_blocks` must not exceed `index_topk_blocks`"):
        MiniMaxM3VLTextModel(config)


def test_tuples_instead_of_named_outputs(make_pair, make_tokens):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 1, 20)
    with torch.no_grad():
        named = model(tokens, labels=tokens)
        loss, logits = model(tokens, labels=tokens, return_dict=False)[:2]
        model.config.return_dict = False
        by_config = model(tokens, labels=tokens)
    torch.testing.assert_close((loss, logits), (named.loss, named.logits))
    torch.testing.assert_close(by_config[1], named.logits)


def test_stock_configs_are_refused(to_stock_config):
    with pytest.raises(TypeError, match=r"must be a configuration_minimax_m3.MiniMaxM3VLTextConfig, got transformers"):
        MiniMaxM3VLForCausalLM(to_stock_config(tiny_config().text_config))


def test_dropout_of_sparse_layers_is_said_to_be_none(caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    MiniMaxM3VLTextModel(tiny_config(text={"attention_dropout": 0.25}).text_config)
    transformers_logger.removeHandler(caplog.handler)
    assert "`attention_dropout` is 0.25, but layers that attend to chosen blocks apply none" in caplog.text
