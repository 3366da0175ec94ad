"""Scores of sequences: which token they come from, under padding and packing, and how the models load and save."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLForSequenceClassification,
    MiniMaxM3VLTextForSequenceClassification,
)

LENGTHS = (5, 9, 1)
CLASSES = {"text": MiniMaxM3VLTextForSequenceClassification, "multimodal": MiniMaxM3VLForSequenceClassification}


def build(kind, config, num_labels=3):
    torch.manual_seed(0)
    config = config.text_config if kind == "text" else config
    config.num_labels = num_labels
    config.get_text_config().pad_token_id = 1
    return CLASSES[kind](config).eval()


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, config):
    return build(kind, config)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 90, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def alone(model, sequences):
    """The score of each sequence by the definition: the head on the last token of a pass of its own."""
    with torch.no_grad():
        states = [model.model(input_ids=sequence[None]).last_hidden_state[0, -1] for sequence in sequences]
        return model.score(torch.stack(states))


def padded(sequences, side, pad_id=1):
    longest = max(map(len, sequences)) + 2  # so that every row has padding
    rows, masks = [], []
    for sequence in sequences:
        pads = longest - len(sequence)
        padding = (pads, 0) if side == "left" else (0, pads) if side == "right" else (1, pads - 1)
        rows.append(F.pad(sequence, padding, value=pad_id))
        masks.append(F.pad(torch.ones_like(sequence), padding))
    return torch.stack(rows), torch.stack(masks)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("pad_id", [1, 50], ids=["pad_token", "other_token"])
def test_padding_changes_no_score(model, sequences, alone, side, pad_id):
    ids, mask = padded(sequences, side, pad_id)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, alone)


@torch.no_grad()
def test_text_may_end_with_the_pad_token(model, sequences):
    sequences = [torch.cat([sequence, torch.tensor([1])]) for sequence in sequences]
    expected = torch.cat([model(input_ids=s[None], attention_mask=torch.ones_like(s)[None]).logits for s in sequences])
    ids, mask = padded(sequences, "right")
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_pad_tokens_at_the_end_count_where_there_is_no_mask(model, sequences, alone):
    ids, _ = padded(sequences, "right")
    torch.testing.assert_close(model(input_ids=ids).logits, alone)


@torch.no_grad()
@pytest.mark.parametrize("by", ["offsets", "offsets_of_keys", "positions", "padded_offsets", "empty_sequence"])
def test_packed_sequences_have_scores_of_their_own(model, sequences, alone, by):
    ids = torch.cat(sequences)[None]
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    if by == "padded_offsets":
        ids, positions = F.pad(ids, (0, 4)), F.pad(positions, (0, 4))
    if by == "empty_sequence":
        offsets = torch.cat([offsets[:2], offsets[1:]])
    layout = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    if by == "offsets_of_keys":
        layout = {"cu_seq_lens_k": offsets}
    logits = model(input_ids=ids, position_ids=positions, **({} if by == "positions" else layout)).logits
    torch.testing.assert_close(logits, alone)


@torch.no_grad()
def test_embeddings_and_masks(model, sequences, alone):
    ids, mask = padded(sequences, "left")
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, alone)
    one = model.get_input_embeddings()(sequences[0][None])
    torch.testing.assert_close(model(inputs_embeds=one).logits, alone[:1])


@torch.no_grad()
def test_a_cache_goes_on(model, sequences, alone):
    first = model(input_ids=sequences[1][None, :4], use_cache=True)
    cache = first.past_key_values if "past_key_values" in first else first.cache
    mask = torch.ones(1, LENGTHS[1], dtype=torch.long)
    rest = model(input_ids=sequences[1][None, 4:], attention_mask=mask, cache=cache)
    torch.testing.assert_close(rest.logits, alone[1:2])


def test_losses_of_the_three_kinds_of_labels(kind, config, sequences):
    ids, mask = padded(sequences, "left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    model = build(kind, config)
    logits = model(**inputs).logits
    classes, several = torch.tensor([0, 2, 1]), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]])
    torch.testing.assert_close(model(**inputs, labels=classes).loss, F.cross_entropy(logits, classes))
    config.text_config.problem_type = config.problem_type = None  # stock keeps the kind of the first labels
    torch.testing.assert_close(
        model(**inputs, labels=several).loss, F.binary_cross_entropy_with_logits(logits, several)
    )
    config.text_config.problem_type = config.problem_type = None
    model = build(kind, config, num_labels=1)
    numbers = torch.tensor([0.5, -1.0, 2.0])
    output = model(**inputs, labels=numbers)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], numbers))
    output.loss.backward()
    assert model.score.weight.grad.abs().max() > 0
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_errors_name_the_argument(model, sequences):
    ids, mask = padded(sequences, "left")
    with pytest.raises(ValueError, match=r"`labels` must have one entry for each of the 3 sequences.*\(2,\)"):
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    model.config.get_text_config().pad_token_id = None
    with pytest.raises(ValueError, match="`attention_mask` must mark the padding of a batch of 3"):
        model(input_ids=ids)
    assert model(input_ids=ids[:1]).logits.shape == (1, 3)


@torch.no_grad()
def test_save_and_load(kind, model, sequences, alone, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CLASSES[kind]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = padded(sequences, "left")
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, alone)


def test_starts_from_a_language_model(kind, config, tmp_path):
    torch.manual_seed(0)
    config.text_config.tie_word_embeddings = False
    whole = MiniMaxM3SparseForConditionalGeneration(config)
    folders = {"whole": whole}
    if kind == "text":
        folders["text"] = MiniMaxM3VLForCausalLM(config.text_config)
    for name, source in folders.items():
        source.save_pretrained(tmp_path / name)
        loaded, info = CLASSES[kind].from_pretrained(tmp_path / name, num_labels=1, output_loading_info=True)
        assert info["missing_keys"] == {"score.weight"}
        source = source.model.language_model if kind == "text" and name == "whole" else source.model
        for (key, value), (other_key, other) in zip(
            loaded.model.named_parameters(), source.named_parameters(), strict=True
        ):
            assert key == other_key
            torch.testing.assert_close(value, other, rtol=0, atol=0)


@torch.no_grad()
def test_images_count(config, make_inputs):
    model = build("multimodal", config)
    inputs = make_inputs(config, images=[[1, 4, 4]])
    states = model.model(**inputs).last_hidden_state
    expected = model.score(states[:, -1])
    torch.testing.assert_close(model(**inputs).logits, expected)
    inputs["pixel_values"] = inputs["pixel_values"] + 1
    assert not torch.allclose(model(**inputs).logits, expected)


def test_registered_for_both_configs():
    mapping = AutoModelForSequenceClassification._model_mapping
    assert mapping[MiniMaxM3VLTextConfig] is MiniMaxM3VLTextForSequenceClassification
    assert mapping[MiniMaxM3VLConfig] is MiniMaxM3VLForSequenceClassification
