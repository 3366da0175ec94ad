"""The layers call the fused norms only where a call of the module is nothing else: hooks and replacements still run."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused.support import runs_as_written
from modeling_minimax_m3.layers import rotary
from modeling_minimax_m3.layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts
from modeling_minimax_m3.layers.normalization import MiniMaxM3VLRMSNorm
from modeling_minimax_m3.layers.rotary import apply_rotary, normalize_and_rotate
from modeling_minimax_m3.models import text
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM


class Replacement(MiniMaxM3VLRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
HOOKS += ("register_full_backward_pre_hook",)
GLOBAL_HOOKS = ("register_module_forward_hook", "register_module_forward_pre_hook")
GLOBAL_HOOKS += ("register_module_full_backward_hook", "register_module_full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS + GLOBAL_HOOKS)
def test_a_norm_with_a_hook_is_not_plain(hook):
    norm = MiniMaxM3VLRMSNorm(16)
    assert runs_as_written(norm, MiniMaxM3VLRMSNorm)
    register = getattr(norm, hook) if hook in HOOKS else getattr(torch_module, hook)
    handle = register(lambda *args: None)
    try:
        assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)
    finally:
        handle.remove()
    assert runs_as_written(norm, MiniMaxM3VLRMSNorm)


def test_replaced_norms_are_not_plain():
    assert not runs_as_written(Replacement(16), MiniMaxM3VLRMSNorm)
    assert not runs_as_written(nn.LayerNorm(16), MiniMaxM3VLRMSNorm)
    norm = MiniMaxM3VLRMSNorm(16)
    norm.forward = norm.forward
    assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)
    parametrized = MiniMaxM3VLRMSNorm(16)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert not runs_as_written(parametrized, MiniMaxM3VLRMSNorm)
    compiled = MiniMaxM3VLRMSNorm(16)
    compiled.compile()
    assert not runs_as_written(compiled, MiniMaxM3VLRMSNorm)


def test_a_device_map_leaves_modules_plain():
    """Its hooks bring inputs to the device of a module. Those that move weights, or record no gradients, do more."""
    hooks = pytest.importorskip("accelerate.hooks")
    norm = MiniMaxM3VLRMSNorm(16)
    hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(norm) and runs_as_written(norm, MiniMaxM3VLRMSNorm)
    for options in ({"io_same_device": True}, {"offload": True}):
        hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(execution_device="cpu", **options))
        assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)
        hooks.remove_hook_from_module(norm)
        norm.weight = nn.Parameter(torch.zeros(16))
    hooks.add_hook_to_module(norm, hooks.ModelHook())
    assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)
    hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(execution_device="cpu"))
    assert runs_as_written(norm, MiniMaxM3VLRMSNorm)
    hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(execution_device="cpu"), append=True)
    assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)  # a sequence of hooks is not looked into
    hooks.remove_hook_from_module(norm)
    norm.forward = norm.forward  # replaced before, so that the hook calls something else than the class
    hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(execution_device="cpu"))
    norm._old_forward = lambda states: states
    assert not runs_as_written(norm, MiniMaxM3VLRMSNorm)


def test_a_model_with_a_device_map_computes_the_same():
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config).eval()
    tokens = torch.randint(2, 400, (2, 40))
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    big_modeling.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert runs_as_written(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert runs_as_written(model.model.layers[-1].mlp.experts, MiniMaxM3VLExperts)
    found = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [MiniMaxM3VLRMSNorm, nn.Linear, MiniMaxM3VLExperts, MiniMaxM3VLDenseMLP])
def test_a_class_whose_forward_a_library_replaced_is_not_plain(kind, monkeypatch):
    module = kind(8, 8) if kind in (MiniMaxM3VLRMSNorm, nn.Linear) else kind(tiny_config().text_config)
    assert runs_as_written(module, kind)
    monkeypatch.setattr(kind, "forward", lambda self, *args: args[0])
    assert not runs_as_written(module, kind)


@pytest.mark.parametrize("shape", [(2, 5, 3, 32), (2, 5, 32)])
def test_heads_with_and_without_a_hook(monkeypatch, shape):
    fused_calls = []
    operator = rotary.norm_rotary
    monkeypatch.setattr(rotary, "norm_rotary", lambda *args: fused_calls.append(args) or operator(*args))
    norm = MiniMaxM3VLRMSNorm(32)
    nn.init.normal_(norm.weight)
    states = torch.randn(shape).bfloat16()
    cos, sin = torch.randn(2, 2, 5, 16).bfloat16()
    expected = norm(states)
    expected = apply_rotary(expected if len(shape) == 4 else expected.unsqueeze(2), cos, sin)
    assert torch.equal(normalize_and_rotate(norm, states, cos, sin), expected)
    assert len(fused_calls) == 1
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.equal(normalize_and_rotate(norm, states, cos, sin), expected)
    assert seen == [states.shape]
    assert len(fused_calls) == 1


def test_decoder_layers_with_and_without_a_hook(monkeypatch):
    fused_calls = []
    operator = text.add_rms_norm
    monkeypatch.setattr(text, "add_rms_norm", lambda *args: fused_calls.append(args) or operator(*args))
    config = tiny_config().text_config
    model = text.MiniMaxM3VLTextModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(3, config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        assert len(fused_calls) == config.num_hidden_layers
        names = [name for name, module in model.named_modules() if isinstance(module, MiniMaxM3VLRMSNorm)]
        seen = []
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        assert torch.equal(model(tokens).last_hidden_state, expected)
        assert sorted(seen) == sorted(names)
        assert len(fused_calls) == config.num_hidden_layers
