"""Experts in 4 and 8 bits on a GPU: products as with the dequantized weights, and one layer of the released size."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.fused.four_bit_format import FOUR_BIT_FORMATS
from modeling_minimax_m3.fused.scaled_rows_format import FLOAT8_ROWS, INT8_ROWS
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts
from modeling_minimax_m3.layers.quantized import QuantizedExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

DEVICE = "cuda"
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_topk_blocks": 3,
}
# One sparse layer of the released size. Its gate_up_proj has 4.8 billion elements.
RELEASED = {
    "num_hidden_layers": 1,
    "hidden_size": 6144,
    "intermediate_size": 3072,
    "shared_intermediate_size": 3072,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
TOLERANCE = 1e-2  # of the norm, for bfloat16
FORMATS = {weight_format.name: weight_format for weight_format in (FLOAT8_ROWS, INT8_ROWS, *FOUR_BIT_FORMATS.values())}


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def by_definition(experts: QuantizedExperts, states, ids, weights) -> torch.Tensor:
    """In float32, one expert after the other."""
    out = torch.zeros_like(states, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, choice = torch.nonzero(ids == expert, as_tuple=True)
        gate_up, down = (
            experts.stored_weight(name).of_expert(expert).dequantize(torch.float32) for name in experts.weight_names
        )
        result = nn.functional.linear(experts._apply_gate(states[token].float() @ gate_up.T), down)
        out = out.index_add(0, token, result * weights[token, choice, None])
    return out


def routing(tokens: int, text: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    scores = torch.rand(tokens, text["num_local_experts"], device=DEVICE, generator=generator)
    weights, ids = scores.topk(text["num_experts_per_tok"])
    return torch.randn(tokens, text["hidden_size"], device=DEVICE, generator=generator).bfloat16(), ids, weights


@pytest.fixture(params=FORMATS)
def small(request) -> QuantizedExperts:
    weight_format = FORMATS[request.param]
    if weight_format in FOUR_BIT_FORMATS.values() and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    plain = MiniMaxM3VLExperts(tiny_config(text=TEXT).text_config).to(DEVICE)
    experts = QuantizedExperts(plain, weight_format, torch.bfloat16)
    for name in experts.weight_names:
        weight = torch.randn(getattr(plain, name).shape, device=DEVICE) * getattr(plain, name).shape[-1] ** -0.5
        for suffix, tensor in zip(weight_format.suffixes, weight_format.quantize(weight.bfloat16()), strict=True):
            experts.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    experts.finish_loading()
    return experts


class TestSmallExperts:
    @pytest.mark.parametrize("tokens", [1, 4, 16, 17, 300])
    def test_results(self, small, tokens, monkeypatch):
        inputs = routing(tokens, TEXT)
        expected = by_definition(small, *inputs)
        assert distance(small(*inputs), expected) < TOLERANCE
        monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 3 * 256 * 256 * 2)
        assert distance(small(*inputs), expected) < TOLERANCE

    @pytest.mark.parametrize("tokens", [4, 300])
    def test_gradients_of_states(self, small, tokens):
        states, ids, weights = routing(tokens, TEXT)
        gradients = []
        for call, given in ((small, states), (lambda *inputs: by_definition(small, *inputs), states.float())):
            given = given.clone().requires_grad_()
            call(given, ids, weights).float().pow(2).sum().backward()
            gradients.append(given.grad)
        assert distance(*gradients) < 2 * TOLERANCE

    def test_few_tokens_never_wait(self, small):
        """So they can be captured in a graph, whose answers follow its inputs."""
        states, ids, weights = routing(4, TEXT)
        small(states, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            result = small(states, ids, weights)
        ids.copy_(ids.flip(0))
        graph.replay()
        assert distance(result, by_definition(small, states, ids, weights)) < TOLERANCE


@needs_bitsandbytes
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
def test_qlora_learns(tmp_path, autocast):
    """On attention and experts, prepared by PEFT. The bytes of the base stay."""
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).to(torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = MiniMaxM3VLForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = get_peft_model(
        model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **targets)
    ).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any("gate_up_proj_nested_absmax" in name for name in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(2, 400, (2, 500), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = []
    for _ in range(6):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())


class TestReleasedLayer:
    """A model whose only layer has experts of the released size, by way of files. It needs 15 GB of disk."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        if torch.cuda.mem_get_info()[0] < 44 * 2**30:
            pytest.skip("needs 44 GB of free memory")
        folder = tmp_path_factory.mktemp("released")
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = MiniMaxM3VLForCausalLM._from_config(tiny_config(text=RELEASED).text_config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "float8", "int8"])
    def test_quantized_run_saved_and_reloaded(self, folder, kind, needs_memory, tmp_path):
        needs_memory(44)
        model = MiniMaxM3VLForCausalLM.from_pretrained(
            folder, quantization_config=quantization(kind), device_map={"": 0}
        ).eval()
        experts = model.model.layers[0].mlp.experts
        numbers = RELEASED["num_local_experts"] * 3 * RELEASED["intermediate_size"] * RELEASED["hidden_size"]
        stored = sum(parameter.numel() * parameter.element_size() for parameter in experts.parameters())
        assert stored <= (0.30 if "4" in kind else 0.51) * 2 * numbers

        # The first and the last expert, whose elements begin behind 2 ** 32.
        with safe_open(folder / "model.safetensors", framework="pt", device=DEVICE) as opened:
            for name in experts.weight_names:
                weights = opened.get_slice(f"model.layers.0.mlp.experts.{name}")
                for expert in (0, RELEASED["num_local_experts"] - 1):
                    alone = FORMATS[kind].quantize(weights[expert : expert + 1])
                    kept = experts.stored_weight(name).of_experts(slice(expert, expert + 1)).tensors
                    for tensor, expected in zip(kept, alone, strict=True):
                        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))

        for tokens in (1, 16, 4096):
            inputs = routing(tokens, RELEASED)
            with torch.no_grad():
                expected = by_definition(experts, *inputs)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                result = experts(*inputs)
                extra = torch.cuda.max_memory_allocated() - before
            assert distance(result, expected) < TOLERANCE
            # Weights of one group, a copy of its bytes where experts are gathered, their scales in float32, and the
            # largest activations, as for MXFP8.
            pairs = tokens * RELEASED["num_experts_per_tok"]
            assert extra <= 1.8 * quantized_products.DEQUANTIZED_BYTES + pairs * 2 * (4 * 6144 + 3072) + 2**26

        tokens = torch.randint(2, 400, (1, 64), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with torch.no_grad():
            expected = model(input_ids=tokens).logits
            before = {name: tensor.cpu() for name, tensor in experts.state_dict().items()}
            model.save_pretrained(tmp_path)
            del model, experts
            needs_memory(20)
            again = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).eval()
            assert torch.equal(again(input_ids=tokens).logits, expected)
        for name, tensor in again.model.layers[0].mlp.experts.state_dict().items():
            assert torch.equal(tensor.cpu().view(torch.uint8), before[name].view(torch.uint8))


def quantization(kind: str):
    if kind in ("float8", "int8"):
        configs = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig({"float8": configs.Float8WeightOnlyConfig, "int8": configs.Int8WeightOnlyConfig}[kind]())
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
