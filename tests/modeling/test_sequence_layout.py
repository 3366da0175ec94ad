"""Padding, packing, chunked prefill and caching never change a token's output."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models import text as text_module
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.layout_building import build_layout

WIDTH = 120
LENGTHS = (WIDTH, 75)


@pytest.fixture(scope="module")
def model(make_pair):
    # One layer of each kind and MLP type is enough to see a leak.
    config = tiny_config(text={"index_topk_blocks": 3}).text_config
    return make_pair(MiniMaxM3VLForCausalLM, config)[1]


@pytest.fixture(scope="module")
def rows(model, make_tokens):
    """Two token rows, and their logits alone: unpadded and uncached."""
    tokens = make_tokens(model.config, 2, WIDTH)
    rows = [tokens[i, :length] for i, length in enumerate(LENGTHS)]
    with torch.no_grad():
        return rows, [model(row[None], use_cache=False).logits[0] for row in rows]


def place(rows: list[torch.Tensor], slots: list[torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (rows, width) with each row's tokens at its slots, and token 1 elsewhere."""
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, slot) in enumerate(zip(rows, slots)):
        ids[i, slot], mask[i, slot] = row, 1
    return ids, mask


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    slots = {
        "left": lambda n: torch.arange(WIDTH + 9 - n, WIDTH + 9),
        "right": lambda n: torch.arange(n),
        "both": lambda n: torch.arange(4, 4 + n),
        "holes": lambda n: torch.randperm(WIDTH + 9, generator=generator)[:n].sort().values,
    }[side]
    return place(rows, [slots(len(row)) for row in rows], WIDTH + 9)


SIDES = ["left", "right", "both", "holes"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", SIDES)
def test_padding(model, rows, relative_error, side, implementation):
    ids, mask = padded(rows[0], side)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    assert torch.isfinite(logits).all(), "outputs at padding must be finite"
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_content_of_padding_is_irrelevant(model, rows, side):
    ids, mask = padded(rows[0], side)
    other = torch.where(mask == 1, ids, ids + 7)
    with torch.no_grad():
        a, b = (model(x, attention_mask=mask).logits[mask == 1] for x in (ids, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(129,), (40, 89), (1, 16, 17, 95), (100, *[1] * 29)], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_chunked_prefill(model, rows, relative_error, side, chunks, cache):
    ids, mask = padded(rows[0], side)
    cache = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=WIDTH + 20)
    )
    logits, start = [], 0
    with torch.no_grad():
        for chunk in chunks:
            stop = start + chunk
            logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
            start = stop
    logits = torch.cat(logits, dim=1)
    assert torch.isfinite(logits).all()
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "cu_seq_lens int64 and mask"])
def test_packing(model, rows, relative_error, how):
    ids = torch.cat(rows[0])[None]
    if how == "position_ids":
        kwargs = {"position_ids": torch.cat([torch.arange(len(row)) for row in rows[0]])[None]}
    else:
        offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": WIDTH, "max_length_k": WIDTH}
    if how == "cu_seq_lens int64 and mask":
        kwargs |= {"cu_seq_lens_q": offsets.long(), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        output = model(ids, **kwargs)
    assert relative_error(output.logits[0], torch.cat(rows[1])) < 1e-5
    assert output.cache is None, "no cache can continue a pack"


def test_packed_rows_of_a_batch(model, rows, relative_error):
    """Positions that restart, differently in each row of a batch."""
    first, second = rows[0]
    ids = torch.stack([torch.cat([second, first[:45]]), first])
    positions = torch.stack([torch.cat([torch.arange(75), torch.arange(45)]), torch.arange(WIDTH)])
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
    assert relative_error(logits[0], torch.cat([rows[1][1], rows[1][0][:45]])) < 1e-5
    assert relative_error(logits[1], rows[1][0]) < 1e-5


def test_mask_wins_over_restarting_positions(model, rows, relative_error):
    """`generate` numbers left padding 0, 0, 0, 1, ...: with a mask those are no packed sequences."""
    ids, mask = padded(rows[0], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


def test_positions_that_grow_are_one_sequence(model, rows, relative_error):
    with torch.no_grad():
        shifted = model(rows[0][0][None], position_ids=torch.arange(WIDTH)[None] + 11).logits[0]
    assert relative_error(shifted, rows[1][0]) < 1e-4  # the rotary embedding is relative


def test_gradients_through_a_cached_prompt(model, rows, relative_error):
    """Continuing from a cache is differentiable: the gradient of the whole is that of one pass."""
    tokens = rows[0][0][None]
    gradients = []
    for chunks in ((WIDTH,), (50, 70)):
        model.zero_grad()
        cache, start, logits = DynamicCache(config=model.config), 0, []
        for chunk in chunks:
            logits.append(model(tokens[:, start : start + chunk], cache=cache).logits)
            start += chunk
        torch.cat(logits, dim=1).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-4, name


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mask_with_any_chunks(model, rows, relative_error, data):
    """Real tokens anywhere in two rows, processed in any chunks."""
    lengths = [data.draw(st.integers(1, 60)) for _ in range(2)]
    width = data.draw(st.integers(max(lengths), 70))
    slots = [
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=n, max_size=n)))) for n in lengths
    ]
    ids, mask = place([row[:n] for row, n in zip(rows[0], lengths)], slots, width)
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=3))) if width > 1 else []
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, width]):
            logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
    logits = torch.cat(logits, dim=1)
    for i, n in enumerate(lengths):
        assert relative_error(logits[i][mask[i] == 1], rows[1][i][:n]) < 1e-5


