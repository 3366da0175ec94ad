"""The last layer of a long pass of which a few of the last tokens alone get logits: it attends from these alone."""

import pytest
import torch
from transformers import StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.layers import token_parts
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention

TOKENS = 100  # more blocks of 16 than the 4 that a query selects
KINDS = ["full_attention", "minimax_m3_sparse", "minimax_m3_structured"]


@pytest.fixture(autouse=True)
def short_prompts_count(monkeypatch):
    monkeypatch.setattr(token_parts, "TOKENS_OF_A_LAST_LAYER", 16)


@pytest.fixture
def always_whole(monkeypatch):
    """Switches the rule off, for the answer without it."""
    return lambda: monkeypatch.setattr(token_parts, "TOKENS_OF_A_LAST_LAYER", 10**9)


@pytest.fixture
def make_model(make_pair):
    """A model of four layers, the last of the given kind, in float64."""

    def make(kind: str = "minimax_m3_sparse"):
        layer_types = [*tiny_config().text_config.layer_types[:-1], kind]
        config = tiny_config(text={"layer_types": layer_types}).text_config
        config._experts_implementation = "eager"  # grouped products take no float64
        if kind == "minimax_m3_structured":  # stock knows no such layers
            torch.manual_seed(0)
            return MiniMaxM3VLForCausalLM(config).double().eval()
        return make_pair(MiniMaxM3VLForCausalLM, config, dtype=torch.float64)[1]

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def attending(monkeypatch) -> list[int]:
    """Tokens of a row that each call of an attention layer attends from."""
    seen = []
    forward = MiniMaxM3VLAttention.forward

    def counted(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        seen.append(outputs[0].shape[1])
        return outputs

    monkeypatch.setattr(MiniMaxM3VLAttention, "forward", counted)
    return seen


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the norms compute in float32


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (3, 1), (2, 4), (1, 20)])
def test_logits_and_cache_are_those_of_a_whole_layer(
    make_model, make_tokens, attending, always_whole, kind, rows, kept
):
    model = make_model(kind)
    tokens, more = make_tokens(model.config, rows, TOKENS), make_tokens(model.config, rows, 2, seed=1)
    short = model(tokens, logits_to_keep=kept)
    assert attending == [TOKENS] * 3 + [kept]
    always_whole()
    attending.clear()
    whole = model(tokens, logits_to_keep=kept)
    assert attending == [TOKENS] * 4
    assert short.logits.shape == (rows, kept, model.config.vocab_size)
    assert_same(short.logits, whole.logits)
    for layer, expected in zip(short.cache.layers, whole.cache.layers):
        for buffer, other in zip(layer.buffers(), expected.buffers()):
            assert torch.equal(buffer.used, other.used)
            assert buffer.data.shape == other.data.shape, "no more room than for a whole layer"
    assert_same(model(more, cache=short.cache).logits, model(more, cache=whole.cache).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 5, 45])
def test_later_pieces_of_a_prompt(make_model, make_tokens, attending, always_whole, kind, padding):
    """A cache holds 40 tokens. Padding on the left may reach into the tokens behind them."""
    model = make_model(kind)
    tokens = make_tokens(model.config, 2, TOKENS)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0

    def second_piece() -> torch.Tensor:
        cache = model(tokens[:, :40], attention_mask=mask[:, :40]).cache
        attending.clear()
        return model(tokens[:, 40:], attention_mask=mask, cache=cache, logits_to_keep=1).logits

    short = second_piece()
    assert attending == [TOKENS - 40] * 3 + [1]
    always_whole()
    assert_same(short, second_piece())
    assert attending == [TOKENS - 40] * 4


@torch.no_grad()
def test_later_piece_with_padding_on_the_right(model, make_tokens, attending):
    """Its tokens change their order."""
    tokens = make_tokens(model.config, 2, TOKENS)
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    cache = model(tokens[:, :40], attention_mask=mask[:, :40]).cache
    attending.clear()
    model(tokens[:, 40:], attention_mask=mask, cache=cache, logits_to_keep=1)
    assert attending == [TOKENS - 40] * 4


