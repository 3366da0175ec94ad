"""Captured decoding on a CPU: what keeps a step from being captured, and the steps themselves without a graph."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime import captured_decoding as captured
from modeling_minimax_m3.runtime.graph_pieces import current_capture

LENGTH = 30


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """The question fails where there is no driver."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def model(make_pair):
    return make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)[1]


@pytest.fixture
def passes(monkeypatch):
    """Runs each pass in Python, as a replay would run it, and lists the objects that stand for a capture."""
    made = []
    init = captured._CapturedPass.__init__
    monkeypatch.setattr(captured._CapturedPass, "_on_side_stream", lambda self, function: function())
    monkeypatch.setattr(captured._CapturedPass, "_capture", lambda self: None)
    monkeypatch.setattr(
        captured._CapturedPass, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1]
    )
    return made


class Pair:
    """The same steps through `CapturedDecoding` and through the model, each with a cache of its own."""

    def __init__(self, model, tokens, make_cache, mask=None):
        self.model, self.tokens, self.mask = model, tokens, mask
        self.cache, self.other = make_cache(), make_cache()
        self.decode = captured.CapturedDecoding(model)

    @torch.no_grad()
    def step(self, start, stop):
        inputs = {"input_ids": self.tokens[:, start:stop]}
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[:, :stop]
        expected = self.model(**inputs, cache=self.other)
        found = self.decode(**inputs, cache=self.cache, return_dict=True)
        assert type(found) is type(expected) and found.cache is self.cache
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=70),
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("kind", CACHES)
def test_steps_are_those_of_the_model(model, make_tokens, passes, kind, padded):
    """A dynamic cache is full after 60 tokens; then another pass takes the place of the first."""
    tokens = make_tokens(model.config, 3, 70)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :7], mask[2, :19] = 0, 0
    pair = Pair(model, tokens, lambda: CACHES[kind](model), mask)
    pair.step(0, LENGTH)
    for position in range(LENGTH, 70):
        pair.step(position, position + 1)
    assert len(passes) == (2 if kind == "dynamic" else 1)
    assert int(pair.cache.get_seq_length()) == 70


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_changed_meanwhile(model, make_tokens, passes, kind):
    """Cropped, reordered, or continued by another call: another pass begins."""
    tokens = make_tokens(model.config, 2, 70)
    pair = Pair(model, tokens, lambda: CACHES[kind](model))
    pair.step(0, LENGTH)
    pair.step(30, 31)
    for cache in (pair.cache, pair.other):
        cache.crop(-2)
    pair.step(29, 30)
    pair.step(30, 31)
    assert len(passes) == 2
    with torch.no_grad():
        for cache in (pair.cache, pair.other):
            model(tokens[:, 31:34], cache=cache)
    pair.step(34, 35)
    assert len(passes) == 3
    for cache in (pair.cache, pair.other):
        cache.reorder_cache(torch.tensor([1, 0]))
    pair.step(35, 36)
    pair.step(36, 37)
    assert len(passes) == (4 if kind == "dynamic" else 3)  # a static cache reorders in place


@pytest.mark.parametrize("kind", CACHES)
def test_layers_that_lend_memory_share_a_counter(model, make_tokens, passes, kind):
    """A pass raises it once, after the last layer. A static cache of the caller keeps its own counters."""
    pair = Pair(model, make_tokens(model.config, 2, 40), lambda: CACHES[kind](model))
    pair.step(0, LENGTH)
    for position in range(LENGTH, 35):
        pair.step(position, position + 1)
        layers = passes[0]._graph_cache.layers
        assert len(layers) == model.config.num_hidden_layers
        counters = {id(layer.cumulative_length) for layer in layers}
        if kind == "dynamic":
            assert counters == {id(passes[0]._counter)} and not any(layer.counts_tokens for layer in layers)
        else:
            assert passes[0]._counter is None and len(counters) == len(layers)
            assert layers == pair.cache.layers and all(layer.counts_tokens for layer in layers)
        assert {int(layer.cumulative_length) for layer in layers} == {position + 1}
    assert len(passes) == 1


