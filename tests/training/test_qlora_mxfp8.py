"""Adapters over a base in MXFP8: losses and gradients are those over the dequantized base."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, mxfp8_config
from modeling_minimax_m3.fused import quantized_products, weight_formats

from .qlora_cases import (
    EXPERTS,
    TARGETS,
    assert_adapters_learn_and_are_saved,
    assert_close_training,
    fill_adapters,
    logits_of,
    loss_and_gradients,
    tokens,
    with_adapters,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    MiniMaxM3VLForCausalLM(tiny_config().text_config).to(torch.bfloat16).save_pretrained(folder / "plain")
    model = MiniMaxM3VLForCausalLM.from_pretrained(folder / "plain", quantization_config=mxfp8_config())
    model.save_pretrained(folder / "mxfp8")
    return folder / "mxfp8"


@pytest.fixture
def load(checkpoint):
    def load(dequantize: bool = False, dtype: torch.dtype = torch.float32, **options):
        quantization = mxfp8_config(dequantize=dequantize)
        return MiniMaxM3VLForCausalLM.from_pretrained(
            checkpoint, quantization_config=quantization, dtype=dtype, **options
        )

    return load


@pytest.mark.parametrize("rank", [4, 8, 3])
@pytest.mark.parametrize("targets", TARGETS)
def test_loss_and_gradients(load, targets, rank, monkeypatch):
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 2 * 64 * 64 * 4)  # two experts at a time
    models = [with_adapters(load(dequantize), rank, **TARGETS[targets]) for dequantize in (False, True)]
    assert_close_training(*models, tolerance=1e-5)


def test_gradients_reach_the_input(load):
    """Through every quantized layer, to the embeddings."""
    gradients = []
    for dequantize in (False, True):
        model = load(dequantize)
        embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(load, use_reentrant):
    models = [with_adapters(load(dequantize), **TARGETS["both"]) for dequantize in (False, True)]
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close_training(*models, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["none", "lora", "prompt"])
def test_data_parallelism_does_not_send_the_base(load, kind):
    """DistributedDataParallel reads the names from the model that it gets, whatever PEFT has wrapped around ours."""
    model = load()
    if kind == "lora":
        model = with_adapters(model, **TARGETS["both"])
    elif kind == "prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    left = set(model._ddp_params_and_buffers_to_ignore)
    kept = {parameter.dtype for name, parameter in model.named_parameters() if name in left}
    assert kept == {torch.float8_e4m3fn, torch.uint8}
    assert {parameter.dtype for name, parameter in model.named_parameters() if name not in left} == {torch.float32}


def test_several_active_adapters(load):
    models = []
    for dequantize in (False, True):
        model = with_adapters(load(dequantize), **EXPERTS)
        model.add_adapter("second", LoraConfig(r=2, task_type="CAUSAL_LM", **EXPERTS))
        model.base_model.set_adapter(["default", "second"])
        fill_adapters(model)
        models.append(model)
    assert_close_training(*models, tolerance=1e-5)


def test_bytes_stay_after_passes(load):
    model = with_adapters(load(), **TARGETS["both"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.element_size() == 1}
    loss_and_gradients(model)
    after = model.state_dict()
    assert before.keys() == {name for name, tensor in after.items() if tensor.element_size() == 1}
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in before.items())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)


def test_experts_are_never_dequantized_whole(load, monkeypatch):
    largest, dequantize = [], weight_formats.dequantize_mxfp8
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 64 * 64 * 4)
    record = lambda values, *rest: largest.append(values[..., 0, 0].numel()) or dequantize(values, *rest)  # noqa: E731
    monkeypatch.setattr(weight_formats, "dequantize_mxfp8", record)
    loss_and_gradients(with_adapters(load(), **EXPERTS))
    assert set(largest) == {1, 2}  # experts of the four, whose down projections have half of the elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prepared_for_kbit_training(load, dtype):
    """PEFT's preparation makes what is in 16 bits float32, and leaves the bytes alone."""
    model = load(dtype=dtype)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model = prepare_model_for_kbit_training(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (stored[name] if parameter.element_size() == 1 else torch.float32)
    model = with_adapters(model, **TARGETS["both"])
    loss, gradients = loss_and_gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    reference = with_adapters(load(dequantize=True), **TARGETS["both"])
    expected, _ = loss_and_gradients(reference)
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_adapters_learn_and_are_saved(load, tmp_path):
    assert_adapters_learn_and_are_saved(lambda: load(dtype=torch.bfloat16), tmp_path)


@pytest.mark.parametrize("targets", ["attention", "experts"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(load, targets, safe):
    model = with_adapters(load(), **TARGETS[targets])
    with pytest.raises(TypeError, match="MXFP8 cannot be changed.*dequantize=True"):
        model.merge_and_unload(safe_merge=safe)


def test_unloaded_adapters_leave_the_model_as_it_was(load):
    model = load()
    expected, names = logits_of(model), set(model.state_dict())
    model = with_adapters(model, **TARGETS["both"])
    loss_and_gradients(model)
    assert not torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    model = model.unload()
    assert torch.equal(logits_of(model), expected)
    assert set(model.state_dict()) == names


def test_adapters_on_offloaded_experts_are_refused(load, tmp_path):
    devices = {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = get_peft_model(load(device_map=devices, offload_folder=tmp_path), LoraConfig(r=4, **EXPERTS))
    with pytest.raises(NotImplementedError, match="`target_parameters` must not name .*_proj.*MXFP8.*Accelerate"):
        logits_of(model)


def test_copies_take_adapters(load):
    model = load()
    first, second = (with_adapters(copy.deepcopy(model), **EXPERTS) for _ in range(2))
    assert torch.equal(logits_of(first), logits_of(second))
