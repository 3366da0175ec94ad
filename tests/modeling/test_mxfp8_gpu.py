"""Models and experts in MXFP8 on a GPU: exact numbers, products as with the dequantized weights, bounded memory."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from configuration_minimax_m3 import released_config, tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, mxfp8_config
from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts
from modeling_minimax_m3.layers.mxfp8 import Mxfp8Experts
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8, quantize_mxfp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_topk_blocks": 3,
}
TOLERANCE = 1e-2  # of the norm, for bfloat16


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def experts_of(config, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Mxfp8Experts:
    """Random experts. They are quantized one by one, because all of them in float32 would not fit."""
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Mxfp8Experts(MiniMaxM3VLExperts(config), dtype)
    experts.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name in experts.weight_names:
        values, scales = experts.stored(name)
        for expert in range(len(values)):
            weight = torch.randn(values.shape[1:], device=device, generator=generator) * values.shape[-1] ** -0.5
            for stored, quantized in zip((values, scales), quantize_mxfp8(weight), strict=True):
                stored[expert].view(torch.uint8).copy_(quantized.view(torch.uint8))
    experts.shows_numbers = True
    return experts


def routing(tokens: int, config, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(tokens, config.num_local_experts, device="cuda", generator=generator)
    weights, ids = scores.topk(config.num_experts_per_tok)
    states = torch.randn(tokens, config.hidden_size, device="cuda", generator=generator)
    return states.bfloat16(), ids, weights


def by_definition(experts: Mxfp8Experts, states, ids, weights) -> torch.Tensor:
    """In float32, one expert after the other. Differentiable."""
    out = torch.zeros_like(states, dtype=torch.float32)
    for expert in ids.unique().tolist():
        if expert >= experts.num_experts:
            continue
        token, choice = torch.nonzero(ids == expert, as_tuple=True)
        gate_up, down = (
            dequantize_mxfp8(*(tensor[expert] for tensor in experts.stored(name)), torch.float32)
            for name in experts.weight_names
        )
        result = nn.functional.linear(experts._apply_gate(states[token].float() @ gate_up.T), down)
        out = out.index_add(0, token, result * weights[token, choice, None])
    return out


@pytest.fixture(scope="module")
def small_config():
    return tiny_config(text=TEXT).text_config


@pytest.fixture(scope="module")
def small(small_config) -> Mxfp8Experts:
    return experts_of(small_config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mxfp8_gpu")
    MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).to(torch.bfloat16).save_pretrained(folder / "plain")
    model = MiniMaxM3VLForCausalLM.from_pretrained(folder / "plain", quantization_config=mxfp8_config())
    model.save_pretrained(folder / "mxfp8")
    return folder / "mxfp8"


def load(checkpoint, **options):
    return MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, device_map={"": 0}, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_same_numbers_as_on_a_cpu(dtype):
    """Every value with every scale, and numbers that are quantized."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values.where(values.float().isfinite(), torch.zeros(()).to(values.dtype)).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 8)
    expected = dequantize_mxfp8(values, scales, dtype)
    assert torch.equal(dequantize_mxfp8(values.cuda(), scales.cuda(), dtype).cpu(), expected)
    tensor = torch.randn(64, 256) * torch.exp2(4 * torch.randn(64, 256))
    for ours, theirs in zip(quantize_mxfp8(tensor.cuda()), quantize_mxfp8(tensor), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


class TestExperts:
    @pytest.mark.parametrize("tokens", [1, 3, 16, 17, 300, 3000])
    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
    def test_results(self, small, small_config, tokens, implementation, monkeypatch):
        monkeypatch.setattr(small.config, "_experts_implementation", implementation)
        monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 3 * 256 * 256 * 2)
        inputs = routing(tokens, small_config)
        with torch.no_grad():
            assert distance(small(*inputs), by_definition(small, *inputs)) < TOLERANCE

    @pytest.mark.parametrize("tokens", [1, 16, 300])
    def test_pairs_of_other_processes(self, small, small_config, tokens):
        states, ids, weights = routing(tokens, small_config)
        ids[:, 1:] = small.num_experts
        with torch.no_grad():
            assert distance(small(states, ids, weights), by_definition(small, states, ids, weights)) < TOLERANCE
            assert small(states, torch.full_like(ids, small.num_experts), weights).abs().sum() == 0

    @pytest.mark.parametrize("tokens", [3, 300])
    def test_gradients(self, small, small_config, tokens):
        states, ids, weights = routing(tokens, small_config)
        upstream = torch.randn_like(states)
        gradients = []
        for run in (small, lambda *inputs: by_definition(small, *inputs)):
            leaves = states.clone().requires_grad_(), weights.clone().requires_grad_()
            run(leaves[0], ids, leaves[1]).backward(upstream.to(run(leaves[0], ids, leaves[1]).dtype))
            gradients.append([leaf.grad for leaf in leaves])
        for ours, expected in zip(*gradients, strict=True):
            assert distance(ours, expected) < 2 * TOLERANCE

    def test_captured(self, small, small_config):
        """For any number of tokens, a graph replays on new routing."""
        for tokens in (1, 16, 40):
            static = routing(tokens, small_config)
            with torch.no_grad():
                small(*static)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = small(*static)
                for seed in (2, 3):
                    inputs = routing(tokens, small_config, seed)
                    for held, new in zip(static, inputs, strict=True):
                        held.copy_(new)
                    graph.replay()
                    assert distance(out, by_definition(small, *inputs)) < TOLERANCE


