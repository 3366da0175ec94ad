"""Text, images and videos together: against stock's joint processor, and features that stock lacks."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from processing_minimax_m3 import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

pytestmark = pytest.mark.compatibility

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
START, END = "]<]start of image[>[", "]<]end of image[>["


@pytest.fixture
def media(pixels) -> dict[str, list[np.ndarray]]:
    """Media for the tests. Frames fit the patch grid, because stock refuses others."""
    return {
        "images": [pixels(60, 90, 3), pixels(200, 31, 3, seed=1), pixels(100, 100, 3, seed=2)],
        "videos": [pixels(5, 56, 84, 3, seed=3), pixels(2, 84, 28, 3, seed=4), pixels(18, 28, 28, 3, seed=5)],
    }


PROMPTS = {
    "text": "only words",
    "image": f"{IMAGE}What is this?",
    "video": f"Watch {VIDEO} closely",
    "images": f"{IMAGE}{IMAGE} then {IMAGE}",
    "videos": f"{VIDEO}{VIDEO}{VIDEO}",
    "mixed": f"a{VIDEO}b{IMAGE}c{IMAGE}{VIDEO}{VIDEO}d{IMAGE}e",
    "image-first": f"{IMAGE} before {VIDEO}",
    "unicode": f"图 {IMAGE} — ünïcode 🎬 {VIDEO}\n",
}


def take(media, prompts):
    """Takes as many images and videos as the prompts have placeholders."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    counts = {"images": IMAGE, "videos": VIDEO}
    taken = {name: media[name][: sum(text.count(token) for text in prompts)] for name, token in counts.items()}
    return {name: items or None for name, items in taken.items()}


@pytest.mark.parametrize("name", PROMPTS)
def test_any_prompt_equals_stock(name, media, processor, stock, assert_same_output):
    inputs = take(media, PROMPTS[name])
    ours = processor(text=PROMPTS[name], return_tensors="pt", **inputs)
    assert_same_output(ours, stock.joint(text=PROMPTS[name], return_tensors="pt", **inputs))


BATCHES = [("text", "image"), ("video", "text", "images"), ("mixed", "text"), ("image", "video", "image-first")]


