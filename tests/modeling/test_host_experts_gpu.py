"""Experts on the host beside a GPU: the same answers while copies and kernels run at the same time."""

import copy
import gc
import threading

import pytest
import torch
from transformers import LogitsProcessorList

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, mxfp8_config, offload_experts
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.layers.host_experts import HostExperts
from modeling_minimax_m3.layers.moe import MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.runtime import pinned_memory
from modeling_minimax_m3.runtime.graph_pieces import GraphPieces
from modeling_minimax_m3.runtime.pinned_memory import PinnedMemory
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

from .conftest import Prescribed, fill_with_noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "shared_intermediate_size": 256,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_topk_blocks": 3,
}
TOLERANCE = 2e-2  # of the norm, for bfloat16
FORMS = ("plain", "mxfp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config)
    fill_with_noise(model, seed=0)
    path = tmp_path_factory.mktemp("host_experts_gpu")
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def load(folder):
    def load_form(form: str = "plain") -> MiniMaxM3VLForCausalLM:
        options = {"quantization_config": mxfp8_config()} if form == "mxfp8" else {}
        model = MiniMaxM3VLForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)
        return model.eval()

    return load_form


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 440, (batch, length), generator=generator).cuda()  # 448 is padding


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def states_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, count, 256, device="cuda", generator=generator).bfloat16()


def blocks_of(model) -> list[MiniMaxM3VLSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, MiniMaxM3VLSparseMoeBlock)]