class TestModels:
    @pytest.mark.parametrize("length", [5, 70, 700])
    def test_logits(self, checkpoint, length, kernels):
        tokens = torch.randint(2, 400, (2, length), generator=torch.Generator().manual_seed(1)).cuda()
        models = [load(checkpoint, quantization_config=mxfp8_config(dequantize=d)) for d in (False, True)]
        with torch.no_grad():
            ours, expected = (model(input_ids=tokens).logits.float() for model in models)
        # A rounding may choose another expert for a token, so the median over tokens is compared.
        errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.median() < 2 * TOLERANCE

    def test_generation_with_a_graph(self, checkpoint, monkeypatch):
        tokens = torch.randint(2, 400, (2, 50), generator=torch.Generator().manual_seed(1)).cuda()
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for graphs in ("1", "0"):
            monkeypatch.setenv("MINIMAX_M3_CUDA_GRAPHS", graphs)
            outputs.append(load(checkpoint).generate(tokens, **options))
        captured, plain = outputs
        assert torch.equal(captured.sequences, plain.sequences)
        ours, expected = (torch.stack(output.logits).float() for output in outputs)
        # As above. Once an expert is another, so are the keys and values of that row.
        errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.median() < TOLERANCE

    def test_adapters_learn(self, checkpoint, kernels):
        model = load(checkpoint)
        targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], **targets)
        model = get_peft_model(model, config).train()
        before = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.randint(2, 400, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
        losses = []
        for _ in range(6):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        after = dict(model.named_parameters())
        assert all(torch.equal(p.view(torch.uint8), after[n].view(torch.uint8)) for n, p in before.items())

    def test_gradients_of_adapters_on_experts(self, small, small_config):
        """Against experts in float32 that hold the dequantized weights."""
        plain = MiniMaxM3VLExperts(copy.deepcopy(small_config)).cuda()
        for name in small.weight_names:
            getattr(plain, name).data = dequantize_mxfp8(*small.stored(name), torch.float32)
        states, ids, weights = routing(300, small_config)
        gradients = []
        for experts, dtype in ((copy.deepcopy(small), torch.bfloat16), (plain, torch.float32)):
            holder = nn.ModuleDict({"experts": experts})
            model = get_peft_model(
                holder, LoraConfig(r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
            )
            generator = torch.Generator("cuda").manual_seed(2)
            adapters = [p for n, p in model.named_parameters() if "lora_" in n]
            for parameter in adapters:
                parameter.data = torch.randn(parameter.shape, device="cuda", generator=generator) * 0.05
            model.base_model.model["experts"](states.to(dtype), ids, weights).float().pow(2).sum().backward()
            gradients.append([parameter.grad for parameter in adapters])
        for ours, expected in zip(*gradients, strict=True):
            assert distance(ours, expected) < 2 * TOLERANCE


class TestReleasedLayer:
    """The experts of one layer: 7.3 billion weights, 4.8 billion of them in one tensor."""

    @pytest.fixture(scope="class")
    def config(self):
        return released_config().text_config

    @pytest.fixture(scope="class")
    def experts(self, config):
        if torch.cuda.mem_get_info()[0] < 24 * 2**30:
            pytest.skip("needs 24 GB of free memory")
        return experts_of(config)

    @pytest.mark.parametrize("tokens", [1, 16, 4096])
    def test_results_and_memory(self, experts, config, tokens, needs_memory):
        needs_memory(12)
        inputs = routing(tokens, config)
        stored = sum(parameter.numel() * parameter.element_size() for parameter in experts.parameters())
        assert stored <= 0.52 * 2 * 128 * 3 * 3072 * 6144
        with torch.no_grad():
            expected = by_definition(experts, *inputs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = experts(*inputs)
            extra = torch.cuda.max_memory_allocated() - before
        assert distance(result, expected) < TOLERANCE
        # Weights of one group, a copy of its bytes where experts are gathered, and the largest activations: for each
        # pair the tokens, gates and ups, what the gate makes of them, and a second copy of the widest of these.
        pairs = tokens * config.num_experts_per_tok
        assert extra <= 1.6 * quantized_products.DEQUANTIZED_BYTES + pairs * 2 * (4 * 6144 + 3072) + 2**26
