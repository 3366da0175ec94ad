"""From videos to the flat patches, grid sizes and chunk counts that the vision tower reads."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import (
    VideoInput,
    group_videos_by_shape,
    make_batched_metadata,
    reorder_videos,
)

from configuration_minimax_m3.auto_class import AutoClassByImport

from .media import as_source, check_pixels, check_range, flatten_videos, map_sources, read_image, stack_frames
from .patches import patchify
from .resize import check_pixel_bounds, fits_patch_grid, smart_resize
from .sampling import sample_frame_indices
from .video_decoding import decode_video
from .video_metadata import VideoMetadata


class MiniMaxM3VLVideoProcessorKwargs(VideosKwargs, total=False):
    """Options of the video processor beyond those of every video processor.

    Args:
        patch_size (int): Side of a patch, in pixels. Default: 14.
        temporal_patch_size (int): Frames in a patch. Default: 2.
        merge_size (int): `merge_size` x `merge_size` patches become one token. Default: 2.
        min_pixels (int): Least area of a resized frame, in pixels. Default: 4 * 28 * 28.
        max_pixels (int): Greatest area of a resized frame, in pixels. Default: 768 * 28 * 28.
        total_pixels (int): Greatest area of all resized frames of a video together, in pixels.
        vision_segment_max_frames (int, optional): Greatest number of temporal patches that attend to each other in
            the vision tower. None keeps each video whole. Default: 4.
        do_sample_frames (bool, optional): False takes every frame. True samples, by the processor's own `num_frames`
            or `fps` if the call gives neither. By default (None) a call samples if it gives `num_frames`, `fps` or
            `max_frames`. If it gives none of them, a file yields the processor's own `num_frames`, or else all frames
            up to the processor's own `max_frames`.
        num_frames (int, optional): Number of frames to sample, exactly. It excludes `fps`. Default: None.
        fps (float): Frames to sample per second of video. Default: 1.0, which counts only where `do_sample_frames` is
            True and neither the call nor the processor has `num_frames`.
        min_frames (int, optional): Least number of frames to sample (all frames of a shorter video). The processor's
            own `min_frames` counts with the processor's own `fps`, but not with `fps` of the call. Default: 4.
        max_frames (int, optional): Greatest number of frames to sample. The processor's own `max_frames` does not
            limit `num_frames`. Default: 768.

    The defaults are those of the released processor, whose code never reads `total_pixels`, `min_frames` and
    `max_frames`. Every saved file has the released value of `total_pixels`. So here `total_pixels` counts only if a
    call gives it, or if the processor has a different value than the released one.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    total_pixels: int | None
    min_frames: int | None
    max_frames: int | None
    vision_segment_max_frames: int | None
    fps: float | int | None


