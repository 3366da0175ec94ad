"""The composite model: equal to stock where stock is correct, and in the calls of its users."""

import inspect
import re
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, StaticCache
from transformers import MiniMaxM3VLProcessor as StockProcessor
from transformers.utils import logging

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM, MiniMaxM3VLModel
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

IMAGES = [[1, 4, 6], [1, 4, 4]]
VIDEOS = [[1, 4, 4], [2, 4, 4]]


@pytest.fixture
def make_models(make_pair, config):
    def make(attn_implementation="sdpa", dtype=torch.float32):
        config._attn_implementation = attn_implementation
        return make_pair(MiniMaxM3SparseForConditionalGeneration, config, dtype=dtype)

    return make


@pytest.fixture
def model(make_models):
    return make_models()[1]


@pytest.fixture
def inputs(make_inputs, config):
    return make_inputs(config, images=IMAGES, videos=VIDEOS)


def without(inputs: dict, *names: str) -> dict:
    return {name: value for name, value in inputs.items() if name not in names}


class TestForward:
    @pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
    def test_equals_stock(self, make_models, inputs, attn_implementation):
        stock_model, model = make_models(attn_implementation)
        options = {
            "labels": inputs["input_ids"],
            "output_hidden_states": True,
            "output_router_logits": True,
            "output_attentions": attn_implementation == "eager",
        }
        with torch.no_grad():
            expected, output = stock_model(**inputs, **options), model(**inputs, **options)
        assert set(output) == set(expected)
        assert len(output.hidden_states) == 5
        assert len(output.router_logits) == 3
        for name in set(expected) - {CACHE_NAME}:
            torch.testing.assert_close(output[name], expected[name], rtol=1e-5, atol=1e-5)

    def test_gradients_equal_stock_with_and_without_checkpointing(self, make_models, make_inputs, config):
        config._experts_implementation = "eager"  # the grouped product takes no float64
        stock_model, model = make_models(dtype=torch.float64)
        inputs = make_inputs(config, images=IMAGES, videos=VIDEOS, dtype=torch.float64)

        def gradients(module) -> dict[str, torch.Tensor]:
            module.train()
            module.zero_grad()
            module(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False).loss.backward()
            return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

        expected = gradients(stock_model)
        trained = {name.split(".")[1] for name in expected if name.startswith("model.")}
        assert trained == {"vision_tower", "multi_modal_projector", "language_model"}
        # Norms and softmax run in float32 inside a float64 model.
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)
        model.activation_checkpointing_enable()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_frozen_model_with_checkpointing_trains_what_is_left(self, model, inputs, use_reentrant):
        """As adapters do, in the vision tower as well as in the language model."""
        model.requires_grad_(False)
        parts = [model.model.vision_tower.layers[0], model.model.language_model.layers[1]]
        weights = [part.self_attn.q_proj.weight.requires_grad_() for part in parts]
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        expected = torch.autograd.grad(loss, weights)
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        torch.testing.assert_close([weight.grad for weight in weights], list(expected))

    def test_tuple_output(self, model, inputs):
        output = model(**inputs)
        logits, *_ = model(**inputs, return_dict=False)
        torch.testing.assert_close(logits, output.logits, rtol=0, atol=0)
        hidden_states, *_ = model.model(**inputs, return_dict=False)
        assert hidden_states.shape == (1, 60, 64)
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config.return_dict = False
        logits, *_ = model(**inputs)
        torch.testing.assert_close(logits, output.logits, rtol=0, atol=0)

    @pytest.mark.parametrize("keep", [1, 7, torch.tensor([0, 3, 59])], ids=["last", "last seven", "chosen"])
    def test_logits_to_keep(self, model, inputs, keep):
        every = model(**inputs).logits
        kept = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, kept)

    def test_embeddings_in_place_of_ids(self, model, inputs):
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        output = model(inputs_embeds=embeddings, **without(inputs, "input_ids")).logits
        torch.testing.assert_close(output, model(**inputs).logits, rtol=0, atol=0)

    def test_encoded_features_in_place_of_pixels(self, model, inputs):
        encoded = {
            "image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
            "video": model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]),
        }
        assert [len(features) for features in encoded["image"].pooler_output] == [6, 4]
        assert [len(features) for features in encoded["video"].pooler_output] == [4, 8]
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        expected = model(**inputs).logits
        torch.testing.assert_close(model(**text, mm_encoder_outputs=encoded).logits, expected, rtol=0, atol=0)
        images = without(inputs, "pixel_values_videos", "video_grid_thw")
        mixed = model(**images, mm_encoder_outputs={"video": encoded["video"]}).logits
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0)

    def test_features_as_tuple(self, model, inputs):
        hidden_states, features = model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=False
        )
        assert hidden_states.shape == (1, 40, 48)
        assert len(features) == 2

    def test_images_and_videos_take_their_own_places(self, model, inputs):
        first = model(**inputs, output_hidden_states=True).hidden_states[0][0]
        for name, token_id in (
            ("pixel_values", model.config.image_token_id),
            ("pixel_values_videos", model.config.video_token_id),
        ):
            changed = model(**{**inputs, name: inputs[name] + 1}, output_hidden_states=True).hidden_states[0][0]
            moved = (changed != first).any(-1)
            torch.testing.assert_close(moved, inputs["input_ids"][0] == token_id)

    def test_token_types_decide_where_they_are_given(self, model, inputs):
        """The types decide, against the ids and against embeddings that do not show placeholders."""
        expected = model(**inputs).logits
        ids = inputs["input_ids"]
        types = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
        embeddings = model.get_input_embeddings()(torch.full_like(ids, model.config.image_token_id))
        embeddings[types == 0] = model.get_input_embeddings()(ids[types == 0])
        output = model(inputs_embeds=embeddings, mm_token_type_ids=types, **without(inputs, "input_ids")).logits
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        types[0, -1] = 1
        with pytest.raises(ValueError, match="tokens: 11, features: 10"):
            model(**inputs, mm_token_type_ids=types)

    def test_precomputed_values_reach_the_right_tower_call(self, model, inputs):
        joined = torch.tensor([0, 40], dtype=torch.int32)
        expected = model(**inputs, output_hidden_states=True).hidden_states[0][0]
        output = model(**inputs, image_cu_seqlens=joined, output_hidden_states=True).hidden_states[0][0]
        moved = (output != expected).any(-1)
        torch.testing.assert_close(moved, inputs["input_ids"][0] == model.config.image_token_id)


