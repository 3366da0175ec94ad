"""Structured layers on a GPU: compiled kernels and the `torch` backend agree in every layout and cache."""

import copy

import pytest
import torch
from transformers import StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import msa
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in msa.available_backends(), reason="needs the compiled kernels"),
]

LENGTH = 900
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "layer_types": ["full_attention", *["minimax_m3_structured"] * 3],
    "mlp_layer_types": ["dense"] * 4,
    "structured_local_blocks": 1,
    "structured_anchor_blocks": 2,
    "structured_anchor_stride": 2,
    "structured_random_blocks": 2,
}


# The second has kernels of its own on Hopper.
SHAPES = {
    "64 channels": {"head_dim": 64, "index_block_size": 64},
    "released heads": {
        "num_attention_heads": 16, "num_key_value_heads": 1, "index_n_heads": 1, "head_dim": 128, "index_block_size": 128
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    config = tiny_config(text=TEXT | SHAPES[request.param]).text_config
    model = MiniMaxM3VLForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval().to("cuda", torch.bfloat16)


LAYOUTS = {
    "uniform": {},
    "left padding": {"attention_mask": (torch.arange(LENGTH) >= 77).long().expand(2, -1)},
    "packed": {"position_ids": torch.cat([torch.arange(400), torch.arange(LENGTH - 400)]).expand(2, -1)},
    "cross-document": {"position_ids": torch.cat([torch.arange(400), torch.arange(LENGTH - 400)]).expand(2, -1)},
}


def logits_of(model, backend, tokens, **kwargs):
    model.config.msa_backend = backend
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(kernels, model, make_tokens, relative_error, name):
    kwargs = {key: value.cuda() for key, value in LAYOUTS[name].items()}
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    real = kwargs.get("attention_mask", torch.ones_like(tokens)) == 1
    model.config.structured_cross_document = name == "cross-document"
    by_backend = {backend: logits_of(model, backend, tokens, **kwargs)[real] for backend in ("cuda", "torch")}
    model.config.structured_cross_document = False
    assert relative_error(by_backend["cuda"], by_backend["torch"]) < 3e-2


def test_compiles(model, make_tokens, relative_error):
    """By the default backend of `torch.compile`."""
    torch.compiler.reset()
    model = copy.deepcopy(model).half()
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    mask = LAYOUTS["left padding"]["attention_mask"].cuda()
    expected = logits_of(model, "cuda", tokens, attention_mask=mask, use_cache=False)
    logits = logits_of(torch.compile(model, fullgraph=True), "cuda", tokens, attention_mask=mask, use_cache=False)
    assert relative_error(logits[mask == 1], expected[mask == 1]) < 1e-2


def test_static_cache(kernels, model, make_tokens, relative_error):
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :77] = 0
    by_backend = {}
    for backend in ("cuda", "torch"):
        cache, logits, start = StaticCache(config=model.config, max_cache_len=960), [], 0
        for chunk in (500, 390, *[1] * 10):
            stop = start + chunk
            logits.append(logits_of(model, backend, tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache))
            start = stop
        by_backend[backend] = torch.cat(logits, dim=1)[mask == 1]
    assert relative_error(by_backend["cuda"], by_backend["torch"]) < 3e-2


def test_training_step(kernels, model, make_tokens, relative_error):
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    gradients = {}
    for backend in ("cuda", "torch"):
        twin = copy.deepcopy(model).train()
        twin.config.msa_backend = backend
        twin(tokens, labels=tokens).loss.backward()
        gradients[backend] = torch.cat([p.grad.float().flatten() for p in twin.parameters() if p.grad is not None])
    assert relative_error(gradients["cuda"], gradients["torch"]) < 5e-2
