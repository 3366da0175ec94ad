"""Activation checkpointing together with a cache: passes without gradients use it, others get an error that helps."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.models import text as text_module

pytestmark = pytest.mark.compatibility

CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
}


@pytest.fixture(params=["text", "composite"])
def model_and_inputs(request, make_pair, make_inputs, config):
    if request.param == "text":
        return make_pair(MiniMaxM3VLForCausalLM, config.text_config)[1], make_inputs(config, length=40)
    model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1]
    return model, make_inputs(config, images=[[1, 4, 6]], length=40)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=CACHES)
def test_generation_in_training_mode(model_and_inputs, options, use_reentrant):
    model, inputs = model_and_inputs
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    expected = model.generate(**inputs, **options)
    model.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("kind", CACHES)
def test_a_filled_cache_and_gradients_are_refused(model_and_inputs, kind):
    model, inputs = model_and_inputs
    cache = CACHES[kind](model.config.get_text_config())
    tokens = inputs["input_ids"][:, -9:]
    with torch.no_grad():
        model(tokens[:, :6], cache=cache)
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"`cache` holds 6 tokens, which gradient checkpointing cannot read"):
        model(tokens[:, 6:], cache=cache)
    with torch.no_grad():
        continued = model(tokens[:, 6:], cache=cache).logits
        torch.testing.assert_close(continued, model(tokens).logits[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CACHES)
def test_an_empty_cache_and_gradients_leave_it_empty_with_a_warning(model_and_inputs, kind, monkeypatch):
    model, inputs = model_and_inputs
    warnings = []
    monkeypatch.setattr(text_module.logger, "warning_once", warnings.append)
    expected = model(**inputs).logits
    cache = CACHES[kind](model.config.get_text_config())
    model.train().activation_checkpointing_enable()
    logits = model(**inputs, cache=cache).logits
    assert warnings == ["`cache` is not filled: gradient checkpointing cannot be combined with it."]
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.sum().backward()
