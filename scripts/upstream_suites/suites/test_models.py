"""The suites for models, configurations and training."""

import unittest

from ..generation.test_utils import GenerationTesterMixin
from ..test_configuration_common import ConfigTester
from ..test_modeling_common import ModelTesterMixin
from ..test_training_mixin import TrainingTesterMixin
from .subjects import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLModel,
    MiniMaxM3VLTextModel,
    MultimodalModelTester,
    TextModelTester,
)


class TextModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (MiniMaxM3VLTextModel, MiniMaxM3VLForCausalLM)
    model_tester = None

    def setUp(self):
        self.model_tester = TextModelTester(self)

    def test_config(self):
        ConfigTester(self, config_class=TextModelTester.config_class).run_common_tests()


class MultimodalModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MiniMaxM3VLModel, MiniMaxM3SparseForConditionalGeneration)
    model_tester = None
    _is_composite = True
    # the suites expect one row per image, but the patches of all images form one sequence
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True

    def setUp(self):
        self.model_tester = MultimodalModelTester(self)

    def test_config(self):
        ConfigTester(self, config_class=MultimodalModelTester.config_class, has_text_modality=False).run_common_tests()
