"""The mixture of experts and the dense MLP against stock Transformers, and what stock does not check."""

import math

import pytest
import torch

from modeling_minimax_m3.layers.moe import (
    MiniMaxM3VLDenseMLP,
    MiniMaxM3VLExperts,
    MiniMaxM3VLSparseMoeBlock,
    MiniMaxM3VLTopKRouter,
    swiglu_oai,
)
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.layout_building import real_tokens
from modeling_minimax_m3.training.router_loss import load_balancing_loss


def random_tokens(config, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, config.hidden_size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def text_config(config):
    return config.text_config


def test_activation_is_the_formula():
    alpha, limit = 1.702, 7.0
    gates, ups = (-30.0, -1.0, 0.0, 0.5, 6.9, 7.5), (-9.0, -7.0, 0.0, 1.0, 7.0, 20.0)
    result = swiglu_oai(torch.tensor([*gates, *ups], dtype=torch.float64), alpha, limit)

    def gated(gate: float, up: float) -> float:
        gate, up = min(gate, limit), max(-limit, min(up, limit))
        return gate / (1 + math.exp(-alpha * gate)) * (up + 1)

    assert result.tolist() == pytest.approx([gated(gate, up) for gate, up in zip(gates, ups)], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_moe_block_equals_stock(make_pair, text_config, implementation, dtype):
    text_config._experts_implementation = implementation
    stock_block, block = make_pair(MiniMaxM3VLSparseMoeBlock, text_config, dtype=dtype)
    # Large inputs reach the clamps of the activation.
    tokens = 10 * random_tokens(text_config, 2, 17, dtype=dtype)
    # Low precision has to round where stock rounds; in float32 only the order of sums inside a product may differ.
    tolerance = 1e-6 if dtype is torch.float32 else 0.0
    expected = stock_block(tokens)
    torch.testing.assert_close(block(tokens), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_moe_gradients_equal_stock(make_pair, text_config, implementation):
    text_config._experts_implementation = implementation
    stock_block, block = make_pair(MiniMaxM3VLSparseMoeBlock, text_config, dtype=torch.float64)
    assert stock_block.experts.config._experts_implementation == implementation
    gradients = []
    for module in (stock_block, block):
        tokens = random_tokens(text_config, 3, 11, dtype=torch.float64).requires_grad_()
        module(tokens).square().sum().backward()
        gradients.append({"input": tokens.grad, **{name: p.grad for name, p in module.named_parameters()}})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_dense_mlp_equals_stock(make_pair, text_config):
    stock_mlp, mlp = make_pair(MiniMaxM3VLDenseMLP, text_config)
    tokens = 10 * random_tokens(text_config, 2, 9)
    torch.testing.assert_close(mlp(tokens), stock_mlp(tokens), rtol=0, atol=0)
    assert mlp.down_proj.in_features == text_config.dense_intermediate_size
    assert MiniMaxM3VLDenseMLP(text_config, intermediate_size=24).down_proj.in_features == 24


def test_router_bias_chooses_experts_but_does_not_weigh_them(make_pair, text_config):
    _, router = make_pair(MiniMaxM3VLTopKRouter, text_config)
    tokens = random_tokens(text_config, 50)
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([5.0, -5.0, 0.0, 0.0]))
        logits, weights, chosen = router(tokens)
    assert (chosen == 0).any(dim=-1).all()
    assert not (chosen == 1).any()
    scores = logits.sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_router_weights_are_float32_under_bfloat16(make_pair, text_config):
    _, router = make_pair(MiniMaxM3VLTopKRouter, text_config, dtype=torch.bfloat16)
    logits, weights, _ = router(random_tokens(text_config, 5, dtype=torch.bfloat16))
    assert (logits.dtype, weights.dtype) == (torch.bfloat16, torch.float32)


def test_experts_of_another_rank_add_nothing(make_pair, text_config):
    """Expert parallelism gives the id `num_experts` to choices that another rank computes."""
    text_config._experts_implementation = "eager"
    _, experts = make_pair(MiniMaxM3VLExperts, text_config)
    tokens = random_tokens(text_config, 6)
    elsewhere = experts.num_experts
    both = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [3, 0], [2, 1]])
    weights = torch.full(both.shape, 0.5)
    left, right = both.clone(), both.clone()
    left[both >= 2] = elsewhere
    right[both < 2] = elsewhere
    parts = experts(tokens, left, weights) + experts(tokens, right, weights)
    torch.testing.assert_close(parts, experts(tokens, both, weights))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_rank_without_tokens_goes_backward(make_pair, text_config, implementation):
    """The other ranks wait for this one in the backward, so gradients have to be zeros, not missing."""
    text_config._experts_implementation = implementation
    _, experts = make_pair(MiniMaxM3VLExperts, text_config)
    experts._is_expert_parallel = True
    tokens = random_tokens(text_config, 6).requires_grad_()
    elsewhere = torch.full((6, 2), experts.num_experts)
    experts(tokens, elsewhere, torch.zeros(6, 2)).sum().backward()
    for tensor in (tokens, experts.gate_up_proj, experts.down_proj):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


