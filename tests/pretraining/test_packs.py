"""The fast encoding equals the processor's, packs are exact, and a packed row gets the output that it gets alone."""

import numpy as np
import pytest
import torch

from configuration_minimax_m3 import small_config, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3 import MultimodalChatCollator
from processing_minimax_m3.pretraining import Packs, RowEncoder, Stage, collate_packs, make_row, parse_stages
from processing_minimax_m3.pretraining.dataset import build_dataset
from processing_minimax_m3.pretraining.mixture import check_weights
from processing_minimax_m3.pretraining.packs import join_rows
from processing_minimax_m3.pretraining.videos import FPS, encode_mp4
from processing_minimax_m3.special_tokens import SPECIAL_TOKENS

from .pretraining_cases import available_tasks, media


def through_processor(processor, row: dict) -> dict[str, torch.Tensor]:
    """A row as the collator for fine-tuning reads it, by the processor."""
    videos = [
        {"fps": FPS, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
        for frames in media(row, "video")
    ]
    options = {"videos_kwargs": {"video_metadata": videos}} if videos else {}
    return MultimodalChatCollator(processor, processor_kwargs=options)([row])


@pytest.mark.parametrize("task", available_tasks())
@pytest.mark.parametrize("index", range(3))
def test_encoding_equals_that_of_the_processor(processor, task, index):
    row = make_row(task, "train", index)
    encoded = RowEncoder(processor).encode(row)
    expected = through_processor(processor, row)
    assert encoded.ids.tolist() == expected["input_ids"][0].tolist()
    assert encoded.labels.tolist() == expected["labels"][0].tolist()
    for found, pixels, grids in (
        (encoded.images, "pixel_values", "image_grid_thw"),
        (encoded.videos, "pixel_values_videos", "video_grid_thw"),
    ):
        assert bool(found) == (pixels in expected)
        if found:
            torch.testing.assert_close(torch.cat([patches for patches, _ in found]), expected[pixels])
            assert torch.equal(torch.cat([grid for _, grid in found]), expected[grids])


def test_squares_of_any_size_get_the_size_of_the_rows(processor):
    image, video = processor.image_processor, processor.video_processor
    for side in range(
        1, 2000
    ):  # with both limits at 112 x 112, rounding gives 345 of the sides up to 3000 another size
        assert image.get_number_of_image_patches(side, side) == (112 // 14) ** 2, side
        assert video.get_num_of_video_patches(2, side, side) == (56 // 14) ** 2, side


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (100, 300), (30, 20)])
def test_other_shapes_get_about_that_area(processor, size):
    grid = processor.image_processor(np.zeros((*size, 3), np.uint8), return_tensors="pt")["image_grid_thw"][0]
    assert 0.7 < int(grid.prod()) / (112 // 14) ** 2 < 1.3
    assert (grid[1] > grid[2]) == (size[0] > size[1])
    frames = np.zeros((4, *size, 3), np.uint8)
    grid = processor.video_processor([frames], return_tensors="pt")["video_grid_thw"][0]
    assert 0.5 <= int(grid[1:].prod()) / (56 // 14) ** 2 <= 1.5


def test_frames_that_fit_the_grid_are_resized_only_on_request(processor):
    text, frames = processor.video_token, np.zeros((2, 112, 112, 3), np.uint8)
    kept = processor(text=text, videos=[frames], return_tensors="pt")["video_grid_thw"]
    resized = processor(text=text, videos=[frames], videos_kwargs={"do_resize": True}, return_tensors="pt")
    assert kept.tolist() == [[1, 8, 8]] and resized["video_grid_thw"].tolist() == [[1, 4, 4]]


@pytest.mark.parametrize("task", [task for task in available_tasks() if task not in ("code", "english")])
def test_answers_are_found_in_the_tokens(processor, task):
    for index in range(5):
        row = make_row(task, "train", index)
        encoded = RowEncoder(processor).encode(row)
        learned = np.concatenate([np.arange(answer.start, answer.end) for answer in encoded.answers])
        assert learned.tolist() == (encoded.labels != -100).nonzero()[0].tolist()
        for found, kind, answer in zip(encoded.answers, row["questions"], row["answers"], strict=True):
            assert (found.task, found.question) == (task, kind)
            text = processor.decode(encoded.ids[found.start : found.end])
            assert text.endswith("[e~[")
            if kind != "call":
                assert text.split("</mm:think>")[-1] == f"{answer}[e~["


def test_tokenizer_keeps_every_text(processor, weights):
    tokenizer = processor.tokenizer
    for text in ("naïve — 漢字 \t\x00\n", *(make_row("code", "heldout", index)["text"] for index in range(3))):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    first = 1024 - 64
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, first + len(SPECIAL_TOKENS)))
    # learnt from these texts: the developer block of every chat is few tokens
    assert len(tokenizer("You are a helpful assistant.")["input_ids"]) <= 6


def test_videos_as_files_read_like_their_frames(processor, tmp_path):
    """The real processor decodes the mp4: the prompt has the same tokens, the pixels differ by the codec alone."""
    row = make_row("video", "train", 4)
    encoded = RowEncoder(processor).encode(row)
    for number, frames in enumerate(media(row, "video")):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(encode_mp4(frames))
    paths = iter(sorted(tmp_path.iterdir()))
    for message in row["messages"]:
        for part in message["content"]:
            if isinstance(part, dict) and part["type"] == "video":
                part["video"] = str(next(paths))
    found = MultimodalChatCollator(processor)([row])
    assert found["input_ids"][0].tolist() == encoded.ids.tolist()
    drawn = torch.cat([patches for patches, _ in encoded.videos])
    assert found["pixel_values_videos"].shape == drawn.shape
    assert (found["pixel_values_videos"] - drawn).abs().mean() < 0.1 < drawn.std()


def test_packs_depend_on_seed_and_number_alone(processor, weights):
    options = {"tokens": 2048, "stages": [Stage(1.0, 1024)], "weights": weights}
    packs = Packs(processor, "train", 3, **options)
    later = Packs(processor, "train", 3, **options)[2]["input_ids"]
    in_order = [packs[index]["input_ids"] for index in range(3)]
    assert torch.equal(in_order[2], later)
    assert not torch.equal(in_order[0], in_order[1])
    assert not torch.equal(Packs(processor, "train", 3, **options, seed=1)[0]["input_ids"], in_order[0])
    assert not torch.equal(Packs(processor, "heldout", 3, **options)[0]["input_ids"], in_order[0])
    with pytest.raises(IndexError, match="3 packs, got index 3"):
        packs[3]


def test_packs_are_full_and_rows_keep_to_their_stage(processor, weights):
    stages = parse_stages("512:0.5,4096:1")
    packs = Packs(processor, "train", 12, tokens=4096, stages=stages, weights=weights)
    longest = []
    for index in range(12):
        pack = packs[index]
        assert pack["input_ids"].shape == pack["labels"].shape == (1, 4096)
        assert sum(pack["lengths"]) == 4096
        rows = pack["lengths"][: len(pack["modalities"])]
        assert sum(rows) > 4096 - 16
        longest.append(max(rows))
        starts = np.cumsum([0, *rows])[:-1]
        assert (pack["labels"][0, starts] == -100).all()
    assert max(longest[:6]) <= 512
    assert max(longest[6:]) > 1024


def test_packed_rows_get_the_outputs_that_they_get_alone(processor, weights):
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"vocab_size": 1024})).eval()
    encoder = RowEncoder(processor)
    tasks = [task for task in ("image", "code", "video", "digits", "recall") if task in weights]
    rows = [encoder.encode(make_row(task, "train", 1, characters=500)) for task in tasks]
    padding = processor.tokenizer.pad_token_id
    total = sum(len(row.ids) for row in rows)
    packs = [join_rows(rows[:2], sum(len(row.ids) for row in rows[:2]) + 5, padding)]  # the second of them begins late
    packs.append(join_rows(rows[2:], total, padding))
    with torch.no_grad():
        together = model(**collate_packs(packs), use_cache=False, skip_logits=False).logits[0]
        place = 0
        for number, row in enumerate(rows):
            inputs = collate_packs([join_rows([row], len(row.ids), padding)])
            alone = model(**inputs, use_cache=False, skip_logits=False).logits[0]
            torch.testing.assert_close(together[place : place + len(row.ids)], alone, rtol=1e-3, atol=1e-4)
            place += len(row.ids) + (5 if number == 1 else 0)


