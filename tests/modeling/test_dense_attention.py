"""Dense attention on a sequence layout: the arguments of each implementation, and the operator of compiled packing."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.layers import cached_attention, packed_causal_attention
from modeling_minimax_m3.layers import dense_attention as dense
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.sequence_layout import SequenceLayout


def attend(query, key, value, scaling):
    """Causal attention of (T, H_q, D) queries, the last of (S, H_kv, D) keys, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(group, dim=1) for states in (key, value))
    scores = torch.einsum("thd,shd->hts", query.double(), key) * scaling
    future = torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


class FlashCalls:
    """Stands in for a flash kernel: takes offsets, or a 2-D mask, and never a 4-D one."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        batch, num_new = query.shape[:2]
        out = torch.zeros_like(query)
        if cu_seq_lens_q is not None:
            assert attention_mask is None and torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"])
            assert kwargs["max_length_q"] >= cu_seq_lens_q.diff().max()
            bounds = cu_seq_lens_q.tolist()
            flat = [states.flatten(0, 1) for states in (query, key, value)]
            for start, stop in itertools.pairwise(bounds):
                out.flatten(0, 1)[start:stop] = attend(*(states[start:stop] for states in flat), scaling)
            self.seen.append("offsets")
        else:
            mask = torch.ones(key.shape[:2]) if attention_mask is None else attention_mask
            for row in range(batch):
                real = mask[row] == 1
                new = real[-num_new:]
                out[row, new] = attend(query[row, new], key[row, real], value[row, real], scaling).float()
            self.seen.append("mask")
        return out, None


@pytest.fixture
def model_and_calls(make_pair):
    calls = FlashCalls()
    AttentionInterface.register("test_flash", calls)
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"num_hidden_layers": 3}).text_config)
    return model, calls


MASKS = {
    "uniform": (None, "offsets"),
    "left": ((torch.arange(60) >= 13).long().expand(2, -1), "offsets"),
    "holes": ((torch.arange(60) % 4 > 0).long().expand(2, -1), "mask"),
}


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_flash_implementations_get_offsets_or_a_padding_mask(model_and_calls, make_tokens, relative_error, name):
    model, calls = model_and_calls
    mask, expected_call = MASKS[name]
    tokens = make_tokens(model.config, 2, 60)
    real = torch.ones_like(tokens) == 1 if mask is None else mask == 1
    expected = model(tokens, attention_mask=mask).logits[real]
    model.config._attn_implementation = "test_flash"
    assert relative_error(model(tokens, attention_mask=mask).logits[real], expected) < 1e-5
    assert set(calls.seen) == {expected_call}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_flash_implementations_with_a_cache(model_and_calls, make_tokens, relative_error, cache):
    """The flash kernel gets the keys of a dynamic cache. It would attend to the unused slots of a static one."""
    model, calls = model_and_calls
    tokens, mask = make_tokens(model.config, 2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :13] = 0
    expected = model(tokens, attention_mask=mask).logits[:, 50:]
    model.config._attn_implementation = "test_flash"
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=70)
    model(tokens[:, :50], attention_mask=mask[:, :50], cache=past)
    calls.seen.clear()
    logits = model(tokens[:, 50:], attention_mask=mask, cache=past).logits
    assert relative_error(logits, expected) < 1e-5
    assert set(calls.seen) == ({"mask"} if cache == "dynamic" else set())


def random_states(offsets: list[int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(offsets[-1], heads, 8, generator=generator, dtype=dtype) for heads in (6, 2, 2)]


@pytest.mark.parametrize("tile", [2**24, 40], ids=["whole sequences", "small tiles"])
@pytest.mark.parametrize("offsets", [[0, 37], [0, 0, 5, 6, 6, 40, 40]], ids=str)
def test_packed_operator(monkeypatch, relative_error, offsets, tile):
    monkeypatch.setattr(packed_causal_attention, "_TILE", tile)
    query, key, value = random_states(offsets, torch.float32)
    out, _ = torch.ops.minimax_m3.packed_causal_attention(query, key, value, torch.tensor(offsets).int(), 0.3)
    for start, stop in itertools.pairwise(offsets):
        if stop > start:
            expected = attend(query[start:stop], key[start:stop], value[start:stop], 0.3)
            assert relative_error(out[start:stop], expected) < 1e-6


def test_packed_operator_gradient():
    states = [tensor.requires_grad_() for tensor in random_states([0, 9], torch.float64)]
    offsets = torch.tensor([0, 3, 3, 9]).int()
    assert torch.autograd.gradcheck(
        lambda *x: torch.ops.minimax_m3.packed_causal_attention(*x, offsets, 0.3)[0], states
    )
    torch.library.opcheck(torch.ops.minimax_m3.packed_causal_attention, (*states, offsets, 0.3))


def test_cached_attention_in_small_tiles(monkeypatch, make_pair, make_tokens, relative_error):
    """Chunked prefill masks a few queries at a time, so that no query x key mask exists."""
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"num_hidden_layers": 1}).text_config)
    tokens = make_tokens(model.config, 2, 80)
    with torch.no_grad():
        expected = model(tokens).logits[:, 30:]
        monkeypatch.setattr(cached_attention, "_MASK_ELEMENTS", 2 * 80 * 7)
        cache = model(tokens[:, :30]).cache
        assert relative_error(model(tokens[:, 30:], cache=cache).logits, expected) < 1e-5


# Rows with padding at the start, which every cut below leaves with keys that nobody may see, and elsewhere.
PADDED_ROWS = {"left": [slice(0, 9)], "everywhere": [slice(0, 9), slice(3, 11), slice(15, 20)]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", PADDED_ROWS)
@torch.no_grad()
def test_chunks_of_padded_rows(make_pair, make_tokens, relative_error, padding, dtype, implementation):
    """Wherever a padded prompt is cut, values are finite and each token's equals that of its unpadded row."""
    text = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense"] * 2}
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text=text).text_config, dtype=dtype)
    model.set_attn_implementation(implementation)
    tokens = make_tokens(model.config, len(PADDED_ROWS[padding]) + 1, 20)
    mask = torch.ones_like(tokens)
    for row, hidden in enumerate(PADDED_ROWS[padding]):
        mask[row, hidden] = 0
    expected = torch.cat([model(row[real == 1][None]).logits[0] for row, real in zip(tokens, mask)])
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 5e-2)
    for cut in range(1, 20):
        start = model(tokens[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        rest = model(tokens[:, cut:], attention_mask=mask, cache=start.cache)
        logits = torch.cat((start.logits, rest.logits), dim=1)
        assert logits.isfinite().all(), cut
        assert relative_error(logits[mask == 1], expected) < tolerance, cut


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_eager_rows_that_see_nothing_are_finite(dtype):
    """Rows stay finite where all scores are so low that half precision cannot add its lowest number to them."""
    query, key = torch.full((1, 3, 2, 4), 20.0, dtype=dtype), torch.full((1, 3, 1, 4), -20.0, dtype=dtype)
    layout = SequenceLayout(1, 3, allowed=torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    out, weights = dense.dense_attention(module, query, key, key, layout, "eager", scaling=0.5)
    assert out.isfinite().all() and weights.isfinite().all()
