"""The suites for models in several processes: tensor parallelism, expert parallelism and FSDP."""

import unittest

from .. import test_expert_parallel_mixin as expert_parallel
from .. import test_fsdp_mixin as fsdp
from .. import test_tensor_parallel_mixin as tensor_parallel
from .subjects import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLModel,
    MiniMaxM3VLTextModel,
    MultimodalModelTester,
    TextModelTester,
)

# Upstream's own runs test only a few models to save time. None tests all.
expert_parallel.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class TextParallelTest(
    tensor_parallel.TensorParallelTesterMixin,
    expert_parallel.ExpertParallelTesterMixin,
    fsdp.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (MiniMaxM3VLTextModel, MiniMaxM3VLForCausalLM)
    model_tester = None

    def setUp(self):
        self.model_tester = TextModelTester(self)

    def _get_tiny_config(self):
        # the suite sets four key/value heads, and each needs an index head
        config_class, fields = super()._get_tiny_config()
        return config_class, {**fields, "num_key_value_heads": 4, "index_n_heads": 4}


class MultimodalParallelTest(
    tensor_parallel.TensorParallelTesterMixin, expert_parallel.ExpertParallelTesterMixin, unittest.TestCase
):
    all_model_classes = (MiniMaxM3VLModel, MiniMaxM3SparseForConditionalGeneration)
    model_tester = None

    def setUp(self):
        self.model_tester = MultimodalModelTester(self)
