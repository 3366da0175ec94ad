"""The memory planner on the routed experts: dequantized in groups, left plain by a quantizer, kept on the host."""

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from transformers import BitsAndBytesConfig

from configuration_minimax_m3 import released_config, tiny_config
from modeling_minimax_m3 import offload_experts
from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.fused.weight_formats import MXFP8, StoredWeight
from modeling_minimax_m3.memory_plan import MemoryRequest, plan_memory, saved_unquantized_parts
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.planning import adapted_experts, devices
from modeling_minimax_m3.planning import request as request_module

from .mxfp8_cases import NOT_QUANTIZED

GIB = 2**30


@pytest.fixture(scope="module")
def released():
    return released_config()


def on_one(config, **options):
    """The parts of the only device of a plan."""
    (device,) = plan_memory(config, MemoryRequest(**options)).devices
    return device.gib


# ---- dequantized in groups ----------------------------------------------------------------------------------------


def test_a_group_of_dequantized_experts_is_that_of_the_products(released):
    """14 matrices of 72 MiB are the most that do not exceed 1 GiB."""
    for precision in ("mxfp8", "nf4"):
        gib = on_one(released, precision=precision, context=32768, new_tokens=1)["dequantized weights"]
        assert gib == pytest.approx(14 * 2 * 6144 * 6144 / GIB)


def test_groups_of_the_products_are_as_large_as_planned(monkeypatch):
    """With a small limit, a product dequantizes the number of experts that the planner counts."""
    most = 3 * 2 * 64 * 64 + 1  # room for three matrices in 16 bits
    monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", most)
    monkeypatch.setattr(devices, "DEQUANTIZED_BYTES", most)
    seen = []
    dequantize = type(MXFP8).dequantize
    monkeypatch.setattr(
        type(MXFP8),
        "dequantize",
        lambda self, tensors, dtype: seen.append(2 * tensors[0].numel()) or dequantize(self, tensors, dtype),
    )
    weight = StoredWeight(MXFP8, MXFP8.quantize(torch.randn(8, 64, 64)))
    offsets = torch.arange(2, 18, 2, dtype=torch.int32)
    quantized_products.grouped_product(torch.randn(16, 64, dtype=torch.bfloat16), weight, offsets)
    experts = next(w for w in plan_weights() if w.part == "routed experts")
    planned = devices._dequantized_bytes(replace(experts, shape=(8, 64, 64)), MemoryRequest(precision="mxfp8"))
    assert planned == max(seen) == 3 * 2 * 64 * 64


def plan_weights():
    return plan_memory(tiny_config(), MemoryRequest())._model.weights


def test_few_tokens_in_mxfp8_dequantize_nothing(released):
    options = {"precision": "mxfp8", "context": 2048, "new_tokens": 2047}
    (one,) = plan_memory(released, MemoryRequest(**options)).devices
    (many,) = plan_memory(released, MemoryRequest(batch_size=32, **options)).devices
    assert (one.moment, many.moment) == ("prefill", "decoding")  # of one token that is read first
    assert many.gib["dequantized weights"] == pytest.approx(14 * 72 / 1024)
    (long,) = plan_memory(released, MemoryRequest(**options | {"context": 132072, "new_tokens": 1000})).devices
    assert long.moment == "decoding", "whose cache has doubled"
    assert "dequantized weights" not in long.gib


# ---- left plain by a quantizer ------------------------------------------------------------------------------------


def config_with(**quantization):
    config = tiny_config(dtype="bfloat16")
    config.quantization_config = quantization
    return config


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"vision", "head", "routed experts"}),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"vision", "head"}),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
            {"head"},
        ),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "llm_int8_skip_modules": ["lm_head", "mlp.experts", "vision_tower", "multi_modal_projector"],
            },
            {"vision", "head", "routed experts"},
        ),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, None),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, {"vision", "head"}),
        ({"quant_method": "mxfp8", "ignored_layers": NOT_QUANTIZED}, {"vision", "head"}),
        ({"quant_method": "mxfp8", "ignored_layers": ["block_sparse_moe.experts"]}, {"routed experts"}),
    ],
)  # fmt: skip
def test_parts_that_a_quantizer_left_alone(quantization, expected):
    found = saved_unquantized_parts(config_with(**quantization))
    assert set(found) == ({"vision", "head", "routed experts"} if expected is None else expected)
    MemoryRequest(precision="nf4", unquantized_parts=found)  # which checks their names


def test_most_of_a_part_decides():
    """The tiny model has experts in layers 1 to 3."""
    names = [f"layers.{layer}.mlp.experts" for layer in (1, 2, 3)]
    for count, expected in ((0, ()), (1, ()), (2, ("routed experts",)), (3, ("routed experts",))):
        config = config_with(quant_method="mxfp8", ignored_layers=["nothing", *names[:count]])
        assert saved_unquantized_parts(config) == expected


def test_a_saved_list_may_be_an_object():
    config = tiny_config()
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert saved_unquantized_parts(config) == ("routed experts", "head")


def test_plain_checkpoints_have_the_default():
    assert saved_unquantized_parts(tiny_config()) == MemoryRequest().unquantized_parts


# ---- on the host --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0.5, 1.0, "150KB", 200_000])
def test_slots_are_those_of_the_offload(room):
    config = tiny_config().text_config
    model = MiniMaxM3VLForCausalLM(config)
    offload = offload_experts(model, "cpu", experts_on_device=room, show_progress=False)
    gib = on_one(config, precision="float32", experts_on_device=room, context=64, new_tokens=4)
    assert gib["routed experts"] * GIB == pytest.approx(offload.num_slots * offload.expert_bytes)
    plan = plan_memory(config, MemoryRequest(precision="float32", experts_on_device=room, context=64, new_tokens=4))
    assert plan.host_gib * GIB == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()))


