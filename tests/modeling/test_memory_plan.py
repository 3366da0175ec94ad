"""The memory planner: arithmetic against cases by hand, parameters against real models, and what more devices do."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate.utils.modeling import check_device_map
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, TorchAoConfig

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, released_config, tiny_config
from modeling_minimax_m3.memory_plan import (
    PARTS,
    MemoryRequest,
    as_dict,
    plan_memory,
    read_config,
    saved_precision,
)
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.planning import holdings, passes
from modeling_minimax_m3.planning.devices import _balanced
from modeling_minimax_m3.planning.weights import PRECISIONS, adapters, list_weights, optimizer_bytes

GIB = 2**30


@pytest.fixture(scope="module")
def released():
    return released_config()


@pytest.fixture(autouse=True, scope="module")
def weights_are_listed_once():
    """Listing the released model's takes a third of a second, and tests plan for it more than a hundred times."""
    listed = {}

    def list_once(config):
        key = type(config), config.to_json_string()
        if key not in listed:
            listed[key] = list_weights(config)
        return list(listed[key])

    with mock.patch.object(holdings, "list_weights", list_once):
        yield


def seven_layers():
    """The released geometry with one dense layer and six sparse ones."""
    config = released_config().text_config.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        config[name] = config[name][:1] + config[name][-6:]
    return MiniMaxM3VLTextConfig(**(config | {"num_hidden_layers": 7}))


def on_one(config, **options):
    """The parts of the only device of a plan."""
    (device,) = plan_memory(config, MemoryRequest(**options)).devices
    return device


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config().text_config,
        tiny_config(tie_word_embeddings=True),
        tiny_config(text={"layer_types": ["minimax_m3_structured"] * 4}),
    ],
    ids=["composite", "text", "tied", "structured"],
)
def test_parameters_are_those_of_the_model(config):
    auto_class = AutoModelForCausalLM if isinstance(config, MiniMaxM3VLTextConfig) else AutoModelForImageTextToText
    model = auto_class.from_config(config)
    plan = plan_memory(config, MemoryRequest(precision="float32"))
    assert sum(plan.parameters.values()) == model.num_parameters()
    weights = sum(size for part, size in plan.devices[0].gib.items() if part in PARTS)
    assert weights * GIB == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()))


def test_released_parameters_by_part(released):
    parameters = plan_memory(released, MemoryRequest()).parameters
    hidden, vocabulary = 6144, 200064
    assert parameters["embeddings"] == parameters["head"] == vocabulary * hidden
    assert parameters["attention"] == 60 * (hidden * (2 * 64 + 2 * 4) * 128 + 2 * 128)
    assert parameters["indexer"] == 57 * (hidden * (4 + 1) * 128 + 2 * 128)
    assert parameters["routed experts"] == 57 * 128 * 3 * hidden * 3072
    assert parameters["shared experts"] == 57 * 3 * hidden * 3072
    assert parameters["dense MLPs"] == 3 * 3 * hidden * 12288
    assert parameters["router"] == 57 * 128 * hidden
    assert parameters["norms"] == (2 * 60 + 1) * hidden
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(released)
    assert sum(parameters.values()) == model.num_parameters()


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", 4 * 4096 * 96),
        ("bf16", 2 * 4096 * 96),
        ("mxfp8", 4096 * 96 + 4096 * 3),  # a scale of a byte for 32 elements of a row
        ("fp8", 4096 * 96 + 4 * 4096),  # a float32 for each row
        ("int8", 4096 * 96 + 4 * 4096),
        ("nf4", 4096 * 96 // 2 + 4 * 4096 * 96 // 64),
        ("nf4-double", 4096 * 96 // 2 + (1 + 4 / 256) * 4096 * 96 // 64),
    ],
)
def test_bytes_of_a_precision(precision, expected):
    assert PRECISIONS[precision].bytes_of((4096, 96)) == expected
    assert PRECISIONS[precision].bytes_of((8, 512, 96)) == expected


def test_an_odd_row_ends_its_block():
    assert PRECISIONS["mxfp8"].bytes_of((10, 33)) == 10 * (33 + 2)


