"""QLoRA's dtypes without bitsandbytes: quantized projections between float32 hidden states, as PEFT prepares a model.

`test_qlora_gpu.py` does the same with weights in 4 bits.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import msa
from modeling_minimax_m3.layers import attention
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

OPERATORS = (
    "select_blocks",
    "select_blocks_with_kvcache",
    "block_sparse_attention",
    "block_sparse_attention_with_kvcache",
    "indexer_kl_loss",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Params4bit(nn.Parameter):
    """PEFT leaves parameters of a class of this name as they are."""


class QuantizedLinear(nn.Linear):
    """Computes in bf16 and returns the dtype of its input, as bitsandbytes' layers do. Its weight holds bytes."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = linear.weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8)
        self.weight = Params4bit(packed, requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states.bfloat16(), self.weight.view(torch.bfloat16)).to(states.dtype)


def quantized_model(kind: str) -> nn.Module:
    """A prepared model with adapters.

    "compute dtype": its layers know theirs, and the config says float32, as it does where the checkpoint was float32.
    "model's dtype": only the config knows one.
    """
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(tiny_config(text={"indexer_loss_coef": 0.1}).text_config).to(torch.bfloat16)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            quantized = QuantizedLinear(linear)
            if kind == "compute dtype":
                quantized.compute_dtype = torch.bfloat16
            model.set_submodule(name, quantized)
    model.config._is_quantized = True
    model.config.dtype = torch.float32 if kind == "compute dtype" else torch.bfloat16
    model.config.msa_backend = "torch"
    model = prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(PROJECTIONS)))


@pytest.fixture
def came(monkeypatch) -> dict[str, set[torch.dtype]]:
    """The floating-point dtypes that each operator, and dense attention, were called with."""
    dtypes = {}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            tensors = (arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
            dtypes.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    for name in OPERATORS:
        record(msa, name)
    record(attention, "dense_attention")
    return dtypes


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 400, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
@pytest.mark.parametrize("kind", ["compute dtype", "model's dtype"])
def test_training_steps(kind, autocast, came, tokens):
    model = quantized_model(kind).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        assert any("indexer" in name and grad.abs().sum() > 0 for name, grad in grads.items())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(came) == {"select_blocks", "block_sparse_attention", "indexer_kl_loss", "dense_attention"}
    assert set().union(*came.values()) == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache, autocast, came, tokens):
    model = quantized_model("compute dtype").eval()
    options = {"input_ids": tokens, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        generated = model.generate(**options, cache_implementation=cache, disable_compile=True)
        without_cache = model.generate(**options, use_cache=False)
    torch.testing.assert_close(generated.sequences, without_cache.sequences, rtol=0, atol=0)
    layers = generated.cache.layers
    assert {states.dtype for layer in layers for states in (layer.keys, layer.values)} == {torch.bfloat16}
    # Their arguments are the caches as well, that of the index keys among them.
    assert set(came) >= {"select_blocks_with_kvcache", "block_sparse_attention_with_kvcache", "dense_attention"}
    assert set().union(*came.values()) == {torch.bfloat16}


@pytest.mark.parametrize("was_quantized", [False, True], ids=["plain", "dequantized"])
def test_float32_stays_float32(was_quantized, came, tokens):
    """It holds under adapters in half precision, and where the config names a former dtype of the weights."""
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config).eval()
    if was_quantized:
        model.config._is_quantized, model.config.dtype = True, torch.bfloat16
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(PROJECTIONS)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    generated = model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert set().union(*came.values()) == {torch.float32}
    assert {layer.keys.dtype for layer in generated.cache.layers} == {torch.float32}