def test_the_rest_of_the_plan_is_that_of_a_plain_model(released):
    options = {"precision": "mxfp8", "context": 131072, "new_tokens": 100}
    plain, offloaded = on_one(released, **options), on_one(released, experts_on_device=0.1, **options)
    assert offloaded["routed experts"] == pytest.approx(0.1 * plain["routed experts"], rel=1e-3)
    for part in ("attention", "head", "cache", "shared experts"):
        assert offloaded[part] == plain[part]


def test_tokens_that_meet_one_expert_at_a_time_need_less(released):
    options = {"context": 2001, "new_tokens": 1}
    plain, offloaded = on_one(released, **options), on_one(released, experts_on_device=0.1, **options)
    assert offloaded["activations"] < plain["activations"]
    dequantized = on_one(released, precision="mxfp8", experts_on_device=0.1, context=8192, new_tokens=1)
    assert dequantized["dequantized weights"] == pytest.approx(2 * 12288 * 2 * 6144 / GIB), "the dense MLP, no group"


def test_memory_of_the_host_decides_too(released):
    request = MemoryRequest(device_gib=79.1, experts_on_device=0.05, host_gib=512.0)
    plan = plan_memory(released, request)
    assert plan.total_gib < plan.request.usable_gib and plan.fits is False and not plan.fits_host
    assert "GiB of the host are needed, and there are 486.40 GiB, 95% of 512.00" in plan.table()
    fitting = [change for change in plan.changes if change.fits]
    assert [change.request.precision for change in fitting] == ["mxfp8"]
    assert f"{fitting[0].host_gib:.2f} GiB of host memory" in plan.table()
    assert plan_memory(released, replace(request, host_gib=1024.0)).fits
    assert plan_memory(released, replace(request, host_gib=None)).fits, "unknown, so not checked"
    assert "GiB of weights in host memory" in plan_memory(released, replace(request, host_gib=None)).table()


def test_experts_on_the_host_make_a_plan_fit(released):
    plan = plan_memory(released, MemoryRequest(precision="mxfp8", device_gib=79.1, context=32768))
    (change,) = [change for change in plan.changes if change.request.experts_on_device is not None]
    assert change.fits and change.description == "experts_on_device=0.1"
    assert change.host_gib == pytest.approx(413, abs=1)
    smaller = plan_memory(released, replace(change.request, device_gib=40.0))
    assert "experts_on_device=0.02" in [other.description for other in smaller.changes]
    assert all(other.request.devices == 1 for other in smaller.changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_on_device": 1.5}, "must be a share between 0 and 1 .* got 1.5"),
        ({"experts_on_device": "three"}, "must be a size such as '20GiB', got 'three'"),
        ({"experts_on_device": 0.1, "training": "lora"}, "needs training='none', .* got training='lora'"),
        ({"experts_on_device": 0.1, "devices": 2, "strategy": "device_map"}, "strategy='device_map' and devices=2"),
        ({"experts_on_device": 0.1, "precision": "nf4"}, "plain experts or those in mxfp8, got precision='nf4'"),
        ({"host_gib": 0.0}, "`host_gib` must be a positive number of GiB or None, got 0.0"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryRequest(**options)
    MemoryRequest(experts_on_device=0.1, precision="nf4", unquantized_parts=("routed experts",))


def test_errors_of_the_model(released):
    with pytest.raises(
        ValueError, match="`experts_on_device` must leave room for 4 experts .* got 0.0001, room for 0"
    ):
        plan_memory(released, MemoryRequest(experts_on_device=0.0001))
    dense = tiny_config(text={"mlp_layer_types": ["dense"] * 4})
    with pytest.raises(ValueError, match="`experts_on_device` must be None, because the model has no routed experts"):
        plan_memory(dense, MemoryRequest(experts_on_device=0.5))
    assert plan_memory(dense, MemoryRequest(device_gib=0.01)).fits is False, "whose changes name no experts"


def test_memory_of_this_host(monkeypatch, tmp_path):
    total = request_module.detected_host_gib()
    assert 0.5 < total < 2**20
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(request_module, "_CONTAINER_LIMIT", limit)
    limit.write_text(f"{GIB // 2}\n")
    assert request_module.detected_host_gib() == 0.5
    limit.write_text("max\n")
    assert request_module.detected_host_gib() >= total


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("version", ["0.20.1", "0.21.0", None])
def test_what_peft_makes_of_experts_and_adapters(monkeypatch, version, checkpointing):
    """Sums in 16 bits: of PEFT that keeps factors one at a time, of older ones all, and what they make on the way."""

    def found(_name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    weights = plan_weights()
    elements = {}
    for weight in weights:
        if weight.part == "routed experts":
            elements.setdefault(weight.layer, []).append(weight.elements)
    layers = len(elements)
    (gate_up, down), *others = elements.values()
    assert gate_up == 2 * down and layers > 1 and all(other == [gate_up, down] for other in others)
    request = MemoryRequest(training="lora", lora_experts=True, gradient_checkpointing=checkpointing)
    if version == "0.20.1":  # without checkpointing, the sums of the other layers wait for their backward
        expected = 2 * (gate_up + down) * (1 if checkpointing else layers) + 10 * gate_up
    else:
        expected = 2 * gate_up
    assert adapted_experts.merged_bytes(request, weights) == expected
    assert adapted_experts.merged_bytes(replace(request, lora_experts=False), weights) == 0
    assert adapted_experts.merged_bytes(request, [w for w in weights if w.part != "routed experts"]) == 0