def test_layout_moves_between_devices():
    """Accelerate moves a layer's arguments by calling `.to`."""
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    layout = build_layout(mask, None, None, 2, 3, mask.device)
    moved = layout.to("meta")
    assert moved.cu_seqlens.device.type == moved.query_order.device.type == "meta"
    assert (moved.batch, moved.num_new, moved.is_uniform) == (2, 3, False)


BAD_INPUTS = {
    "both inputs": ({"inputs_embeds": torch.zeros(1, 4, 64)}, "exactly one of `input_ids` and `inputs_embeds`"),
    "flat ids": ({"input_ids": torch.ones(4, dtype=torch.long)}, r"`input_ids` must have shape \(batch, tokens\)"),
    "no token": ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "at least one token"),
    "short mask": ({"attention_mask": torch.ones(1, 3)}, r"must cover the 4 tokens of the input, got shape \(1, 3\)"),
    "mask of another batch": ({"attention_mask": torch.ones(2, 4)}, r"with batch 1, got \(2, 4\)"),
    "3-D mask": ({"attention_mask": torch.ones(1, 4, 4)}, "must have shape"),
    "4-D mask of other width": ({"attention_mask": torch.ones(1, 1, 3, 4).bool()}, "new tokens 4"),
    "offsets past the end": ({"cu_seq_lens_q": torch.tensor([0, 5])}, "not go past the number of tokens 4"),
    "offsets that fall": ({"cu_seq_lens_q": torch.tensor([0, 3, 2, 4])}, "never fall"),
    "float offsets": ({"cu_seq_lens_q": torch.tensor([0.0, 4.0])}, "`cu_seq_lens_q` must be a 1-D integer tensor"),
    "unequal offsets": (
        {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
        "must be equal without a cache",
    ),
    "4-D mask of other keys": ({"attention_mask": torch.ones(1, 1, 4, 3).bool()}, r"tokens 4\), got \(1, 1, 4, 3\)"),
    "4-D mask of other heads": ({"attention_mask": torch.ones(1, 3, 4, 4).bool()}, "heads 4 or 1"),
    "4-D mask of ones in float": (
        {"attention_mask": torch.ones(1, 1, 4, 4).tril()},
        "nothing between is supported, got 1.0",
    ),
    "4-D mask with a bias": (
        {"attention_mask": torch.full((1, 1, 4, 4), -0.5)},
        "nothing between is supported, got -0.5",
    ),
    "float position_ids": ({"position_ids": torch.arange(4.0)[None]}, "`position_ids` must be integers"),
    "labels of other length": (
        {"labels": torch.ones(1, 4, dtype=torch.long), "logits_to_keep": 2},
        r"shape \(1, 2\), got \(1, 4\)",
    ),
    "wide position_ids": ({"position_ids": torch.arange(5)[None]}, "`position_ids` must be integers of shape"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(name):
    kwargs, message = BAD_INPUTS[name]
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config)
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": torch.ones(1, 4, dtype=torch.long)} | kwargs))


def test_offsets_must_be_a_tensor():
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config)
    with pytest.raises(TypeError, match="`cu_seq_lens_q` must be a tensor of offsets, got list"):
        model(torch.ones(1, 4, dtype=torch.long), cu_seq_lens_q=[0, 4])


def test_tokens_after_the_last_offset_are_padding(model, rows, relative_error):
    ids = torch.cat([*rows[0], torch.ones(9, dtype=torch.long)])[None]
    offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with torch.no_grad():
        logits = model(ids, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).logits[0]
    assert torch.isfinite(logits).all()
    assert relative_error(logits[:-9], torch.cat(rows[1])) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static", "static, wide mask"])
