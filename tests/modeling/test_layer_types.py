"""A new kind of attention layer is registered in one place, and every part of the package then knows it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer

from configuration_minimax_m3 import tiny_config
from configuration_minimax_m3.layer_types import FULL_ATTENTION, LAYER_TYPES, LayerType
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.flops import attended_keys, forward_flops
from modeling_minimax_m3.layers.attention import MiniMaxM3VLAttention
from modeling_minimax_m3.layers.block_selection import BlockSelector
from modeling_minimax_m3.layers.layer_types import ATTENTION_TYPES, AttentionType, register_attention_type
from modeling_minimax_m3.models.cache_adoption import adopt_cache
from modeling_minimax_m3.runtime.cache import MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer

NAME = "toy_last_blocks"
BLOCK, TOKENS = 4, 37


def check_last_blocks(config) -> None:
    if config.last_blocks < 1:
        raise ValueError(f"`last_blocks` must be at least 1, got {config.last_blocks}.")


class LastBlocksSelector(BlockSelector):
    """The query's own block and those right before it."""

    @staticmethod
    def blocks_per_query(config) -> int:
        return config.last_blocks

    def select(self, layout, key, index, reads_cache):
        own = torch.div(layout.working_positions(), self.config.index_block_size, rounding_mode="floor")
        blocks = own[..., None] - torch.arange(self.config.last_blocks, device=own.device)
        blocks = blocks.clamp(min=-1).to(torch.int32)
        return blocks[:, :, None].expand(-1, -1, key.shape[2], -1).contiguous()


@pytest.fixture(scope="module")
def toy_type():
    kind = AttentionType(
        LayerType(NAME, fields=("index_block_size", "last_blocks"), check=check_last_blocks),
        selector=LastBlocksSelector,
    )
    register_attention_type(kind)
    yield kind
    for table in (LAYER_TYPES, ATTENTION_TYPES, DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        del table[NAME]


def toy_config(**fields):
    return tiny_config(
        text={"layer_types": [NAME] * 4, "index_block_size": BLOCK, "last_blocks": 2} | fields
    ).text_config


@pytest.fixture(scope="module")
def model(toy_type):
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(toy_config()).eval()


@pytest.fixture
def ids(make_tokens, model):
    return make_tokens(model.config, 1, TOKENS)


def test_config_validates_it(toy_type):
    assert toy_config().layer_types == [NAME] * 4
    with pytest.raises(Exception, match="`last_blocks` must be at least 1, got 0"):
        toy_config(last_blocks=0)
    fields = {"layer_types": [NAME] * 4, "index_block_size": BLOCK}
    with pytest.raises(Exception, match=f"'{NAME}' need the field `last_blocks` of the text config"):
        tiny_config(text=fields)


@torch.no_grad()
def test_forward_is_masked_attention(model, ids, relative_error):
    dense = MiniMaxM3VLForCausalLM(toy_config(layer_types=[FULL_ATTENTION.name] * 4)).eval()
    dense.load_state_dict(model.state_dict())
    token = torch.arange(TOKENS)
    block = token // BLOCK
    mask = (token <= token[:, None]) & (block > block[:, None] - 2)
    logits = model(ids).logits
    assert relative_error(logits, dense(ids, attention_mask=mask[None, None]).logits) < 1e-5
    assert relative_error(logits, dense(ids).logits) > 0.01, "the mask must leave keys out"
    padded = torch.nn.functional.pad(ids, (3, 0))
    padding = (torch.arange(TOKENS + 3) >= 3).long()[None]
    assert relative_error(model(padded, attention_mask=padding).logits[:, 3:], logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_caches(model, ids, relative_error, cache_class):
    options = {"max_cache_len": TOKENS} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    pieces = [model(piece, cache=cache).logits for piece in ids.split([20, 1, TOKENS - 21], dim=1)]
    ours = {DynamicCache: MiniMaxM3VLDynamicLayer, StaticCache: MiniMaxM3VLStaticLayer}
    assert {type(layer) for layer in cache.layers} == {ours[cache_class]}
    assert relative_error(torch.cat(pieces, dim=1), model(ids).logits) < 1e-5


def test_generate(model, ids):
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), expected)


def test_flops_count_it(model):
    config = model.config
    keys = sum(token - max(0, token // BLOCK - 1) * BLOCK + 1 for token in range(TOKENS))
    assert attended_keys(config, NAME, TOKENS) == keys
    flops = forward_flops(config, TOKENS)
    assert flops["attention"] == 4 * config.num_attention_heads * config.head_dim * keys * 4
    assert flops["index scores"] == flops["indexer projections"] == 0


def test_a_name_is_registered_once(toy_type):
    with pytest.raises(ValueError, match=f"'{NAME}' is registered already"):
        register_attention_type(toy_type)
    with pytest.raises(ValueError, match="'sliding_attention' is registered already"):
        register_attention_type(AttentionType(LayerType("sliding_attention")))
    assert "sliding_attention" not in LAYER_TYPES


def test_caches_of_other_models_keep_their_layers():
    assert DYNAMIC_LAYER_TYPE_MAPPING[FULL_ATTENTION.name] is DynamicLayer
    assert STATIC_LAYER_TYPE_MAPPING[FULL_ATTENTION.name] is StaticLayer


def test_both_tables_have_the_same_types():
    assert list(LAYER_TYPES) == list(ATTENTION_TYPES)
    assert all(kind.layer_type is LAYER_TYPES[name] for name, kind in ATTENTION_TYPES.items())


def test_unknown_types_raise_everywhere():
    """A config may be changed after it was checked: no part of the model takes an unknown type for dense attention."""
    unknown = r"the layer type must be 'full_attention' or 'minimax_m3_sparse' or .*, got 'nonsense'"
    config = tiny_config().text_config
    with pytest.raises(ValueError, match=unknown):
        attended_keys(config, "nonsense", 10)
    with pytest.raises(ValueError, match=unknown):
        adopt_cache(DynamicCache(), ["nonsense"], 1)
    config.layer_types[1] = "nonsense"
    with pytest.raises(ValueError, match=unknown):
        MiniMaxM3VLAttention(config, 1)
    with pytest.raises(ValueError, match=unknown):
        forward_flops(config, 10)
    with pytest.raises(Exception, match=r"`layer_types\[1\]` must be 'full_attention'.*got 'nonsense'"):
        config.validate()