def test_layers_of_other_kinds_or_lengths_share_no_counter(model, make_tokens):
    tokens = make_tokens(model.config, 1, 10)

    def pass_over(prepare):
        caches = [CACHES[kind](model) for kind in ("dynamic", "static")]
        with torch.no_grad():
            for cache in caches:
                model(tokens, cache=cache)
            layers = prepare(caches[0].layers, caches[1].layers)
        one = captured._CapturedPass.__new__(captured._CapturedPass)
        one._memory = [captured._LayerMemory(layer) for layer in layers]
        return one._share_counter(), [memory.static_layer for memory in one._memory]

    def crop_last(dynamic, static):
        dynamic[-1].crop(-1)
        return dynamic

    counter, layers = pass_over(lambda dynamic, static: dynamic)
    assert int(counter) == 10 and all(layer.cumulative_length is counter for layer in layers)
    for prepare in (lambda dynamic, static: static, lambda dynamic, static: [*dynamic[:3], static[3]], crop_last):
        counter, layers = pass_over(prepare)
        assert counter is None and all(layer.counts_tokens for layer in layers)
        assert len({id(layer.cumulative_length) for layer in layers}) == len(layers)


@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("kind", CACHES)
def test_generated_tokens_are_the_same(model, make_tokens, passes, monkeypatch, kind, padded):
    tokens = make_tokens(model.config, 2, 40)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :7] = 0
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": mask} | ({"cache_implementation": "static"} if kind == "static" else {})
    expected = model.generate(tokens, **options)
    assert not passes
    monkeypatch.setattr(captured, "_DEVICE_TYPE", "cpu")
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(passes) == (2 if kind == "dynamic" else 1)


@pytest.mark.parametrize("kind", CACHES)
def test_inference_mode(model, make_tokens, passes, kind):
    """Its tensors have no version."""
    with torch.inference_mode():
        pair = Pair(model, make_tokens(model.config, 2, 40), lambda: CACHES[kind](model))
        pair.step(0, LENGTH)
        for position in range(LENGTH, 36):
            pair.step(position, position + 1)
    assert len(passes) == 1


def test_a_full_static_cache_is_named(model, make_tokens, passes):
    tokens = make_tokens(model.config, 1, 71)
    pair = Pair(model, tokens, lambda: CACHES["static"](model))
    pair.step(0, 69)
    pair.step(69, 70)
    with pytest.raises(ValueError, match="70 slots, got tokens for 71"), torch.no_grad():
        pair.decode(input_ids=tokens[:, 70:], cache=pair.cache, return_dict=True)


def test_a_pass_that_cannot_be_captured(model, make_tokens, passes, monkeypatch):
    """The steps go on without: nothing is lost, no token is counted twice."""

    def fail(self):
        raise captured._CaptureFailed from RuntimeError("no")

    monkeypatch.setattr(captured._CapturedPass, "_capture", fail)
    pair = Pair(model, make_tokens(model.config, 2, 40), lambda: CACHES["dynamic"](model))
    pair.step(0, LENGTH)
    for position in range(LENGTH, 40):
        pair.step(position, position + 1)
    assert len(passes) == 1 and pair.cache.get_seq_length() == 40


@torch.no_grad()
def test_padding_between_tokens_is_not_captured(model, make_tokens, passes):
    tokens = make_tokens(model.config, 2, 40)
    mask = torch.ones_like(tokens)
    mask[1, 10:14] = 0
    pair = Pair(model, tokens, lambda: CACHES["dynamic"](model), mask)
    pair.step(0, LENGTH)
    pair.step(30, 31)
    assert not passes


OBSTACLES = {
    "more than one token": {"input_ids": torch.ones(2, 2, dtype=torch.long)},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.ones(2, 1, 64)},
    "there is no cache": {"cache": None},
    "another form": {"attention_mask": torch.ones(2, 1, 1, 31)},
    "inputs beside tokens": {"pixel_values": torch.ones(4)},
    "more than logits": {"output_hidden_states": True},
}


@pytest.mark.parametrize("reason", OBSTACLES)
@torch.no_grad()
def test_inputs_that_are_not_captured(model, make_tokens, reason):
    cache = model(make_tokens(model.config, 2, LENGTH)).cache
    inputs = {"input_ids": make_tokens(model.config, 2, 1), "cache": cache}
    assert captured._obstacle_of_inputs(model, inputs) is None
    assert reason in captured._obstacle_of_inputs(model, inputs | OBSTACLES[reason])
    with torch.enable_grad():
        assert "gradients" in captured._obstacle_of_inputs(model, inputs)


