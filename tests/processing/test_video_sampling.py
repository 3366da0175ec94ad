"""Requests for fewer frames work in every form of the call."""

import math

import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata

from processing_minimax_m3 import MiniMaxM3VLVideoProcessor, MultimodalChatCollator, video_pyav

pytestmark = pytest.mark.compatibility

pytest.importorskip("av")

VIDEO = "]<]video[>["
ASKED = {
    "rate": ({"fps": 2}, 12),
    "low-rate": ({"fps": 0.5}, 3),
    "number": ({"num_frames": 7}, 7),
    "greatest": ({"max_frames": 9}, 9),
    "rate-and-greatest": ({"fps": 2, "max_frames": 5}, 5),
    "rate-and-least": ({"fps": 0.5, "min_frames": 8}, 8),
    "least": ({"min_frames": 8}, 60),  # all are no less
    "own-rate": ({"do_sample_frames": True}, 6),
    "own-rate-and-greatest": ({"do_sample_frames": True, "max_frames": 3}, 3),
    "all": ({"do_sample_frames": False}, 60),
    "all-the-same": ({"do_sample_frames": False, "fps": 1, "max_frames": 6}, 60),
    "nothing": ({}, 60),
}
WAYS = {
    "video-processor": lambda processor, path, options: processor.video_processor(path, **options),
    "flat": lambda processor, path, options: processor(text=VIDEO, videos=path, **options),
    "nested": lambda processor, path, options: processor(text=VIDEO, videos=path, videos_kwargs=options),
    "chat-flat": lambda processor, path, options: chat(processor, path, options),
    "chat-nested": lambda processor, path, options: chat(processor, path, {"videos_kwargs": options}),
    "collator-flat": lambda processor, path, options: collate(processor, path, options),
    "collator-nested": lambda processor, path, options: collate(processor, path, {"videos_kwargs": options}),
}


def message(path: str) -> dict:
    return {"role": "user", "content": [{"type": "video", "path": path}]}


def chat(processor, path: str, options: dict):
    return processor.apply_chat_template([message(path)], tokenize=True, return_dict=True, processor_kwargs=options)


def collate(processor, path: str, options: dict):
    row = {"messages": [message(path), {"role": "assistant", "content": "So."}]}
    return MultimodalChatCollator(processor, processor_kwargs=options)([row])


@pytest.fixture(scope="module")
def six_seconds(tmp_path_factory, make_video) -> str:
    """A video of 60 frames at 10 frames per second."""
    return str(make_video(tmp_path_factory.mktemp("six") / "six.mp4", 60, 10, height=28, width=28))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory, make_video) -> str:
    """A video of 900 frames at 30 frames per second."""
    return str(make_video(tmp_path_factory.mktemp("long") / "long.mp4", 900, 30, height=28, width=28))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", ASKED)
def test_every_way_of_asking(asked, way, six_seconds, processor):
    options, expected = ASKED[asked]
    output = WAYS[way](processor, six_seconds, dict(options))
    assert output["video_grid_thw"][:, 0].sum() == math.ceil(expected / 2)


@pytest.mark.parametrize("options", [{"num_frames": 6}, {"fps": 1}, {"max_frames": 6}], ids=str)
def test_frames_are_the_asked_ones(options, six_seconds, processor):
    metadata = processor.video_processor(six_seconds, return_metadata=True, **options)["video_metadata"][0]
    assert metadata.frames_indices.tolist() == [0, 10, 20, 30, 40, 50]
    assert metadata.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_processor_set_for_good(six_seconds):
    def count(path=six_seconds, call=(), **options):
        output = MiniMaxM3VLVideoProcessor(**options)(path, return_metadata=True, **dict(call))
        return len(output["video_metadata"][0].frames_indices)

    assert count(num_frames=8) == 8
    assert count(num_frames=8, call={"max_frames": 5}) == 5
    assert count(num_frames=8, call={"fps": 1}) == 6
    assert count(num_frames=8, call={"do_sample_frames": False}) == 60
    assert count(max_frames=7) == 7
    assert count(max_frames=7, call={"max_frames": 9}) == 9
    assert count(max_frames=7, call={"num_frames": 9}) == 9
    assert count(max_frames=None) == 60
    assert count(do_sample_frames=True, fps=2) == 12
    assert count(do_sample_frames=True, fps=2, call={"fps": 1}) == 6
    assert count(do_sample_frames=True, min_frames=11) == 11
    assert count(do_sample_frames=True, min_frames=None, fps=0.2) == 1
    assert count(do_sample_frames=True, fps=0.2) == 4


