"""A prompt that `generate` reads in pieces gives the tokens and logits of one that a single pass reads."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.models import text_generation
from modeling_minimax_m3.models.multimodal_generation import split_rows

pytestmark = pytest.mark.compatibility

NEW, LENGTH = 6, 60
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
OPTIONS |= {"return_dict_in_generate": True, "output_logits": True}
GREEDY = {**OPTIONS, "do_sample": False}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture
def model(make_pair, config):
    return make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1]


@pytest.fixture
def text_model(make_pair, config):
    return make_pair(MiniMaxM3VLForCausalLM, config.text_config)[1]


@pytest.fixture
def inputs(make_inputs, config):
    """Images of 6 and 4 tokens from token 2 on, then videos of 4 and 8 tokens, to token 27."""
    return make_inputs(config, images=[[1, 4, 6], [1, 4, 4]], videos=[[1, 4, 4], [2, 4, 4]], length=LENGTH)


@pytest.fixture
def padded_batch(make_inputs, config):
    """Rows of 60, 43 and 50 tokens with padding on the left, so that borders cut their media at different places."""
    rows = [
        make_inputs(config, images=[[1, 4, 6], [1, 4, 4]], videos=[[2, 4, 4]], length=60, seed=1),
        make_inputs(config, images=[[1, 4, 4]], videos=[[1, 4, 4]], length=43, seed=2),
        make_inputs(config, length=50, seed=3),
    ]
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if name in ("input_ids", "attention_mask"):
            values = [torch.nn.functional.pad(value, (60 - value.shape[1], 0)) for value in values]
        batch[name] = torch.cat(values)
    return batch


@pytest.fixture
def warnings(monkeypatch):
    """Warnings about `prefill_chunk_size`, and about media that did not come with their tokens."""
    messages = []

    def note(_, message):
        if "prefill_chunk_size" in message or "inputs came" in message:
            messages.append(message)

    monkeypatch.setattr(type(logging.get_logger(text_generation.__name__)), "warning_once", note)
    return messages


def count_passes(model) -> list[int]:
    """The number of tokens of each pass from now on."""
    passes = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    return passes


def count_encoder_calls(model) -> list[int]:
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def assert_equal(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_split_rows_covers_all_rows_in_order():
    parts = [torch.arange(3), torch.arange(3, 4), torch.arange(4, 9)]
    shares = split_rows(parts, [2, 0, 3, 4])
    assert [torch.cat(share).tolist() for share in shares] == [[0, 1], [], [2, 3, 4], [5, 6, 7, 8]]
    assert shares[2][0].data_ptr() == parts[0][2:].data_ptr(), "no copy"


class TestMedia:
    @pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
    @pytest.mark.parametrize("size", [1, 4, 7, 25, 59, 60, 1000])
    def test_greedy(self, model, inputs, size, cache):
        """Borders at every place of an image, and pieces without one."""
        expected = model.generate(**inputs, **GREEDY)
        calls, passes = count_encoder_calls(model), count_passes(model)
        assert_equal(model.generate(**inputs, **GREEDY, **cache, prefill_chunk_size=size), expected)
        assert len(calls) == 2, "once for the images, once for the videos"
        rest = [LENGTH % size] if LENGTH % size else []
        assert passes == [size] * (LENGTH // size) + rest + [1] * (NEW - 1)

    @pytest.mark.parametrize("size", [4, 33])
    @pytest.mark.parametrize(
        "options",
        [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3, "do_sample": False}],
        ids=["greedy", "samples", "beams"],
    )
    def test_left_padded_batch(self, model, padded_batch, options, size):
        outputs = []
        for chunks in ({}, {"prefill_chunk_size": size}):
            torch.manual_seed(0)
            outputs.append(model.generate(**padded_batch, **OPTIONS, **options, **chunks))
        assert_equal(*reversed(outputs))

    @pytest.mark.parametrize(
        "options", [{"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 2}], ids=["prompt lookup", "early exit"]
    )
    @pytest.mark.parametrize("size", [1, 7, 59])
    def test_assisted_decoding(self, model, inputs, options, size):
        inputs["input_ids"][0, -1] = inputs["input_ids"][0, 1]  # prompt lookup proposes the first image's tokens
        expected = model.generate(**inputs, **GREEDY)
        calls, passes = count_encoder_calls(model), count_passes(model)
        assert_equal(model.generate(**inputs, **GREEDY, **options, prefill_chunk_size=size), expected)
        assert len(calls) == 2
        assert max(passes) <= size + 20, "drafts come with the last piece"

    def test_assisted_sampling(self, model, inputs):
        outputs = []
        for chunks in ({}, {"prefill_chunk_size": 7}):
            torch.manual_seed(0)
            options = {**OPTIONS, "do_sample": True, "prompt_lookup_num_tokens": 3}
            outputs.append(model.generate(**inputs, **options, **chunks))
        assert_equal(*outputs)

    @pytest.mark.parametrize("kind", ["composite", "text"])
    def test_assistant_without_media(self, model, inputs, config, kind, warnings):
        if kind == "composite":
            assistant = MiniMaxM3SparseForConditionalGeneration(config).eval()
        else:
            assistant = MiniMaxM3VLForCausalLM(config.text_config).eval()
        expected = model.generate(**inputs, **GREEDY)
        options = {"assistant_model": assistant, "prefill_chunk_size": 7}
        assert_equal(model.generate(**inputs, **GREEDY, **options), expected)
        assert warnings == []

    @pytest.mark.parametrize("types", ["given", "found"])
    def test_embeddings(self, model, padded_batch, types):
        embeddings = model.get_input_embeddings()(padded_batch["input_ids"])
        rest = {name: value for name, value in padded_batch.items() if name != "input_ids"}
        if types == "given":
            ids = padded_batch["input_ids"]
            rest["mm_token_type_ids"] = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
        expected = model.generate(inputs_embeds=embeddings, **rest, **GREEDY)
        passes = count_passes(model)
        assert_equal(model.generate(inputs_embeds=embeddings, **rest, **GREEDY, prefill_chunk_size=7), expected)
        assert passes == [7] * 8 + [4] + [1] * (NEW - 1)

    def test_token_types_decide_about_placeholders(self, model, inputs):
        """A token that is written as a placeholder but marked as text stays text, also in a piece of its own."""
        ids = inputs["input_ids"]
        types = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
        ids[0, 50] = model.config.image_token_id
        for given in (types, types[:, :50]):
            expected = model.generate(**inputs, mm_token_type_ids=given, **GREEDY)
            output = model.generate(**inputs, mm_token_type_ids=given, **GREEDY, prefill_chunk_size=7)
            assert_equal(output, expected)

    def test_features_in_place_of_pixels(self, model, inputs):
        expected = model.generate(**inputs, **GREEDY)
        encoded = {
            "image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
            "video": model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]),
        }
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(**text, mm_encoder_outputs=encoded, **GREEDY, prefill_chunk_size=7)
        assert_equal(output, expected)

    @pytest.mark.parametrize("number", ["too many", "too few"])
    def test_features_without_placeholders(self, model, inputs, number):
        ids = inputs["input_ids"]
        ids[0, -1 if number == "too many" else 2] = model.config.image_token_id if number == "too many" else 5
        count = 11 if number == "too many" else 9
        with pytest.raises(ValueError, match=f"Image features and image tokens do not match, tokens: {count}, feat"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=7)

    def test_unknown_modality(self, model, inputs):
        encoded = {"images": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with pytest.raises(ValueError, match=r"mm_encoder_outputs must have no keys but .* got \['images'\]"):
            model.generate(**text, mm_encoder_outputs=encoded, **GREEDY, prefill_chunk_size=7)


class TestCacheThatHoldsTokens:
    @pytest.fixture(params=["dynamic", "static"])
    def cache(self, request, model):
        if request.param == "static":
            return StaticCache(config=model.config, max_cache_len=2 * LENGTH)
        return DynamicCache(config=model.config)

    @pytest.mark.parametrize("given", ["whole prompt", "new tokens", "whole prompt in embeddings"])
    def test_next_turn(self, model, make_inputs, config, inputs, cache, given):
        second = make_inputs(config, images=[[1, 4, 6]], videos=[[2, 4, 4]], length=40, seed=7)
        ids = torch.cat((inputs["input_ids"], second["input_ids"]), dim=1)
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        media = {name: torch.cat((inputs[name], second[name])) for name in names}
        mask = torch.ones_like(ids)
        expected = model.generate(input_ids=ids, attention_mask=mask, **media, **GREEDY)
        with torch.no_grad():
            model(**inputs, cache=cache)

        prompt = {"input_ids": ids, "attention_mask": mask, **media}
        if given == "new tokens":
            prompt = {**second, "attention_mask": mask}
        elif given == "whole prompt in embeddings":
            prompt["inputs_embeds"] = model.get_input_embeddings()(prompt.pop("input_ids"))
        passes = count_passes(model)
        output = model.generate(**prompt, **GREEDY, cache=cache, prefill_chunk_size=7)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(output.sequences[:, -NEW:], expected.sequences[:, -NEW:])
        assert passes == [7] * 5 + [5] + [1] * (NEW - 1)

    @pytest.mark.parametrize("size", [None, 7])
    @pytest.mark.parametrize("given", ["pixels", "features"])
    @pytest.mark.parametrize("num_cached", [5, 10, 24])
    def test_part_of_an_image(self, model, inputs, num_cached, given, size):
        """The cache ends within the first image, the second one and the last video."""
        cache = DynamicCache(config=model.config)
        expected = model.generate(**inputs, **GREEDY, cache=cache)
        cache.crop(num_cached - cache.get_seq_length())
        if given == "features":
            inputs["mm_encoder_outputs"] = {
                "image": model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_thw")),
                "video": model.get_video_features(inputs.pop("pixel_values_videos"), inputs.pop("video_grid_thw")),
            }
        output = model.generate(**inputs, **GREEDY, cache=cache, prefill_chunk_size=size)
        assert_equal(output, expected)

    @pytest.mark.parametrize("size", [None, 7, 100])
    @pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}], ids=str)
    def test_assisted_decoding(self, text_model, make_tokens, size, drafts):
        """The first pass reads what the cache does not hold."""
        tokens = make_tokens(text_model.config, 1, LENGTH)
        expected = text_model.generate(tokens, **GREEDY)
        cache = DynamicCache(config=text_model.config)
        with torch.no_grad():
            text_model(tokens[:, :20], cache=cache)
        assert_equal(text_model.generate(tokens, **GREEDY, **drafts, cache=cache, prefill_chunk_size=size), expected)


class TestAutomaticPieces:
    @pytest.fixture(autouse=True)
    def short_bound(self, monkeypatch):
        monkeypatch.setattr(text_generation, "_PREFILL_TOKENS", 16)
        monkeypatch.setattr(text_generation, "_UNDIVIDED_DEVICES", ())

    @pytest.fixture
    def whole(self, monkeypatch):
        """Generates from a prompt that one pass reads."""

        def generate(model, **inputs):
            with monkeypatch.context() as patch:
                patch.setattr(text_generation, "_UNDIVIDED_DEVICES", ("cpu",))
                return model.generate(**inputs, **GREEDY)

        return generate

    @pytest.mark.parametrize("form", ["ids", "embeddings"])
    def test_media(self, model, padded_batch, whole, form):
        expected = whole(model, **padded_batch)
        if form == "embeddings":
            padded_batch["inputs_embeds"] = model.get_input_embeddings()(padded_batch.pop("input_ids"))
        calls, passes = count_encoder_calls(model), count_passes(model)
        output = model.generate(**padded_batch, **GREEDY)
        assert torch.equal(output.sequences[:, -NEW:], expected.sequences[:, -NEW:])
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert passes == [16, 16, 16, 12] + [1] * (NEW - 1)
        assert len(calls) == 2

    def test_assisted_decoding(self, model, inputs, whole):
        expected = whole(model, **inputs)
        passes = count_passes(model)
        assert_equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), expected)
        assert passes[:3] == [16, 16, 16]

    def test_processes_with_prompts_of_their_own_stay_in_step(self, model, inputs, whole, monkeypatch):
        """Where a pass gathers weights from all processes, each makes one pass for its prompt, unless told."""
        monkeypatch.setattr(text_generation, "gathers_weights", lambda model: True)
        passes = count_passes(model)
        model.generate(**inputs, **GREEDY)
        assert passes[0] == LENGTH
        passes.clear()
        model.generate(**inputs, **GREEDY, prefill_chunk_size=50)
        assert passes[:2] == [50, 10]

    def test_what_needs_the_whole_prompt_says_nothing(self, model, inputs, warnings):
        passes = count_passes(model)
        model.generate(**inputs, **GREEDY, output_hidden_states=True)
        assert passes[0] == LENGTH
        assert warnings == []


class TestWhatCannotBeDivided:
    @pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
    def test_outputs_of_all_tokens(self, make_pair, config, inputs, warnings, name):
        config._attn_implementation = "eager"
        model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1]
        expected = model.generate(**inputs, **GREEDY, **{name: True})
        output = model.generate(**inputs, **GREEDY, **{name: True}, prefill_chunk_size=7)
        field = name.removeprefix("output_")
        torch.testing.assert_close(output[field], expected[field])
        assert f"`prefill_chunk_size=7` has no effect, one pass reads the whole prompt: `{name}` re" in warnings[0]
        warnings.clear()
        model.generate(**inputs, **GREEDY, **{name: True}, prefill_chunk_size=LENGTH)
        assert warnings == []

    def test_virtual_tokens(self, model, inputs, warnings):
        tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
        expected = tuned.generate(**inputs, **GREEDY)
        assert_equal(tuned.generate(**inputs, **GREEDY, prefill_chunk_size=7), expected)
        assert "PEFT puts virtual tokens in front of it" in warnings[-1]


class TestBadInput:
    @pytest.mark.parametrize("size", [0, -3, 2.5, "7", True], ids=repr)
    @pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "assisted"])
    def test_size(self, model, inputs, size, drafts):
        with pytest.raises(ValueError, match=f"`prefill_chunk_size` must be a positive integer or None, got {size!r}"):
            model.generate(**inputs, **GREEDY, **drafts, prefill_chunk_size=size)

    def test_no_cache(self, model, inputs):
        with pytest.raises(ValueError, match="`prefill_chunk_size=7` needs a cache: pass `use_cache=True`"):
            model.generate(**inputs, **GREEDY, use_cache=False, prefill_chunk_size=7)

    def test_static_cache_without_room(self, text_model, make_tokens):
        cache = StaticCache(config=text_model.config, max_cache_len=50)
        tokens = make_tokens(text_model.config, 1, LENGTH)
        with pytest.raises(ValueError, match="50"):
            text_model.generate(tokens, **GREEDY, cache=cache, disable_compile=True, prefill_chunk_size=7)