def test_quantized_weights_of_the_released_model(released):

    def gigabytes(precision):
        gib = on_one(released, precision=precision).gib
        return sum(gib.get(part, 0) for part in PARTS) * GIB / 1e9

    assert gigabytes("bf16") == pytest.approx(854, abs=1)
    assert gigabytes("mxfp8") == pytest.approx(444, abs=1)
    assert gigabytes("nf4") == pytest.approx(245, abs=1)


def test_what_stays_in_bfloat16(released):
    plain, quantized = (on_one(released, precision=precision).gib for precision in ("bf16", "nf4"))
    for part in ("vision", "embeddings", "router", "norms", "head"):
        assert quantized[part] == plain[part]
    for part in ("attention", "indexer", "dense MLPs", "routed experts", "shared experts"):  # an indexer has norms too
        assert quantized[part] == pytest.approx(plain[part] * 0.5625 / 2, rel=2e-4)
    chosen = on_one(released, precision="nf4", unquantized_parts=("routed experts",)).gib
    assert chosen["routed experts"] == plain["routed experts"]
    assert chosen["head"] == pytest.approx(plain["head"] * 0.5625 / 2)


def test_torchao_bytes_are_those_of_the_library(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = tiny_config().text_config
    MiniMaxM3VLForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    scheme = TorchAoConfig(quantization.Float8WeightOnlyConfig())
    model = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, quantization_config=scheme)
    weight = model.model.layers[0].mlp.down_proj.weight
    held = sum(getattr(weight, name).nbytes for name in ("qdata", "scale"))
    assert held == pytest.approx(PRECISIONS["fp8"].bytes_of(weight.shape), abs=2 * weight.shape[0])


# ---- training -----------------------------------------------------------------------------------------------------


def test_adapters_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    config = tiny_config()
    model = get_peft_model(
        AutoModelForImageTextToText.from_config(config),
        LoraConfig(
            r=4,
            target_modules=r"(?!.*vision_tower).*self_attn\.[qv]_proj",
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            modules_to_save=["lm_head"],
        ),
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options = {"lora_rank": 4, "lora_targets": ("q_proj", "v_proj"), "lora_experts": True, "lora_save": ("lm_head",)}
    plan = plan_memory(config, MemoryRequest(training="lora", **options))
    assert plan.trained_parameters == trained


def test_frozen_indexers_get_no_adapter():
    for coef, layers in ((0.0, 4), (0.1, 4 + 2)):
        config = tiny_config(text={"indexer_loss_coef": coef})
        found = adapters(list_weights(config), ("q_proj",), 8, on_experts=False)
        assert len(found) == 2 * layers


def test_states_of_a_full_training():
    config = tiny_config().text_config
    gib = on_one(config, training="full", precision="bf16", context=64).gib
    trained = sum(weight.elements for weight in list_weights(config) if weight.requires_grad)
    assert gib["optimizer"] * GIB == pytest.approx(2 * 2 * trained)
    assert plan_memory(config, MemoryRequest(training="full")).trained_parameters == trained
    in_float32 = on_one(config, training="full", precision="float32", context=64).gib
    assert in_float32["optimizer"] * GIB == pytest.approx(2 * 4 * trained)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", 2 * 2 * 6000),
        ("adamw-8bit", 2 * (1 + 4 / 256) * 6000),
        ("paged-adamw", 2 * 4 * 6000),
        ("paged-adamw-8bit", 2 * (1 + 4 / 256) * 6000),
        ("adafactor", 4 * (10 * 20 + 10 * 30)),
        ("sgd", 0),
        ("sgd-momentum", 2 * 6000),
    ],
)
def test_bytes_of_an_optimizer(optimizer, expected):
    assert optimizer_bytes((10, 20, 30), optimizer, 2) == expected


def test_paged_states_are_host_memory():
    options = {"training": "full", "context": 64}
    paged = plan_memory(tiny_config(), MemoryRequest(optimizer="paged-adamw", **options))
    assert "optimizer" not in paged.devices[0].gib
    assert paged.paged_gib * GIB == pytest.approx(8 * paged.trained_parameters)
    assert "GiB of paged optimizer states in host memory" in paged.table()


def test_gradients_grow_through_the_backward():
    """Before the optimizer's step all gradients are there, and none but the head's while the loss runs."""
    model = passes.loss_bytes(seven_layers(), 8192, 1024)
    assert model == 4 * 8192 * 6144 * 2 + 2 * 1024 * 200064 * 6
    step = on_one(tiny_config().text_config, training="full", context=64, precision="float32")
    elements = sum(weight.elements for weight in list_weights(tiny_config().text_config) if weight.requires_grad)
    assert step.gib["gradients"] * GIB <= 4 * elements + 1


