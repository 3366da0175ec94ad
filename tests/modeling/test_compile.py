"""`torch.compile(fullgraph=True)`: no graph break, no shape that depends on values, the same results."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM


@pytest.fixture
def model(make_pair):
    torch._dynamo.reset()
    return make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"num_hidden_layers": 3}).text_config)[1]


def compiled(model):
    # Traces forward and backward like the default backend, without generating code.
    return torch.compile(model, fullgraph=True, backend="aot_eager")


PACKED = {"cu_seq_lens_q": torch.tensor([0, 30, 64], dtype=torch.int32)}
PACKED["cu_seq_lens_k"] = PACKED["cu_seq_lens_q"]
INPUTS = {
    "no mask": {},
    "left padding": {"attention_mask": (torch.arange(64) >= 20).long()[None]},
    "holes": {"attention_mask": (torch.arange(64) % 3 > 0).long()[None]},
    "offsets": PACKED,
    "restarting positions": {"position_ids": torch.cat([torch.arange(30), torch.arange(34)])[None]},
}


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_forward(model, make_tokens, relative_error, name):
    tokens = make_tokens(model.config, 1, 64)
    real = INPUTS[name].get("attention_mask", torch.ones(1, 64)) == 1
    expected = model(tokens, **INPUTS[name]).logits[real]
    assert relative_error(compiled(model)(tokens, **INPUTS[name]).logits[real], expected) < 1e-5


@pytest.mark.parametrize("name", ["left padding", "offsets"])
def test_backward(model, make_tokens, relative_error, name):
    tokens = make_tokens(model.config, 1, 64)
    # Outputs at padding are left open, so nothing may be predicted from them, the first real token neither.
    labels = tokens.clone()
    labels[:, :21] = -100
    gradients = []
    for forward in (model.train(), compiled(model)):
        model.zero_grad()
        forward(tokens, labels=labels, use_cache=False, **INPUTS[name]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        assert relative_error(gradients[1][parameter], gradient) < 1e-4, parameter


@torch.no_grad()
def test_lengths_stay_symbolic(model, make_tokens, relative_error):
    """One graph serves every length."""
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for length in (50, 64, 81):
        tokens = make_tokens(model.config, 2, length)
        mask = torch.ones_like(tokens)
        mask[1, :7] = 0
        logits = forward(tokens, attention_mask=mask, use_cache=False).logits
        assert relative_error(logits[mask == 1], model(tokens, attention_mask=mask).logits[mask == 1]) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("prepared", [False, True], ids=["2-D mask", "as generate prepares it"])
@torch.no_grad()
def test_static_decode_is_one_graph(model, make_tokens, relative_error, prepared):
    tokens = make_tokens(model.config, 2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(tokens[:, :30], attention_mask=mask[:, :30], cache=cache)
    twin = copy.deepcopy(cache)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(30, 36):
        token = tokens[:, step : step + 1]
        expected = model(token, attention_mask=mask[:, : step + 1], cache=cache).logits
        # A mask of the cache's full width keeps its shape from step to step.
        step_mask = torch.nn.functional.pad(mask[:, : step + 1], (0, 64 - step - 1))
        if prepared:
            embeds = torch.empty(2, 1, 0)
            step_mask = model.create_masks_for_generate(model.config, embeds, mask[:, : step + 1], twin)
        assert relative_error(forward(token, attention_mask=step_mask, cache=twin).logits, expected) < 1e-5
    assert counter.frame_count == 1


def test_generate_compiles_its_static_cache(model, make_tokens):
    """On an accelerator `generate` compiles the decoding step by itself. The result stays the same."""
    from transformers import CompileConfig

    tokens = make_tokens(model.config, 2, 30)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    expected = model.generate(tokens, attention_mask=mask, **options)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    generated = model.generate(
        tokens, attention_mask=mask, cache_implementation="static", compile_config=compile_config, **options
    )
    assert torch.equal(generated, expected)