@torch.no_grad()
def test_layers_that_read_in_parts(model, make_tokens, attending, always_whole, monkeypatch):
    monkeypatch.setattr(token_parts, "TOKENS_OF_A_LAYER", 64)
    tokens = make_tokens(model.config, 1, TOKENS)
    short = model(tokens, logits_to_keep=1).logits
    assert attending == [64, TOKENS - 64] * 3 + [1]
    always_whole()
    attending.clear()
    assert_same(short, model(tokens, logits_to_keep=1).logits)
    assert attending == [64, TOKENS - 64] * 4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 60}, {"num_beams": 2}], ids=str)
def test_generation(model, make_tokens, attending, always_whole, options):
    tokens = make_tokens(model.config, 1, TOKENS)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    answer = model.generate(tokens, **options)
    pieces = [60, TOKENS - 60] if "prefill_chunk_size" in options else [TOKENS]
    assert attending[: 4 * len(pieces)] == [count for piece in pieces for count in (piece, piece, piece, 1)]
    always_whole()
    assert torch.equal(answer, model.generate(tokens, **options))


@torch.no_grad()
def test_drafts_by_the_first_layers(model, make_tokens, attending, always_whole):
    """Then the last layer that runs is another one."""
    tokens = make_tokens(model.config, 1, TOKENS)
    options = {"max_new_tokens": 6, "do_sample": False, "assistant_early_exit": 2}
    answer = model.generate(tokens, **options)
    assert attending[:2] == [TOKENS, 1]
    always_whole()
    assert torch.equal(answer, model.generate(tokens, **options))


@torch.no_grad()
def test_composite_model(make_pair, make_inputs, attending, always_whole):
    config = tiny_config()
    config.text_config._experts_implementation = "eager"
    _, model = make_pair(MiniMaxM3SparseForConditionalGeneration, config, dtype=torch.float64)
    inputs = make_inputs(config, images=[[1, 4, 4]], length=TOKENS, dtype=torch.float64)
    short = model(**inputs, use_cache=True, logits_to_keep=1).logits
    assert attending == [TOKENS] * 3 + [1]
    always_whole()
    assert_same(short, model(**inputs, use_cache=True, logits_to_keep=1).logits)


@torch.no_grad()
def test_model_without_a_head(model, make_tokens):
    tokens = make_tokens(model.config, 2, TOKENS)
    whole = model.model(tokens).last_hidden_state
    assert whole.shape[1] == TOKENS
    short = model.model(tokens, outputs_to_keep=3).last_hidden_state
    assert_same(short, whole[:, -3:])
    assert model.model(tokens[:, :16], outputs_to_keep=3).last_hidden_state.shape[1] == 16, "a short pass"


@torch.no_grad()
def test_model_without_a_head_needs_all_outputs_for_the_indexers_loss(model, make_tokens):
    outputs = model.model(make_tokens(model.config, 2, TOKENS), outputs_to_keep=3, output_indexer_loss=True)
    assert outputs.last_hidden_state.shape[1] == TOKENS == outputs.indexer_divergence.shape[1]


@torch.no_grad()
def test_loss_of_the_router_needs_all_outputs(make_pair, make_tokens):
    """Also where the last layer has no router."""
    config = tiny_config(text={"mlp_layer_types": ["sparse", "sparse", "sparse", "dense"]}).text_config
    _, model = make_pair(MiniMaxM3VLForCausalLM, config)
    tokens = make_tokens(config, 2, TOKENS)
    few, whole = (model(tokens, logits_to_keep=kept, output_router_logits=True).aux_loss for kept in (1, 0))
    assert torch.equal(few, whole)