def test_training_of_one_layer_by_hand():
    """A sparse layer of the released geometry, LoRA on attention, 4096 tokens."""
    config, tokens = seven_layers(), 4096
    options = {"attention_inputs": 6144, "mlp_inputs": 0, "trains_indexer": False}
    found = passes.training_bytes(config, 6, tokens, tokens, **options)
    assert found.input == tokens * 6144 * 2
    attention = 3 * 8192 + 3 * 512 + 640 + 6144  # queries thrice, keys and values, index, the projections' input
    mlp = 2 * (4 * 3072 + 3072) + 4 * 6144 + 2 * 128  # gates and ups, rows of the experts, logits of the router
    saved = 2 * (attention + mlp + 2 * 6144) + 4 * 64 + 4 * 4 * 16
    assert found.saved == tokens * saved
    partial_gradients = tokens * 2 * 64 * 128 * 16
    workspace = partial_gradients + tokens * (4 * 64 + 8 * 512)
    of_attention = tokens * (2 * attention + 4 * 64 + 4 * 4 * 16 + 4 * 6144 + 2 * (2 * 8192 + 2 * 512)) + workspace
    of_mlp = tokens * (saved + 4 * 6144 + 2 * 4 * 6144)
    assert found.backward == max(of_attention, of_mlp)


def test_inputs_that_training_keeps():
    config = seven_layers()
    sizes = {}
    for name, options in {
        "none": {"lora_targets": ("k_proj",)},
        "attention": {"lora_targets": ("k_proj", "o_proj")},
        "shared": {"lora_targets": ("k_proj", "shared_experts.down_proj")},
        "experts": {"lora_targets": ("k_proj",), "lora_experts": True},
    }.items():
        request = MemoryRequest(training="lora", lora_rank=1, context=1000, **options)
        sizes[name] = on_one(config, **(vars(request) | {"device_gib": None})).gib["activations"] * GIB
    assert sizes["attention"] - sizes["none"] == pytest.approx(7 * 1000 * 8192 * 2)
    assert sizes["shared"] - sizes["none"] == pytest.approx(6 * 1000 * 3072 * 2)
    assert sizes["experts"] - sizes["none"] == pytest.approx(6 * 1000 * 4 * 3072 * 2)


def test_product_of_adapters_of_experts():
    """One more tensor of what the experts return, at the moment of the MLP."""
    config, tokens = seven_layers(), 65536
    options = {"attention_inputs": 0, "mlp_inputs": 0, "trains_indexer": False}
    found, without = (
        passes.training_bytes(config, 6, tokens, tokens, adapted_experts=adapted, **options)
        for adapted in (True, False)
    )
    assert (found.workspace, found.saved) == (0, without.saved)
    assert found.backward - without.backward == tokens * 4 * 6144 * 2


def lora_with_experts(version: str | None = None, **options):
    with mock.patch("importlib.metadata.version", return_value=version or "0.21.2"):
        return on_one(seven_layers(), **{"training": "lora", "lora_experts": True, "context": 64} | options)


EXPERTS_ALONE = {"training": "qlora", "unquantized_parts": ("routed experts",)}


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 2),
        ({"gradient_checkpointing": True}, 2),
        ({"precision": "float32"}, 4),
        ({"precision": "float32", "autocast": True}, 4),
        ({"precision": "float32", "strategy": "fsdp2", "devices": 2}, 2),
        ({"precision": "mxfp8", **EXPERTS_ALONE}, 2),
        ({"precision": "mxfp8", "prepared_for_kbit": True, **EXPERTS_ALONE}, 4),
    ],
)
def test_sum_of_experts_and_update(options, size):
    """The gates and ups of a layer, before its experts compute."""
    plan = lora_with_experts(**options)
    assert plan.gib["merged experts"] * GIB == 128 * 2 * 3072 * 6144 * size
    assert plan.moment.startswith("adapters of layer")
    old = lora_with_experts(version="0.20.0", **options)
    assert old.gib["merged experts"] > 2 * plan.gib["merged experts"]
    assert old.moment.startswith("backward of layer")


