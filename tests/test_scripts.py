"""The scripts: the tiny checkpoint, the picture of selected blocks, and the video that pans over a photograph."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import modeling_minimax_m3
import processing_minimax_m3
from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.msa import select_blocks
from processing_minimax_m3.special_tokens import SPECIAL_TOKENS, TEXT_MARKUP_TOKENS

# ---- tiny checkpoint -----------------------------------------------------------------------------------------------


def test_checkpoint_loads_through_the_auto_classes(tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert type(processor) is processing_minimax_m3.MiniMaxM3VLProcessor
    assert type(model) is modeling_minimax_m3.MiniMaxM3SparseForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert processor.image_token_id == model.config.image_token_id
    assert processor.video_token_id == model.config.video_token_id


def test_checkpoint_has_the_released_parameter_names(tiny_checkpoint):
    with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert "language_model.model.layers.3.block_sparse_moe.experts.0.w1.weight" in names
    assert "language_model.model.layers.3.self_attn.index_q_proj.weight" in names
    assert "language_model.lm_head.weight" in names


def test_tokenizer_and_config_agree_on_every_special_token(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    text = config["text_config"]
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS)))
    assert ids[-1] < text["vocab_size"]
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("]<]image[>[")
    assert config["video_token_index"] == tokenizer.convert_tokens_to_ids("]<]video[>[")
    for name in ("bos", "eos", "pad"):
        assert text[f"{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")


def test_tokenizer_keeps_text_and_drops_control_tokens_only(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = "Grüße, 世界!\n\tx = 1234567  # done"
    marked = "]~!b[" + text + "".join(TEXT_MARKUP_TOKENS) + "[e~["
    ids = tokenizer(marked)["input_ids"]
    assert tokenizer.decode(ids) == marked
    assert tokenizer.decode(ids, skip_special_tokens=True) == text + "".join(TEXT_MARKUP_TOKENS)


def test_checkpoint_depends_on_the_seed_alone(load_script, tmp_path):
    make_tiny_checkpoint = load_script("make_tiny_checkpoint").make_tiny_checkpoint
    state = torch.random.get_rng_state()
    weights = [
        (make_tiny_checkpoint(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config(text={"vocab_size": 300}), "leaves 236 ids below the special tokens, but the tokenizer has 256"),
        (tiny_config(text={"eos_token_id": 3}), r"`eos_token_id` of the config must be 468.*'\[e~\['.*got 3"),
    ],
    ids=["no-room", "other-id"],
)
def test_config_that_no_tokenizer_fits_is_refused(load_script, config, message):
    with pytest.raises(ValueError, match=message):
        load_script("make_tiny_checkpoint").train_tokenizer(config)


# ---- picture of selected blocks ------------------------------------------------------------------------------------


def test_selection_shares_are_what_loops_count(load_script):
    block_size, num_tokens, num_heads = 4, 11, 2
    generator = torch.Generator().manual_seed(0)
    selection = torch.full((num_tokens, num_heads, 2), -1, dtype=torch.int32)
    for token in range(num_tokens):
        for head in range(num_heads):
            visible = torch.randperm(token // block_size + 1, generator=generator)[:2]
            selection[token, head, : len(visible)] = visible

    expected = torch.zeros(num_heads, 3, 3)
    for token, head, slot in torch.cartesian_prod(torch.arange(num_tokens), torch.arange(num_heads), torch.arange(2)):
        if (block := selection[token, head, slot]) >= 0:
            expected[head, token // block_size, block] += 1
    expected /= torch.tensor([4, 4, 3])[:, None]

    torch.testing.assert_close(load_script("plot_selection").selection_shares(selection, block_size), expected)


def test_recorder_keeps_long_calls_only(load_script):
    def select(num_tokens: int) -> torch.Tensor:
        offsets = torch.tensor([0, num_tokens], dtype=torch.int32)
        index_query, index_key = torch.randn(num_tokens, 2, 8), torch.randn(num_tokens, 8)
        return select_blocks(index_query, index_key, cu_seqlens_q=offsets, cu_seqlens_k=offsets, block_size=4, topk=2)

    with load_script("plot_selection").SelectionRecorder(min_tokens=10) as recorder:
        selections = [select(num_tokens) for num_tokens in (12, 3, 10)]
    assert len(recorder.selections) == 2
    assert torch.equal(recorder.selections[0], selections[0])
    assert torch.equal(recorder.selections[1], selections[2])


def test_picture_has_one_panel_for_each_layer_and_head(load_script, tmp_path):
    selection = torch.zeros(20, 3, 1, dtype=torch.int32)
    path = load_script("plot_selection").plot_selections({2: selection, 3: selection}, 4, tmp_path / "picture.png")
    with Image.open(path) as picture:
        width, height = picture.size
    assert width / height == pytest.approx(13.6 / 8.5, rel=0.01)


# ---- panning video ------------------------------------------------------------------------------------------------


def test_panning_video_moves_over_the_photograph(load_script, tmp_path):
    import av

    photograph = tmp_path / "ramp.png"
    Image.linear_gradient("L").resize((400, 400)).convert("RGB").save(photograph)
    path = load_script("panning_video").write_panning_video(
        photograph, tmp_path / "clip.mp4", seconds=2, fps=5, side=64
    )
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 5
    assert len(frames) == 10
    brightness = [frame.mean() for frame in frames]
    assert brightness == sorted(brightness)
    assert brightness[-1] - brightness[0] > 150
