"""Low-rank updates of the routed experts, multiplied apart from their weights."""

import contextlib
import copy
from unittest import mock

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused import experts as many_tokens
from modeling_minimax_m3.layers import expert_adapters
from modeling_minimax_m3.layers.expert_adapters import adapted_weight
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.planning.adapted_experts import peft_keeps_factors

from .qlora_cases import EXPERTS, TARGETS, fill_adapters, logits_of, loss_and_gradients, with_adapters

pytestmark = pytest.mark.compatibility


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config().text_config)


def relative_error(tensor, expected):
    return float((tensor - expected).norm() / expected.norm())


def materialized(model):
    """The same model with the path of Transformers that reads whole weights."""
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    return other


def our_path():
    return mock.patch.object(many_tokens, "gathered_product", wraps=many_tokens.gathered_product)


@pytest.mark.parametrize("rank", [4, 3, 16])
@pytest.mark.parametrize("targets", ["experts", "one weight of the experts", "both"])
def test_gradients_equal_those_of_whole_weights(base, targets, rank):
    model = with_adapters(copy.deepcopy(base), rank=rank, **TARGETS[targets])
    reference = materialized(model)
    with our_path() as products:
        loss, gradients = loss_and_gradients(model)
    assert products.called == peft_keeps_factors()
    with our_path() as products:
        expected_loss, expected = loss_and_gradients(reference)
    assert not products.called
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if ".indexer." not in name:  # the language loss sends nothing there
            assert relative_error(gradient, expected[name]) < 1e-4, name


def test_trained_base(base):
    model = with_adapters(copy.deepcopy(base), **EXPERTS)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.requires_grad_(True)
    reference = materialized(model)
    for each in (model, reference):
        ids = torch.arange(2, 100)[None]
        each(input_ids=ids, labels=ids).loss.backward()
    checked = 0
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if "experts" in name and parameter.grad is not None:
            assert relative_error(parameter.grad, other.grad) < 1e-4, name
            checked += "lora" not in name
    assert checked


def test_bfloat16(base):
    """The rounding of one layer, beside that of whole weights."""
    experts = get_peft_model(
        nn.ModuleDict({"experts": copy.deepcopy(base.model.layers[-1].mlp.experts).bfloat16()}),
        LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    fill_adapters(experts)
    wrapped = experts.base_model.model["experts"]
    width, num_experts = wrapped.get_base_layer().hidden_dim, wrapped.get_base_layer().num_experts
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(64, width, generator=generator).bfloat16()
    ids = torch.rand(64, num_experts, generator=generator).topk(2).indices
    shares = torch.rand(64, 2, generator=generator)
    outputs = {}
    for name in ("grouped_mm", "eager", "exact"):
        wrapped.get_base_layer().config._experts_implementation = "eager" if name == "exact" else name
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            layer = copy.deepcopy(wrapped).double() if name == "exact" else wrapped
            outputs[name] = layer(tokens.double() if name == "exact" else tokens, ids, shares).double()
    errors = {name: relative_error(out, outputs["exact"]) for name, out in outputs.items()}
    assert errors["grouped_mm"] < 1.5 * errors["eager"] < 3e-2, errors


@pytest.mark.parametrize("of_tokens", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16], ids=["of float32", "of bfloat16"])
def test_autocast(base, of_weights, of_tokens):
    """Grouped products compute in the dtype of the weights, as those of Transformers."""
    experts = copy.deepcopy(base.model.layers[-1].mlp.experts).to(of_weights)
    options = {"target_modules": [], "target_parameters": ["0.gate_up_proj", "0.down_proj"]}
    model = get_peft_model(nn.Sequential(experts), LoraConfig(r=4, **options))
    fill_adapters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(30, experts.hidden_dim, generator=generator).to(of_tokens).requires_grad_()
    ids = torch.rand(30, experts.num_experts, generator=generator).topk(2).indices
    shares = torch.rand(30, 2, generator=generator)

    def output_and_gradients():
        with torch.autocast("cpu", torch.bfloat16):
            out = model.base_model.model[0](tokens, ids, shares)
        return out, *torch.autograd.grad(out.float().square().sum(), [tokens, *trained])

    with our_path() as products:
        found = output_and_gradients()
    assert products.called == peft_keeps_factors()
    with mock.patch.object(expert_adapters, "_has_grouped_products", return_value=False):
        expected = output_and_gradients()
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        is_exact = of_weights == of_tokens == torch.float32
        assert relative_error(got.float(), wanted.float()) < (1e-5 if is_exact else 2e-2)