def test_sums_are_gone_in_the_backward():
    """With many tokens, the backward of a layer is the larger moment."""
    plan = lora_with_experts(context=262144)
    assert plan.moment.startswith(("backward", "the loss"))
    assert "merged experts" not in plan.gib
    assert "merged experts" not in lora_with_experts(training="qlora", precision="mxfp8").gib


def test_copies_of_tokens_for_quantized_experts():
    """Adapters of quantized experts keep the tokens once for each of their experts."""
    options = {"lora_targets": ("k_proj",), "lora_rank": 1, "context": 16384, "batch_size": 2}
    kept = {}
    for parts in ((), ("routed experts",)):
        request = {"training": "qlora", "precision": "mxfp8", "unquantized_parts": parts, **options}
        with_experts, without = (on_one(seven_layers(), lora_experts=adapts, **request) for adapts in (True, False))
        assert {with_experts.moment, without.moment} <= {"the loss", "adapters of layer 6"}  # behind all layers
        kept[parts] = (with_experts.gib["activations"] - without.gib["activations"]) * GIB
    assert kept["routed experts",] == pytest.approx(6 * 32768 * 4 * 3072 * 2)
    assert kept[()] - kept["routed experts",] == pytest.approx(6 * 32768 * 4 * 6144 * 2)


def test_checkpointing_and_smaller_batches_need_less():
    config = seven_layers()
    base = MemoryRequest(training="lora", context=16384, batch_size=4)
    needs = [
        plan_memory(config, request).total_gib
        for request in (
            base,
            replace(base, gradient_checkpointing=True),
            replace(base, gradient_checkpointing=True, batch_size=2),
            replace(base, gradient_checkpointing=True, batch_size=2, context=8192),
        )
    ]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > 1.5 * needs[1]


# ---- cache and generation -----------------------------------------------------------------------------------------


def test_capacity_of_the_dynamic_cache_is_the_real_one():
    config = tiny_config().text_config
    model = MiniMaxM3VLForCausalLM(config).eval()
    for prompt, new in ((20, 3), (20, 25)):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            for tokens in (prompt, *[1] * new):
                model(torch.ones(2, tokens, dtype=torch.long), cache=cache)
        expected = passes.cache_capacity(prompt + new, prompt, 32768, is_static=False)
        held = [sum(buffer.data.nbytes for buffer in layer.buffers()) for layer in cache.layers]
        assert held == [passes.cache_bytes(config, layer, 2 * expected, 4) for layer in range(4)]


def test_cache_by_hand(released):
    tokens = 131072
    gib = on_one(released, context=tokens, new_tokens=1, cache="static").gib["cache"]
    assert gib * GIB == pytest.approx(tokens * 2 * (60 * 2 * 4 * 128 + 57 * 128))
    assert passes.cache_capacity(131072, 131071, 32768, is_static=False) == 131072
    assert passes.cache_capacity(131073, 131072, 32768, is_static=False) == 262144
    assert passes.cache_capacity(1001, 1000, 32768, is_static=False) == 2000


def test_experts_of_a_prefill_by_hand():
    """16384 tokens at a time, and for each of its four experts a token (6144) with gates and ups (2 x 3072)."""
    config = seven_layers()
    activations, workspace = passes.prefill_bytes(
        config, 6, 1, 1024, 1024, element_bytes=2, layers_in_parts=True, mlps_in_parts=True
    )
    assert workspace == 0, "fewer than 2048 queries need no partial outputs"
    assert activations == 1024 * (6144 + 64) * 2 + 1024 * (2 * 6144 + 4 * 12288) * 2


# ---- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["none", "lora", "full"])
@pytest.mark.parametrize("strategy", ["device_map", "fsdp2", "zero3", "tensor_parallel", "expert_parallel", "ddp"])
def test_more_devices_never_need_more_for_each(released, strategy, training):
    request = MemoryRequest(strategy=strategy, training=training, context=4096)
    counts = (2, 4, 8, 16, 64) if strategy == "expert_parallel" else (2, 3, 4, 8, 16, 64)
    needs = [plan_memory(released, replace(request, devices=count)).total_gib for count in counts]
    assert needs == sorted(needs, reverse=True)


