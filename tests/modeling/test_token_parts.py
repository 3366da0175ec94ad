"""Parts of the tokens of a pass, one after the other, in passes without gradients."""

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import Cache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.layers import token_parts
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention
from modeling_minimax_m3.layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.cache import MiniMaxM3VLSparseDynamicLayer

PART = 16


@pytest.fixture
def model(make_pair):
    return make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)[1]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(token_parts, "TOKENS_OF_A_PART", PART)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Tokens of each call of experts."""
    seen = []
    forward = MiniMaxM3VLExperts.forward

    def counted(self, hidden_states, *args):
        seen.append(len(hidden_states))
        return forward(self, hidden_states, *args)

    monkeypatch.setattr(MiniMaxM3VLExperts, "forward", counted)
    return seen


@pytest.mark.parametrize("shape", [(1, 49), (2, 33), (3, 16), (1, 16)], ids=str)
def test_logits_are_those_of_one_call(model, make_tokens, monkeypatch, calls, shape):
    tokens = make_tokens(model.config, *shape)
    with torch.no_grad():
        whole = model(tokens).logits
        num_layers = len(calls)
        assert calls == [tokens.numel()] * num_layers
        calls.clear()
        monkeypatch.setattr(token_parts, "TOKENS_OF_A_PART", PART)
        parts = model(tokens).logits
    full, rest = divmod(tokens.numel(), PART)
    assert calls == [PART] * full * num_layers if not rest else ([PART] * full + [rest]) * num_layers
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_the_router_takes_all_tokens_at_once(model, make_tokens, calls):
    """So parts do not change which experts a token takes, and router logits are recorded as they are without parts."""
    tokens = make_tokens(model.config, 1, 3 * PART)
    logits = model(tokens, output_router_logits=True).router_logits
    assert [len(layer) for layer in logits] == [3 * PART] * (len(calls) // 3)
    assert set(calls) == {PART}


@pytest.fixture
def layer_calls(monkeypatch) -> list[int]:
    """Tokens of a row of each call of a layer."""
    seen = []
    forward = MiniMaxM3VLAttention.forward

    def counted(self, hidden_states, *args, **kwargs):
        seen.append(hidden_states.shape[1])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(MiniMaxM3VLAttention, "forward", counted)
    return seen


class TestLayers:
    """Layers that read a prompt in parts."""

    @pytest.fixture(autouse=True)
    def small_parts_of_a_layer(self, monkeypatch):
        monkeypatch.setattr(token_parts, "TOKENS_OF_A_LAYER", 32)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("shape", "parts"), [((1, 70), [32, 32, 6]), ((2, 64), [16] * 4), ((1, 33), [32, 1])], ids=str
    )
    def test_a_prompt_and_what_follows(self, model, make_tokens, monkeypatch, layer_calls, shape, parts):
        tokens, more = make_tokens(model.config, *shape), make_tokens(model.config, shape[0], 3, seed=1)
        in_parts = model(tokens)
        num_layers = model.config.num_hidden_layers
        assert layer_calls == parts * num_layers
        assert [layer.get_seq_length() for layer in in_parts.cache.layers] == [shape[1]] * num_layers
        room = {buffer.data.shape[1] for layer in in_parts.cache.layers for buffer in layer.buffers()}
        assert room == {max(shape[1], 2 * parts[0])}, "no more than for all tokens, or for two parts"
        next_logits = model(more, cache=in_parts.cache).logits
        monkeypatch.setattr(token_parts, "TOKENS_OF_A_LAYER", 10**6)
        whole = model(tokens)
        torch.testing.assert_close(in_parts.logits, whole.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(next_logits, model(more, cache=whole.cache).logits, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_a_pass_that_continues_a_cache_reads_its_tokens_at_once(self, model, make_tokens, layer_calls):
        tokens = make_tokens(model.config, 2, 70)
        cache = model(tokens[:, :10]).cache
        layer_calls.clear()
        logits = model(tokens[:, 10:], cache=cache).logits
        assert layer_calls == [60] * model.config.num_hidden_layers
        torch.testing.assert_close(logits, model(tokens).logits[:, 10:], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_embeddings_of_the_caller_stay_as_they_are(self, model, make_tokens, layer_calls):
        embeddings = model.get_input_embeddings()(make_tokens(model.config, 1, 70))
        copy = embeddings.clone()
        model(inputs_embeds=embeddings)
        assert set(layer_calls) == {32, 6}
        assert torch.equal(embeddings, copy)

    @torch.no_grad()
    @pytest.mark.parametrize("obstacle", ["padding", "packed", "no cache", "static cache", "weights", "hidden states"])
    def test_one_call(self, model, make_tokens, layer_calls, obstacle):
        tokens = make_tokens(model.config, 1, 70)
        options = {
            "padding": {"attention_mask": (torch.arange(70) > 3).long()[None]},
            "packed": {"cu_seq_lens_q": torch.tensor([0, 30, 70], dtype=torch.int32)},
            "no cache": {"use_cache": False},
            "static cache": {"cache": StaticCache(config=model.config, max_cache_len=80)},
            "weights": {"output_attentions": True},
            "hidden states": {"output_hidden_states": True},
        }[obstacle]
        model(tokens, **options)
        assert set(layer_calls) == {70}

    @torch.no_grad()
    def test_recorded_outputs_once_do_not_prevent_parts(self, model, make_tokens, layer_calls):
        """Transformers leaves hooks behind that do nothing afterwards."""
        tokens = make_tokens(model.config, 1, 70)
        model(tokens, output_router_logits=True, output_hidden_states=True)
        layer_calls.clear()
        model(tokens)
        assert set(layer_calls) == {32, 6}

    @torch.no_grad()
    def test_cache_without_layers(self, model, make_tokens, layer_calls):
        """Such a cache makes its layers when a layer of the model writes to it."""
        cache = Cache(layer_class_to_replicate=MiniMaxM3VLSparseDynamicLayer)
        tokens = make_tokens(model.config, 1, 70)
        logits = model(tokens, cache=cache).logits
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)

    def test_with_gradients(self, model, make_tokens, layer_calls):
        model(make_tokens(model.config, 1, 70))
        assert set(layer_calls) == {70}


@pytest.mark.usefixtures("small_parts")
class TestOneCall:
    """Where a layer calls its feed-forward part once, whatever the number of tokens."""

    num_tokens = 3 * PART

    def run(self, model, make_tokens, **kwargs):
        return model(make_tokens(model.config, 1, self.num_tokens), **kwargs)

    def test_with_gradients(self, model, make_tokens, calls):
        self.run(model, make_tokens)
        assert set(calls) == {self.num_tokens}

    @torch.no_grad()
    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_with_a_hook(self, model, make_tokens, calls, register):
        sizes = []
        for layer in model.model.layers:
            shared = getattr(layer.mlp, "shared_experts", layer.mlp)
            getattr(shared.down_proj, register)(lambda module, args, *output: sizes.append(args[0].shape[-2]))
        self.run(model, make_tokens)
        assert set(sizes) == {self.num_tokens} == set(calls)

    @torch.no_grad()
    def test_with_a_hook_of_the_norm(self, model, make_tokens, calls):
        """It may keep the sum that would be changed in place."""
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: None)
        self.run(model, make_tokens)
        assert set(calls) == {self.num_tokens}

    @torch.no_grad()
    def test_with_a_hook_on_all_modules(self, model, make_tokens, calls):
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        try:
            self.run(model, make_tokens)
        finally:
            handle.remove()
        assert set(calls) == {self.num_tokens}

    @torch.no_grad()
    def test_with_a_replaced_forward(self, model, make_tokens, calls):
        """As Accelerate replaces it to fetch offloaded weights, and expert parallelism to exchange tokens."""
        for layer in model.model.layers[1:]:
            layer.mlp.experts.forward = layer.mlp.experts.forward
        self.run(model, make_tokens)
        assert set(calls) == {self.num_tokens}

    @torch.no_grad()
    def test_among_several_processes(self, model, make_tokens, calls, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        self.run(model, make_tokens)
        assert set(calls) == {self.num_tokens}


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_what_a_hook_of_the_layer_sees_stays_as_it_was(model, make_tokens):
    """The sum of the residual connection is made in place: in a tensor that nothing else holds."""
    layer, seen = model.model.layers[1], {}
    layer.register_forward_pre_hook(lambda module, args: seen.update(input=args[0], copy=args[0].clone()))
    layer.self_attn.register_forward_hook(
        lambda module, args, output: seen.update(attended=output[0], attended_copy=output[0].clone())
    )
    model(make_tokens(model.config, 1, 3 * PART))
    assert torch.equal(seen["input"], seen["copy"])
    assert torch.equal(seen["attended"], seen["attended_copy"])


def test_activations_of_the_released_model_are_bounded():
    """The arithmetic of the comment at `TOKENS_OF_A_PART`."""
    channels, experts_of_a_token, expert_width, dense_width = 6144, 4, 3072, 12288
    assert experts_of_a_token * 2 * (channels + 2 * expert_width) == 96 * 1024
    of_a_pair = channels * (2 + 2 + 4 + 4)
    assert experts_of_a_token * of_a_pair == 288 * 1024
    assert 2 * (2 * dense_width + dense_width + channels) == 84 * 1024
    assert token_parts.TOKENS_OF_A_PART * experts_of_a_token * of_a_pair == 4.5 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("module", [MiniMaxM3VLSparseMoeBlock, MiniMaxM3VLDenseMLP])
@torch.no_grad()
def test_on_a_gpu(module):
    """Memory does not grow with the tokens, but for the routing; the result is that of one call but for rounding."""
    config = tiny_config(text={"hidden_size": 512, "intermediate_size": 256}).text_config
    block = module(config).to("cuda", torch.bfloat16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    peaks = []
    for parts in (2, 8):
        states = torch.randn(1, parts * token_parts.TOKENS_OF_A_PART, 512, device="cuda", dtype=torch.bfloat16)
        total = torch.randn_like(states)
        expected = total + block(states)
        assert block.runs_in_parts(states.shape[1])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block.add_in_parts(total, states)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert (total - expected).float().norm() < 5e-3 * expected.float().norm()
    assert peaks[1] < 1.2 * peaks[0]
