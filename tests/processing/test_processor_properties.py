"""Random prompts and media: equality with stock, counts, and independence of the samples of a batch."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processing_minimax_m3.sampling import sample_frame_indices

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(lambda text: "]<]" not in text)
image_sizes = st.tuples(st.integers(1, 120), st.integers(5, 120))
# frames that stock takes: sides of whole merged patches
video_sizes = st.tuples(
    st.integers(1, 6), st.integers(1, 3).map(lambda n: 28 * n), st.integers(1, 3).map(lambda n: 28 * n)
)
parts = st.one_of(words, image_sizes, video_sizes)


def build(prompt: list, seed: int) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """The text, images and videos of a prompt of words, image sizes (2) and video sizes (3)."""
    rng = np.random.default_rng(seed)
    text, media = "a", {2: [], 3: []}
    for part in prompt:
        if isinstance(part, str):
            text += part
        else:
            text += IMAGE if len(part) == 2 else VIDEO
            media[len(part)].append(rng.integers(0, 256, (*part, 3), dtype=np.uint8))
    return text, media[2], media[3]


@quick
@given(prompts=st.lists(st.lists(parts, max_size=4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_batch_equals_stock(processor, stock, assert_same_output, prompts, seed):
    text, images, videos = (list(column) for column in zip(*[build(prompt, seed) for prompt in prompts]))
    flat_images = [image for own_images in images for image in own_images] or None
    flat_videos = [video for own_videos in videos for video in own_videos] or None
    options = {"padding": True, "return_tensors": "pt", "input_data_format": "channels_last"}
    ours = processor(text=list(text), images=images, videos=videos, return_mm_token_type_ids=True, **options)
    theirs = stock.joint(
        text=list(text), images=flat_images, videos=flat_videos, return_mm_token_type_ids=True, **options
    )
    assert_same_output(ours, theirs)
    kinds = ours["mm_token_type_ids"]
    for kind, grid in ((1, "image_grid_thw"), (2, "video_grid_thw")):
        expected = ours[grid].prod(-1).sum() // 4 if grid in ours else 0
        assert kinds.eq(kind).sum() == expected


@quick
@given(prompt=st.lists(parts, max_size=5), seed=st.integers(0, 99))
def test_text_survives(processor, prompt, seed):
    """Without its placeholders and times, the processed text equals the prompt."""
    text, images, videos = build(prompt, seed)
    output = processor(text=text, images=images, videos=videos, input_data_format="channels_last")
    decoded = processor.tokenizer.decode(output["input_ids"][0], clean_up_tokenization_spaces=False)
    for token in (processor.vision_start_token, processor.vision_end_token, IMAGE, VIDEO):
        decoded, text = decoded.replace(token, ""), text.replace(token, "")
    assert decoded == text


@quick
@given(
    sizes=st.lists(image_sizes, max_size=3),
    video_sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 120), st.integers(5, 120)), max_size=2),
    do_resize=st.booleans(),
)
def test_counts_are_the_real_ones(processor, sizes, video_sizes, do_resize):
    options = {"videos_kwargs": {"do_resize": do_resize}}
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=video_sizes, **options)
    text, images, videos = build([*sizes, *video_sizes], seed=0)
    output = processor(
        text=text,
        images=images,
        videos=videos,
        return_mm_token_type_ids=True,
        images_kwargs={"input_data_format": "channels_last"},
        videos_kwargs={"do_resize": do_resize, "input_data_format": "channels_last"},
    )
    kinds = output["mm_token_type_ids"][0]
    assert (kinds.count(1), kinds.count(2)) == (sum(counts.num_image_tokens), sum(counts.num_video_tokens))
    assert len(output.get("pixel_values", [])) == sum(counts.num_image_patches)


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 2000),
    video_fps=st.floats(0.5, 120),
    fps=st.floats(0.1, 60),
    limits=st.tuples(st.none() | st.integers(1, 50), st.none() | st.integers(50, 900)),
)
def test_sampled_frames_are_spread_evenly(total, video_fps, fps, limits):
    indices = sample_frame_indices(total, video_fps, fps=fps, min_frames=limits[0], max_frames=limits[1])
    assert indices.dtype == np.int64 and indices[0] == 0 and indices[-1] < total
    steps = np.diff(np.append(indices, total))
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1
    assert len(indices) <= min(total, limits[1] or total)
    assert len(indices) >= min(total, limits[0] or 1)
    if not any(limits):
        assert len(indices) == min(total, max(1, int(total / video_fps * fps)))


@pytest.mark.parametrize("total, count", [(10, 10), (10, 3), (7, 1)])
def test_exact_number_of_frames(total, count):
    assert len(sample_frame_indices(total, num_frames=count)) == count


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    start=st.integers(0, 10_000),
    fps=st.floats(0.1, 60),
    count=st.integers(1, 60),
)
def test_sampled_frames_are_on_show(steps, start, fps, count):
    """Frames with times of their own (here in milliseconds) are chosen if they are on show at evenly spread times."""
    times = [start / 1000 + sum(steps[:index]) / 1000 for index in range(len(steps))]
    duration = sum(steps) / 1000
    options = {"times": times, "duration": duration}

    def on_show(number: int) -> list[set[int]]:
        """The frames that may be chosen at each moment. A frame counts as shown a millisecond before its time."""
        moments = [times[0] + index * duration / number for index in range(number)]
        frames, lateness = range(len(times)), (-1e-9, 1e-9, 1e-3 - 1e-9, 1e-3 + 1e-9)
        return [
            {max((frame for frame in frames if times[frame] <= moment + late), default=0) for late in lateness}
            for moment in moments
        ]

    moments = on_show(max(1, int((duration + 1e-3) * fps)))
    indices = sample_frame_indices(len(steps), fps=fps, **options)
    assert (np.diff(indices) > 0).all()
    assert set(indices.tolist()) <= set().union(*moments)
    assert all(moment & set(indices.tolist()) for moment in moments)

    count = min(count, len(steps))
    indices = sample_frame_indices(len(steps), num_frames=count, **options)
    assert len(indices) == count and (np.diff(indices) > 0).all() and indices[0] >= 0 and indices[-1] < len(steps)
    if all(first.isdisjoint(second) for first, second in itertools.pairwise(on_show(count))):
        assert all(index in frames for index, frames in zip(indices, on_show(count), strict=True))
