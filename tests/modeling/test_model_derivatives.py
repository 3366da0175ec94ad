"""Forward mode and second derivatives of a model with sparse layers."""

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

TEXT = {"layer_types": ["minimax_m3_sparse"] * 4, "index_block_size": 8, "index_topk_blocks": 2}


@pytest.fixture(scope="module")
def loss_of(make_tokens):
    """The language loss as a function of token embeddings, and the embeddings of the tokens."""
    config = tiny_config(text=TEXT).text_config
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(False)
    tokens = make_tokens(config, 2, 50)

    def loss(embedded: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=tokens).loss

    return loss, model.get_input_embeddings()(tokens)


def direction(embedded: torch.Tensor) -> torch.Tensor:
    return torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1), dtype=embedded.dtype)


def gradient(loss, embedded: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = embedded.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf, **options)[0], leaf


def test_forward_mode(loss_of):
    loss, embedded = loss_of
    along = direction(embedded)
    _, tangent = torch.func.jvp(loss, (embedded,), (along,))
    expected = (gradient(loss, embedded)[0] * along).sum()
    assert abs(expected) > 1e-4
    assert tangent.item() == pytest.approx(expected.item(), rel=1e-4)


def test_second_derivatives(loss_of, relative_error):
    loss, embedded = loss_of
    along = direction(embedded)
    grad, leaf = gradient(loss, embedded, create_graph=True)
    (by_double_backward,) = torch.autograd.grad((grad * along).sum(), leaf)
    _, by_forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (embedded,), (along,))
    assert relative_error(by_forward_over_reverse, by_double_backward) < 1e-4
    step = 1e-4
    ahead, behind = (gradient(loss, embedded + sign * step * along)[0] for sign in (1, -1))
    assert relative_error(by_double_backward, (ahead - behind) / (2 * step)) < 0.05


@pytest.mark.parametrize("training", [False, True])
def test_functional_gradient_of_every_parameter(make_tokens, relative_error, training):
    """It works in training mode as well, although the loss without logits allows one backward only."""
    config = tiny_config(text=TEXT).text_config
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(config).train(training).requires_grad_(True)
    model.set_experts_implementation("eager")  # under torch.func the grouped kernel needs PyTorch 2.12 or newer
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = make_tokens(config, 2, 50)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        kwargs = {"labels": tokens, "use_cache": False}
        return torch.func.functional_call(model, parameters, (tokens,), kwargs).loss

    gradients = torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
    assert "model.layers.0.self_attn.indexer.q_proj.weight" in gradients
    for name, parameter in parameters.items():
        if parameter.grad.norm() == 0:
            assert gradients[name].norm() == 0
        else:
            assert relative_error(gradients[name], parameter.grad) < 1e-4, name
