"""The indexers' loss of a model on a GPU: compiled kernels against the `torch` backend, sparse and in warm-up."""

import copy

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# One layer, so that rounding in one backend does not change what the next layer selects.
TEXT = {
    "num_hidden_layers": 1,
    "layer_types": ["minimax_m3_sparse"],
    "mlp_layer_types": ["dense"],
    "hidden_size": 128,
    "num_attention_heads": 8,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_block_size": 64,
    "index_topk_blocks": 3,
    "indexer_loss_coef": 0.3,
}
# The heads and blocks that have kernels of their own on Hopper.
RELEASED_HEADS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "index_n_heads": 1,
    "head_dim": 128,
    "index_head_dim": 128,
    "index_block_size": 128,
}
LAYOUTS = {
    "uniform": {},
    "left padding": {"attention_mask": (torch.arange(500) >= 150).long().expand(2, -1)},
    "packed": {"position_ids": torch.cat([torch.arange(200), torch.arange(300)]).expand(2, -1)},
}


@pytest.fixture(params=[{}, RELEASED_HEADS], ids=["64 channels", "released heads"])
def heads(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["sparse", "warmup"])
def model(request, heads, make_pair):
    config = tiny_config(text=TEXT | heads | {"indexer_warmup": request.param}).text_config
    return make_pair(MiniMaxM3VLForCausalLM, config)[1].to(DEVICE, torch.bfloat16).train()


def losses_and_gradients(model, backend, inputs):
    model = copy.deepcopy(model)
    model.config.msa_backend = backend
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return outputs, {name: grad for name, grad in grads.items() if ".indexer." in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_agree_with_the_torch_backend(kernels, model, make_tokens, relative_error, layout):
    tokens = make_tokens(model.config, 2, 500).to(DEVICE)
    inputs = {"input_ids": tokens, "labels": tokens} | {name: x.to(DEVICE) for name, x in LAYOUTS[layout].items()}
    expected, expected_grads = losses_and_gradients(model, "torch", inputs)
    outputs, grads = losses_and_gradients(model, "cuda", inputs)
    # Where sparse, a few queries choose another block near a tie.
    tolerance = 1e-3 if model.config.indexer_warmup else 1e-2
    assert abs(outputs.indexer_loss / expected.indexer_loss - 1) < tolerance
    assert len(grads) == 4
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 5e-2, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kernels, model, make_tokens, relative_error, use_reentrant):
    tokens = make_tokens(model.config, 2, 300).to(DEVICE)
    inputs = {"input_ids": tokens, "labels": tokens}
    expected, expected_grads = losses_and_gradients(model, "cuda", inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs, grads = losses_and_gradients(model, "cuda", inputs)
    assert torch.equal(outputs.indexer_loss, expected.indexer_loss)
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 1e-3, name
