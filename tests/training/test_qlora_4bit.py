"""QLoRA over experts in 4 bits: losses and gradients are those over the dequantized base."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.fused.four_bit_format import FourBitFormat
from modeling_minimax_m3.layers.quantized import QuantizedExperts

from .qlora_cases import (
    EXPERTS,
    TARGETS,
    assert_adapters_learn_and_are_saved,
    assert_close_training,
    fill_adapters,
    logits_of,
    loss_and_gradients,
    with_adapters,
)

pytest.importorskip("bitsandbytes")

KINDS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 twice": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    MiniMaxM3VLForCausalLM(tiny_config().text_config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def load(checkpoint):
    def load(kind: str = "nf4", dequantize: bool = False, dtype: torch.dtype = torch.float32, **options):
        config = BitsAndBytesConfig(load_in_4bit=True, **KINDS[kind], **options)
        model = MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=dtype)
        if dequantize:
            model.dequantize()
            model.requires_grad_(False)
        return model

    return load


@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("targets", [name for name in TARGETS if name != "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(load, kind, targets, rank, monkeypatch):
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 2 * 64 * 64 * 4)  # two experts at a time
    models = [with_adapters(load(kind, dequantize), rank, **TARGETS[targets]) for dequantize in (False, True)]
    assert_close_training(*models, tolerance=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(load, use_reentrant):
    models = [with_adapters(load(dequantize=dequantize), **TARGETS["both"]) for dequantize in (False, True)]
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close_training(*models, tolerance=1e-5)


def test_several_active_adapters(load):
    models = []
    for dequantize in (False, True):
        model = with_adapters(load("nf4 twice", dequantize), **EXPERTS)
        model.add_adapter("second", LoraConfig(r=2, task_type="CAUSAL_LM", **EXPERTS))
        model.base_model.set_adapter(["default", "second"])
        fill_adapters(model)
        models.append(model)
    assert_close_training(*models, tolerance=1e-5)


def test_experts_are_never_dequantized_whole(load, monkeypatch):
    largest, dequantize = [], FourBitFormat.dequantize
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 64 * 64 * 4)
    record = lambda self, tensors, dtype: largest.append(len(tensors[0])) or dequantize(self, tensors, dtype)  # noqa: E731
    monkeypatch.setattr(FourBitFormat, "dequantize", record)
    loss_and_gradients(with_adapters(load(), **EXPERTS))
    assert set(largest) == {1, 2}  # experts of the four, whose down projections have half of the elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_for_kbit_training(load, kind, dtype):
    """PEFT's preparation makes what is in 16 bits float32. The experts keep their bytes."""
    model = load(kind, dtype=dtype)
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in experts]
    model = with_adapters(prepare_model_for_kbit_training(model), **TARGETS["both"])
    loss, gradients = loss_and_gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert len(experts) == 3
    for module, tensors in zip(experts, before, strict=True):
        assert module.compute_dtype == dtype
        for name, tensor in tensors.items():
            stored = module._parameters[name]
            assert stored.dtype == tensor.dtype and torch.equal(stored, tensor) and not stored.requires_grad
    reference = with_adapters(load(kind, dequantize=True), **TARGETS["both"])
    expected, _ = loss_and_gradients(reference)
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_adapters_learn_and_are_saved(load, tmp_path):
    options = {"dtype": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16}
    assert_adapters_learn_and_are_saved(lambda: load("nf4 twice", **options), tmp_path)


def test_merging_is_refused_and_possible_after_dequantizing(load):
    with pytest.raises(TypeError, match=r"NF4 cannot be changed.*`model.dequantize\(\)`"):
        with_adapters(load(), **EXPERTS).merge_and_unload()
    model = with_adapters(load(dequantize=True), **EXPERTS)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_unloaded_adapters_leave_the_model_as_it_was(load):
    model = load()
    expected, names = logits_of(model), set(model.state_dict())
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **EXPERTS))
    fill_adapters(model)
    loss_and_gradients(model.train())
    assert not torch.equal(logits_of(model), expected)
    model = model.unload()
    assert torch.equal(logits_of(model), expected)
    assert set(model.state_dict()) == names
