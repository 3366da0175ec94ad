"""Cache layers: what they store, how they grow, and every operation that Transformers performs on them."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.cache_adoption import adopt_cache
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.cache import (
    MiniMaxM3VLDynamicLayer,
    MiniMaxM3VLSparseDynamicLayer,
    MiniMaxM3VLSparseStaticLayer,
    MiniMaxM3VLStaticLayer,
)

from ..forked_processes import run_python

pytestmark = pytest.mark.compatibility

B, H, D, D_IDX = 2, 3, 8, 4


def numbered(start: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
    """(B, heads, tokens, dim) states. Each value encodes its row, head, token and channel."""
    parts = (torch.arange(B), torch.arange(heads), torch.arange(start, start + tokens), torch.arange(dim))
    row, head, token, channel = torch.meshgrid(*parts, indexing="ij")
    return (row * 1000 + token + head * 0.25 + channel * 0.01).float()


def append(layer, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = layer.update(numbered(start, tokens, H, D), -numbered(start, tokens, H, D))
    return keys, values, layer.update_index(numbered(start, tokens, 1, D_IDX))


def assert_holds(layer, rows: list[int], tokens: int) -> None:
    """The layer holds the first `tokens` numbered tokens of the given rows, in all three tensors."""
    shown = append(layer, tokens, 1)
    torch.testing.assert_close(shown[0][:, :, : tokens + 1][:, :, :tokens], numbered(0, tokens, H, D)[rows])
    torch.testing.assert_close(shown[1][:, :, :tokens], -numbered(0, tokens, H, D)[rows])
    torch.testing.assert_close(shown[2][:, :, :tokens], numbered(0, tokens, 1, D_IDX)[rows])


def make_layer(kind: str):
    return MiniMaxM3VLSparseDynamicLayer() if kind == "dynamic" else MiniMaxM3VLSparseStaticLayer(max_cache_len=40)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_appending(kind):
    layer = make_layer(kind)
    for start, tokens in ((0, 5), (5, 1), (6, 1), (7, 12), (19, 1)):
        keys, values, index_keys = append(layer, start, tokens)
        used = start + tokens
        assert int(layer.get_seq_length()) == used
        torch.testing.assert_close(keys[:, :, :used], numbered(0, used, H, D))
        torch.testing.assert_close(values[:, :, :used], -numbered(0, used, H, D))
        torch.testing.assert_close(index_keys[:, :, :used], numbered(0, used, 1, D_IDX))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_are_stored_next_to_each_other(kind):
    layer = make_layer(kind)
    keys, _, _ = append(layer, 0, 5)
    assert keys.transpose(1, 2)[0].is_contiguous(), "one row must be (S, H, D) in memory"


@torch.no_grad()
def test_growth_is_amortised():
    """Appending one token at a time moves the cache a logarithmic number of times, not once per token."""
    layer, moves, address = MiniMaxM3VLSparseDynamicLayer(), 0, None
    for start in range(200):
        keys, _, _ = append(layer, start, 1)
        moves += keys.data_ptr() != address
        address = keys.data_ptr()
    assert moves <= 9


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reorder(kind):
    layer = make_layer(kind)
    append(layer, 0, 5)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert_holds_rows_one(layer)


def assert_holds_rows_one(layer) -> None:
    torch.testing.assert_close(layer.keys[:, :, :5], numbered(0, 5, H, D)[[1, 1]])
    torch.testing.assert_close(layer.values[:, :, :5], -numbered(0, 5, H, D)[[1, 1]])
    index_keys = layer.update_index(numbered(5, 0, 1, D_IDX))
    torch.testing.assert_close(index_keys[:, :, :5], numbered(0, 5, 1, D_IDX)[[1, 1]])


def test_static_reorder_keeps_addresses():
    layer = make_layer("static")
    append(layer, 0, 5)
    before = (layer.keys.data_ptr(), layer.values.data_ptr(), layer.index_keys.data_ptr())
    layer.reorder_cache(torch.tensor([1, 0]))
    assert before == (layer.keys.data_ptr(), layer.values.data_ptr(), layer.index_keys.data_ptr())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset(kind):
    layer = make_layer(kind)
    append(layer, 3, 5)
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    append(layer, 0, 4)
    assert int(layer.get_seq_length()) == 4
    torch.testing.assert_close(layer.keys[:, :, :4], numbered(0, 4, H, D))


def test_crop_then_append():
    layer = make_layer("dynamic")
    append(layer, 0, 9)
    layer.crop(-3)
    assert layer.get_seq_length() == 6
    assert_holds(layer, [0, 1], 6)
    layer.crop(0)
    assert layer.get_seq_length() == 7


def test_crop_refuses_a_length():
    layer = make_layer("dynamic")
    append(layer, 0, 9)
    with pytest.raises(ValueError, match=r"`tokens_to_remove` must be 0 or negative .*, got 4"):
        layer.crop(4)


def test_repeat_and_select_rows():
    layer = make_layer("dynamic")
    append(layer, 0, 5)
    layer.batch_repeat_interleave(2)
    torch.testing.assert_close(layer.keys, numbered(0, 5, H, D)[[0, 0, 1, 1]])
    layer.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(layer.keys, numbered(0, 5, H, D)[[1, 0]])
    torch.testing.assert_close(layer.values, -numbered(0, 5, H, D)[[1, 0]])
    torch.testing.assert_close(layer.update_index(numbered(5, 0, 1, D_IDX)), numbered(0, 5, 1, D_IDX)[[1, 0]])


def test_static_crop_then_append():
    layer = make_layer("static")
    append(layer, 0, 9)
    layer.crop(-3)
    assert int(layer.get_seq_length()) == 6
    assert_holds(layer, [0, 1], 6)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 or negative"):
        layer.crop(2)


def test_static_repeat_and_select_rows():
    layer = make_layer("static")
    append(layer, 0, 5)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(layer.keys[:, :, :5], numbered(0, 5, H, D)[[1, 0]])
    torch.testing.assert_close(layer.values[:, :, :5], -numbered(0, 5, H, D)[[1, 0]])
    torch.testing.assert_close(layer.index_keys[:, :, :5], numbered(0, 5, 1, D_IDX)[[1, 0]])
    assert layer.keys.transpose(1, 2)[0].is_contiguous()


def test_static_overflow_is_named():
    layer = make_layer("static")
    append(layer, 0, 39)
    with pytest.raises(ValueError, match="has 40 slots, got tokens for 41"):
        append(layer, 39, 2)


def test_caches_that_do_not_fit_are_named():
    config = tiny_config().text_config
    filled = DynamicCache(config=config)
    filled.update(numbered(0, 2, H, D), numbered(0, 2, H, D), 0)
    for cache, error, message in (
        ((), TypeError, "must be a `Cache` of a decoder.* got tuple"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), TypeError, "got EncoderDecoderCache"),
        (DynamicCache(config=tiny_config(text={"num_hidden_layers": 3}).text_config), ValueError, "4 layers, got 3"),
        (filled, ValueError, "input's 5 rows, got 2"),
    ):
        with pytest.raises(error, match=message):
            adopt_cache(cache, config.layer_types, 5)


def test_offload_and_prefetch_move_keys_and_values():
    """Without an accelerator "meta" stands for the device that the layer was filled on."""
    layer = make_layer("dynamic")
    append(layer, 0, 5)
    layer.offload()
    torch.testing.assert_close(layer.keys, numbered(0, 5, H, D))
    layer.device = torch.device("meta")
    layer.prefetch()
    assert layer.keys.device.type == layer.values.device.type == "meta"
    assert layer._index_buffer.used.device.type == "cpu", "index keys stay where they are"


def test_states_with_gradient_are_not_overwritten():
    layer = MiniMaxM3VLDynamicLayer()
    first = numbered(0, 3, H, D).requires_grad_()
    keys, _ = layer.update(first, first)
    loss = (keys**2).sum()
    layer.update(numbered(3, 3, H, D), numbered(3, 3, H, D))
    loss.backward()
    torch.testing.assert_close(first.grad, 2 * first.detach())


def make_cache(kind: str, config):
    if kind == "without config":
        return DynamicCache()
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=50)


@pytest.mark.parametrize("kind", ["dynamic", "static", "without config"])
def test_empty_caches_are_adopted(kind):
    config = tiny_config().text_config
    cache = make_cache(kind, config)
    adopt_cache(cache, config.layer_types, B)
    dense, sparse = (
        (MiniMaxM3VLStaticLayer, MiniMaxM3VLSparseStaticLayer)
        if kind == "static"
        else (MiniMaxM3VLDynamicLayer, MiniMaxM3VLSparseDynamicLayer)
    )
    expected = [dense if layer_type == "full_attention" else sparse for layer_type in config.layer_types]
    assert [type(layer) for layer in cache.layers] == expected


def test_filled_layers_are_left_alone():
    config = tiny_config().text_config
    cache = DynamicCache(config=config)
    cache.layers[0] = filled = DynamicLayer()
    filled.update(numbered(0, 2, H, D), numbered(0, 2, H, D))
    adopt_cache(cache, config.layer_types, B)
    assert cache.layers[0] is filled


@pytest.mark.parametrize("layer", [DynamicLayer(), StaticLayer(max_cache_len=9)], ids=["dynamic", "static"])
def test_filled_layers_without_index_keys_are_refused(layer):
    config = tiny_config().text_config
    cache = DynamicCache(config=config)
    layer.update(numbered(0, 2, H, D), numbered(0, 2, H, D))
    cache.layers[-1] = layer
    with pytest.raises(ValueError, match=rf"a {type(layer).__name__} for layer 3, which keeps no index keys"):
        adopt_cache(cache, config.layer_types, B)


IMPORTS = {
    "ours first": "import modeling_minimax_m3.runtime.cache\nimport transformers.models.minimax_m3_vl.modeling_minimax_m3_vl",
    "stock first": "import transformers.models.minimax_m3_vl.modeling_minimax_m3_vl\nimport modeling_minimax_m3.runtime.cache",
}
BOTH_GENERATE = """
import torch
from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as c, modeling_minimax_m3_vl as m
config = tiny_config().text_config
torch.manual_seed(0)
ours = MiniMaxM3VLForCausalLM(config).eval()
for parameter in ours.parameters():  # spread out, so that no two tokens score almost the same
    torch.nn.init.normal_(parameter, std=0.3)