def test_own_mask_with_a_cache(model, rows, relative_error, cache):
    """A causal 4-D mask changes nothing, also where a static cache has more slots than tokens."""
    tokens = rows[0][0][None]
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=150)
    width = 150 if "wide" in cache else WIDTH
    allowed = torch.arange(width) <= torch.arange(WIDTH)[:, None]
    with torch.no_grad():
        for start, stop in ((0, 70), (70, WIDTH)):
            mask = allowed[None, None, start:stop, : width if "wide" in cache else stop]
            logits = model(tokens[:, start:stop], attention_mask=mask, cache=past).logits[0]
            assert relative_error(logits, rows[1][0][start:stop]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_own_mask_of_integers(model, rows, relative_error, dtype):
    allowed = torch.ones(WIDTH, WIDTH, dtype=dtype).tril()[None, None]
    with torch.no_grad():
        assert relative_error(model(rows[0][0][None], attention_mask=allowed).logits[0], rows[1][0]) < 1e-5


@pytest.fixture
def context_warnings(monkeypatch) -> list[str]:
    """All warnings of the text model, repeated ones included."""
    warnings = []
    monkeypatch.setattr(text_module.logger, "warning_once", warnings.append)
    return warnings


def test_context_length_counts_sequences_not_rows(make_pair, make_tokens, context_warnings):
    """Padding and other documents of a pack do not count."""
    config = tiny_config(text={"max_position_embeddings": 40}).text_config
    model = make_pair(MiniMaxM3VLForCausalLM, config)[1]
    tokens, mask = make_tokens(config, 1, 60), (torch.arange(60) >= 25).long()[None]
    with torch.no_grad():
        model(tokens, attention_mask=mask)
        model(tokens, cu_seq_lens_q=torch.tensor([0, 30, 60]))
        assert not context_warnings
        model(tokens, attention_mask=(torch.arange(60) >= 19).long()[None])
        model(tokens, cu_seq_lens_q=torch.tensor([0, 10, 60]))
        assert len(context_warnings) == 2
        assert "`config.max_position_embeddings` = 40 " in context_warnings[0]


def test_past_the_context_length_the_model_warns_once_and_runs(
    make_pair, make_tokens, relative_error, context_warnings
):
    """The output equals stock's, which has no such bound, and the steps of a long answer do not repeat the warning."""
    stock, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config(text={"max_position_embeddings": 40}).text_config)
    tokens = make_tokens(model.config, 1, 60)
    with torch.no_grad():
        expected = stock(tokens).logits
        assert relative_error(model(tokens).logits, expected) < 1e-5
        cache = model(tokens[:, :39]).past_key_values
        for position in range(39, 60):
            logits = model(tokens[:, position : position + 1], cache=cache).logits
            assert relative_error(logits, expected[:, position : position + 1]) < 1e-5
    assert len(set(context_warnings)) == 1  # `warning_once` drops those that it has seen


def test_end_of_a_static_cache_is_an_error(make_pair, make_tokens):
    """Its number of slots is a strict bound. The context length is none."""
    config = tiny_config(text={"max_position_embeddings": 40}).text_config
    model = make_pair(MiniMaxM3VLForCausalLM, config)[1]
    tokens, cache = make_tokens(config, 1, 51), StaticCache(config, max_cache_len=50)
    with torch.no_grad():
        model(tokens[:, :50], cache=cache)
        with pytest.raises(ValueError, match="the static cache has 50 slots, got tokens for 51"):
            model(tokens[:, 50:], cache=cache)


def test_gradient_of_queries_alone_through_a_cache(make_pair, make_tokens):
    """Autograd may save keys without a gradient for that of the queries, so a cache must not overwrite them."""
    model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".q_proj." in name and ".indexer." not in name)
    tokens, cache, loss = make_tokens(model.config, 1, 60), DynamicCache(config=model.config), 0.0
    for start in range(0, 60, 15):
        logits = model(tokens[:, start : start + 15], cache=cache).logits
        loss = loss + logits.logsumexp(-1).sum()
    loss.backward()
    chunked = model.model.layers[-1].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(tokens).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(chunked, model.model.layers[-1].self_attn.q_proj.weight.grad, rtol=1e-3, atol=1e-4)


def test_bad_input_with_a_cache_is_named(model):
    tokens = torch.ones(1, 6, dtype=torch.long)
    with torch.no_grad():
        cache = model(tokens).cache
        with pytest.raises(ValueError, match="must cover the 6 cached and 6 new tokens"):
            model(tokens, attention_mask=torch.ones(1, 6), cache=cache)
        with pytest.raises(NotImplementedError, match="`cache` holds tokens already"):
            model(tokens, cu_seq_lens_q=torch.tensor([0, 6]), cache=cache)
