"""Decoding steps with the kernels for few tokens and without: the same logits, over every kind of cache and batch."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused import attention_input, few_tokens
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.msa import extension

from .conftest import Prescribed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64, "index_topk_blocks": 3}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT, LENGTH = 50, 80
KERNELS = ("few_token_linear", "few_token_mlp", "attention_input", "rotary_table")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def model(make_pair, request):
    model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=TEXT).text_config)[1].to("cuda")
    frequencies = model.model.rotary_emb.inv_freq
    model.to(request.param).model.rotary_emb.inv_freq = frequencies  # float32, as a loaded model has them
    model.set_experts_implementation("batched_mm")  # reads no value on the host
    return model


@pytest.fixture
def calls(monkeypatch):
    """Lists the kernels that are called. A replay of a graph calls none."""
    reason = extension.load(build=True)
    assert reason is None, reason
    made, namespace = [], torch.ops.minimax_m3_msa_cuda

    def recorded(name, kernel):
        return lambda *args: made.append(name) or kernel(*args)

    for name in KERNELS:
        monkeypatch.setattr(namespace, name, recorded(name, getattr(namespace, name)))
    return made


@pytest.fixture
def plain(monkeypatch, calls):
    """Calls a function without these kernels."""

    def call(function, *args, **kwargs):
        before = len(calls)
        with monkeypatch.context() as patch:
            for module in (few_tokens, attention_input):
                patch.setattr(module, "kernels_take", lambda *tensors: False)
            result = function(*args, **kwargs)
        assert len(calls) == before
        return result

    return call


def inputs_of(model, make_tokens, batch, padded):
    tokens = make_tokens(model.config, batch, LENGTH + 20).cuda()
    mask = torch.ones_like(tokens[:, :PROMPT])
    if padded:
        for row in range(1, batch):
            mask[row, : 3 * row] = 0
    return tokens, {"input_ids": tokens[:, :PROMPT], "attention_mask": mask}


def generated_logits(model, tokens, inputs, **options):
    options = GREEDY | {"max_new_tokens": LENGTH - PROMPT, "output_logits": True} | options
    options["logits_processor"] = LogitsProcessorList([Prescribed(tokens)])
    return model.generate(**inputs, **options, return_dict_in_generate=True).logits


def assert_close(found, expected, relative_error):
    """An expert or a block near a tie may change a few steps."""
    assert len(found) == len(expected)
    errors = sorted(relative_error(*pair) for pair in zip(found, expected))
    assert errors[len(errors) // 2] < 3e-2, errors
    assert errors[len(errors) * 8 // 10] < 1e-1, errors


@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("captures", [True, False], ids=["captured", "plain steps"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(model, make_tokens, relative_error, calls, plain, monkeypatch, cache, captures, batch, padded):
    monkeypatch.setenv("MINIMAX_M3_CUDA_GRAPHS", "1" if captures else "0")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    if not captures:
        options["disable_compile"] = True
    tokens, inputs = inputs_of(model, make_tokens, batch, padded)
    expected = plain(generated_logits, model, tokens, inputs, **options)
    found = generated_logits(model, tokens, inputs, **options)
    # Without a graph a dynamic cache keeps its own growing buffers.
    wanted = {"few_token_linear", "few_token_mlp", "rotary_table"}
    if cache == "static" or captures:
        wanted.add("attention_input")
    if batch > few_tokens.MAX_TOKENS_OF_ONE_LAYER and "attention_input" not in wanted:
        wanted.discard("few_token_linear")
    assert wanted <= set(calls)
    assert_close(found, expected, relative_error)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_repeat(model, make_tokens, calls, cache):
    """Two runs give the same tokens, bit for bit."""
    _, inputs = inputs_of(model, make_tokens, 4, padded=True)
    options = GREEDY | {"max_new_tokens": 30} | ({"cache_implementation": "static"} if cache == "static" else {})
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options))
    assert "attention_input" in calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(model, make_tokens, calls, plain, cache):
    """Their scores are close: the words of two runs may part at a near-tie."""
    _, inputs = inputs_of(model, make_tokens, 2, padded=True)
    options = GREEDY | {"max_new_tokens": 10, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = plain(model.generate, **inputs, **options)
    found = model.generate(**inputs, **options)
    assert "few_token_mlp" in calls
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=3e-2, atol=3e-2)


def test_assisted_decoding(model, make_tokens, relative_error, calls, plain):
    """Several tokens at a time; the assistant proposes what is prescribed."""
    tokens, inputs = inputs_of(model, make_tokens, 1, padded=False)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    expected = plain(generated_logits, model, tokens, inputs, assistant_model=assistant)
    assert_close(generated_logits(model, tokens, inputs, assistant_model=assistant), expected, relative_error)
    assert "few_token_mlp" in calls


@torch.no_grad()
def steps(model, tokens, make_cache, num_new=1):
    """Logits of steps after a prompt, each over the same tokens, without graphs."""
    cache = make_cache()
    model(tokens[:, :PROMPT], cache=cache)
    return [
        model(tokens[:, start : start + num_new], cache=cache).logits
        for start in range(PROMPT, PROMPT + 8 * num_new, num_new)
    ]


def caches_of(model):
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 20),
    }


@pytest.mark.parametrize("batch, num_new", [(1, 2), (1, 4), (4, 3), (5, 3), (4, 4), (3, 6)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_several_tokens_a_step(model, make_tokens, relative_error, calls, plain, cache, batch, num_new):
    tokens, make_cache = make_tokens(model.config, batch, LENGTH + 20).cuda(), caches_of(model)[cache]
    expected = plain(steps, model, tokens, make_cache, num_new)
    found = steps(model, tokens, make_cache, num_new)
    assert ("few_token_mlp" in calls) == (batch * num_new <= few_tokens.MAX_TOKENS)
    assert ("attention_input" in calls) == (cache == "static" and batch * num_new <= few_tokens.MAX_TOKENS)
    assert_close(found, expected, relative_error)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_adapters(model, make_tokens, relative_error, calls, plain, cache):
    """Layers with an adapter run as PEFT wrote them; the others still run as kernels."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    tokens, make_cache = make_tokens(model.config, 2, LENGTH).cuda(), caches_of(model)[cache]
    expected = plain(steps, adapted, tokens, make_cache)
    assert_close(steps(adapted, tokens, make_cache), expected, relative_error)
    assert "attention_input" not in calls and "few_token_mlp" not in calls
    assert calls.count("few_token_linear") == 8 * 3, "the routers alone"
    without = plain(steps, model, tokens, make_cache)
    assert relative_error(expected[-1], without[-1]) > 1e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_hooks(model, make_tokens, relative_error, calls, plain, cache):
    """They are called in each step, and change what they return."""
    watched, seen = copy.deepcopy(model), []

    def double(module, args, output):
        seen.append(module)
        return 2 * output

    names = ("k_proj", "o_proj", "down_proj")
    for name, module in watched.named_modules():
        if name.rpartition(".")[2] in names and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(double)
    tokens, make_cache = make_tokens(model.config, 2, LENGTH).cuda(), caches_of(model)[cache]
    expected = plain(steps, watched, tokens, make_cache)
    count = len(seen)
    assert_close(steps(watched, tokens, make_cache), expected, relative_error)
    assert len(seen) == 2 * count
    assert "attention_input" not in calls and "few_token_mlp" not in calls