def test_tensor_parallelism_shares_heads_and_mlps(released):
    """Four key/value heads: two or four devices hold their own, eight hold all."""
    plans = [
        plan_memory(released, MemoryRequest(strategy="tensor_parallel", devices=devices, context=2**17)).devices[0]
        for devices in (2, 4, 8)
    ]
    tokens, layers, text = 2**17, 60, released.text_config
    index_keys = 57 * tokens * text.index_head_dim * 2 / 2**30
    heads = layers * tokens * 2 * text.head_dim * 2 / 2**30
    for plan, held in zip(plans, (2, 1, 4), strict=True):
        assert plan.gib["cache"] == pytest.approx(held * heads + index_keys)
    for part in ("dense MLPs", "shared experts"):
        assert [plan.gib[part] * 4 / plans[1].gib[part] for plan in plans] == pytest.approx([8, 4, 2])


def test_layers_are_shared_out_evenly():
    assert _balanced([1.0, 1.0, 1.0, 1.0], 2) == [0, 0, 1, 1]
    assert _balanced([3.0, 1.0, 1.0, 1.0], 2) == [0, 1, 1, 1]
    assert _balanced([1.0, 1.0], 4)[-1] == 1, "there may be more devices than layers"


@pytest.mark.parametrize("config", [tiny_config(), tiny_config().text_config], ids=["composite", "text"])
def test_device_map_covers_the_model(config):
    auto_class = AutoModelForCausalLM if isinstance(config, MiniMaxM3VLTextConfig) else AutoModelForImageTextToText
    plan = plan_memory(config, MemoryRequest(devices=2, strategy="device_map"))
    placed = plan.device_map()
    check_device_map(auto_class.from_config(config), placed)
    assert set(placed.values()) == {0, 1}
    layers = [layer for device in plan.devices for layer in device.layers]
    assert layers == list(range(4))
    with pytest.raises(ValueError, match="`device_map` needs the strategy 'device_map', got 'single'"):
        plan_memory(config, MemoryRequest()).device_map()


def test_data_parallelism_has_buckets_of_gradients():
    config, options = tiny_config(), {"training": "full", "context": 64, "devices": 2}
    alone = on_one(config, training="full", context=64, gradient_accumulation_steps=2).gib["gradients"]
    assert on_one(config, strategy="ddp", **options).gib["gradients"] == pytest.approx(2 * alone)


# ---- what fits ----------------------------------------------------------------------------------------------------


def test_changes_make_it_fit(released):
    request = MemoryRequest(devices=2, device_gib=141.0, strategy="device_map", context=32768)
    plan = plan_memory(released, request)
    assert plan.fits is False
    fitting = [change for change in plan.changes if change.fits]
    assert {"precision='nf4'", "devices=8, strategy='device_map'"} <= {
        change.description.split(", training")[0] for change in fitting
    }
    assert [change.gib for change in fitting] == sorted(change.gib for change in fitting)
    for change in plan.changes:
        again = plan_memory(released, change.request)
        assert (again.total_gib, again.fits) == (change.gib, change.fits)
        assert again.total_gib < plan.total_gib


def test_training_changes(released):
    request = MemoryRequest(training="full", device_gib=30.0, context=65536, precision="bf16")
    config = tiny_config(text={"vocab_size": 200064, "hidden_size": 6144, "num_hidden_layers": 2})
    changes = {change.description.split("=")[0] for change in plan_memory(config, request).changes}
    assert {"training", "gradient_checkpointing", "optimizer", "context", "loss_chunk"} <= changes


def test_unknown_memory_has_no_verdict():
    plan = plan_memory(tiny_config(), MemoryRequest())
    assert plan.fits is None and plan.changes == ()
    assert "`device_gib`" in plan.table()