@pytest.mark.parametrize("names", BATCHES, ids="+".join)
def test_any_batch_equals_stock(names, media, processor, stock, assert_same_output):
    prompts = [PROMPTS[name] for name in names]
    options = {"padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True, **take(media, prompts)}
    assert_same_output(processor(text=prompts, **options), stock.joint(text=prompts, **options))


OPTIONS = {
    "lists": {},
    "numpy": {"return_tensors": "np", "padding": True},
    "left": {"return_tensors": "pt", "padding": True, "padding_side": "left"},
    "max-length": {"return_tensors": "pt", "padding": "max_length", "max_length": 200},
    "types": {"return_mm_token_type_ids": True},
    "metadata": {"return_metadata": True},
    "offsets": {"return_text_replacement_offsets": True},
    "resize": {"do_resize": True, "return_tensors": "pt", "padding": True},
    "chunks": {"vision_segment_max_frames": 1},
    "sizes": {"images_kwargs": {"size": {"shortest_edge": 20_000, "longest_edge": 30_000}}},
    "no-mask": {"return_attention_mask": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_any_option_equals_stock(name, media, processor, stock, assert_same_output):
    prompts = [PROMPTS["mixed"], PROMPTS["text"]]
    inputs = take(media, prompts)
    ours = processor(text=list(prompts), **inputs, **OPTIONS[name])
    theirs = stock.joint(text=list(prompts), **inputs, **OPTIONS[name])
    if name == "offsets":
        assert ours.pop("text_replacement_offsets") == theirs.pop("text_replacement_offsets")
    if name == "types":
        assert ours.pop("mm_token_type_ids") == theirs.pop("mm_token_type_ids")
    for output in (ours, theirs):
        if name not in ("numpy", "left", "max-length", "resize"):
            assert output.pop("attention_mask", None) == (
                None if name == "no-mask" else [[1] * len(ids) for ids in output["input_ids"]]
            )
    assert_same_output(ours, theirs)


@pytest.mark.parametrize("with_indices", [True, False], ids=["indices", "no-indices"])
def test_timing_equals_stock(with_indices, media, processor, stock, assert_same_output):
    indices = [[0, 7, 15, 22, 29], [3, 4]]
    metadata = [
        {"total_num_frames": 60, "fps": fps} | ({"frames_indices": frames} if with_indices else {})
        for fps, frames in zip([3.0, 25], indices)
    ]
    options = {"text": f"{VIDEO} and {VIDEO}", "videos": media["videos"][:2], "video_metadata": metadata}
    ours = processor(**options)
    assert ours["input_ids"] == stock.joint(**options)["input_ids"]
    text = processor.tokenizer.decode(ours["input_ids"][0])
    times = [part.split(" seconds")[0] for part in text.split("]<]") if " seconds" in part]
    assert times == (["0.0", "5.0", "9.7", "0.1"] if with_indices else [])


def test_image_and_video_alone_equal_stock(media, processor, stock, assert_same_output):
    options = {"images": media["images"], "videos": media["videos"], "return_tensors": "pt"}
    assert_same_output(processor(**options), stock.joint(**options))


def test_what_a_placeholder_becomes(pixels, processor):
    output = processor(text=f"x{IMAGE}y", images=pixels(56, 84, 3))
    assert processor.tokenizer.decode(output["input_ids"][0]) == f"x{START}{IMAGE * 6}{END}y"
    assert "num_chunks_per_video" not in output
    metadata = VideoMetadata(total_num_frames=3, fps=2, frames_indices=[0, 1, 2])
    output = processor(text=f"x{VIDEO}y", videos=pixels(3, 28, 56, 3), video_metadata=metadata)
    steps = [f"]<]{time} seconds[>[{START}{VIDEO * 2}{END}" for time in ("0.0", "1.0")]
    assert processor.tokenizer.decode(output["input_ids"][0]) == "x" + "".join(steps) + "y"
    assert "num_chunks_per_video" not in output and "video_metadata" not in output


@pytest.mark.parametrize(
    "permutation", list(itertools.permutations(range(3))), ids=lambda order: "".join(map(str, order))
)
def test_order_of_samples_changes_no_sample(permutation, media, processor):
    """Each sample of a batch has the same ids and pixels as alone."""
    samples = [
        (PROMPTS["image"], media["images"][:1], []),
        (PROMPTS["text"], [], []),
        (f"{VIDEO}{IMAGE}{VIDEO}", media["images"][1:2], media["videos"][:2]),
    ]
    samples = [samples[index] for index in permutation]
    text, images, videos = (list(column) for column in zip(*samples))
    together = processor(text=text, images=images, videos=videos)
    alone = [
        processor(text=prompt, images=own_images or None, videos=own_videos or None)
        for prompt, own_images, own_videos in samples
    ]
    assert together["input_ids"] == [output["input_ids"][0] for output in alone]
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        torch.testing.assert_close(
            together[name], torch.cat([output[name] for output in alone if name in output]), atol=0, rtol=0
        )


def test_empty_lists_are_no_media(processor):
    expected = processor(text=["a", "b"])
    output = processor(text=["a", "b"], images=[[], []], videos=[[], []])
    assert output == expected


def test_frames_off_the_grid(pixels, processor, stock):
    options = {"text": f"{VIDEO}", "videos": pixels(4, 61, 90, 3)}
    with pytest.raises(RuntimeError):
        stock.joint(**options)
    output = processor(**options)
    assert output["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert output["input_ids"][0].count(processor.video_token_id) == 2 * 4 * 6 // 4


def test_files(video_file, image_files, processor):
    output = processor(
        text=f"{IMAGE}{VIDEO}", images=image_files["png"], videos=video_file, do_sample_frames=True, fps=2
    )
    text = processor.tokenizer.decode(output["input_ids"][0])
    assert [f"]<]{time} seconds[>[" in text for time in ("0.0", "1.0", "2.0", "0.5")] == [True, True, True, False]
    assert output["video_grid_thw"].tolist() == [[3, 4, 6]]


def test_mm_token_type_ids_mark_the_placeholders(media, processor):
    output = processor(text=PROMPTS["mixed"], return_mm_token_type_ids=True, **take(media, PROMPTS["mixed"]))
    kinds = {processor.image_token_id: 1, processor.video_token_id: 2}
    assert output["mm_token_type_ids"] == [[kinds.get(token, 0) for token in output["input_ids"][0]]]


def test_model_input_names_are_those_of_stock_with_the_tokens_first(processor, stock):
    assert sorted(processor.model_input_names) == sorted(stock.joint.model_input_names)
    assert processor.model_input_names[0] == "input_ids"
    assert processor.unused_input_names == stock.joint.unused_input_names


def test_decoding_equals_stock(processor, stock):
    ids = processor.tokenizer(["one, two", "three !"], padding=True, return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == stock.joint.post_process_image_text_to_text(ids)
    assert processor.post_process_image_text_to_text(ids) == ["one, two", "three !"]


def test_merge_size_of_a_call_counts(pixels, processor):
    options = {"patch_size": 14, "merge_size": 1}
    output = processor(text=IMAGE + VIDEO, images=pixels(56, 84, 3), videos=pixels(2, 28, 28, 3), **options)
    assert output["input_ids"][0].count(processor.image_token_id) == 24
    assert output["input_ids"][0].count(processor.video_token_id) == 4


# --- counting ---------------------------------------------------------------------------------------------------

COUNTED = {
    "default": {},
    "resize": {"do_resize": True},
    "image-size": {"images_kwargs": {"size": {"shortest_edge": 20_000, "longest_edge": 30_000}}},
    "frame-bounds": {"videos_kwargs": {"do_resize": True, "max_pixels": 20_000}},
    "total": {"videos_kwargs": {"do_resize": True, "total_pixels": 60_000}},
    "merge": {"merge_size": 1},
    "time": {"videos_kwargs": {"temporal_patch_size": 1}},
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_the_real_ones(name, pixels, processor):
    image_sizes = [(60, 90), (28, 28), (800, 700)]
    video_sizes = [(5, 61, 90), (4, 56, 84), (2, 784, 784), (1, 28, 28)]
    counts = processor._get_num_multimodal_tokens(image_sizes=image_sizes, video_sizes=video_sizes, **COUNTED[name])
    for index, size in enumerate(image_sizes):
        output = processor(text=IMAGE, images=pixels(*size, 3), return_mm_token_type_ids=True, **COUNTED[name])
        assert output["mm_token_type_ids"][0].count(1) == counts["num_image_tokens"][index]
        assert len(output["pixel_values"]) == counts["num_image_patches"][index]
    for index, size in enumerate(video_sizes):
        output = processor(text=VIDEO, videos=pixels(*size, 3), return_mm_token_type_ids=True, **COUNTED[name])
        assert output["mm_token_type_ids"][0].count(2) == counts["num_video_tokens"][index]


def test_counts_equal_stock_where_stock_counts_right(processor, stock):
    options = {"image_sizes": [(60, 90), (1000, 700)], "video_sizes": [(5, 61, 90), (4, 300, 400)]}
    ours = processor._get_num_multimodal_tokens(**options, do_resize=True)
    theirs = stock.joint._get_num_multimodal_tokens(**options, do_resize=True)
    assert ours == theirs


def test_counting_one_kind_only(processor):
    assert processor._get_num_multimodal_tokens(image_sizes=[(56, 56)]).num_video_tokens is None
    assert processor._get_num_multimodal_tokens(video_sizes=[(2, 56, 56)]).num_image_tokens is None


# --- bad input --------------------------------------------------------------------------------------------------

# Transformers' own words, which other programs look for.
SHOULD = "The total number of ]<]{0}[>[ tokens in the prompts should be the same as the number of {0}s passed."


@pytest.mark.parametrize(
    "text, options, message",
    [
        (IMAGE, {}, "Found 1 ]<]image[>[ tokens in the text but no images were passed (tokens per text: [1])."),
        (
            "no placeholder",
            {"images": 1},
            f"{SHOULD.format('image')} Found total 0 .* and 1 images (tokens per text: [0]).",
        ),
        ([IMAGE, "x"], {"images": 2}, "Found total 1 ]<]image[>[ tokens and 2 images (tokens per text: [1, 0])."),
        (VIDEO, {}, "Found 1 ]<]video[>[ tokens in the text but no videos were passed (tokens per text: [1])."),
        (VIDEO * 2, {"videos": 1}, f"{SHOULD.format('video')} Found total 2 .* and 1 videos (tokens per text: [2])."),
        (
            [IMAGE, IMAGE * 2],
            {"images": [2, 1]},
            "`images`, given as one list per text, must hold [1, 2] .* got [2, 1].",
        ),
        ([VIDEO, VIDEO], {"videos": [0, 2]}, "`videos`, given as one list per text, must hold [1, 1] .* got [0, 2]."),
    ],
    ids=[
        "no-image",
        "no-image-token",
        "image-too-many",
        "no-video",
        "video-missing",
        "images-swapped",
        "videos-swapped",
    ],
)
def test_counts_that_do_not_match(text, options, message, pixels, processor):
    shapes = {"images": (28, 28, 3), "videos": (2, 28, 28, 3)}

    def make(name, count):
        return [pixels(*shapes[name]) for _ in range(count)]

    inputs = {
        name: [make(name, n) for n in count] if isinstance(count, list) else make(name, count)
        for name, count in options.items()
    }
    with pytest.raises(ValueError) as error:
        processor(text=text, **inputs)
    for part in message.split(" .* "):
        assert part in str(error.value)


def test_lists_of_frames_are_not_lists_per_text(pixels, processor):
    frames = [list(pixels(2, 28, 28, 3)), list(pixels(4, 28, 28, 3))]
    output = processor(text=[VIDEO * 2, "no video"], videos=frames)
    assert output["video_grid_thw"].tolist() == [[1, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "at least one of `text`, `images` and `videos`"),
        ({"text": ""}, r"`text\[0\]` must be a string that is not empty"),
        ({"text": ["a", ""]}, r"`text\[1\]` must be a string that is not empty"),
        ({"text": []}, "`text` must hold at least one prompt"),
        ({"text": [["pre", "tokenized"]]}, r"`text\[0\]` must be a string"),
        ({"text": 5}, "`text` must be a string or a list of strings, got int"),
        ({"text": "a", "audios": [np.zeros(9)]}, "`audios` is not an argument"),
        ({"text": ["a", "b\ud83d"]}, r"`text\[1\]` must be text, but holds '.ud83d', one half of a surrogate pair"),
        ({"text": "a", "sanitize_control_tokens": True}, "`sanitize_control_tokens` is an option of `apply_chat_temp"),
    ],
    ids=["nothing", "empty", "empty-in-batch", "no-prompt", "tokens", "number", "audio", "surrogate", "sanitize"],
)
def test_bad_text(options, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(**options)


@pytest.mark.parametrize("audio", [None, [], [np.zeros(9)]], ids=["none", "empty", "sound"])
def test_audio_is_ignored_as_in_stock(audio, media, processor, stock, assert_same_output):
    inputs = {"text": PROMPTS["image"], "images": media["images"][:1], "audio": audio, "return_tensors": "pt"}
    ours = processor(**inputs)
    assert_same_output(ours, stock.joint(**inputs))
    assert_same_output(ours, processor(**{**inputs, "audio": None}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_never_cuts_an_image_or_a_video(side, pixels, processor):
    processor = copy.deepcopy(processor)  # truncating leaves its mark on a tokenizer
    processor.tokenizer.truncation_side = side
    options = {"text": f"before {IMAGE}{VIDEO} after", "images": pixels(56, 84, 3), "videos": pixels(4, 28, 28, 3)}
    whole = processor(**options)
    length = len(whole["input_ids"][0])
    special = [processor.vision_start_token_id, processor.vision_end_token_id]
    marked = [place for place, token in enumerate(whole["input_ids"][0]) if token in special]
    kept = marked[-1] + 1 if side == "right" else length - marked[0]  # up to the last bracket, from the first one on
    options["truncation"] = True
    for max_length in range(1, length + 1):
        if max_length < kept:
            with pytest.raises(ValueError, match="Mismatch in .* token count .* increase `max_length`"):
                processor(**options, max_length=max_length)
        else:
            assert len(processor(**options, max_length=max_length)["input_ids"][0]) == max_length


def test_foreign_tokenizer(tokenizer):
    class Foreign(type(tokenizer)):
        def convert_ids_to_tokens(self, ids, **kwargs):
            return "<unk>"

    foreign = Foreign(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"`tokenizer` must know '\]<\]image\[>\[' as one token"):
        MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), foreign, MiniMaxM3VLVideoProcessor())
