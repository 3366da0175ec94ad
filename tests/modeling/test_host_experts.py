"""Models whose experts stay on the host, with the CPU as the device: answers, copies, saves and refusals."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    expert_offloading,
    mxfp8_config,
    offload_experts,
)
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.layers.host_experts import HostExperts, HostMxfp8Experts, HostSparseMoeBlock
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.layers.mxfp8 import Mxfp8Experts
from modeling_minimax_m3.runtime.captured_decoding import obstacle_of_model
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

from .conftest import fill_with_noise

CONFIG = tiny_config(text={"num_local_experts": 8}).text_config  # three sparse layers, two experts of a token
FORMS = ("plain", "mxfp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = MiniMaxM3VLForCausalLM(CONFIG)
    fill_with_noise(model, seed=0)
    path = tmp_path_factory.mktemp("host_experts")
    model.save_pretrained(path)
    return path


@pytest.fixture
def load(folder):
    def load_form(form: str = "plain", **options) -> MiniMaxM3VLForCausalLM:
        if form == "mxfp8":
            options["quantization_config"] = mxfp8_config()
        model = MiniMaxM3VLForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()
        # Products of a CPU round in another way where a weight starts between two cache lines, as in a file.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    return load_form


@pytest.fixture
def kernels_of_few_tokens(monkeypatch):
    """Lets blocks take the path of the kernels, whose definition runs in their place."""
    monkeypatch.setattr(few_tokens, "takes_mlp", lambda x, *_: len(x) <= few_tokens.MAX_TOKENS)
    monkeypatch.setattr(few_tokens, "mlp", few_tokens.mlp_reference)


def offload(model, **options):
    return offload_experts(model, **{"device": "cpu", "experts_on_device": 0.25, "show_progress": False} | options)


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, CONFIG.vocab_size, (batch, length), generator=generator)


def blocks_of(model) -> list[MiniMaxM3VLSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, MiniMaxM3VLSparseMoeBlock)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts_on_device", [0.1, 0.25, 1.0])
def test_answers_are_those_of_resident_experts(load, form, experts_on_device):
    model, ids = load(form), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        offload(model, experts_on_device=experts_on_device)
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_writes_the_same_tokens(load, form, cache):
    model, ids = load(form), tokens()
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(ids, **options)
    offload(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_parts_of_a_whole_model_work(folder):
    """A composite model keeps its vision tower and language model; only experts change."""
    config = tiny_config(text={"num_local_experts": 8})
    model = MiniMaxM3SparseForConditionalGeneration(config).eval()
    ids = torch.randint(2, 100, (1, 30))
    with torch.no_grad():
        expected = model(ids).logits
        offload(model)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_read_slots(load, form, prefetch, kernels_of_few_tokens):
    model, ids = load(form), tokens(batch=1, length=8)
    with torch.no_grad():
        expected = model(ids).logits
        offloaded = offload(model, experts_on_device=0.7, prefetch=prefetch)
        for step in range(3):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
            if step == 0:
                assert offloaded.stats.misses > 0
    assert (offloaded.stats.prefetched > 0) == prefetch


def test_slots_of_chosen_experts_stay_while_others_are_prefetched(load, kernels_of_few_tokens):
    """With the least room, predictions may use what is left only."""
    model, ids = load(), tokens(batch=1, length=1)
    with torch.no_grad():
        expected = [model(ids + step).logits for step in range(20)]
        offloaded = offload(model, experts_on_device=2 / 24, prefetch=True)
        for step in range(20):
            torch.testing.assert_close(model(ids + step).logits, expected[step], rtol=1e-4, atol=1e-4)
    assert offloaded.num_slots == 2


def test_prediction_is_the_next_router_on_these_inputs(load, kernels_of_few_tokens):
    model = load()
    offload(model, prefetch=True)
    first, second, last = blocks_of(model)
    assert (first.next_block, second.next_block, last.next_block) == ([second], [last], [])
    states = torch.randn(3, CONFIG.hidden_size)
    with torch.no_grad():
        assert torch.equal(second.predicted(states), second.gate(states)[2])
    assert "next_block" not in dict(first.named_modules())


def test_predictions_are_not_recorded_as_router_outputs(load, kernels_of_few_tokens):
    model, ids = load(), tokens(batch=1, length=6)
    with torch.no_grad():
        expected = model(ids, output_router_logits=True).router_logits
        offload(model, experts_on_device=1.0, prefetch=True)
        recorded = model(ids, output_router_logits=True).router_logits
    assert len(recorded) == len(expected) == 3
    torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-4)


def test_statistics_count_experts_and_bytes(load):
    model, ids = load(), tokens(batch=1, length=30)
    chosen = []
    handles = [
        block.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for block in blocks_of(model)
    ]
    offloaded = offload(model, experts_on_device=1.0)
    size = 3 * CONFIG.hidden_size * CONFIG.intermediate_size * 4
    assert (offloaded.expert_bytes, offloaded.num_slots, offloaded.num_experts) == (size, 24, 24)
    with torch.no_grad():
        model(ids)
        needed = sum(len(ids_of_layer.unique()) for ids_of_layer in chosen)
        stats = offloaded.stats
        assert (stats.hits, stats.misses, stats.waits, stats.hit_rate) == (0, needed, 3, 0)
        assert stats.bytes_copied == needed * size
        model(ids)
        assert (stats.hits, stats.misses, stats.waits, stats.hit_rate) == (needed, needed, 3, 0.5)
        stats.reset()
        model(ids)
        assert (stats.misses, stats.bytes_copied, stats.hit_rate) == (0, 0, 1)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("length", [1, 6, 40])
def test_choices_are_counted_for_the_policy(load, length, kernels_of_few_tokens, monkeypatch):
    model, ids = load(), tokens(batch=1, length=length)
    chosen, counted = [], []
    offload(model, experts_on_device=1.0)
    for block in blocks_of(model):
        block.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    cache = blocks_of(model)[0].experts.expert_cache
    monkeypatch.setattr(cache, "count", lambda *arguments: counted.append(arguments))
    with torch.no_grad():
        model(ids)
    expected = [dict(zip(*(part.tolist() for part in choice.unique(return_counts=True)))) for choice in chosen]
    assert counted == [(layer, counts, length) for layer, counts in enumerate(expected)]


def test_more_choices_than_slots_take_the_other_way(load, kernels_of_few_tokens):
    model, ids = load(), tokens(batch=1, length=8)
    with torch.no_grad():
        expected = model(ids).logits
        offload(model, experts_on_device=2 / 24)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_slots_are_released_behind_the_kernels(load, kernels_of_few_tokens, monkeypatch):
    model, events = load(), []
    offload(model)
    cache = blocks_of(model)[0].experts.expert_cache
    fetch, mlp = cache.fetch, few_tokens.mlp
    monkeypatch.setattr(cache, "fetch", lambda placement: events.append(placement.slots) or fetch(placement))
    monkeypatch.setattr(few_tokens, "mlp", lambda *args: events.append(args[7].flatten().tolist()) or mlp(*args))
    monkeypatch.setattr(cache, "release", lambda slots: events.append(list(slots)))
    with torch.no_grad():
        model.model.layers[1].mlp(torch.randn(1, 1, CONFIG.hidden_size))
    fetched, used, released = events
    assert set(fetched.values()) == set(used) == set(released)


def test_slots_take_the_share_that_was_asked_for(load):
    size = 3 * CONFIG.hidden_size * CONFIG.intermediate_size * 4
    for share, slots in ((0.5, 12), (5 * size, 5), (f"{6 * size // 1000 + 1}KB", 6), (10**15, 24)):
        model = load()
        assert offload(model, experts_on_device=share).num_slots == slots
        assert {len(tensor) for tensor in blocks_of(model)[0].experts.expert_cache.slots.values()} == {slots}


@pytest.mark.parametrize("form", FORMS)
def test_a_save_has_the_experts(load, form, tmp_path):
    model = load(form)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload(model)
    with torch.no_grad():
        model(tokens())
    model.save_pretrained(tmp_path)
    again = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("form", FORMS)
def test_remove_makes_an_ordinary_model(load, form):
    model, plain, ids = load(form), load(form), tokens()
    offloaded = offload(model)
    kinds = (HostSparseMoeBlock, HostExperts if form == "plain" else HostMxfp8Experts)
    assert {(type(block), type(block.experts)) for block in blocks_of(model)} == {kinds}
    offloaded.remove()
    kinds = (MiniMaxM3VLSparseMoeBlock, MiniMaxM3VLExperts if form == "plain" else Mxfp8Experts)
    assert {(type(block), type(block.experts)) for block in blocks_of(model)} == {kinds}
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in plain.modules()]
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(block.gate.weight.grad is not None for block in blocks_of(model))
    offload(model)


def test_experts_stay_when_the_model_moves(load):
    model = load()
    offload(model)
    experts = blocks_of(model)[0].experts
    before = experts.gate_up_proj.data_ptr()
    model.to("meta")
    assert model.device.type == "meta"
    assert (experts.gate_up_proj.device.type, experts.gate_up_proj.data_ptr()) == ("cpu", before)
    states, ids, weights = torch.empty(3, 4, device="meta"), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="offloaded from cpu, but the tokens are on meta"):
        experts(states, ids, weights)


def test_a_cast_model_is_refused_when_called(load):
    model = load()
    offload(model)
    model.to(torch.bfloat16)
    with torch.no_grad(), pytest.raises(ValueError, match=r"offloaded for torch\.float32.*torch\.bfloat16"):
        model(tokens())


def test_gradients_are_refused(load):
    model = load()
    offload(model)
    with pytest.raises(NotImplementedError, match=r"torch\.no_grad"):
        model(tokens())


def test_threads_share_the_slots(load, kernels_of_few_tokens):
    model = load()
    inputs = [tokens(batch=1, length=length, seed=length) for length in (1, 3, 30, 50)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    offload(model)
    errors: list[float] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                errors.append(float((model(inputs[number]).logits - expected[number]).abs().max()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 1e-4


def test_an_error_in_a_pass_leaves_the_slots_usable(load):
    model, ids = load(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        offload(model)
        experts = blocks_of(model)[1].experts
        experts.swiglu_limit = "no number"
        with pytest.raises(TypeError):
            model(ids)
        experts.swiglu_limit = CONFIG.swiglu_limit
        assert torch.equal(model(ids).logits, expected)
        with experts.expert_cache.lock:
            pass


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_may_begin_and_end_anywhere(load, form, kernels_of_few_tokens):
    model, ids = load(form), tokens(batch=1, length=8)
    with torch.inference_mode():
        expected = model(ids).logits.clone()
        offload(model, experts_on_device=0.5)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False}
    found = model.generate(ids, **options)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **options), found)


def test_compiled_calls_break_at_the_experts(load):
    model, ids = load(), tokens(batch=1, length=20)
    with torch.no_grad():
        expected = model(ids).logits
        offload(model)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_decoding_is_captured_but_not_compiled(load, monkeypatch):
    model = load()
    monkeypatch.setattr("modeling_minimax_m3.runtime.captured_decoding._DEVICE_TYPE", "cpu")
    assert obstacle_of_model(model) is None
    offloaded = offload(model)
    assert obstacle_of_model(model) is None
    static = SimpleNamespace(disable_compile=False, compile_config=None)
    monkeypatch.setattr("transformers.GenerationMixin._valid_auto_compile_criteria", lambda *_: True)
    assert model._valid_auto_compile_criteria({CACHE_NAME: DynamicCache(config=model.config)}, static)
    assert not model._valid_auto_compile_criteria({}, static)
    offloaded.remove()
    assert model._valid_auto_compile_criteria({}, static)


def test_adapters_on_attention_work(load):
    model, ids = load(), tokens()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        offload(adapted)
        assert torch.equal(adapted(ids).logits, expected)


def test_adapters_on_experts_are_refused(load):
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    adapted = get_peft_model(load(), config)
    with pytest.raises(ValueError, match="without adapters or hooks, but `.*experts` is a"):
        offload(adapted)


def test_adapters_on_offloaded_experts_are_refused(load, kernels_of_few_tokens):
    """They would have no effect."""
    model = load()
    offload(model)
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    for length in (1, 40):
        with torch.no_grad(), pytest.raises(NotImplementedError, match="adapters on experts"):
            adapted(tokens(length=length))


def test_offloaded_experts_are_not_dequantized(load):
    model = load("mxfp8")
    offloaded = offload(model)
    with pytest.raises(ValueError, match=r"call `remove\(\)` of the offload"):
        model.dequantize()
    offloaded.remove()
    model.dequantize()
    assert {type(block.experts) for block in blocks_of(model)} == {MiniMaxM3VLExperts}


def test_a_copy_is_refused(load):
    model = load()
    offload(model)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(model)


def test_what_cannot_be_offloaded_is_refused(load):
    with pytest.raises(ValueError, match="must have routed experts, got a Linear"):
        offload(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        empty = MiniMaxM3VLForCausalLM(CONFIG)
    with pytest.raises(ValueError, match=r"is on the meta device\. Load the model with `device_map=\"cpu\"`"):
        offload(empty)
    mixed = load()
    blocks_of(mixed)[2].experts.to(torch.bfloat16)
    with pytest.raises(ValueError, match="one shape and dtype in all layers"):
        offload(mixed)
    watched = load()
    blocks_of(watched)[0].experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks, but `model\.layers\.1\.mlp\.experts`"):
        offload(watched)
    twice = load()
    offload(twice)
    with pytest.raises(ValueError, match="offloaded already"):
        offload(twice)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "share between 0 and 1 .* got 0.0"),
        (1.5, "share between 0 and 1 .* got 1.5"),
        (float("nan"), "share between 0 and 1"),
        (0.01, "room for 2 experts of 24,576 bytes, .* got 0.01, room for 0"),
        (1, "room for 2 experts .* got 1, room for 0"),
        ("much", "a size such as '20GiB', got 'much'"),
        (None, "a size such as '20GiB', got None"),
    ],
)
def test_experts_on_device_is_checked_first(load, value, message):
    model = load()
    with pytest.raises(ValueError, match=f"`experts_on_device` .*{message}"):
        offload(model, experts_on_device=value)
    assert {type(block) for block in blocks_of(model)} == {MiniMaxM3VLSparseMoeBlock}


@pytest.mark.parametrize(("device", "message"), [("mps", "must be a CUDA device"), ("cuda", "finds no CUDA device")])
def test_device_is_checked(load, device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"`device` .*{message}"):
        offload(load(), device=device)


def test_too_little_memory_is_said_before_anything_moves(load, monkeypatch):
    model = load()
    size = 3 * CONFIG.hidden_size * CONFIG.intermediate_size * 4
    experts = [parameter for block in blocks_of(model) for parameter in block.experts.parameters()]
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(w.nbytes for w in experts)
    free = 2**30 + rest + 3 * size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(ValueError, match=r"`experts_on_device` .* room for 3 of 24 experts, 0\.125 of them"):
        offload(model, device="cuda:0", experts_on_device=4 * size)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_failure_midway_leaves_an_ordinary_model(load, monkeypatch):
    model, ids = load(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        put_on_host, done = expert_offloading.put_on_host, []

        def fail_at_second(*arguments):
            if done:
                raise RuntimeError("no memory to lock")
            done.append(True)
            put_on_host(*arguments)

        monkeypatch.setattr(expert_offloading, "put_on_host", fail_at_second)
        with pytest.raises(RuntimeError, match="no memory to lock"):
            offload(model)
        assert {type(block) for block in blocks_of(model)} == {MiniMaxM3VLSparseMoeBlock}
        assert torch.equal(model(ids).logits, expected)


def test_a_model_with_a_device_map_is_refused(load):
    """Accelerate has bound the forward of the class that experts have now."""
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    model = big_modeling.dispatch_model(load(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="without adapters or hooks.*experts. is a MiniMaxM3VLExperts"):
        offload_experts(model, "cpu", 0.5)