stock = m.MiniMaxM3VLForCausalLM(c.MiniMaxM3VLTextConfig(**config.to_dict())).eval()
stock.load_state_dict(ours.state_dict())
ids = torch.arange(30)[None]
for static in (None, "static"):
    a, b = (x.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                       cache_implementation=static, disable_compile=True) for x in (ours, stock))
    assert a.shape == (1, 38) and torch.equal(a, b), (a, b)
"""


@pytest.mark.parametrize("order", IMPORTS)
def test_both_models_cache_in_one_process(order, tmp_path):
    done = run_python("-c", IMPORTS[order] + BOTH_GENERATE, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_cache_of_a_prompt_is_reused(make_pair, make_tokens, relative_error):
    _, model = make_pair(MiniMaxM3VLForCausalLM, tiny_config().text_config)
    tokens = make_tokens(model.config, 1, 90)
    with torch.no_grad():
        cache = model(tokens[:, :70]).cache
        for _ in range(2):
            logits = model(tokens[:, 70:], cache=cache).logits
            assert relative_error(logits, model(tokens).logits[:, 70:]) < 1e-5
            cache.crop(-20)


@pytest.fixture
def memory_of_nan():
    """Fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_static_layer_over_the_memory_of_a_dynamic_one(memory_of_nan):
    """What it writes becomes part of the dynamic layer, and unused slots are 0."""
    layer = MiniMaxM3VLSparseDynamicLayer()
    append(layer, 0, 5)
    static = layer.as_static_layer(room=1)
    assert isinstance(static, MiniMaxM3VLSparseStaticLayer) and static.max_cache_len == 10
    for states in (static.keys, static.values, static.index_keys):
        assert (states[:, :, 5:] == 0).all()
    append(static, 5, 2)
    assert layer.get_seq_length() == 5
    for buffer in layer.buffers():
        buffer.length += 2
    assert_holds(layer, [0, 1], 7)


def test_views_of_a_dynamic_layer_are_not_set():
    layer = MiniMaxM3VLDynamicLayer()
    with pytest.raises(AttributeError, match="add tokens by `update`"):
        layer.keys = torch.zeros(1, 1, 1, 1)
