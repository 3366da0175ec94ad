"""Saved processors: stock loads ours, ours loads stock's, and both load files in the released form."""

import json

import pytest
from transformers import AutoTokenizer

from processing_minimax_m3 import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

IMAGE_OPTIONS = [
    {},
    {"size": {"shortest_edge": 5000, "longest_edge": 50_000}, "merge_size": 1},
    {"min_pixels": 5000},
    {"min_pixels": 5000, "max_pixels": 50_000, "do_normalize": False},
    {"size": [672, 672]},
]
VIDEO_OPTIONS = [{}, {"max_frames": 16, "fps": 2.0, "do_sample_frames": True}, {"vision_segment_max_frames": 2}]


def file_content(sub_processor) -> dict:
    return json.loads(sub_processor.to_json_string())


@pytest.mark.parametrize("options", IMAGE_OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_image_processor_files_are_equal(options, stock, tmp_path):
    ours, theirs = MiniMaxM3VLImageProcessor(**options), stock.image_class(**options)
    assert file_content(ours) == file_content(theirs)
    ours.save_pretrained(tmp_path)
    assert file_content(stock.image_class.from_pretrained(tmp_path)) == file_content(ours)
    theirs.save_pretrained(tmp_path)
    assert file_content(MiniMaxM3VLImageProcessor.from_pretrained(tmp_path)) == file_content(theirs)


@pytest.mark.parametrize("options", VIDEO_OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_video_processor_files_are_equal(options, stock, tmp_path):
    ours, theirs = MiniMaxM3VLVideoProcessor(**options), stock.video_class(**options)
    assert file_content(ours) == file_content(theirs)
    ours.save_pretrained(tmp_path)
    assert file_content(stock.video_class.from_pretrained(tmp_path)) == file_content(ours)
    theirs.save_pretrained(tmp_path)
    assert file_content(MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path)) == file_content(theirs)


def test_joint_processor_files_are_equal(processor, stock, tmp_path):
    processor.save_pretrained(tmp_path / "ours")
    stock.joint.save_pretrained(tmp_path / "theirs")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_joint_processor_round_trip(processor, pixels, tmp_path, assert_same_output):
    processor.save_pretrained(tmp_path)
    loaded = MiniMaxM3VLProcessor(
        MiniMaxM3VLImageProcessor.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path),
        chat_template=(tmp_path / "chat_template.jinja").read_text(),
    )
    options = {
        "text": "]<]image[>[ and ]<]video[>[",
        "images": pixels(60, 90, 3),
        "videos": pixels(5, 61, 90, 3),
        "return_tensors": "pt",
    }
    assert_same_output(loaded(**options), processor(**options))
    chat = [{"role": "user", "content": "Hello"}]
    assert loaded.apply_chat_template(chat) == processor.apply_chat_template(chat)


# What the released checkpoint's file says: among other things a size that nothing applies.
RELEASED_FILE = {
    "processor_class": "MiniMaxVLProcessor",
    "process_image_mode": "dynamic_res",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": [672, 672],
    "patch_size": 14,
    "img_token_compression_config": {
        "image_token_compression_threshold": 1.1,
        "image_token_compression_method": "patch_merge",
        "max_image_resolution": 1008,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "add_start_end_special_tokens": True,
}


def test_released_file_reads_as_stock_reads_it(stock, tmp_path, pixels, assert_same_output):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED_FILE))
    ours = MiniMaxM3VLImageProcessor.from_pretrained(tmp_path)
    theirs = stock.image_class.from_pretrained(tmp_path)
    assert dict(ours.size) == {"shortest_edge": 3136, "longest_edge": 451_584}
    assert file_content(ours) == file_content(theirs)
    image = pixels(900, 700, 3)
    assert_same_output(ours(image), theirs(image))


def test_bounds_of_one_processor_do_not_leak_into_the_next():
    """Stock's options do leak: it writes these two into its class when they come together."""
    bounded = MiniMaxM3VLImageProcessor(size=[672, 672], max_pixels=50_000)
    assert dict(bounded.size) == {"shortest_edge": 3136, "longest_edge": 50_000}
    assert dict(MiniMaxM3VLImageProcessor().size) == {"shortest_edge": 3136, "longest_edge": 451_584}


def test_older_names_of_the_bounds_inside_size(pixels, assert_same_output):
    image = pixels(900, 700, 3)
    older = MiniMaxM3VLImageProcessor(size={"min_pixels": 5000, "max_pixels": 50_000})
    newer = MiniMaxM3VLImageProcessor(size={"shortest_edge": 5000, "longest_edge": 50_000})
    assert file_content(older) == file_content(newer)
    assert_same_output(older(image), newer(image))