def with_all_in_slots(model, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of the same code where no expert ever gives up its slot: to be met bit for bit."""
    offload_experts(model, experts_on_device=1.0, show_progress=False)
    for ids in inputs:
        model(ids)
    torch.cuda.synchronize()
    return [model(ids).logits for ids in inputs]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
@torch.no_grad()
def test_blocks_answer_as_with_resident_experts(kernels, load, form, share):
    """Single blocks: in a whole model, rounding may change the choice of a later router."""
    inputs = [states_of(count, seed) for seed, count in enumerate((1, 4, 15, 16, 17, 600))]
    expected = [block(states) for block in blocks_of(load(form).cuda()) for states in inputs]
    model = load(form)
    offloaded = offload_experts(model, experts_on_device=share, show_progress=False)
    assert model.device.type == "cuda"
    experts = [module for module in model.modules() if isinstance(module, HostExperts)]
    assert all(parameter.is_pinned() for module in experts for parameter in module.parameters())
    for _ in range(3):
        found = [block(states) for block in blocks_of(model) for states in inputs]
        assert max(map(distance, found, expected)) < TOLERANCE
    assert offloaded.stats.bytes_copied > 0
    if share == 1.0:
        offloaded.stats.reset()
        model(tokens(1, 1))
        assert (offloaded.stats.misses, offloaded.stats.hit_rate) == (0, 1)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_few_tokens_run_the_kernels(kernels, load, form, monkeypatch):
    """A token takes the fused kernels over the slots, in MXFP8 too: copies do not make them doubt the numbers."""
    model = load(form)
    offload_experts(model, show_progress=False)
    outputs = model(tokens(1, 30), use_cache=True)
    cache = {CACHE_NAME: outputs[CACHE_NAME]}
    calls, mlp = [], few_tokens.mlp
    monkeypatch.setattr(few_tokens, "mlp", lambda *args: calls.append(len(args)) or mlp(*args))
    looks = []
    is_ordinary = few_tokens.is_ordinary
    monkeypatch.setattr(few_tokens, "is_ordinary", lambda weight: looks.append(weight) or is_ordinary(weight))
    for step in range(4):
        model(tokens(1, 1, seed=step), **cache)
        if step == 0:
            looks.clear()
    assert sum(count > 6 for count in calls) == 4 * 3  # steps, sparse layers
    assert not looks


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_generate_writes_the_same_tokens(kernels, load, form, prefetch):
    ids = tokens(2, 40)
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole = load(form)
    offload_experts(whole, experts_on_device=1.0, show_progress=False)
    expected = whole.generate(ids, **options)
    model = load(form)
    offloaded = offload_experts(model, prefetch=prefetch, show_progress=False)
    for cache in ("dynamic", "dynamic", "static"):
        found = model.generate(ids, **options, cache_implementation=cache)
        if cache == "dynamic":
            assert torch.equal(found.sequences, expected.sequences)  # whatever is in the slots at the start
        assert found.sequences.shape == expected.sequences.shape
    assert (offloaded.stats.prefetched > 0) == prefetch


@pytest.fixture
def captures(monkeypatch):
    """The pieces of all captured passes."""
    found, capture = [], GraphPieces.capture

    def watched(pieces, *args):
        capture(pieces, *args)
        found.append(pieces)

    monkeypatch.setattr(GraphPieces, "capture", watched)
    return found


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_captured_pass_answers_as_a_pass_in_python(kernels, load, form, prefetch, captures, monkeypatch):
    """With about as many copies, and the bits of a captured pass whose experts are all in slots.

    A captured pass attends to buffers that are longer than the text, so it sums in another order than a pass in Python.
    A piece ends in each of the three sparse layers.
    """
    options = {"max_new_tokens": 60, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole, model = load(form), load(form)
    offload_experts(whole, experts_on_device=1.0, show_progress=False)
    offloaded = offload_experts(model, experts_on_device=0.3, prefetch=prefetch, show_progress=False)
    for batch, length in ((1, 40), (3, 7)):
        ids = tokens(batch, length + 60)
        call = options | {"input_ids": ids[:, :length], "logits_processor": LogitsProcessorList([Prescribed(ids)])}
        monkeypatch.setenv("MINIMAX_M3_CUDA_GRAPHS", "0")
        model.generate(**call)
        offloaded.stats.reset()
        expected = model.generate(**call).logits
        copied = offloaded.stats.bytes_copied
        assert not captures
        monkeypatch.delenv("MINIMAX_M3_CUDA_GRAPHS")
        offloaded.stats.reset()
        found = model.generate(**call).logits
        assert {len(pieces) for pieces in captures} == {4}
        assert len(found) == 60
        assert all(map(torch.equal, found, whole.generate(**call).logits))
        errors = sorted(map(distance, found, expected))
        assert errors[len(errors) * 8 // 10] < TOLERANCE  # an expert or a block near a tie changes a step
        assert offloaded.stats.misses > 0 and abs(offloaded.stats.bytes_copied - copied) < copied / 2
        captures.clear()


def test_a_pass_with_too_few_slots_is_not_captured(kernels, load, captures):
    """Then experts may have to pass through slots one after the other."""
    model = load()
    offload_experts(model, experts_on_device=6 / 48, show_progress=False)
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    assert model.generate(tokens(4, 20), **options).shape == (4, 28)
    assert not captures
    assert model.generate(tokens(1, 20), **options).shape == (1, 28)
    assert captures


@torch.no_grad()
def test_a_copy_waits_for_the_expert_that_is_in_use(kernels, load):
    """Room for one layer's experts: a slot that is overwritten too early gives another answer."""
    model = load()
    offload_experts(model, experts_on_device=16 / 48, show_progress=False)
    inputs = [tokens(1, 1 + seed % 5 * (1 + seed % 3 * 40), seed=seed) for seed in range(30)]
    expected = with_all_in_slots(load(), inputs)
    results = [model(ids).logits for ids in inputs]  # nothing waits between passes
    assert all(map(torch.equal, results, expected))


@torch.no_grad()
def test_threads_with_streams_share_the_slots(kernels, load):
    model = load()
    inputs = [tokens(1, length, seed=length) for length in (1, 3, 30, 200)]
    expected = with_all_in_slots(load(), inputs)
    offload_experts(model, experts_on_device=16 / 48, show_progress=False)
    torch.cuda.synchronize()
    are_equal = []

    def run(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results = [model(inputs[number]).logits for _ in range(20)]
            torch.cuda.current_stream().synchronize()
            are_equal.extend(torch.equal(logits, expected[number]) for logits in results)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(are_equal) == 80
    assert all(are_equal)


def test_threads_generate_with_graphs_of_their_own(kernels, load):
    """A piece of one thread may run between the pieces of another."""
    options = {"max_new_tokens": 30, "do_sample": False}
    inputs = [tokens(1, length, seed=length) for length in (5, 33, 64)]
    whole = load()
    offload_experts(whole, experts_on_device=1.0, show_progress=False)
    expected = [whole.generate(ids, **options) for ids in inputs]
    model = load()
    offload_experts(model, experts_on_device=16 / 48, show_progress=False)
    are_equal = []

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            are_equal.extend(
                torch.equal(model.generate(inputs[number], **options), expected[number]) for _ in range(3)
            )

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert are_equal == [True] * 9


@torch.no_grad()
def test_a_model_on_the_gpu_gives_its_memory_back(load, kernels):
    model = load().cuda()
    states = states_of(50, seed=0)
    expected = blocks_of(model)[1](states)
    experts = sum(w.nbytes for name, w in model.named_parameters() if ".experts." in name)
    before = torch.cuda.memory_allocated()
    offloaded = offload_experts(model, experts_on_device=0.25, show_progress=False)
    gc.collect()
    slots = offloaded.num_slots * offloaded.expert_bytes
    assert torch.cuda.memory_allocated() <= before - experts + slots + 2**21
    assert distance(blocks_of(model)[1](states), expected) < TOLERANCE
    offloaded.remove()
    model.cuda()
    assert distance(blocks_of(model)[1](states), expected) < TOLERANCE


def test_too_many_slots_are_refused(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30 + 2**22, 2**33))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(ValueError, match="`experts_on_device` asks for"):
        offload_experts(load(), experts_on_device=1.0, show_progress=False)


def test_large_memory_is_locked_in_place_and_unlocked():
    tensor = torch.zeros(2**25)  # 128 MiB
    address = tensor.data_ptr()
    memory = PinnedMemory(tensor)
    assert memory.tensor.data_ptr() == address
    assert tensor.is_pinned()
    del memory
    gc.collect()
    assert not tensor.is_pinned()


def test_memory_that_is_locked_in_part_is_copied(monkeypatch):
    """As where two weights lie on one page of a file. The failure leaves no error for later calls."""
    monkeypatch.setattr(pinned_memory, "_SMALLEST_IN_PLACE", 2**20)
    whole = torch.zeros(2**22)
    first = PinnedMemory(whole[: 2**21 + 16])
    second = PinnedMemory(whole[2**21 + 16 :])
    assert first.tensor.is_pinned() and second.tensor.is_pinned()
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_an_offloaded_model_can_be_dropped(load):
    model = load()
    offload_experts(model, show_progress=False)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    with torch.no_grad():
        model(tokens(1, 40))
    del model
    gc.collect()
    torch.cuda.synchronize()