@pytest.mark.parametrize("limit", [767, 768, 769])
def test_a_limit_equal_to_the_default_is_a_limit(limit):
    metadata = VideoMetadata(total_num_frames=2000, fps=1.0)
    assert len(MiniMaxM3VLVideoProcessor(max_frames=limit).sample_frames(metadata)) == limit
    assert len(MiniMaxM3VLVideoProcessor().sample_frames(metadata, max_frames=limit)) == limit
    assert len(MiniMaxM3VLVideoProcessor(min_frames=4).sample_frames(VideoMetadata(total_num_frames=9, fps=9.0))) == 4


def test_long_clip(long_clip):
    """A call without options samples a long video down to the default limit, and converts no other frame."""
    converted = []
    video_processor = MiniMaxM3VLVideoProcessor()
    with pytest.MonkeyPatch.context() as patch:
        turn = video_pyav.turn_upright
        patch.setattr(video_pyav, "turn_upright", lambda *args: converted.append(1) or turn(*args))
        metadata = video_processor(long_clip, return_metadata=True)["video_metadata"][0]
    assert len(metadata.frames_indices) == len(converted) == 768
    steps = np.diff(np.append(metadata.frames_indices, 900))
    assert steps.min() == 1 and steps.max() == 2
    for options, expected in (({"fps": 30}, 768), ({"num_frames": 800}, 800), ({"do_sample_frames": False}, 900)):
        assert video_processor(long_clip, **options)["video_grid_thw"][:, 0].sum() == expected // 2


ARRAYS = {
    "array": lambda frames: frames,
    "list-of-arrays": list,
    "pil-frames": lambda frames: [Image.fromarray(frame) for frame in frames],
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_and_lists_of_frames(form, pixels, processor):
    video = ARRAYS[form](pixels(20, 28, 28, 3))
    metadata = [VideoMetadata(total_num_frames=20, fps=4.0)]

    def count(**options):
        return processor(text=VIDEO, videos=[video], **options)["video_grid_thw"][:, 0].sum() * 2

    assert count() == 20
    assert count(num_frames=6) == 6
    assert count(max_frames=6) == 6
    assert count(fps=2, video_metadata=metadata) == 10
    assert count(do_sample_frames=True, video_metadata=metadata, fps=math.inf) == 20
    with pytest.raises(ValueError, match="sampling by `fps` needs a positive `video_metadata.fps`, got None"):
        count(fps=2)


def test_arrays_longer_than_the_limit_are_left_alone(pixels, processor):
    """Arrays may be sampled already, so they are not sampled by default."""
    video_processor = MiniMaxM3VLVideoProcessor(max_frames=4, num_frames=2)
    assert video_processor(pixels(20, 28, 28, 3))["video_grid_thw"][:, 0].sum() == 10


REFUSED = {
    "both": ({"num_frames": 3, "fps": 1}, "`num_frames` and `fps` exclude each other"),
    "above-the-video": ({"num_frames": 61}, "`num_frames` must be between 1 and 60"),
    "above-the-limit": ({"num_frames": 9, "max_frames": 8}, "`num_frames` must be between 1 and 8"),
    "no-rate": ({"fps": 0}, "needs a positive `fps`, got 0"),
    "no-frames": ({"max_frames": 0}, "`max_frames` must be at least 1, got 0"),
    "crossed": ({"fps": 1, "min_frames": 9, "max_frames": 8}, "`min_frames` must not exceed `max_frames`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, six_seconds, processor):
    options, text = REFUSED[name]
    with pytest.raises(ValueError, match=rf"`videos\[0\]` \('.*six.mp4'\): .*{text}"):
        processor(text=VIDEO, videos=six_seconds, **options)