class MiniMaxM3VLVideoProcessor(AutoClassByImport, BaseVideoProcessor):
    """Samples, resizes, normalises and cuts videos into patches, on the CPU or (`device="cuda"`) on a GPU.

    A call returns `pixel_values_videos`, float32 (patches of all videos, channels * temporal_patch_size *
    patch_size**2); `video_grid_thw`, int64 (chunks of all videos, 3): the number of patches along time, height and
    width; and `num_chunks_per_video` (videos): how many rows of `video_grid_thw` belong to each video. An odd frame at
    the end is paired with itself.

    `do_resize=False` keeps frames that fit the patch grid as they are. Frames that do not fit are resized even then,
    because they could not be cut into patches otherwise.

    Raises:
        ValueError: A video cannot be decoded, has no frames, is empty, too elongated or not finite, or its metadata
            contradict it. The message names the video by its index.
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"height": 672, "width": 672}
    default_to_square = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    do_sample_frames = False
    patch_size = 14
    temporal_patch_size = 2
    merge_size = 2
    min_pixels = 4 * 28 * 28
    max_pixels = 768 * 28 * 28
    total_pixels = int(64000 * 28 * 28 * 0.9)
    fps = 1.0
    min_frames = 4
    max_frames = 768
    vision_segment_max_frames = 4
    valid_kwargs = MiniMaxM3VLVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw", "num_chunks_per_video"]

    def __init__(self, **kwargs: Unpack[MiniMaxM3VLVideoProcessorKwargs]):
        super().__init__(**kwargs)
        # the base class reads None as "not given", but here None has a meaning
        if "vision_segment_max_frames" in kwargs:
            self.vision_segment_max_frames = kwargs["vision_segment_max_frames"]

    def fetch_videos(
        self, video_url_or_urls: Any, sample_indices_fn: Callable[..., np.ndarray] | None = None
    ) -> tuple[Any, Any]:
        """Decodes a path or an address, or a list of them, to frames and metadata."""
        if isinstance(video_url_or_urls, (list, tuple)):
            decoded = [self.fetch_videos(source, sample_indices_fn) for source in video_url_or_urls]
            return [video for video, _ in decoded], [metadata for _, metadata in decoded]
        return decode_video(as_source(video_url_or_urls), sample_indices_fn)

    # It counts only if it was set on purpose (see MiniMaxM3VLVideoProcessorKwargs).
    def _total_pixels(self, options: Mapping[str, Any]) -> int | None:
        if options.get("total_pixels") is not None:
            return options["total_pixels"]
        return None if self.total_pixels == type(self).total_pixels else self.total_pixels

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[MiniMaxM3VLVideoProcessorKwargs]) -> BatchFeature:
        """Processes one video or several. See `flatten_videos` for the inputs and the class for the outputs."""
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            if kwargs.get(name, getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {kwargs.get(name, getattr(self, name))}.")
        check_pixel_bounds(kwargs.get("min_pixels"), kwargs.get("max_pixels"))
        segment = kwargs.get("vision_segment_max_frames", self.vision_segment_max_frames)
        if segment is not None and segment < 1:
            raise ValueError(f"`vision_segment_max_frames` must be at least 1 or None, got {segment}.")
        kwargs["total_pixels"] = self._total_pixels(kwargs)
        # The base class fills in missing options, but leaves None: `sample_frames` decides what None means.
        for name in ("num_frames", "fps", "min_frames", "max_frames"):
            kwargs.setdefault(name, None)
        if kwargs.setdefault("do_sample_frames", None) is None:
            if self.do_sample_frames or kwargs["num_frames"] is not None or kwargs["fps"] is not None:
                kwargs["do_sample_frames"] = True
            elif kwargs["max_frames"] is not None:
                kwargs.update(do_sample_frames=True, fps=math.inf)
        return super().preprocess(videos, **kwargs)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """Chooses frames evenly spread over the time of the video: `num_frames` of them, or `fps` per second.

        Without either, the processor's own `num_frames` counts, or else its own `fps`. `fps=math.inf` takes every
        frame. See MiniMaxM3VLVideoProcessorKwargs for the limits.

        Returns:
            Strictly increasing frame indices, int64.

        Raises:
            ValueError: See `sample_frame_indices`.
        """
        is_own_rate = num_frames is None and fps is None
        if is_own_rate and self.num_frames is not None:
            num_frames = self.num_frames if max_frames is None else min(self.num_frames, max_frames)
        elif num_frames is None:
            max_frames = self.max_frames if max_frames is None else max_frames
            if is_own_rate:
                fps = self.fps
                if min_frames is None and self.min_frames is not None:
                    min_frames = self.min_frames if max_frames is None else min(self.min_frames, max_frames)
        return sample_frame_indices(
            metadata.total_num_frames,
            metadata.fps,
            times=getattr(metadata, "frame_times", None),
            duration=metadata.duration,
            num_frames=num_frames,
            fps=fps,
            min_frames=min_frames,
            max_frames=max_frames,
        )

    def _decode_and_sample_videos(
        self,
        videos: VideoInput,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        sample_indices_fn: Callable[..., np.ndarray] | None = None,
    ) -> tuple[list[Any], list[VideoMetadata]]:
        # Each video is treated by its own kind, so that a batch may mix kinds. The base class looks only at the first.
        videos = flatten_videos(map_sources(videos))
        if not videos:
            raise ValueError("`videos` must hold at least one video, got none.")
        all_metadata = self._list_metadata(video_metadata, len(videos))
        for index, video in enumerate(videos):
            name = f"videos[{index}]"
            if isinstance(video, str):
                choose = sample_indices_fn
                if do_sample_frames is None:  # the call says nothing about sampling
                    choose = self.sample_frames if self.num_frames else partial(self.sample_frames, fps=math.inf)
                videos[index], all_metadata[index] = decode_video(video, choose, name)
                check_pixels(videos[index], name)
                self._check_timing(all_metadata[index], len(videos[index]), index)
                continue
            if isinstance(video, list):
                if isinstance(video[0], str):
                    if do_sample_frames:
                        raise ValueError(  # stock's message, because other tools look for it
                            f"`{name}`: Sampling frames from a list of images is not supported! Set "
                            "`do_sample_frames=False`."
                        )
                    video = [read_image(frame) for frame in video]
                video = stack_frames(video, name)
            check_pixels(video, name)
            if all_metadata[index] is None:
                self._find_layout(video, name)
                metadata = VideoMetadata(**make_batched_metadata([video], None)[0])
            elif isinstance(all_metadata[index], VideoMetadata):
                metadata = copy.copy(all_metadata[index])
            else:
                metadata = VideoMetadata(**all_metadata[index])
            if do_sample_frames:
                if metadata.total_num_frames != len(video):
                    raise ValueError(
                        f"`video_metadata[{index}].total_num_frames` must be the {len(video)} frames of `{name}` to "
                        f"sample from them, got {metadata.total_num_frames}."
                    )
                metadata.frames_indices = sample_indices_fn(metadata=metadata)
                if metadata.frame_times is not None:
                    metadata.frame_times = [metadata.frame_times[frame] for frame in metadata.frames_indices]
                video = video[metadata.frames_indices]
            self._check_timing(metadata, len(video), index)
            videos[index], all_metadata[index] = video, metadata
        return videos, all_metadata

    @staticmethod
    def _list_metadata(video_metadata: Any, num_videos: int) -> list[Mapping[str, Any] | None]:
        if video_metadata is None:
            return [None] * num_videos
        entries = [video_metadata] if isinstance(video_metadata, Mapping) else list(video_metadata)
        entries = [
            entry for item in entries for entry in (item if isinstance(item, (list, tuple)) else [item])
        ]  # one level of nesting: per sample
        if len(entries) != num_videos:
            raise ValueError(
                f"`video_metadata` must have one entry for each of the {num_videos} videos, got {len(entries)}."
            )
        return entries

    @staticmethod
    def _check_timing(metadata: VideoMetadata, num_frames: int, index: int) -> None:
        if metadata.fps is not None and not 0 < metadata.fps < math.inf:
            raise ValueError(f"`video_metadata[{index}].fps` must be positive, got {metadata.fps}.")
        for name in ("frames_indices", "frame_times"):
            entries = getattr(metadata, name)
            if entries is not None and len(entries) != num_frames:
                raise ValueError(
                    f"`video_metadata[{index}].{name}` must have one entry for each of the {num_frames} frames of "
                    f"`videos[{index}]`, got {len(entries)}."
                )

    def _prepare_input_videos(
        self,
        videos: list[Any],
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "str | torch.device | None" = None,
    ) -> list[torch.Tensor]:
        prepared = []
        for index, video in enumerate(videos):
            # one at a time, because the base class would read all videos in the layout of the first
            layout = input_data_format or self._find_layout(video, f"videos[{index}]")
            prepared += super()._prepare_input_videos([video], do_convert_rgb, layout, device)
        return prepared

    @staticmethod
    def _find_layout(video: np.ndarray | torch.Tensor, name: str) -> ChannelDimension:
        for num_channels in ((1, 3), 4):
            try:
                return infer_channel_dimension_format(video, num_channels)
            except ValueError:
                continue
        raise ValueError(
            f"`{name}` must have 1, 3 or 4 channels after its frames or at its end, got shape {tuple(video.shape)}. "
            "If the channels stand elsewhere, pass `input_data_format`."
        )

    def _output_size(
        self,
        num_frames: int,
        height: int,
        width: int,
        *,
        do_resize: bool,
        patch_size: int,
        merge_size: int,
        min_pixels: int,
        max_pixels: int,
        total_pixels: int | None,
    ) -> tuple[int, int]:
        factor = patch_size * merge_size
        if not do_resize and fits_patch_grid(height, width, factor):
            return height, width
        if total_pixels is not None:
            if total_pixels < num_frames * min_pixels:
                raise ValueError(
                    f"`total_pixels` must leave each of the {num_frames} frames at least min_pixels={min_pixels}, that "
                    f"is {num_frames * min_pixels} in all, got {total_pixels}. Sample fewer frames."
                )
            max_pixels = min(max_pixels, total_pixels // num_frames)
        return smart_resize(height, width, factor, min_pixels=min_pixels, max_pixels=max_pixels)

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        resample: "PILImageResampling | int | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        patch_size: int,
        temporal_patch_size: int,
        merge_size: int,
        min_pixels: int,
        max_pixels: int,
        total_pixels: int | None,
        vision_segment_max_frames: int | None,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        new_sizes = {}
        for index, video in enumerate(videos):
            shape = (len(video), *video.shape[-2:])
            try:
                if do_rescale:
                    check_range(video)
                new_sizes[shape] = self._output_size(
                    *shape,
                    do_resize=do_resize,
                    patch_size=patch_size,
                    merge_size=merge_size,
                    min_pixels=min_pixels,
                    max_pixels=max_pixels,
                    total_pixels=total_pixels,
                )
            except ValueError as error:
                raise ValueError(f"videos[{index}]: {error}") from error

        groups, order = group_videos_by_shape(videos)
        patches, grids = {}, {}
        for shape, stacked in groups.items():
            num_frames, *old_size = shape
            height, width = new_sizes[shape]
            if [height, width] != old_size:
                frames = self.resize(stacked.flatten(0, 1), SizeDict(height=height, width=width), resample=resample)
                stacked = frames.unflatten(0, stacked.shape[:2])
            stacked = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            patches[shape] = patchify(
                stacked, patch_size=patch_size, temporal_patch_size=temporal_patch_size, merge_size=merge_size
            )
            grid = [math.ceil(num_frames / temporal_patch_size), height // patch_size, width // patch_size]
            grids[shape] = [grid] * len(stacked)

        chunks = [self._split_time(*grid, vision_segment_max_frames) for grid in reorder_videos(grids, order)]
        data = {
            "pixel_values_videos": torch.cat(reorder_videos(patches, order)),
            "video_grid_thw": torch.tensor([grid for grids in chunks for grid in grids], dtype=torch.long),
            "num_chunks_per_video": [len(grids) for grids in chunks],
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    @staticmethod
    def _split_time(grid_t: int, grid_h: int, grid_w: int, longest: int | None) -> list[list[int]]:
        """Cuts a video along time into chunks of at most `longest` temporal patches."""
        longest = longest or grid_t
        return [[min(longest, grid_t - start), grid_h, grid_w] for start in range(0, grid_t, longest)]

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """The number of patches, before merging, that a call returns for a video of this size.

        Serving engines size their buffers by it.

        Args:
            num_frames (int): Number of frames after sampling.
            height (int): Height of a frame, in pixels.
            width (int): Width of a frame, in pixels.
            videos_kwargs (dict, optional): Options of the call.

        Raises:
            ValueError: The call would raise it too.
        """
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        names = ("do_resize", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
        options = {name: getattr(self, name) for name in names}
        options.update(videos_kwargs or {})
        new_height, new_width = self._output_size(
            num_frames,
            height,
            width,
            do_resize=options["do_resize"],
            patch_size=options["patch_size"],
            merge_size=options["merge_size"],
            min_pixels=options["min_pixels"],
            max_pixels=options["max_pixels"],
            total_pixels=self._total_pixels(options),
        )
        grid_t = math.ceil(num_frames / options["temporal_patch_size"])
        return grid_t * (new_height // options["patch_size"]) * (new_width // options["patch_size"])
