"""Gradients of SDPA stay away from cuDNN's kernel where it may return NaN: on a GPU, and which calls are guarded."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.layers import cached_attention, dense_attention, sdpa_gradients
from modeling_minimax_m3.models import vision
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.models.vision import MiniMaxM3VLVisionModel

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Calls that record gradients count as calls on a GPU."""
    monkeypatch.setattr(
        sdpa_gradients,
        "_needs_gradient",
        lambda states: torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states),
    )


def test_cudnn_is_off_for_partial_tiles_alone(pretend_gpu):
    states = torch.zeros(1, requires_grad=True)
    for queries, keys, is_off in ((64, 64, True), (1, 128, True), (128, 130, True), (128, 256, False)):
        assert torch.backends.cuda.cudnn_sdp_enabled()
        with sdpa_gradients.finite_gradients(queries, keys, states):
            assert torch.backends.cuda.cudnn_sdp_enabled() != is_off
            assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with torch.no_grad(), sdpa_gradients.finite_gradients(64, 64, states):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_other_switches_stay_as_the_user_set_them(pretend_gpu):
    states = torch.zeros(1, requires_grad=True)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        with sdpa_gradients.finite_gradients(64, 64, states):
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    cudnn_alone = torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION])
    with cudnn_alone, sdpa_gradients.finite_gradients(64, 64, states):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_cpu_needs_no_guard():
    with sdpa_gradients.finite_gradients(64, 64, torch.zeros(1, requires_grad=True)):
        assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def cudnn_switches(monkeypatch, pretend_gpu):
    """Whether cuDNN's kernel was allowed, for each call of SDPA that is not causal by its argument."""
    seen = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if not is_causal:
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)  # that Transformers calls
    monkeypatch.setattr(cached_attention, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(dense_attention, "scaled_dot_product_attention", spy)
    return seen


def test_vision_tower_is_guarded(config, make_patches, cudnn_switches):
    grid = torch.tensor([[1, 4, 6], [1, 4, 4]])
    config.vision_config._attn_implementation = "sdpa"
    tower = MiniMaxM3VLVisionModel(config.vision_config)
    tower(make_patches(config, grid), grid_thw=grid).last_hidden_state.sum().backward()
    assert cudnn_switches and not any(cudnn_switches)
    assert vision.finite_gradients is sdpa_gradients.finite_gradients


def test_layers_with_a_cache_and_with_a_mask_are_guarded(cudnn_switches):
    config = tiny_config(text={"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}).text_config
    model = MiniMaxM3VLForCausalLM(config).train()
    ids = torch.randint(0, 100, (2, 20))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache, use_cache=True)
    assert all(cudnn_switches)  # nothing was recorded
    cudnn_switches.clear()
    model(ids[:, 10:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert cudnn_switches and not any(cudnn_switches)
    cudnn_switches.clear()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].expand(2, 1, 20, 20)
    model(ids, attention_mask=mask).logits.sum().backward()
    assert cudnn_switches and not any(cudnn_switches)


@needs_cuda
@pytest.mark.parametrize("length", [64, 65, 128, 192, 200, 704])
def test_queries_with_very_negative_scores_have_finite_gradients(length):
    generator = torch.Generator("cuda").manual_seed(length)
    heads, channels = 4, 32
    query, key, value, grad = (
        torch.randn(1, heads, length, channels, device="cuda", generator=generator).mul(0.3).bfloat16()
        for _ in range(4)
    )
    query[..., 0], key[..., 0] = 1.0, -120 * channels**0.5  # all scores near -120
    states = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    for attn_mask in (None, mask):
        exact = [tensor.detach().double().requires_grad_() for tensor in states]
        out = scaled_dot_product_attention(*exact, attn_mask=attn_mask)
        expected = torch.autograd.grad(out, exact, grad.double())
        with sdpa_gradients.finite_gradients(length, length, *states):
            out = scaled_dot_product_attention(*states, attn_mask=attn_mask)
        for found, wanted in zip(torch.autograd.grad(out, states, grad), expected):
            assert found.isfinite().all()
            # In channel 0, large keys multiply the rounding of gradients whose sum is 0.
            assert (found.double() - wanted)[..., 1:].norm() < 0.03 * wanted[..., 1:].norm()