class TestLoadBalancingLoss:
    num_experts, top_k = 8, 3

    def logits(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(tokens, self.num_experts, generator=generator) for _ in range(2))

    def loss(self, logits, attention_mask=None, cu_seq_lens=None) -> torch.Tensor:
        batch = 1 if attention_mask is None else len(attention_mask)
        real = real_tokens(attention_mask, cu_seq_lens, batch, len(logits[0]) // batch)
        return load_balancing_loss(logits, self.num_experts, self.top_k, real)

    @pytest.mark.parametrize("with_mask", [False, True], ids=["all tokens", "padded"])
    def test_equals_stock(self, stock, with_mask):
        logits = self.logits(20)
        mask = (torch.arange(20) % 5 > 0).long().view(2, 10) if with_mask else None
        expected = stock.load_balancing_loss_func(logits, self.num_experts, self.top_k, mask)
        torch.testing.assert_close(self.loss(logits, attention_mask=mask), expected)

    def test_is_the_formula(self):
        logits = self.logits(9)
        fraction, probability = [0.0] * self.num_experts, [0.0] * self.num_experts
        rows = [row for layer in logits for row in layer.softmax(-1).tolist()]
        for row in rows:
            for expert in sorted(range(self.num_experts), key=lambda e: -row[e])[: self.top_k]:
                fraction[expert] += 1 / len(rows)
            for expert, value in enumerate(row):
                probability[expert] += value / len(rows)
        expected = self.num_experts * sum(f * p for f, p in zip(fraction, probability))
        assert self.loss(logits).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_pads_do_not_count(self, side):
        logits = self.logits(14)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
        real = tuple(layer[mask.flatten() == 1] for layer in logits)
        torch.testing.assert_close(self.loss(logits, attention_mask=mask), self.loss(real))

    def test_what_follows_packed_sequences_does_not_count(self):
        logits = self.logits(12)
        real = tuple(layer[:9] for layer in logits)
        offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
        torch.testing.assert_close(self.loss(logits, cu_seq_lens=offsets), self.loss(real))
        mask = torch.ones(1, 12)
        torch.testing.assert_close(self.loss(logits, attention_mask=mask, cu_seq_lens=offsets), self.loss(real))

    def test_mask_that_covers_cached_tokens(self):
        logits = self.logits(6)  # 2 rows of 3 new tokens
        mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
        real = tuple(layer[[1, 2, 3, 4, 5]] for layer in logits)
        torch.testing.assert_close(self.loss(logits, attention_mask=mask), self.loss(real))

    def test_other_masks_are_ignored(self):
        logits = self.logits(6)
        torch.testing.assert_close(self.loss(logits, attention_mask=torch.zeros(2, 1, 3, 3)), self.loss(logits))

    def test_model_without_experts(self):
        with pytest.raises(ValueError, match="router_logits is empty"):
            load_balancing_loss((), self.num_experts, self.top_k)


def test_balance_coefficient_of_the_text_model(text_config):
    """An attribute in stock, which callers set; here it changes the config that the loss reads."""
    text_config.output_router_logits = True
    model = MiniMaxM3VLForCausalLM(text_config)
    tokens = torch.arange(20)[None]
    model.router_aux_loss_coef = 0.0
    without = model(tokens, labels=tokens).loss
    model.router_aux_loss_coef = 2.0
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, without + 2.0 * output.aux_loss)
    assert model.config.router_aux_loss_coef == 2.0