class TestCallsThatReadWholeWeights:
    @pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="this PEFT takes one such adapter")
    def test_two_active_adapters(self, base):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **EXPERTS)
        model = get_peft_model(copy.deepcopy(base), config)
        model.add_adapter("second", config)
        fill_adapters(model)
        model.base_model.set_adapter(["default", "second"])
        reference = materialized(model)
        with mock.patch.object(many_tokens, "plan", side_effect=AssertionError("our path has no such update")):
            out = logits_of(model)
        assert relative_error(out, logits_of(reference)) < 1e-5

    def test_eager(self, base):
        model = with_adapters(copy.deepcopy(base), **EXPERTS)
        model.set_experts_implementation("eager")
        with mock.patch.object(many_tokens, "plan", side_effect=AssertionError("not our path")):
            assert logits_of(model).isfinite().all()

    @pytest.mark.parametrize("difference", ["dtypes of the weights", "float64"])
    def test_dtypes(self, base, difference):
        """Transformers is asked, which takes none of these in PyTorch 2.14."""
        model = with_adapters(copy.deepcopy(base), **EXPERTS)
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj" if difference != "float64" else ("down_proj", "gate_up_proj")):
                parameter.data = parameter.data.double()
        with (
            mock.patch.object(many_tokens, "plan", side_effect=AssertionError("not our path")),
            contextlib.suppress(RuntimeError),
        ):
            logits_of(model)

    @pytest.mark.parametrize(
        "change",
        [
            lambda weight: 2 * weight,
            lambda weight: weight.mul(2),
            lambda weight: weight.clone() if weight.ndim == 3 else weight,
            lambda weight: torch.ones(4, 64, 32),
            lambda weight: torch.baddbmm(weight, torch.ones(4, 64, 1), torch.ones(4, 1, 32), beta=0.5),
        ],
        ids=["operator", "method", "attribute", "another tensor", "another sum"],
    )
    def test_another_parametrization(self, base, change):
        experts = copy.deepcopy(base.model.layers[-1].mlp.experts)

        class Changed(nn.Module):
            def forward(self, weight):
                return change(weight)

        parametrize.register_parametrization(experts, "down_proj", Changed())
        assert adapted_weight(experts, "down_proj") is None
        weight, updates = adapted_weight(experts, "gate_up_proj")
        assert weight is experts.gate_up_proj and updates == ()
        tokens, ids, shares = torch.randn(5, experts.hidden_dim), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
        out = experts(tokens, ids, shares)
        parametrize.remove_parametrizations(experts, "down_proj")
        torch.testing.assert_close(out, experts(tokens, ids, shares))

    def test_weight_of_several_tensors(self, base):
        experts = copy.deepcopy(base.model.layers[-1].mlp.experts)
        tokens, ids, shares = torch.randn(5, experts.hidden_dim), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
        expected = experts(tokens, ids, shares)
        nn.utils.parametrizations.weight_norm(experts, "down_proj")
        assert adapted_weight(experts, "down_proj") is None
        torch.testing.assert_close(experts(tokens, ids, shares), expected)

    def test_devices_without_grouped_products(self, base):
        has = expert_adapters._has_grouped_products
        assert has(torch.device("cpu"))
        assert not has(torch.device("mps")) and not has(torch.device("meta"))
        for capability, expected in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
            with mock.patch("torch.cuda.get_device_capability", return_value=capability):
                assert has(torch.device("cuda")) is expected
        model = with_adapters(copy.deepcopy(base), **EXPERTS)
        with (
            mock.patch.object(expert_adapters, "_has_grouped_products", return_value=False),
            mock.patch.object(many_tokens, "plan", side_effect=AssertionError("not our path")),
        ):
            out = logits_of(model)
        assert relative_error(out, logits_of(model)) < 1e-5

    def test_weights_that_are_mapped_into_memory(self, base):
        """PyTorch 2.10 takes none that begin between two multiples of 16 bytes."""
        model = with_adapters(copy.deepcopy(base), **EXPERTS)
        expected = logits_of(model)
        for name, parameter in model.named_parameters():
            if name.endswith("experts.base_layer.base_layer.down_proj"):
                memory = torch.empty(parameter.numel() + 1)
                memory[1:] = parameter.data.flatten()
                parameter.data = memory[1:].view_as(parameter)
                assert parameter.data_ptr() % 16
        with mock.patch.object(many_tokens, "plan", side_effect=AssertionError("not our path")):
            assert relative_error(logits_of(model), expected) < 1e-5

    def test_disabled_adapter(self, base):
        model = with_adapters(copy.deepcopy(base), **EXPERTS)
        with model.disable_adapter():
            out = logits_of(model)
        assert torch.equal(out, logits_of(copy.deepcopy(base)))