def test_pixels_in_bfloat16_change_no_result_of_a_model_that_computes_in_it(processor):
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"vocab_size": 1024})).eval()
    rows = [RowEncoder(processor).encode(make_row(task, "train", 1, characters=500)) for task in ("image", "video")]
    pack = join_rows(rows, sum(len(row.ids) for row in rows), processor.tokenizer.pad_token_id)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = collate_packs([pack], pixel_dtype=dtype)
        assert inputs["pixel_values"].dtype == inputs["pixel_values_videos"].dtype == dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(**inputs, use_cache=False, skip_logits=False).logits)
    assert torch.equal(*outputs)


def test_rows_become_a_data_set_that_reads_like_them(processor, tmp_path):
    pytest.importorskip("datasets")
    encoder = RowEncoder(processor)
    for task in ("image", "video", "tools", "code"):
        dataset = build_dataset(task, "train", 3, videos=tmp_path / "videos", characters=800)
        assert len(dataset) == 3
        for index, columns in enumerate(dataset):
            row = make_row(task, "train", index, characters=800)
            assert columns["answers"] == row.get("answers", [])
            read = MultimodalChatCollator(processor)([columns])
            assert read["input_ids"][0].tolist() == encoder.encode(row).ids.tolist()
    (tmp_path / "videos" / "video-train-0-2-0.mp4").unlink()
    build_dataset("video", "train", 3, videos=tmp_path / "videos", characters=800)
    assert (tmp_path / "videos" / "video-train-0-2-0.mp4").is_file()  # made anew, whatever was kept
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, got 0"):
        build_dataset("image", "train", 0, videos=tmp_path)


def test_small_model_fits_its_file_and_the_kernels():
    config = small_config()
    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(config)
    assert 4e6 < model.num_parameters() < 8e6
    assert 2 * model.num_parameters() < 16e6  # bytes in bfloat16
    text = config.text_config
    assert (text.head_dim, text.index_head_dim, text.index_block_size) == (128, 128, 128)
    assert text.num_attention_heads == 16 * text.num_key_value_heads
    assert set(text.layer_types) == {"full_attention", "minimax_m3_sparse"}
    assert set(text.mlp_layer_types) == {"dense", "sparse"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("2048", "TOKENS:SHARE.*'2048'"),
        ("2048:0.5", "end with 1"),
        ("2048:0.5,4096:0.5,8192:1", "must rise"),
        ("128:1", "at least 256 tokens, got 128"),
    ],
)
def test_faulty_stages_are_named(stages, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(stages)


def test_faulty_weights_and_sizes_are_named(processor):
    with pytest.raises(ValueError, match="poetry"):
        check_weights({"poetry": 1.0})
    with pytest.raises(ValueError, match=r"weights\['code'\].*above 0, got 0"):
        check_weights({"code": 0})
    with pytest.raises(ValueError, match="at least one task"):
        check_weights({})
    with pytest.raises(ValueError, match="pack of 1024 tokens.*2048"):
        Packs(processor, "train", 1, tokens=1024, weights={"code": 1.0})
