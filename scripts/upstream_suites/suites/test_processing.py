"""The suites for processors."""

import os
import unittest

from ..test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from ..test_processing_common import ProcessorTesterMixin
from ..test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs
from .subjects import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

# The suites count images in the first dimension of the result. M3's first dimension counts patches, so an image has
# one.
PATCH_SIZE, NUM_CHANNELS, TEMPORAL_PATCH_SIZE = 14, 3, 2
ONE_PATCH = {"patch_size": PATCH_SIZE, "merge_size": 1, "temporal_patch_size": TEMPORAL_PATCH_SIZE}


def patch_width(num_channels: int) -> int:
    return num_channels * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiniMaxM3VLProcessor
    model_id = os.environ["UPSTREAM_SUITES_CHECKPOINT"]

    def prepare_audio_inputs(self, batch_size=None):
        return None  # the model has no audio input

    @property
    def video_sampling_expectations(self):
        # 320 x 240 pixels become 22 x 18 patches, and a patch spans two frames
        patches_of_two_frames = 22 * 18
        return [
            {
                **expectation,
                "expected_dim": 0,
                "output_length": -(-expectation["output_length"] // 2) * patches_of_two_frames,
            }
            for expectation in super().video_sampling_expectations
        ]


class ImageTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        area = PATCH_SIZE**2
        kwargs = {"min_resolution": PATCH_SIZE, "max_resolution": PATCH_SIZE + 1, **kwargs}
        super().__init__(parent, **kwargs, **ONE_PATCH, size={"shortest_edge": area, "longest_edge": area})

    def _get_image_processing_classes(self):
        return {"torchvision": MiniMaxM3VLImageProcessor}

    def expected_output_image_shape(self, images):
        return (patch_width(self.num_channels),)


class ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


class VideoTester:
    batch_size = 5
    num_channels = NUM_CHANNELS
    num_frames = TEMPORAL_PATCH_SIZE

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            min_resolution=PATCH_SIZE,
            max_resolution=PATCH_SIZE + 1,
            equal_resolution=False,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return (patch_width(self.num_channels),)


class VideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = MiniMaxM3VLVideoProcessor

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoTester()

    @property
    def video_processor_dict(self):
        # M3 uses the bounds in pixels; the suite expects the other sizes to be kept
        return {
            **ONE_PATCH,
            "min_pixels": PATCH_SIZE**2,
            "max_pixels": PATCH_SIZE**2,
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 18, "width": 18},
            "do_sample_frames": False,
        }
