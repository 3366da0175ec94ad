"""The model on a GPU: layouts, half precision, and static-cache decoding under CUDA graphs."""

import copy

import pytest
import torch
from transformers import CompileConfig, LogitsProcessorList, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import msa
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

from .conftest import Prescribed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Flash kernels and grouped GEMMs want strides of 16 bytes and known head sizes. The blocks of 16 tokens that the tiny model
# has are for the `torch` backend alone; the compiled kernels have a test of their own at the end.
TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64}


@pytest.fixture(scope="module")
def on_cpu(make_pair):
    return make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=TEXT).text_config)[1]


def to_gpu(model, dtype):
    return copy.deepcopy(model).to("cuda", dtype)


LENGTH = 150
LAYOUTS = {
    "uniform": {},
    "left padding": {"attention_mask": (torch.arange(LENGTH) >= 47).long().expand(2, -1)},
    "right padding": {"attention_mask": (torch.arange(LENGTH) < 101).long().expand(2, -1)},
    "holes": {"attention_mask": (torch.arange(LENGTH) % 5 > 0).long().expand(2, -1)},
    "packed": {"position_ids": torch.cat([torch.arange(60), torch.arange(90)]).expand(2, -1)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_separate_rows(on_cpu, make_tokens, relative_error, name, dtype):
    """Each sequence gives the same output alone and inside its layout, on the GPU and in one dtype."""
    model = to_gpu(on_cpu, dtype)
    kwargs = {key: value.cuda() for key, value in LAYOUTS[name].items()}
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    real = kwargs.get("attention_mask", torch.ones_like(tokens)) == 1
    with torch.no_grad():
        together = model(tokens, **kwargs).logits
        for row in range(2):
            pieces = (tokens[row, :60], tokens[row, 60:]) if name == "packed" else (tokens[row, real[row]],)
            alone = torch.cat([model(piece[None]).logits[0] for piece in pieces])
            if dtype == torch.float32:
                assert relative_error(together[row, real[row]], alone) < 1e-5
            else:  # in bf16 a few tokens change an expert or a block near a tie
                errors = [relative_error(a, b) for a, b in zip(together[row, real[row]], alone)]
                assert sorted(errors)[len(errors) * 8 // 10] < 2e-2


def test_float32_equals_cpu(on_cpu, make_tokens, relative_error):
    tokens = make_tokens(on_cpu.config, 2, LENGTH)
    with torch.no_grad():
        logits = to_gpu(on_cpu, torch.float32)(tokens.cuda()).logits.cpu()
        assert relative_error(logits, on_cpu(tokens).logits) < 1e-4


@pytest.mark.parametrize("name", ["uniform", "packed"])
def test_gradients_in_bf16(on_cpu, make_tokens, relative_error, name):
    tokens = make_tokens(on_cpu.config, 2, LENGTH)
    kwargs = LAYOUTS[name]
    gradients = []
    for model, device in ((on_cpu, "cpu"), (to_gpu(on_cpu, torch.bfloat16), "cuda")):
        model.zero_grad()
        inputs = {key: value.to(device) for key, value in kwargs.items()}
        model.train()(tokens.to(device), labels=tokens.to(device), **inputs).loss.backward()
        gradients.append(torch.cat([p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 0.2  # experts and blocks change hands near ties in bf16


def test_static_decode_replays_as_a_cuda_graph(on_cpu, make_tokens, relative_error):
    """One decoding step is captured once and replayed, because nothing in it reads a value on the host."""
    model = to_gpu(on_cpu, torch.bfloat16)
    tokens = make_tokens(model.config, 2, 60).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens[:, :40], attention_mask=mask[:, :40], cache=cache)
        twin = copy.deepcopy(cache)

        def prepared(step, cache):
            return model.create_masks_for_generate(model.config, torch.empty(2, 1, 0), mask[:, : step + 1], cache)

        token = tokens[:, 40:41].clone()
        layout = {name: tensor.clone() for name, tensor in prepared(40, twin).items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up on a copy, as capturing must not be the first call
            model(token, attention_mask=layout, cache=copy.deepcopy(twin))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, attention_mask=layout, cache=twin).logits
        for step in range(40, 50):
            expected = model(tokens[:, step : step + 1], attention_mask=mask[:, : step + 1], cache=cache).logits
            token.copy_(tokens[:, step : step + 1])
            for name, tensor in prepared(step, twin).items():
                layout[name].copy_(tensor)
            graph.replay()
            assert relative_error(logits, expected) < 1e-5


def test_generate_compiles_where_it_is_told_to(on_cpu, make_tokens):
    """A `compile_config` of the user's own asks for a compiled step in place of a captured one."""
    model = to_gpu(on_cpu, torch.float32)
    tokens = make_tokens(model.config, 2, 40).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, pad_token_id=0, **options)
    compiled = model.generate(
        tokens, pad_token_id=0, cache_implementation="static", compile_config=CompileConfig(), **options
    )
    assert torch.equal(compiled, expected)


def loss_and_gradients(model, *args, **kwargs):
    """The loss, and all gradients in one vector."""
    model.zero_grad()
    loss = model(*args, **kwargs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["uniform", "left padding", "packed"])
def test_training_compiles(on_cpu, make_tokens, relative_error, name):
    """The default backend of `torch.compile` generates other code for GPUs than for CPUs."""
    torch.compiler.reset()
    model = to_gpu(on_cpu, torch.float32).train()
    tokens = make_tokens(model.config, 2, LENGTH).cuda()
    inputs = {key: value.cuda() for key, value in LAYOUTS[name].items()}
    inputs["labels"] = tokens.masked_fill(inputs.get("attention_mask", torch.ones_like(tokens)) == 0, -100)
    loss, gradients = loss_and_gradients(model, tokens, **inputs)
    compiled_loss, compiled = loss_and_gradients(torch.compile(model, fullgraph=True), tokens, **inputs)
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert relative_error(compiled, gradients) < 0.05  # other roundings may flip a near-tie between blocks or experts


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches(on_cpu, make_tokens, implementation):
    model = to_gpu(on_cpu, torch.float32)
    tokens = make_tokens(model.config, 2, 40).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation=implementation, **options), expected)


def test_operators_agree_with_the_reference_on_the_gpu(relative_error):
    generator = torch.Generator("cuda").manual_seed(0)
    offsets = torch.tensor([0, 1, 130, 130, 1000], dtype=torch.int32, device="cuda")

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    kwargs = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "block_size": 64}
    selection = msa.select_blocks(random(1000, 2, 64), random(1000, 64), topk=4, **kwargs)
    states = [random(1000, heads, 64).requires_grad_() for heads in (8, 2, 2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in states]
    out = msa.block_sparse_attention(*states, selection, **kwargs, backend="torch")
    expected = msa.block_sparse_attention(*exact, selection, **kwargs, backend="reference")
    assert relative_error(out, expected) < 1e-2
    upstream = random(*out.shape)
    for a, b in zip(
        torch.autograd.grad(out, states, upstream), torch.autograd.grad(expected, exact, upstream.double())
    ):
        assert relative_error(a, b) < 2e-2


# Heads and blocks that the kernels have; those of the released model have kernels of their own on Hopper.
KERNEL_SHAPES = {
    "64 channels": {"index_block_size": 64},
    "released heads": {
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "index_n_heads": 1,
        "head_dim": 128,
        "index_head_dim": 128,
        "index_block_size": 128,
    },
}


@pytest.fixture(scope="module", params=KERNEL_SHAPES)
def on_kernels(request, make_pair):
    """A model with more blocks than it selects."""
    if "cuda" not in msa.available_backends():
        pytest.skip("needs the compiled kernels")
    text = TEXT | {"index_topk_blocks": 2} | KERNEL_SHAPES[request.param]
    model = to_gpu(make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=text).text_config)[1], torch.bfloat16)
    model.config.msa_backend = "cuda"
    return model


