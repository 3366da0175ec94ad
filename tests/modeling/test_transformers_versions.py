"""Both names of the cache and of the vision features work, whichever release of Transformers is installed."""

import warnings
from importlib.metadata import requires

import pytest
import torch
from packaging.requirements import Requirement
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME, FIRST_UNTESTED, warn_if_untested

pytestmark = pytest.mark.compatibility

NAMES = ["cache", "past_key_values"]


@pytest.fixture(scope="module", params=["text", "composite"])
def model(request):
    torch.manual_seed(0)
    config = tiny_config()
    if request.param == "text":
        return MiniMaxM3VLForCausalLM(config.text_config).eval()
    return MiniMaxM3SparseForConditionalGeneration(config).eval()


@pytest.fixture
def ids(model):
    return torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_inputs(make_patches):
    def make(config):
        grid_thw = torch.tensor([[1, 4, 4]])
        ids = torch.tensor([[5, *[config.image_token_id] * 4, 7]])
        return {"input_ids": ids, "pixel_values": make_patches(config, grid_thw), "image_grid_thw": grid_thw}

    return make


def text_model(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


@pytest.mark.parametrize("name", NAMES)
def test_forward_reads_the_cache(model, ids, name):
    with torch.no_grad():
        expected = model(ids).logits[:, 30:]
        for call, head in ((model, lambda output: output.logits), (model.model, lambda o: model.lm_head(o[0]))):
            cache = DynamicCache(config=model.config.get_text_config())
            call(ids[:, :30], **{name: cache})
            torch.testing.assert_close(head(call(ids[:, 30:], **{name: cache})), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_hold_the_cache(model, ids, name):
    with torch.no_grad():
        outputs = [
            model(ids, use_cache=True),
            model.model(ids, use_cache=True),
            text_model(model)(ids, use_cache=True),
        ]
    for output in outputs:
        cache = getattr(output, name)
        assert cache.get_seq_length() == 40
        assert output[name] is cache and output.get(name) is cache and name in output
        assert list(output).count(CACHE_NAME) == 1 and output.to_tuple().count(cache) == 1
    assert name not in model(ids, use_cache=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_generate_continues_a_cache(model, ids, name, cache_class):
    """Release 5.24 passes `cache=`: a model that does not know it sees one token at every step."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **options, use_cache=False).sequences
    room = {"max_cache_len": 60} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.get_text_config(), **room)
    with torch.no_grad():
        model(ids[:, :20], **{name: cache})
    output = model.generate(ids, **options, **{name: cache})
    assert torch.equal(output.sequences, expected)
    assert getattr(output, name) is cache and int(cache.get_seq_length()) == 45


@pytest.mark.parametrize("name", NAMES)
def test_layers_write_to_the_cache(model, ids, name):
    body = text_model(model)
    seen = []
    handle = body.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        body(ids)
        handle.remove()
        args, kwargs = seen[0]
        for layer in (body.layers[0], body.layers[0].self_attn):
            cache = DynamicCache(config=model.config.get_text_config())
            layer(*args, **without(kwargs, "cache"), **{name: cache})
            assert cache.get_seq_length() == 40


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def test_a_cache_under_an_unknown_name_is_refused(model, ids):
    """A release that renames the argument again would pass it so. The model raises and loses no past."""
    with pytest.raises(TypeError, match="`state` is no argument of this model"):
        model(ids, state=DynamicCache(config=model.config.get_text_config()))


def test_deprecation_is_that_of_the_release(model, ids):
    stock_model = stock.MiniMaxM3VLTextModel(stock.MiniMaxM3VLTextConfig.from_dict(text_model(model).config.to_dict()))
    warned = []
    for body in (stock_model, text_model(model)):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            body(ids, past_key_values=DynamicCache(config=body.config))
        warned.append([str(w.message) for w in caught if "past_key_values" in str(w.message)])
    assert warned[0] == warned[1]
    assert bool(warned[0]) == (CACHE_NAME == "cache")


def test_features_have_both_names(image_inputs):
    torch.manual_seed(0)
    config = tiny_config()
    model = MiniMaxM3SparseForConditionalGeneration(config).eval()
    inputs = image_inputs(config)
    with torch.no_grad():
        (expected,) = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        for output in (model(**inputs), model.model(**inputs)):
            torch.testing.assert_close(output.image_hidden_states[0], expected)
            torch.testing.assert_close(output.image_outputs.pooler_output[0], expected)
            torch.testing.assert_close(output["image_outputs"].pooler_output[0], expected)
            assert "image_outputs" in output and output.video_outputs is None and output.video_hidden_states is None
            assert output.to_tuple() is not None
        stock_config = stock.MiniMaxM3VLConfig.from_dict(config.to_dict())
        stock_model = stock.MiniMaxM3SparseForConditionalGeneration(stock_config).eval()
        assert list(model(**inputs, use_cache=True)) == list(stock_model(**inputs, use_cache=True))


def test_prediction_keeps_logits_alone(image_inputs, tmp_path):
    """`Trainer` joins every output that the config does not name, and features of images cannot be joined."""
    config = tiny_config()
    model = MiniMaxM3SparseForConditionalGeneration(config).eval()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    inputs = image_inputs(config) | {"use_cache": True}
    loss, logits, labels = trainer.prediction_step(model, inputs | {"labels": inputs["input_ids"]}, False)
    assert loss.isfinite() and logits.shape == (1, 6, config.text_config.vocab_size) and labels.shape == (1, 6)


@pytest.mark.parametrize(
    ("release", "is_tested"), [("5.23.0", True), ("5.24.3", True), ("5.25.0.dev0", False), ("6.0.0", False)]
)
def test_untested_releases_are_named(release, is_tested, caplog):
    warn_if_untested(release)
    assert (release in caplog.text) != is_tested


def test_the_declared_range_is_the_tested_one():
    declared = [Requirement(line) for line in requires("minimax-m3-transformers")]
    (versions,) = (requirement.specifier for requirement in declared if requirement.name == "transformers")
    assert "5.23.0" in versions and "5.24.9" in versions
    assert FIRST_UNTESTED not in versions and "5.22.9" not in versions