def test_table_and_dict_of_a_plan():
    plan = plan_memory(tiny_config(), MemoryRequest(device_gib=80.0))
    lines = plan.table().splitlines()
    assert lines[0].split() == ["GiB", "cuda:0"]
    assert next(line for line in lines if line.startswith("total")).split() == ["total", f"{plan.total_gib:.2f}"]
    assert lines[-1].startswith("fits: at most")
    found = as_dict(plan)
    assert found["fits"] is True and found["devices"][0]["total_gib"] == plan.total_gib


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp4"}, "`precision` must be one of float32, .*, got 'fp4'"),
        ({"training": "dpo"}, "`training` must be one of none, lora, .*, got 'dpo'"),
        ({"optimizer": "lion"}, "`optimizer` must be one of"),
        ({"strategy": "pipeline"}, "`strategy` must be one of"),
        ({"cache": "paged"}, "`cache` must be one of dynamic, static"),
        ({"context": 0}, "`context` must be a positive integer, got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be a positive integer, got 1.5"),
        ({"devices": 2}, "`strategy` must be one for several devices"),
        ({"device_gib": -1.0}, "`device_gib` must be a positive number of GiB or None, got -1.0"),
        ({"device_gib": float("inf")}, "`device_gib` must be a positive number of GiB or None, got inf"),
        ({"margin": 1.0}, "`margin` must be at least 0 and below 1"),
        ({"new_tokens": 8192}, "`new_tokens` must be from 0 to context - 1 = 8191, got 8192"),
        ({"unquantized_parts": ("norms",)}, "`unquantized_parts` must be among .*, got 'norms'"),
        ({"training": "lora", "precision": "nf4"}, "`precision` must not be quantized .* training='qlora' is for it"),
        ({"training": "full", "precision": "mxfp8"}, "`precision` must not be quantized with training='full'"),
        ({"training": "qlora"}, "`precision` must be quantized .* got 'bf16': training='lora'"),
        ({"prepared_for_kbit": True}, "`prepared_for_kbit` needs training='qlora'"),
        (
            {"training": "indexers", "precision": "mxfp8", "unquantized_parts": ("head",)},
            "`unquantized_parts` must hold 'indexer'",
        ),
        ({"autocast": True}, "`autocast` needs precision='float32'"),
        ({"training": "lora", "lora_targets": ()}, "`lora_targets` must name a linear layer"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryRequest(**options)


def test_experts_that_the_devices_cannot_share():
    request = MemoryRequest(strategy="expert_parallel", devices=3, device_gib=80)
    with pytest.raises(ValueError, match="`devices` must divide the 4 experts .* strategy='expert_parallel', got 3"):
        plan_memory(tiny_config(), request)
    # Neither does a plan advise it, for as many devices or for the next that would be enough: 2, 4, 8, ...
    for devices, strategy in ((3, "device_map"), (1, "single")):
        request = MemoryRequest(strategy=strategy, devices=devices, device_gib=0.7, context=2**18)
        changes = plan_memory(tiny_config(), request).changes
        assert changes and not [change for change in changes if change.request.strategy == "expert_parallel"]


def test_errors_of_the_model():
    request = MemoryRequest(training="lora", lora_targets=("q_prj",))
    with pytest.raises(ValueError, match="`lora_targets` must be ends of names .* such as .*q_proj.*, got 'q_prj'"):
        plan_memory(tiny_config(), request)
    with pytest.raises(ValueError, match="`lora_save` must be ends of names of modules, got 'lm_hd'"):
        plan_memory(tiny_config(), MemoryRequest(training="lora", lora_save=("lm_hd",)))
    dense = tiny_config(text={"layer_types": ["full_attention"] * 4})
    with pytest.raises(ValueError, match="`training` must not be 'indexers'"):
        plan_memory(dense, MemoryRequest(training="indexers"))


# ---- configurations -----------------------------------------------------------------------------------------------


def test_configurations_from_files_and_folders(tiny_checkpoint):
    by_folder = plan_memory(tiny_checkpoint, MemoryRequest())
    by_file = plan_memory(str(tiny_checkpoint / "config.json"), MemoryRequest())
    assert by_folder.parameters == by_file.parameters == plan_memory(tiny_config(), MemoryRequest()).parameters


def test_first_layers_of_a_configuration():
    config = read_config("released", layers=4)
    assert config.text_config.mlp_layer_types == ["dense"] * 3 + ["sparse"]
    assert plan_memory(config, MemoryRequest()).parameters["routed experts"] == 128 * 3 * 6144 * 3072
    with pytest.raises(ValueError, match="`layers` must be from 1 to 60, got 61"):
        read_config("released", layers=61)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "bf16"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "nf4-double"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    ],
)
def test_saved_precision(quantization, expected):
    config = tiny_config(dtype="bfloat16")
    if quantization is not None:
        config.quantization_config = quantization
    assert saved_precision(config) == expected


def test_other_saved_precisions():
    assert saved_precision(tiny_config(dtype="float32")) == "float32"
    config = tiny_config()
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="`precision` must be given: .* 'awq' is unknown"):
        saved_precision(config)