def test_models_that_are_not_captured(model, monkeypatch):
    assert captured.obstacle_of_model(model) == "the model is on cpu"
    monkeypatch.setattr(captured, "_DEVICE_TYPE", "cpu")
    assert captured.obstacle_of_model(model) is None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "`model.layers.0` has forward hooks" in captured.obstacle_of_model(model)
    handle.remove()
    assert "training mode" in captured.obstacle_of_model(model.train())
    model.eval().lm_head.to("meta")
    assert captured.obstacle_of_model(model) == "`lm_head.weight` is on meta, other weights are on cpu"
    monkeypatch.setenv("MINIMAX_M3_CUDA_GRAPHS", "0")
    assert captured.obstacle_of_model(model) == "MINIMAX_M3_CUDA_GRAPHS is 0"


def test_models_of_several_processes_that_are_not_captured(model, monkeypatch):
    monkeypatch.setattr(captured, "_DEVICE_TYPE", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(captured, "gathers_weights", lambda model: True)
        assert captured.obstacle_of_model(model) == "each pass gathers weights from all processes"
    model._pp_forward_wrapped = True
    assert captured.obstacle_of_model(model) == "the layers are stages of a pipeline"


def test_attention_weights_once_do_not_prevent_captures(model, make_tokens, monkeypatch):
    """Transformers leaves hooks behind that do nothing afterwards."""
    monkeypatch.setattr(captured, "_DEVICE_TYPE", "cpu")
    with torch.no_grad():
        model(make_tokens(model.config, 1, 5), output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    assert captured.obstacle_of_model(model) is None


def test_an_error_in_a_pass_counts_no_token_twice(model, make_tokens, passes, monkeypatch):
    """As an interrupt in a notebook. Rows that the pass has counted already are counted anew."""
    pair = Pair(model, make_tokens(model.config, 2, 40), lambda: CACHES["dynamic"](model))
    pair.step(0, LENGTH)
    pair.step(30, 31)
    for position in (31, 32):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.model.layers[-1].mlp, "forward", _interrupt)
            with torch.no_grad():
                pair.decode(input_ids=pair.tokens[:, position : position + 1], cache=pair.cache, return_dict=True)
        pair.step(position, position + 1)
    assert len(passes) == 3


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_memory_of_a_capture_that_failed_is_used_again(model, make_tokens, monkeypatch):
    """PyTorch would keep it, more with each `generate`."""
    holders, passes_over = [], []

    class Graph:
        def capture_begin(self, pool=None, capture_error_mode=""):
            (holders if pool is None else passes_over).append(self)

        def capture_end(self): ...

        def pool(self):
            return id(self)

    def forward(one):
        if current_capture() is not None:
            raise NotImplementedError("no graph can hold this")
        whole(one)

    whole = captured._CapturedPass._forward
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(captured, "_idle_memory", {})
    monkeypatch.setattr(captured._CapturedPass, "_forward", forward)
    monkeypatch.setattr(captured._CapturedPass, "_on_side_stream", lambda self, function: function())
    tokens = make_tokens(model.config, 2, 40)
    for _ in range(3):
        pair = Pair(model, tokens, lambda: CACHES["dynamic"](model))
        pair.step(0, LENGTH)
        for position in range(LENGTH, 34):
            pair.step(position, position + 1)
    assert len(passes_over) == 3 and len(holders) == 1
    assert [[idle.pool() for idle in all_idle] for all_idle in captured._idle_memory.values()] == [[id(holders[0])]]


def test_the_caller_waits_for_a_pass_that_failed(model, monkeypatch):
    """It may free memory that kernels of the pass still use."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = str(name)

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(captured, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    one = captured._CapturedPass.__new__(captured._CapturedPass)
    one._tokens = torch.zeros(1)
    for function in (lambda: events.append("pass"), _interrupt):
        events.clear()
        with pytest.raises(KeyboardInterrupt) if function is _interrupt else nullcontext():
            one._on_side_stream(function)
        assert (events[0], events[-1]) == ("side waits for caller", "caller waits for side")
    assert not captured._stream_lock.locked()
