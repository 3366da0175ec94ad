"""`generate` with every kind of cache and strategy agrees with recomputing everything at each step."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models import text_generation
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

pytestmark = pytest.mark.compatibility

NEW = 20


@pytest.fixture(scope="module")
def model(make_pair):
    model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)[1]
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def batch(model, make_tokens):
    """Two left-padded prompts of 70 and 40 tokens."""
    ids = make_tokens(model.config, 2, 70)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def greedy(model, batch):
    return model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=False)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 13},
}


@pytest.mark.parametrize("cache", CACHES)
def test_greedy(model, batch, greedy, cache):
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, **CACHES[cache]), greedy)


class TestLongPrompts:
    """Read in pieces by `generate` itself."""

    @pytest.fixture
    def passes(self, model, monkeypatch):
        """How many tokens each pass reads; pieces of 16."""
        monkeypatch.setattr(text_generation, "_PREFILL_TOKENS", 16)
        monkeypatch.setattr(text_generation, "_UNDIVIDED_DEVICES", ())
        counts = []
        handle = model.model.embed_tokens.register_forward_hook(lambda module, args, out: counts.append(out.shape[1]))
        yield counts
        handle.remove()

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_greedy(self, model, batch, greedy, passes, cache):
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, **CACHES[cache]), greedy)
        assert passes == [16] * 4 + [6] + [1] * (NEW - 1)

    def test_a_second_turn(self, model, make_tokens, passes):
        """Only what the cache does not hold is read."""
        tokens = make_tokens(model.config, 1, 90)
        options = {"max_new_tokens": NEW, "do_sample": False}
        expected = model.generate(tokens, **options)
        passes.clear()
        cache = DynamicCache(config=model.config)
        first = model.generate(tokens[:, :40], max_new_tokens=1, do_sample=False, past_key_values=cache)
        assert first.shape[1] == 41 and cache.get_seq_length() == 40
        assert torch.equal(model.generate(tokens, **options, past_key_values=cache), expected)
        assert passes == [16, 16, 8, 16, 16, 16, 2] + [1] * (NEW - 1)

    @pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"use_cache": False}], ids=str)
    def test_what_needs_the_whole_prompt(self, model, batch, greedy, passes, options):
        options |= {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
        assert torch.equal(model.generate(**batch, **options).sequences, greedy)
        assert passes[0] == 70

    def test_a_size_that_the_caller_asks_for(self, model, batch, greedy, passes):
        options = {"max_new_tokens": NEW, "do_sample": False, "prefill_chunk_size": 50}
        assert torch.equal(model.generate(**batch, **options), greedy)
        assert passes[:2] == [50, 20]


def test_batch_equals_single_prompts(model, batch, greedy):
    for row in range(2):
        prompt = batch["input_ids"][row : row + 1, batch["attention_mask"][row] == 1]
        alone = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(alone[0, -NEW:], greedy[row, -NEW:])


@pytest.mark.parametrize("cache", CACHES)
def test_beam_search(model, batch, cache):
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options, **CACHES[cache]), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_sampling(model, batch, cache):
    outputs = []
    for options in ({"use_cache": False}, CACHES[cache]):
        torch.manual_seed(0)
        outputs.append(
            model.generate(**batch, max_new_tokens=NEW, do_sample=True, num_return_sequences=2, top_k=20, **options)
        )
    assert torch.equal(*outputs)


def test_assisted_by_prompt_lookup(model, batch, greedy):
    """Candidates are verified several at a time, and the cache is cropped to the accepted ones."""
    prompt = batch["input_ids"][:1]
    looked_up = model.generate(prompt, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up, greedy[:1])


def test_assisted_by_a_model(model, make_pair, batch, greedy):
    assistant = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"num_hidden_layers": 2}).text_config, seed=1)[1]
    assistant.generation_config = model.generation_config
    assisted = model.generate(batch["input_ids"][:1], max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, greedy[:1])


def test_offloaded_static_caches_are_not_compiled(model):
    """Transformers compiles for static caches by itself, but not for an offloaded one, which moves at every step."""
    config = GenerationConfig(compile_config=CompileConfig())
    config.compile_config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=8)
    assert model._valid_auto_compile_criteria({CACHE_NAME: cache}, config)
    cache.offloading = True
    assert not model._valid_auto_compile_criteria({CACHE_NAME: cache}, config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_next_turn_after_right_padding(model, make_tokens, cache):
    """A conversation that goes on in its cache: answers of unequal length leave padding between real tokens."""
    ids = make_tokens(model.config, 2, 60)
    mask = torch.ones_like(ids)
    mask[1, 20:33] = 0
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = [
        model.generate(ids[row : row + 1, mask[row] == 1], **options, use_cache=False)[0, -NEW:] for row in range(2)
    ]
    together = model.generate(ids, attention_mask=mask, **options, **CACHES[cache])
    for row in range(2):
        assert torch.equal(together[row, -NEW:], expected[row])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_past_the_context_length(make_pair, make_tokens, cache):
    """Stock warns once and continues, and so does ours, with the tokens of a model whose context is longer."""
    short, long = (
        make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"max_position_embeddings": limit}).text_config)[1]
        for limit in (40, 1000)
    )
    tokens = make_tokens(short.config, 1, 30)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **CACHES[cache]}
    generated = short.generate(tokens, max_new_tokens=20, **options)
    assert torch.equal(generated, long.generate(tokens, max_new_tokens=20, **options))
    assert short.generate(tokens, **options).shape == (1, 40), "the default length stops at the context's end"


def test_rotary_that_stretches_has_no_context_length(make_pair, make_tokens):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = tiny_config(text={"max_position_embeddings": 40, "rope_parameters": rope}).text_config
    model = make_pair(MiniMaxM3VLForCausalLM, config)[1]
    tokens = make_tokens(config, 1, 60)
    assert model.generate(tokens, max_new_tokens=3, eos_token_id=None, pad_token_id=0).shape == (1, 63)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_early_exit(model, batch, greedy, layer):
    """The first layers draft, in a cache of as many layers, and leave the model unchanged."""
    options = {"max_new_tokens": NEW, "do_sample": False, "assistant_early_exit": layer}
    calls = []
    last = model.model.layers[3].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(batch["input_ids"][:1], **options), greedy[:1])
    last.remove()
    assert (len(calls) < NEW) == (layer < 4)  # with all layers the drafts count as well
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("layer", [0, 5])
def test_early_exit_from_no_layer(model, batch, layer):
    with pytest.raises(
        ValueError, match=f"`assistant_early_exit` must name one of the model's 4 layers.* got {layer}"
    ):
        model.generate(batch["input_ids"][:1], max_new_tokens=2, assistant_early_exit=layer)


def test_an_error_while_drafting_leaves_the_model_whole(model, batch):
    def fail(*_):
        raise RuntimeError("out of memory")

    first = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(batch["input_ids"][:1], max_new_tokens=2, assistant_early_exit=2)
    first.remove()
    assert model.config.num_hidden_layers == 4
