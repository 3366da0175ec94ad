"""The composite model on a GPU: images, half precision, and generation with a static cache."""

import copy

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.models import vision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64}
VISION = {"hidden_size": 128, "num_attention_heads": 2}
IMAGES = [[1, 4, 6], [1, 4, 4], [1, 4, 4]]
VIDEOS = [[2, 4, 4]]


@pytest.fixture(scope="module")
def on_cpu(make_pair):
    return make_pair(MiniMaxM3SparseForConditionalGeneration, tiny_config(text=TEXT, vision=VISION))[1]


@pytest.fixture
def inputs(make_inputs, on_cpu):
    return make_inputs(on_cpu.config, images=IMAGES, videos=VIDEOS, length=150)


def to_gpu(inputs, dtype=torch.float32):
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in inputs.items()}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_float32_equals_cpu(on_cpu, inputs, relative_error, attn_implementation):
    model = copy.deepcopy(on_cpu).cuda()
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        logits, expected = model(**to_gpu(inputs)).logits.cpu(), on_cpu(**inputs).logits
    errors = sorted(relative_error(a, b) for a, b in zip(logits[0], expected[0]))
    # Other rounding than on the CPU may flip a near-tie between blocks or experts.
    assert errors[len(errors) * 9 // 10] < 1e-4


def test_vision_features_in_bfloat16(on_cpu, inputs, relative_error):
    model = copy.deepcopy(on_cpu).to("cuda", torch.bfloat16)
    pixels = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        expected = torch.cat(on_cpu.get_image_features(*pixels).pooler_output)
        on_gpu = to_gpu({"pixels": pixels[0], "grid": pixels[1]}, torch.bfloat16)
        output = torch.cat(model.get_image_features(on_gpu["pixels"], on_gpu["grid"]).pooler_output)
        grid_on_host = torch.cat(model.get_image_features(on_gpu["pixels"], pixels[1]).pooler_output)
    assert relative_error(output.cpu(), expected) < 3e-2
    torch.testing.assert_close(grid_on_host, output, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_images_of_several_sizes_are_one_call(on_cpu, make_inputs, relative_error, autocast, monkeypatch):
    """One flash kernel for all of them gives the features and gradients of SDPA image by image."""
    model = copy.deepcopy(on_cpu).to("cuda", torch.float32 if autocast else torch.bfloat16).train()
    grids = [[1, 4, 6], [1, 4, 4], [1, 4, 4], [1, 8, 2], [3, 2, 2], [1, 2, 2]]
    inputs = make_inputs(model.config, images=grids, length=150)
    pixels, grid = inputs["pixel_values"].cuda(), inputs["image_grid_thw"]
    calls = []
    attend = vision.MiniMaxM3VLVisionAttention._attend_packed
    counted = lambda self, *args: calls.append(1) or attend(self, *args)  # noqa: E731
    monkeypatch.setattr(vision.MiniMaxM3VLVisionAttention, "_attend_packed", counted)

    def run():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            features = torch.cat(model.get_image_features(pixels, grid).pooler_output)
        features.float().square().mean().backward()
        grads = [parameter.grad for parameter in model.model.vision_tower.parameters() if parameter.grad is not None]
        return features.detach(), torch.cat([grad.flatten().float() for grad in grads])

    packed = run()
    assert len(calls) == model.config.vision_config.num_hidden_layers
    monkeypatch.setattr(vision, "_runs_packed", lambda *_: False)
    for ours, expected in zip(packed, run(), strict=True):
        assert relative_error(ours.cpu(), expected.cpu()) < 2e-2


def test_static_cache_generates_what_the_dynamic_one_does(on_cpu, inputs):
    """`generate` compiles the decoding step for a static cache."""
    model = copy.deepcopy(on_cpu).cuda()
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**to_gpu(inputs), **options)
    torch.testing.assert_close(model.generate(**to_gpu(inputs), **options, cache_implementation="static"), expected)


def test_compiles(on_cpu, inputs, relative_error):
    torch.compiler.reset()
    model = copy.deepcopy(on_cpu).cuda()
    with torch.no_grad():
        expected = model(**to_gpu(inputs), use_cache=False).logits
        logits = torch.compile(model, fullgraph=True)(**to_gpu(inputs), use_cache=False).logits
    errors = sorted(relative_error(a, b) for a, b in zip(logits[0], expected[0]))
    assert errors[len(errors) * 9 // 10] < 1e-4  # as above