OBSTACLES = {
    "all logits": {"logits_to_keep": 0},
    "chosen logits": {"logits_to_keep": torch.tensor([3, 99])},
    "as many logits as tokens": {"logits_to_keep": TOKENS},
    "no cache": {"use_cache": False},
    "static cache": {},
    "padding": {"attention_mask": (torch.arange(TOKENS) > 3).long()[None]},
    "packed": {"cu_seq_lens_q": torch.tensor([0, 30, TOKENS], dtype=torch.int32)},
    "mask of its own": {"attention_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]},
    "labels": {"logits_to_keep": 0, "labels": torch.ones(1, TOKENS, dtype=torch.long)},
    "router logits": {"output_router_logits": True},
    "indexer loss": {"output_indexer_loss": True},
    "hidden states": {"output_hidden_states": True},
    "weights": {"output_attentions": True},
}


@torch.no_grad()
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_whole_last_layer(model, make_tokens, attending, obstacle):
    options = {"logits_to_keep": 1, **OBSTACLES[obstacle]}
    if obstacle == "static cache":
        options["cache"] = StaticCache(config=model.config, max_cache_len=TOKENS + 10)
    outputs = model(make_tokens(model.config, 1, TOKENS), **options)
    assert attending == [TOKENS] * 4
    if obstacle == "hidden states":
        assert [states.shape[1] for states in outputs.hidden_states] == [TOKENS] * 5
    if obstacle == "router logits":
        assert [len(logits) for logits in outputs.router_logits] == [TOKENS] * 3


def test_whole_last_layer_with_gradients(model, make_tokens, attending):
    model(make_tokens(model.config, 1, TOKENS), logits_to_keep=1).logits.sum().backward()
    assert attending == [TOKENS] * 4


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["model", "model.norm", "model.layers.3", "model.layers.3.mlp", "model.layers.3.self_attn.indexer.q_proj"]
)
def test_hooks_see_all_tokens(model, make_tokens, attending, name):
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    tokens = make_tokens(model.config, 1, TOKENS)
    model(tokens, logits_to_keep=1)
    assert attending == [TOKENS] * 4
    handle.remove()
    attending.clear()
    model(tokens, logits_to_keep=1)
    assert attending == [TOKENS] * 3 + [1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "model.language_model"])
def test_hooks_of_the_composite_model_see_all_tokens(make_pair, make_inputs, name):
    _, model = make_pair(MiniMaxM3SparseForConditionalGeneration, tiny_config())
    inputs = make_inputs(model.config, length=TOKENS)
    seen = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.shape[1])
    )
    model(**inputs, use_cache=True, logits_to_keep=1)
    assert seen == [TOKENS]


@torch.no_grad()
def test_among_several_processes(model, make_tokens, attending, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model(make_tokens(model.config, 1, TOKENS), logits_to_keep=1)
    assert attending == [TOKENS] * 4


class Wrapper(torch.nn.Module):
    """Keeps what a module returns, as tools that read or steer activations do."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.seen = module, []

    def forward(self, *args, **kwargs):
        output = self.module(*args, **kwargs)
        self.seen.append((output[0] if isinstance(output, tuple) else output).shape[1])
        return output


@torch.no_grad()
@pytest.mark.parametrize("name", ["layers.3", "layers.3.self_attn", "layers.3.mlp", "norm"])
def test_wrappers_see_all_tokens(model, make_tokens, name):
    wrapper = Wrapper(model.model.get_submodule(name))
    model.model.set_submodule(name, wrapper)
    model(make_tokens(model.config, 1, TOKENS), logits_to_keep=1)
    assert wrapper.seen == [TOKENS]


@torch.no_grad()
def test_true_counts_as_one(make_model, make_tokens):
    model = make_model("minimax_m3_structured")
    tokens = make_tokens(model.config, 1, TOKENS)
    assert torch.equal(model(tokens, logits_to_keep=True).logits, model(tokens, logits_to_keep=1).logits)
