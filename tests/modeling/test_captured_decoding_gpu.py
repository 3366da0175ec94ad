"""`generate` captures its decoding step on a GPU: the tokens of the plain step, over every kind of cache and batch."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache, TextIteratorStreamer

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.captured_decoding import CapturedDecoding

from .conftest import Prescribed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64, "index_topk_blocks": 3}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(make_pair):
    return make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=TEXT).text_config)[1].cuda()


@pytest.fixture
def replays(monkeypatch):
    """Counts the replays of graphs."""
    calls = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: calls.append(graph) or replay(graph))
    return calls


@pytest.fixture
def plain(monkeypatch):
    """Calls a function without graphs."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setenv("MINIMAX_M3_CUDA_GRAPHS", "0")
            return function(*args, **kwargs)

    return call


def batch_of(tokens, padded):
    mask = torch.ones_like(tokens)
    if padded:
        for row in range(1, len(mask)):
            mask[row, : 11 * row] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_the_same(model, make_tokens, replays, plain, cache, batch, padded, seed):
    inputs = batch_of(make_tokens(model.config, batch, 40, seed=seed).cuda(), padded)
    # 60 tokens fill the dynamic buffers, which begin with room for 80.
    options = GREEDY | {"max_new_tokens": 60} | ({} if cache == "dynamic" else {"cache_implementation": "static"})
    expected = plain(model.generate, **inputs, **(GREEDY | {"max_new_tokens": 60}))
    assert not replays
    assert torch.equal(model.generate(**inputs, **options), expected)
    captures = 2 if cache == "dynamic" else 1
    assert len(replays) == 59 - captures and len(set(map(id, replays))) <= captures


def test_sampled_tokens_are_the_same(model, make_tokens, replays, plain):
    inputs = batch_of(make_tokens(model.config, 2, 40).cuda(), padded=True)
    options = GREEDY | {"max_new_tokens": 30, "do_sample": True, "top_p": 0.9, "num_return_sequences": 2}
    torch.manual_seed(1)
    expected = plain(model.generate, **inputs, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert replays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_in_half_precision(model, make_tokens, relative_error, replays, plain, dtype):
    model = copy.deepcopy(model).to(dtype)
    tokens = make_tokens(model.config, 3, 100).cuda()
    inputs = batch_of(tokens[:, :50], padded=True)
    options = GREEDY | {"max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
    options["logits_processor"] = LogitsProcessorList([Prescribed(tokens)])
    expected = plain(model.generate, **inputs, **options).logits
    logits = model.generate(**inputs, **options).logits
    assert replays
    errors = sorted(relative_error(a, b) for a, b in zip(logits, expected))
    assert errors[len(errors) * 8 // 10] < 3e-2  # an expert or a block near a tie changes a step


def test_images_and_prefix_reuse(make_pair, make_inputs, replays, plain):
    """Of the composite model; the second turn goes on with the cache of the first."""
    model = make_pair(MiniMaxM3SparseForConditionalGeneration, tiny_config(text=TEXT))[1].cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(model.config, images=[[1, 4, 4]], length=40).items()}

    def two_turns():
        options = GREEDY | {"max_new_tokens": 20}
        cache = DynamicCache(config=model.config.text_config)
        first = model.generate(**inputs, past_key_values=cache, **options)
        second = torch.cat([first, first[:, 30:39]], dim=1)
        return model.generate(
            **(inputs | {"input_ids": second, "attention_mask": torch.ones_like(second)}),
            past_key_values=cache,
            **options,
        )

    expected = plain(two_turns)
    assert not replays
    assert torch.equal(two_turns(), expected)
    assert len(replays) > 30


def test_streamer_in_a_thread(model, make_tokens, replays, plain):
    class Words:
        def decode(self, tokens, **kwargs):
            return "".join(f"{token} " for token in tokens)

    inputs = batch_of(make_tokens(model.config, 1, 40).cuda(), padded=False)
    expected = plain(model.generate, **inputs, **GREEDY, max_new_tokens=20)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs=inputs | GREEDY | {"max_new_tokens": 20, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(token) for token in expected[0, 40:].tolist()]
    assert replays


@pytest.fixture
def decoding_model(model):
    """With the experts that `generate` takes for its decoding steps; the default ones read values on the host."""
    model = copy.deepcopy(model)
    model.set_experts_implementation("batched_mm")
    return model


@torch.no_grad()
def test_a_failed_capture_goes_on_without(model, make_tokens, relative_error, replays, monkeypatch):
    """Nothing is lost: each token is counted once, and the steps are those without a graph."""
    tokens = make_tokens(model.config, 1, 60).cuda()
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    decode = CapturedDecoding(model)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", lambda graph: None)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda graph, **kwargs: 1 / 0)
    model(tokens[:, :30], cache=cache)
    model(tokens[:, :30], cache=other)
    for position in range(30, 40):
        inputs = {"input_ids": tokens[:, position, None]}
        expected = model(**inputs, cache=other).logits
        assert relative_error(decode(**inputs, cache=cache, return_dict=True).logits, expected) < 1e-5
    assert cache.get_seq_length() == 40 and not replays


@torch.no_grad()
def test_a_cache_that_changed_meanwhile(decoding_model, make_tokens, relative_error, replays):
    """Cropped, reordered, or continued by another call: the step notices, and is captured again."""
    model = decoding_model
    tokens = make_tokens(model.config, 2, 60).cuda()
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    decode = CapturedDecoding(model)

    def step(start, stop):
        mask = torch.ones(2, stop, dtype=torch.long, device="cuda")
        inputs = {"input_ids": tokens[:, start:stop], "attention_mask": mask}
        expected = model(**inputs, cache=other).logits
        assert relative_error(decode(**inputs, cache=cache, return_dict=True).logits, expected) < 1e-5

    step(0, 30)
    for position in range(30, 36):
        step(position, position + 1)
    assert len(replays) == 5
    for each in (cache, other):
        each.crop(-4)
    for position in range(32, 36):
        step(position, position + 1)
    for each in (cache, other):
        each.reorder_cache(torch.tensor([1, 0], device="cuda"))
    step(36, 37)
    for each in (cache, other):
        model(tokens[:, 37:39], cache=each)
    step(39, 40)
    step(40, 41)
    assert cache.get_seq_length() == 41 and cache.layers[0].keys.shape[2] == 41


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reset"])
def test_a_static_cache_that_changed_meanwhile(decoding_model, make_tokens, relative_error, replays, change):
    model = decoding_model
    tokens = make_tokens(model.config, 1, 60).cuda()
    cache, other = (StaticCache(config=model.config, max_cache_len=50) for _ in range(2))
    decode = CapturedDecoding(model)

    def step(start, stop):
        inputs = {"input_ids": tokens[:, start:stop]}
        expected = model(**inputs, cache=other).logits
        assert relative_error(decode(**inputs, cache=cache, return_dict=True).logits, expected) < 1e-5

    step(0, 30)
    for position in range(30, 36):
        step(position, position + 1)
    assert len(replays) == 5
    for each in (cache, other):
        each.crop(-4) if change == "crop" else each.reset()
    if change == "reset":
        step(0, 32)
    for position in range(32, 50):
        step(position, position + 1)
    with pytest.raises(ValueError, match="50 slots, got tokens for 51"):
        decode(input_ids=tokens[:, 50:51], cache=cache, return_dict=True)


def test_inference_mode(model, make_tokens, replays, plain):
    inputs = batch_of(make_tokens(model.config, 2, 40).cuda(), padded=True)
    options = GREEDY | {"max_new_tokens": 20}
    expected = plain(model.generate, **inputs, **options)
    with torch.inference_mode():
        for cache in (None, "static"):
            assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), expected)
    assert replays


