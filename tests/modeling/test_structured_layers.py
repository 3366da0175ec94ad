"""Structured layers in the model: the same answers in every layout and cache, checkpoints, compilation."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.cache import MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer

# Blocks of 4 tokens and 5 places, so that a short text has more blocks than a query may list.
STRUCTURED = {
    "layer_types": ["full_attention", "minimax_m3_structured", "minimax_m3_sparse", "minimax_m3_structured"],
    "index_block_size": 4,
    "structured_local_blocks": 1,
    "structured_anchor_blocks": 2,
    "structured_anchor_stride": 2,
    "structured_random_blocks": 2,
    "structured_seed": 7,
}
LENGTHS = (110, 65)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return fill(MiniMaxM3VLForCausalLM(tiny_config(text=STRUCTURED).text_config))


@pytest.fixture(scope="module")
def rows(model, make_tokens):
    tokens = make_tokens(model.config, 2, 110)
    rows = [tokens[i, :length] for i, length in enumerate(LENGTHS)]
    with torch.no_grad():
        return rows, [model(row[None], use_cache=False).logits[0] for row in rows]


def padded(rows, side):
    ids, mask = torch.ones(2, 117, dtype=torch.long), torch.zeros(2, 117, dtype=torch.long)
    for i, row in enumerate(rows):
        slots = {
            "left": torch.arange(117 - len(row), 117),
            "right": torch.arange(len(row)),
            "holes": torch.randperm(117, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values,
        }[side]
        ids[i, slots], mask[i, slots] = row, 1
    return ids, mask


def test_structured_layers_differ_from_dense_ones(model, rows, relative_error):
    """The pattern leaves keys out, without which the tests below would show nothing."""
    dense = tiny_config(text=STRUCTURED | {"structured_random_blocks": 60}).text_config
    everything = MiniMaxM3VLForCausalLM(dense).eval()
    everything.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert relative_error(everything(rows[0][0][None]).logits[0], rows[1][0]) > 0.01


def test_no_indexer_parameters_and_no_index_cache(model):
    assert [layer.self_attn.indexer is not None for layer in model.model.layers] == [False, False, True, False]
    with torch.no_grad():
        cache = model(torch.ones(1, 9, dtype=torch.long)).cache
    assert type(cache.layers[1]) is MiniMaxM3VLDynamicLayer
    assert not hasattr(cache.layers[1], "update_index")
    static = StaticCache(config=model.config, max_cache_len=9)
    assert type(static.layers[1]) is MiniMaxM3VLStaticLayer


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding(model, rows, relative_error, side, backend):
    ids, mask = padded(rows[0], side)
    model.config.msa_backend = backend
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    model.config.msa_backend = "auto"
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "holes"])
def test_chunked_prefill(model, rows, relative_error, side, cache):
    ids, mask = padded(rows[0], side)
    cache = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=130)
    logits, start = [], 0
    with torch.no_grad():
        for chunk in (40, 1, 16, 50, 1, 9):
            stop = start + chunk
            logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
            start = stop
    logits = torch.cat(logits, dim=1)
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


def packed(rows):
    offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat(rows)[None], {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}


def test_packed_documents_have_their_own_pattern(model, rows, relative_error):
    ids, kwargs = packed(rows[0])
    with torch.no_grad():
        assert relative_error(model(ids, **kwargs).logits[0], torch.cat(rows[1])) < 1e-5


def test_cross_document_links(model, rows, relative_error, make_tokens):
    """With the flag, packing changes the later document's answer in structured layers, not the earlier one's."""
    ids, kwargs = packed(rows[0])
    model.config.structured_cross_document = True
    other = ids.clone()
    other[:, :110] = make_tokens(model.config, 1, 110, seed=5)
    with torch.no_grad():
        linked, changed = model(ids, **kwargs).logits[0], model(other, **kwargs).logits[0]
        alone = model(rows[0][1][None]).logits[0]
    model.config.structured_cross_document = False
    assert relative_error(linked[:110], rows[1][0]) < 1e-5, "the first document must not see the second"
    assert relative_error(linked[110:], rows[1][1]) > 1e-3, "the second document must see the first"
    assert relative_error(changed[110:], linked[110:]) > 1e-3
    assert relative_error(alone, rows[1][1]) < 1e-5, "the flag must mean nothing without packing"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "static", "beams", "assisted"],
)
def test_generation(model, make_tokens, options):
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = make_tokens(model.config, batch, 50)
    mask = torch.ones_like(ids)
    mask[-1, :17] = 0
    kwargs = {
        "attention_mask": mask,
        "max_new_tokens": 15,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    uncached = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(ids, **kwargs, **uncached, use_cache=False)
    assert torch.equal(model.generate(ids, **kwargs, **options), expected)


def test_gradients_and_checkpointing(model, rows, relative_error):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(rows[0][0][None], labels=rows[0][0][None]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()  # else its hook stays, which older PyTorch (2.11) does not compile
    model.eval().zero_grad()
    assert gradients[0]["model.layers.1.self_attn.q_proj.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


def test_lora(model, rows):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "k_proj"])).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(rows[0][0][None], labels=rows[0][0][None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    structured = adapted.base_model.model.model.layers[1].self_attn.q_proj
    assert structured.lora_B["default"].weight.abs().sum() > 0


def test_compiles(model, rows, relative_error):
    torch._dynamo.reset()
    ids, mask = padded(rows[0], "left")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
    for i, expected in enumerate(rows[1]):
        assert relative_error(logits[i][mask[i] == 1], expected) < 1e-5


def test_static_decoding_compiles(model, make_tokens):
    torch._dynamo.reset()
    ids = make_tokens(model.config, 2, 30)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **kwargs)
    assert torch.equal(compiled, model.generate(ids, **kwargs))


def test_checkpoint_round_trip(model, rows, relative_error, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_types"] == STRUCTURED["layer_types"] and saved["structured_seed"] == 7
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MiniMaxM3VLForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert relative_error(loaded(rows[0][0][None]).logits[0], rows[1][0]) < 1e-6


def test_fields_stay_out_of_files_that_stock_reads():
    assert not [key for key in MiniMaxM3VLTextConfig().to_dict() if key.startswith("structured_")]
    assert MiniMaxM3VLTextConfig(structured_seed=3).to_dict()["structured_seed"] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("structured_local_blocks", 0),
        ("structured_anchor_blocks", -1),
        ("structured_anchor_stride", 0),
        ("structured_random_blocks", -1),
        ("structured_seed", 2**64),
    ],
)
def test_fields_are_validated(name, value):
    with pytest.raises(Exception, match=f"'{name}':\n.* must be .*got {value}"):
        MiniMaxM3VLTextConfig(**{name: value})
