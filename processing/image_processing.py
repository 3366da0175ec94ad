"""From images to the flat patches and grid sizes that the vision tower reads."""

from typing import Any

import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from configuration_minimax_m3.auto_class import AutoClassByImport

from .media import check_pixels, check_range, describe, fetch_images, flatten_images, turn_upright
from .patches import patchify
from .resize import check_pixel_bounds, fits_patch_grid, smart_resize

# The released preprocessor_config.json has this size, but the released code never applies it.
UNUSED_RELEASED_SIZE = [672, 672]


class MiniMaxM3VLImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the image processor beyond those of every image processor.

    Args:
        min_pixels (int): Least area of a resized image, in pixels; another name for `size["shortest_edge"]`.
        max_pixels (int): Greatest area of a resized image, in pixels; another name for `size["longest_edge"]`.
        patch_size (int): Side of a patch, in pixels. Default: 14.
        temporal_patch_size (int): Frames in a patch. An image is repeated this many times. Default: 2.
        merge_size (int): `merge_size` x `merge_size` patches become one token. Default: 2.
    """

    min_pixels: int | None
    max_pixels: int | None
    patch_size: int
    temporal_patch_size: int
    merge_size: int


class MiniMaxM3VLImageProcessor(AutoClassByImport, TorchvisionBackend):
    """Resizes, normalises and cuts images into patches, on the CPU or (`device="cuda"`) on a GPU.

    A call returns `pixel_values`, float32 (patches of all images, channels * temporal_patch_size * patch_size**2), and
    `image_grid_thw`, int64 (images, 3): the number of patches along time (1), height and width of each image.
    `size["shortest_edge"]` and `size["longest_edge"]` bound the area in pixels, not the edges.

    An image is a path (also a `pathlib` path or a `file://` address), an http(s) address, a data URL, base64 text, the
    bytes of a file, `{"bytes": ..., "path": ...}`, a PIL image or an array. The same rules hold for every format and
    every source. Pillow decodes the file. The first frame counts, or the current frame of an opened PIL image. The
    image is turned upright by its orientation tag, which an array does not have. Transparent pixels are drawn on
    white. `MediaLimits` bounds what is read.

    Raises:
        ValueError: An image cannot be read, exceeds the `MediaLimits` in force, is empty, too elongated or not finite,
            or does not fit the patch grid with `do_resize=False`; or `size` lacks a bound. The message names the image
            by its index.
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 672 * 672}
    default_to_square = False
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    patch_size = 14
    temporal_patch_size = 2
    merge_size = 2
    valid_kwargs = MiniMaxM3VLImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, **kwargs: Unpack[MiniMaxM3VLImageProcessorKwargs]):
        size = kwargs.pop("size", None)
        if size is None or (isinstance(size, (list, tuple)) and list(size) == UNUSED_RELEASED_SIZE):
            size = type(self).size
        size = self._merge_bounds(size, kwargs.pop("min_pixels", None), kwargs.pop("max_pixels", None))
        super().__init__(size=size, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads every source in a nested list to a PIL image in RGB. Returns images and arrays as they are."""
        return fetch_images(image_url_or_urls)

    def process_image(self, image: Any, *args, **kwargs) -> torch.Tensor:
        """Converts one image to (channels, height, width), and turns a PIL image upright."""
        if isinstance(image, Image.Image):
            image = turn_upright(image)
        return super().process_image(image, *args, **kwargs)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        images = flatten_images(self.fetch_images(images))
        if not images:
            raise ValueError("`images` must hold at least one image, got none.")
        for index, image in enumerate(images):
            check_pixels(image, f"images[{index}]")
        return images

    def _prepare_image_like_inputs(self, images: ImageInput, *args, **kwargs) -> list[torch.Tensor]:
        prepared = []
        for index, image in enumerate(self._prepare_images_structure(images)):
            try:
                prepared.append(self.process_image(image, *args, **kwargs))
            except ValueError as error:
                raise ValueError(f"`images[{index}]` ({describe(image)}) cannot be used: {error}") from error
        return prepared

    @staticmethod
    def _merge_bounds(size: Any, min_pixels: int | None, max_pixels: int | None) -> Any:
        """Writes the bounds into `size`. The `size` of older files may hold them as `min_pixels` and `max_pixels`."""
        check_pixel_bounds(min_pixels, max_pixels)
        if not isinstance(size, (dict, SizeDict)):
            if min_pixels is None and max_pixels is None:
                return size
            size = {}
        bounds = dict(size)
        older = {"shortest_edge": bounds.pop("min_pixels", None), "longest_edge": bounds.pop("max_pixels", None)}
        newer = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        for given in (older, newer):
            bounds.update({name: value for name, value in given.items() if value is not None})
        return bounds

    def _standardize_kwargs(
        self, size: Any = None, min_pixels: int | None = None, max_pixels: int | None = None, **kwargs
    ) -> dict[str, Any]:
        return super()._standardize_kwargs(size=self._merge_bounds(size, min_pixels, max_pixels), **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if kwargs[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {kwargs[name]}.")
        if kwargs["do_resize"]:
            self._check_bounds(kwargs["size"])

    @staticmethod
    def _check_bounds(size: SizeDict | None) -> None:
        if size is None or not (size.shortest_edge and size.longest_edge):
            raise ValueError(
                "`size` must have the keys 'shortest_edge' and 'longest_edge' (least and greatest area in pixels), "
                f"got {None if size is None else dict(size)}."
            )

    def _output_size(
        self, height: int, width: int, *, do_resize: bool, size: SizeDict, patch_size: int, merge_size: int
    ) -> tuple[int, int]:
        factor = patch_size * merge_size
        if do_resize:
            self._check_bounds(size)
            return smart_resize(height, width, factor, min_pixels=size.shortest_edge, max_pixels=size.longest_edge)
        if not fits_patch_grid(height, width, factor):
            raise ValueError(
                f"with do_resize=False height and width must be multiples of patch_size * merge_size = {factor}, "
                f"got {height} x {width}."
            )
        return height, width

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: "PILImageResampling | int | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        patch_size: int,
        temporal_patch_size: int,
        merge_size: int,
        disable_grouping: bool | None,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        new_sizes = {}
        for index, image in enumerate(images):
            try:
                if do_rescale:
                    check_range(image)
                new_sizes[image.shape[-2:]] = self._output_size(
                    *image.shape[-2:], do_resize=do_resize, size=size, patch_size=patch_size, merge_size=merge_size
                )
            except ValueError as error:
                raise ValueError(f"images[{index}]: {error}") from error

        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        patches, grids = {}, {}
        for key, stacked in groups.items():
            height, width = new_sizes[stacked.shape[-2:]]
            if (height, width) != stacked.shape[-2:]:
                stacked = self.resize(stacked, SizeDict(height=height, width=width), resample=resample)
            stacked = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            patches[key] = patchify(
                stacked.unsqueeze(1),
                patch_size=patch_size,
                temporal_patch_size=temporal_patch_size,
                merge_size=merge_size,
            )
            grids[key] = [[1, height // patch_size, width // patch_size]] * len(stacked)

        data = {
            "pixel_values": torch.cat(reorder_images(patches, order)),
            "image_grid_thw": torch.tensor(reorder_images(grids, order), dtype=torch.long),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """The number of patches, before merging, that a call returns for an image of this size.

        Serving engines size their buffers by it.

        Args:
            height (int): Height of the image, in pixels.
            width (int): Width of the image, in pixels.
            images_kwargs (dict, optional): Options of the call.

        Raises:
            ValueError: The call would raise it too.
        """
        options = {name: getattr(self, name) for name in ("do_resize", "size", "patch_size", "merge_size")}
        options.update(images_kwargs or {})
        size = self._standardize_kwargs(
            size=options["size"],
            min_pixels=options.get("min_pixels"),
            max_pixels=options.get("max_pixels"),
            default_to_square=self.default_to_square,
        )["size"]
        patch_size, merge_size = options["patch_size"], options["merge_size"]
        new_height, new_width = self._output_size(
            height,
            width,
            do_resize=options["do_resize"],
            size=size,
            patch_size=patch_size,
            merge_size=merge_size,
        )
        return (new_height // patch_size) * (new_width // patch_size)
