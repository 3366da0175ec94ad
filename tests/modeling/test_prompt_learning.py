"""PEFT's prompt learning: virtual tokens in front of text, images and videos, and learned keys and values."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

pytestmark = pytest.mark.compatibility

VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
KINDS = {
    "prompt tuning": PromptTuningConfig(**VIRTUAL),
    "p-tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=32),
}
MEDIA = {"text": {}, "image": {"images": [[1, 4, 6]]}, "video": {"videos": [[2, 4, 4]]}}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def tuned(request, make_pair, config):
    model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1]
    torch.manual_seed(0)
    return get_peft_model(model, KINDS[request.param]).eval()


def token_types(input_ids, config):
    return (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()


def expected_logits(tuned, input_ids, media):
    """Logits of virtual tokens, and text with features written in its placeholders by hand, given as embeddings."""
    model, config = tuned.get_base_model(), tuned.get_base_model().config
    embeddings = model.get_input_embeddings()(input_ids)
    for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in media:
            encode = getattr(model, f"get_{modality}_features")
            features = torch.cat(encode(media[name], media[f"{modality}_grid_thw"]).pooler_output)
            embeddings[input_ids == getattr(config, f"{modality}_token_id")] = features
    embeddings = torch.cat((tuned.get_prompt(len(input_ids)), embeddings), dim=1)
    return model(inputs_embeds=embeddings).logits


@pytest.mark.parametrize("kind", MEDIA)
@torch.no_grad()
def test_virtual_tokens_stand_in_front(tuned, make_inputs, config, kind):
    inputs = make_inputs(config, **MEDIA[kind], length=40)
    expected = expected_logits(tuned, inputs["input_ids"], inputs)
    types = token_types(inputs["input_ids"], config)
    for given in ({}, {"mm_token_type_ids": types}):
        output = tuned(**inputs, **given, labels=inputs["input_ids"])
        torch.testing.assert_close(output.logits, expected)
        losses = torch.nn.functional.cross_entropy(expected[0, 5:-1], inputs["input_ids"][0])
        torch.testing.assert_close(output.loss, losses)


@torch.no_grad()
def test_token_types_count_from_the_last_token(tuned, make_inputs, config):
    """They decide where the placeholders are, also after virtual tokens: other tokens may share the embedding."""
    inputs = make_inputs(config, **MEDIA["image"], length=40)
    expected = expected_logits(tuned, inputs["input_ids"], inputs)
    table = tuned.get_base_model().get_input_embeddings().weight
    table[inputs["input_ids"][0, -1]] = table[config.image_token_id]
    types = token_types(inputs["input_ids"], config)
    logits = tuned(**inputs, mm_token_type_ids=types).logits
    torch.testing.assert_close(logits[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("kind", MEDIA)
@torch.no_grad()
def test_generation(tuned, make_inputs, config, kind):
    inputs = make_inputs(config, **MEDIA[kind], length=40)
    tokens, media = inputs["input_ids"], {name: inputs[name] for name in set(inputs) - {"input_ids", "attention_mask"}}
    for _ in range(GREEDY["max_new_tokens"]):
        tokens = torch.cat((tokens, expected_logits(tuned, tokens, media)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tuned.generate(**inputs, **GREEDY), tokens)
    padded = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)), **media}
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0))
    assert torch.equal(tuned.generate(**padded, **GREEDY)[:, 3:], tokens)


@pytest.fixture
def make_prefix_tuned():
    def make(**text):
        config = tiny_config(text={"initializer_range": 0.2, **text}).text_config
        sizes = {"num_layers": 4, "num_attention_heads": config.num_key_value_heads}
        sizes["token_dim"] = config.num_key_value_heads * config.head_dim
        torch.manual_seed(0)
        return get_peft_model(MiniMaxM3VLForCausalLM(config), PrefixTuningConfig(**VIRTUAL, **sizes)).eval()

    return make


@torch.no_grad()
def test_prefix_tuning_of_layers_without_indexer(make_prefix_tuned, make_tokens):
    tuned = make_prefix_tuned(layer_types=["full_attention", "minimax_m3_structured"] * 2)
    start = make_tokens(tuned.config, 1, 30)
    tokens = start
    for _ in range(GREEDY["max_new_tokens"]):
        prefix = {CACHE_NAME: tuned.get_prompt(1)}
        logits = tuned.get_base_model()(tokens, **prefix, use_cache=True).logits
        torch.testing.assert_close(tuned(tokens).logits, logits)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tuned.generate(input_ids=start, **GREEDY), tokens)


def test_prefix_tuning_of_an_indexer_is_refused(make_prefix_tuned, make_tokens):
    tuned = make_prefix_tuned()
    tokens = make_tokens(tuned.config, 1, 30)
    for call, options in ((tuned, {}), (tuned.generate, GREEDY)):
        with pytest.raises(ValueError, match="Prefix tuning learns no index keys"):
            call(input_ids=tokens, **options)