@pytest.mark.parametrize("cache", [None, "static"], ids=["prefill", "decoding"])
def test_compiled_kernels_in_the_model(kernels, on_kernels, make_tokens, relative_error, cache):
    """The same model on both backends."""
    model = copy.deepcopy(on_kernels)
    tokens = make_tokens(model.config, 2, 600).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :77] = 0
    logits = {}
    for backend in ("torch", "cuda"):
        model.config.msa_backend = backend
        with torch.no_grad():
            if cache is None:
                logits[backend] = model(tokens, attention_mask=mask).logits[mask == 1]
                continue
            past = StaticCache(config=model.config, max_cache_len=640)
            model(tokens[:, :590], attention_mask=mask[:, :590], cache=past)
            steps = [
                model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=past).logits
                for i in range(590, 600)
            ]
            logits[backend] = torch.cat(steps, dim=1).flatten(0, 1)
    # In bf16 a few tokens change an expert or a block near a tie.
    errors = sorted(relative_error(a, b) for a, b in zip(logits["cuda"], logits["torch"]))
    assert errors[len(errors) * 8 // 10] < 3e-2


def test_gradients_on_compiled_kernels(kernels, on_kernels, make_tokens, relative_error):
    tokens = make_tokens(on_kernels.config, 2, 600).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :77] = 0
    gradients = {}
    for backend in ("torch", "cuda"):
        model = copy.deepcopy(on_kernels).train()
        model.config.msa_backend = backend
        model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        gradients[backend] = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    # As in `test_gradients_in_bf16`, but the same roundings everywhere else.
    assert relative_error(gradients["cuda"], gradients["torch"]) < 0.2


@pytest.mark.parametrize("indexer_loss_coef", [0.0, 0.1], ids=["", "with the indexers"])
def test_training_on_compiled_kernels_compiles(on_kernels, make_tokens, relative_error, indexer_loss_coef):
    torch.compiler.reset()
    model = copy.deepcopy(on_kernels).half().train()
    model.set_indexer_training(indexer_loss_coef)
    tokens = make_tokens(model.config, 2, 600).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :77] = 0
    inputs = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    loss, gradients = loss_and_gradients(model, tokens, **inputs)
    compiled_loss, compiled = loss_and_gradients(torch.compile(model, fullgraph=True), tokens, **inputs)
    assert compiled_loss == pytest.approx(loss, rel=1e-2)
    assert relative_error(compiled, gradients) < 0.2


def test_generate_with_compiled_kernels_in_cuda_graphs(on_kernels, make_tokens, relative_error):
    model = copy.deepcopy(on_kernels).half()  # compiling changes roundings, which bfloat16 would make large
    tokens = make_tokens(model.config, 2, 420).cuda()
    mask = torch.ones_like(tokens)[:, :400]
    mask[1, :77] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "logits_processor": LogitsProcessorList([Prescribed(tokens)]), "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(tokens[:, :400], **options)
    compiled = model.generate(tokens[:, :400], cache_implementation="static", **options)
    assert torch.equal(compiled.sequences, tokens[:, :412])
    errors = sorted(relative_error(a, b) for a, b in zip(compiled.logits, expected.logits))
    assert errors[len(errors) * 8 // 10] < 3e-2  # an expert or a block near a tie changes a step