def test_what_the_processor_returns_goes_in_as_it_is(tiny_checkpoint, stock):
    """Stock's and our processor and model on one chat, equal to the last token."""
    image = Image.effect_noise((130, 90), 80).convert("RGB")
    frames = [Image.effect_noise((84, 56), 80).convert("RGB") for _ in range(4)]
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "Which of the two?"},
        {"type": "video", "video": frames},
    ]
    tokens, logits = [], []
    for processor, model_class in (
        (StockProcessor.from_pretrained(tiny_checkpoint), stock.MiniMaxM3SparseForConditionalGeneration),
        (AutoProcessor.from_pretrained(tiny_checkpoint), MiniMaxM3SparseForConditionalGeneration),
    ):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "return_mm_token_type_ids": True},
        )
        if model_class is not MiniMaxM3SparseForConditionalGeneration:
            del inputs["mm_token_type_ids"]  # stock's `generate` refuses it
        model = model_class.from_pretrained(tiny_checkpoint)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
        tokens.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[1], tokens[0])


class TestLayouts:
    """Rows with images, padded or packed, against each row alone."""

    @pytest.fixture
    def rows(self, make_inputs, config):
        return [
            make_inputs(config, images=[[1, 4, 6]], length=40, seed=1),
            make_inputs(config, images=[[1, 4, 4], [1, 2, 2]], length=23, seed=2),
        ]

    @pytest.fixture
    def alone(self, model, rows):
        with torch.no_grad():
            return [model(**row).logits[0] for row in rows]

    @staticmethod
    def pixels(rows) -> dict[str, torch.Tensor]:
        return {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, model, rows, alone, side):
        pad = (17, 0) if side == "left" else (0, 17)
        ids, mask = (
            torch.cat((rows[0][name], torch.nn.functional.pad(rows[1][name], pad)))
            for name in ("input_ids", "attention_mask")
        )
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, **self.pixels(rows)).logits
        torch.testing.assert_close(output[0], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output[1][mask[1] == 1], alone[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens"])
    def test_packing_does_not_reach_the_vision_tower(self, model, rows, alone, form):
        ids = torch.cat([row["input_ids"] for row in rows], dim=1)
        if form == "position_ids":
            packing = {"position_ids": torch.cat([torch.arange(40), torch.arange(23)])[None]}
        else:
            offsets = torch.tensor([0, 40, 63], dtype=torch.int32)
            packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 40, "max_length_k": 40}
        with torch.no_grad():
            output = model(input_ids=ids, **packing, **self.pixels(rows)).logits[0]
        torch.testing.assert_close(output, torch.cat(alone), rtol=1e-4, atol=1e-5)


class TestLoss:
    def test_accumulated_micro_batches_equal_one_batch(self, model, make_inputs, config):
        rows = [make_inputs(config, images=[[1, 4, 4]], length=30, seed=seed) for seed in range(3)]
        labels = [row["input_ids"].clone() for row in rows]
        labels[1][:, :20] = -100
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        loss = model(**batch, labels=torch.cat(labels)).loss
        num_items = sum((label[:, 1:] != -100).sum() for label in labels)
        parts = [model(**row, labels=label, num_items_in_batch=num_items).loss for row, label in zip(rows, labels)]
        torch.testing.assert_close(sum(parts), loss)

    def test_router_loss_is_added_with_its_weight_and_ignores_pads(self, model, make_inputs, config):
        inputs = make_inputs(config, images=[[1, 4, 4]], length=30)
        labels = inputs["input_ids"]
        plain = model(**inputs, labels=labels)
        assert plain.aux_loss is None
        assert plain.router_logits is None
        full = model(**inputs, labels=labels, output_router_logits=True)
        coefficient = config.text_config.router_aux_loss_coef
        torch.testing.assert_close(full.loss, plain.loss + coefficient * full.aux_loss)

        padded = dict(inputs)
        for name in ("input_ids", "attention_mask"):
            padded[name] = torch.nn.functional.pad(inputs[name], (0, 9))
        torch.testing.assert_close(model(**padded, output_router_logits=True).aux_loss, full.aux_loss)
        config.text_config.output_router_logits = True
        model.config.text_config.output_router_logits = True
        torch.testing.assert_close(model(**inputs).aux_loss, full.aux_loss)


class TestGenerate:
    new_tokens = 12

    @pytest.fixture
    def text(self, inputs):
        return {**inputs, "max_new_tokens": self.new_tokens, "do_sample": False}

    @pytest.fixture
    def recomputed(self, model, inputs):
        """Greedy tokens, each by a full forward pass without a cache."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(self.new_tokens):
            full = {**inputs, "input_ids": ids, "attention_mask": mask}
            token = model(**full, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
        return ids

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
            {"prefill_chunk_size": 7},
            {"prompt_lookup_num_tokens": 3},
            {"assistant_early_exit": 2},
        ],
        ids=["dynamic cache", "no cache", "static cache", "chunked prefill", "prompt lookup", "early exit"],
    )
    def test_greedy(self, model, text, recomputed, options):
        torch.testing.assert_close(model.generate(**text, **options), recomputed)

    def test_static_cache_needs_no_quadratic_mask(self, model, text):
        masks = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        model.generate(**text, cache_implementation="static", disable_compile=True)
        assert len(masks) == self.new_tokens
        for mask in masks:
            tensors = mask.values() if isinstance(mask, dict) else [mask]
            assert all(tensor is None or tensor.ndim <= 2 for tensor in tensors)

    def test_images_are_encoded_once(self, model, text):
        calls = []
        model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
        model.generate(**text)
        assert len(calls) == 2  # once for the images, once for the videos

    @pytest.mark.parametrize(
        "options",
        [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
        ids=["beams", "samples"],
    )
    def test_expanded_batch_equals_stock(self, make_models, make_inputs, config, options):
        """Rows with one, two and no images, each expanded to several sequences."""
        stock_model, model = make_models()
        rows = [
            make_inputs(config, images=[[1, 4, 4]], length=20, seed=1),
            make_inputs(config, images=[[1, 4, 6], [1, 2, 2]], length=20, seed=2),
            make_inputs(config, length=20, seed=3),
        ]
        batch = {name: torch.cat([row[name] for row in rows if name in row]) for name in rows[0]}
        outputs = []
        for candidate in (stock_model, model):
            torch.manual_seed(0)
            outputs.append(candidate.generate(**batch, max_new_tokens=self.new_tokens, **options))
        assert len(outputs[1]) == 3 * options["num_return_sequences"]
        torch.testing.assert_close(outputs[1], outputs[0])

    def test_left_padded_batch_equals_single_rows(self, model, make_inputs, config):
        rows = [
            make_inputs(config, images=[[1, 4, 6]], length=40, seed=1),
            make_inputs(config, images=[[1, 4, 4]], length=23, seed=2),
        ]
        batch = {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.cat((rows[0][name], torch.nn.functional.pad(rows[1][name], (17, 0))))
        together = model.generate(**batch, max_new_tokens=self.new_tokens, do_sample=False)
        for row, tokens in zip(rows, together[:, 40:]):
            alone = model.generate(**row, max_new_tokens=self.new_tokens, do_sample=False)
            torch.testing.assert_close(alone[0, row["input_ids"].shape[1] :], tokens)

    def test_a_second_turn_continues_the_cache(self, model, make_inputs, config):
        first = make_inputs(config, images=[[1, 4, 4]], length=30, seed=1)
        second = make_inputs(config, images=[[1, 2, 4]], length=20, seed=2)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**first, cache=cache)
            ids = torch.cat((first["input_ids"], second["input_ids"]), 1)
            mask = torch.ones_like(ids)
            output = model(**{**second, "attention_mask": mask}, cache=cache).logits
            pixels = {name: torch.cat((first[name], second[name])) for name in ("pixel_values", "image_grid_thw")}
            expected = model(input_ids=ids, attention_mask=mask, **pixels).logits[:, 30:]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    @pytest.fixture
    def warnings(self, monkeypatch):
        """Warnings about images or videos that did not come with their tokens."""
        messages = []
        logger = logging.get_logger("modeling_minimax_m3.models.multimodal")
        monkeypatch.setattr(
            type(logger),
            "warning_once",
            lambda _, message: messages.append(message) if "inputs came" in message else None,
        )
        return messages

    @pytest.mark.parametrize("lookup", [1, 4, 20])
    def test_prompt_lookup_may_copy_placeholders(self, model, text, warnings, lookup):
        ids = text["input_ids"]
        ids[0, -1] = ids[0, 1]  # which the first image follows
        expected = model.generate(**text)
        passes = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        torch.testing.assert_close(model.generate(**text, prompt_lookup_num_tokens=lookup), expected)
        assert passes[0] == 60 + lookup
        assert warnings == []

    @pytest.mark.parametrize("kind", ["composite", "text"])
    def test_assistant(self, model, text, config, warnings, kind):
        """The assistant drafts without the images, and no warning says that they are missing."""
        if kind == "composite":
            assistant = MiniMaxM3SparseForConditionalGeneration(config).eval()
        else:
            assistant = MiniMaxM3VLForCausalLM(config.text_config).eval()
        torch.testing.assert_close(model.generate(**text, assistant_model=assistant), model.generate(**text))
        assert warnings == []

    def test_a_generated_placeholder_is_a_token_like_any_other(self, model, make_inputs, config):
        """In the first row, so that a search by count alone would shift the second row's features."""
        rows = [make_inputs(config, images=[[1, 4, 4]], length=20, seed=seed) for seed in range(2)]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

        def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 22:
                scores[0, config.image_token_id] = scores.max() + 1
            return scores

        options = {**batch, "max_new_tokens": self.new_tokens, "do_sample": False, "logits_processor": [force]}
        expected = model.generate(**options)
        assert expected[0, 22] == config.image_token_id
        torch.testing.assert_close(model.generate(**options, use_cache=False), expected)

    @pytest.mark.parametrize("given", ["all pixels", "new pixels", "all features"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"prefill_chunk_size": 7}, {"disable_compile": True, "cache_implementation": "static"}],
        ids=["dynamic cache", "chunked prefill", "static cache"],
    )
    def test_a_chat_sent_again_with_its_cache(self, model, make_inputs, config, given, options):
        """The second turn encodes its new image alone, and each feature finds its token."""
        first = make_inputs(config, images=[[1, 4, 4], [1, 4, 6]], videos=[[1, 4, 4]], length=30, seed=1)
        second = make_inputs(config, images=[[1, 2, 4]], videos=[[2, 4, 4]], length=20, seed=2)
        options = {**options, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        if options.pop("cache_implementation", None):
            cache = StaticCache(config=model.config, max_cache_len=80)
        else:
            cache = DynamicCache(config=model.config)
        ids = model.generate(**first, **options, cache=cache).sequences
        ids = torch.cat((ids, second["input_ids"]), 1)
        media = {name: torch.cat((first[name], second[name])) for name in second if "pixel" in name or "grid" in name}
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(**whole, **media, **{**options, "prefill_chunk_size": None})

        if given == "new pixels":
            media = {name: second[name] for name in media}
        elif given == "all features":
            media = {
                "mm_encoder_outputs": {
                    "image": model.get_image_features(media["pixel_values"], media["image_grid_thw"]),
                    "video": model.get_video_features(media["pixel_values_videos"], media["video_grid_thw"]),
                }
            }
        patches = []
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: patches.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        output = model.generate(**whole, **media, **options, cache=cache)
        torch.testing.assert_close(output.sequences, expected.sequences)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert patches == ([] if given == "all features" else [8, 32])

    def test_a_chat_whose_images_are_all_cached(self, model, make_inputs, config):
        first = make_inputs(config, images=[[1, 4, 4]], length=30)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        cache = DynamicCache(config=model.config)
        ids = model.generate(**first, **options, cache=cache)
        again = {**first, "input_ids": torch.nn.functional.pad(ids, (0, 7), value=5)}
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        expected = model.generate(**again, **options)
        torch.testing.assert_close(model.generate(**again, **options, cache=cache), expected)

    def test_embeddings_in_place_of_ids(self, model, text):
        embeddings = model.get_input_embeddings()(text["input_ids"])
        output = model.generate(inputs_embeds=embeddings, **without(text, "input_ids"))
        torch.testing.assert_close(output, model.generate(**text)[:, 60:])

    def test_router_logits_while_decoding(self, model, text):
        output = model.generate(**text, output_router_logits=True)
        torch.testing.assert_close(output, model.generate(**text))


class TestBadInput:
    @pytest.mark.parametrize(("modality", "number"), [("image", "too many"), ("video", "none")])
    def test_as_many_features_as_placeholders(self, make_models, inputs, modality, number):
        """The message begins like stock's, by which other tools recognise it, and says what was expected."""
        stock_model, model = make_models()
        token_id = getattr(model.config, f"{modality}_token_id")
        ids = inputs["input_ids"]
        if number == "too many":
            ids[0, -1] = token_id
        else:
            ids[ids == token_id] = 5
        with pytest.raises(ValueError) as known:
            stock_model(**inputs)
        expected = (
            rf"^{re.escape(str(known.value))}: .* one {modality} token \(id {token_id}\) for each {modality} feat"
        )
        with pytest.raises(ValueError, match=expected):
            model(**inputs)

    @pytest.mark.parametrize(
        ("dropped", "message"),
        [
            ("image_grid_thw", "pixel_values needs image_grid_thw"),
            ("video_grid_thw", "pixel_values_videos needs video_grid_thw"),
            ("input_ids", "Exactly one of input_ids and inputs_embeds must be given, got neither"),
        ],
    )
    def test_missing_input(self, model, inputs, dropped, message):
        with pytest.raises(ValueError, match=message):
            model(**without(inputs, dropped))

    def test_ids_and_embeddings(self, model, inputs):
        with pytest.raises(ValueError, match="Exactly one of input_ids and inputs_embeds must be given, got both"):
            model(**inputs, inputs_embeds=torch.zeros(1, 60, 64))

    def test_pixels_and_features(self, model, inputs):
        encoded = {"image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
        with pytest.raises(ValueError, match=r"got both pixel_values and mm_encoder_outputs\['image'\]"):
            model(**inputs, mm_encoder_outputs=encoded)

    @pytest.mark.parametrize("shape", [(60,), (1, 1, 60)], ids=str)
    def test_shape_of_ids(self, model, inputs, shape):
        inputs["input_ids"] = inputs["input_ids"].view(shape)
        with pytest.raises(
            ValueError, match=rf"input_ids must have shape \(batch, tokens\), got {re.escape(str(shape))}"
        ):
            model(**inputs)

    def test_shape_of_embeddings(self, model):
        with pytest.raises(ValueError, match=r"inputs_embeds must have shape .* got \(60, 64\)"):
            model(inputs_embeds=torch.zeros(60, 64))

    def test_shape_of_token_types(self, model, inputs):
        with pytest.raises(ValueError, match=r"mm_token_type_ids .* shape \(1, 60\), got \(1, 59\)"):
            model(**inputs, mm_token_type_ids=torch.zeros(1, 59))

    def test_unknown_modality(self, model, inputs):
        encoded = {"images": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
        text = without(inputs, "pixel_values", "image_grid_thw")
        for call in (model, partial(model.generate, max_new_tokens=1)):
            with pytest.raises(ValueError, match=r"mm_encoder_outputs must have no keys but .* got \['images'\]"):
                call(**text, mm_encoder_outputs=encoded)

    def test_embeddings_that_two_tokens_share(self, model, inputs):
        weight = model.get_input_embeddings().weight
        weight.data[inputs["input_ids"][0, 0]] = weight.data[model.config.image_token_id]
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(
            ValueError, match="tokens: 11, features: 10: .* another token may share: mm_token_type_ids"
        ):
            model(inputs_embeds=embeddings, **without(inputs, "input_ids"))

    def test_grid_of_other_images(self, model, inputs):
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        with pytest.raises(ValueError, match="16 patches .* got 40 rows"):
            model(**inputs)

    def test_forgotten_pixels_are_mentioned(self, model, inputs, monkeypatch):
        messages = []
        logger = logging.get_logger("modeling_minimax_m3.models.multimodal")
        monkeypatch.setattr(type(logger), "warning_once", lambda _, message: messages.append(message))
        model(**without(inputs, "pixel_values", "image_grid_thw"))
        assert len(messages) == 1
        assert "image tokens, but no image inputs" in messages[0]


class TestConstruction:
    def test_plans_and_tables_equal_stock(self, make_models):
        stock_model, model = make_models()
        for name in ("tp_plan", "ep_plan", "pp_plan", "all_tied_weights_keys", "_no_split_modules",
                     "_keys_to_ignore_on_load_unexpected", "input_modalities",
                     "base_model_prefix"):  # fmt: skip
            assert getattr(model, name) == getattr(stock_model, name), name

    def test_layers_that_stay_whole_are_the_models_own(self):
        """Accelerate's FSDP refuses a model that has no layer of that name."""
        composite = MiniMaxM3SparseForConditionalGeneration(tiny_config())
        text = MiniMaxM3VLForCausalLM(tiny_config().text_config)
        models = (composite, composite.model, composite.model.vision_tower, text, text.model)
        for model in models:
            layers = {type(layer).__name__ for layer in model.modules() if type(layer).__name__.endswith("Layer")}
            assert set(model._no_split_modules) == layers
        assert {len(model._no_split_modules) for model in models} == {1, 2}

    def test_signature_covers_stock(self, stock):
        for ours in (MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLModel):
            for method in ("forward", "get_image_features", "get_video_features"):
                expected = list(inspect.signature(getattr(getattr(stock, ours.__name__), method)).parameters)
                names = inspect.signature(getattr(ours, method)).parameters
                assert [name for name in names if name in expected] == expected

    def test_fresh_weights(self):
        model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"initializer_range": 0.1}))
        layer = model.model.language_model.layers[1]
        assert layer.input_layernorm.weight.abs().max() == 0
        assert layer.self_attn.q_norm.weight.abs().max() == 0
        assert layer.mlp.gate.e_score_correction_bias.abs().max() == 0
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
            assert weight.std().item() == pytest.approx(0.1, rel=0.15)
        vision = model.model.vision_tower
        assert vision.embeddings.proj.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert (vision.pre_layrnorm.weight == 1).all()

    def test_tied_embeddings(self):
        model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"tie_word_embeddings": True}))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(600)
        assert model.lm_head.weight.shape[0] == 600
        assert model.lm_head.weight is model.get_input_embeddings().weight

    def test_attention_of_the_parts_can_differ(self, config):
        model = MiniMaxM3SparseForConditionalGeneration(config)
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pixels", "features"])
def test_compiles_without_graph_breaks(make_pair, make_inputs, form):
    config = tiny_config(text={"num_hidden_layers": 2}, vision={"num_hidden_layers": 1})
    _, model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)
    inputs = make_inputs(config, images=IMAGES)
    if form == "features":
        pixels = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
        inputs["mm_encoder_outputs"] = {"image": model.get_image_features(*pixels)}
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
        inputs["input_ids"][inputs["input_ids"] == config.image_token_id] = 5
        with pytest.raises(RuntimeError, match="one image token .* for each image feature"):
            compiled(**inputs)