def test_threads(model, make_tokens, plain):
    """Each has the tokens that it has alone."""
    prompts = [batch_of(make_tokens(model.config, 1, 40, seed=seed).cuda(), padded=False) for seed in range(4)]
    options = GREEDY | {"max_new_tokens": 50}
    expected = [plain(model.generate, **inputs, **options) for inputs in prompts]
    found = [None] * len(prompts)

    def run(index):
        found[index] = model.generate(**prompts[index], **options)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_what_is_not_captured(model, make_tokens, replays, plain):
    """Hooks, padding between tokens, and outputs beside the logits: the plain step, with the same tokens."""
    tokens = make_tokens(model.config, 2, 40).cuda()
    inputs, options = {"input_ids": tokens}, GREEDY | {"max_new_tokens": 8}
    expected = plain(model.generate, **inputs, **options)
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert torch.equal(model.generate(**inputs, **options), expected)
    handle.remove()
    model.generate(**inputs, **options, output_attentions=True, return_dict_in_generate=True)
    model.generate(**inputs, **options, disable_compile=True)
    mask = torch.ones_like(tokens)
    mask[1, 20:23] = 0
    expected = plain(model.generate, **inputs, attention_mask=mask, **options)
    assert torch.equal(model.generate(**inputs, attention_mask=mask, **options), expected)
    assert not replays


def test_memory_is_given_back(model, make_tokens):
    """Graphs of many calls, of different lengths, leave nothing behind, neither in use nor held by PyTorch."""

    def run(count):
        for call in range(count):
            tokens = make_tokens(model.config, 1 + call % 3, 20 + call % 17).cuda()
            model.generate(tokens, **GREEDY, max_new_tokens=4 + call % 5)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    run(60)
    allocated, reserved = run(60)
    later_allocated, later_reserved = run(120)
    assert later_allocated <= allocated and later_reserved <= reserved
