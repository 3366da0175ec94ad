"""The classes under test, and a tiny model of them: this project's, or stock's if UPSTREAM_SUITES_STOCK is set."""

import os

import torch

from configuration_minimax_m3 import tiny_config

STOCK = bool(os.environ.get("UPSTREAM_SUITES_STOCK"))

if STOCK:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import (
        MiniMaxM3VLConfig,
        MiniMaxM3VLTextConfig,
    )
    from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import MiniMaxM3VLImageProcessor
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
        MiniMaxM3SparseForConditionalGeneration,
        MiniMaxM3VLForCausalLM,
        MiniMaxM3VLModel,
        MiniMaxM3VLTextModel,
    )
    from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor
    from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import MiniMaxM3VLVideoProcessor
else:
    from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
    from modeling_minimax_m3 import (
        MiniMaxM3SparseForConditionalGeneration,
        MiniMaxM3VLForCausalLM,
        MiniMaxM3VLModel,
        MiniMaxM3VLTextModel,
    )
    from processing_minimax_m3 import (
        MiniMaxM3VLImageProcessor,
        MiniMaxM3VLProcessor,
        MiniMaxM3VLVideoProcessor,
    )

__all__ = [
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLConfig",
    "MiniMaxM3VLForCausalLM",
    "MiniMaxM3VLImageProcessor",
    "MiniMaxM3VLModel",
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLTextConfig",
    "MiniMaxM3VLTextModel",
    "MiniMaxM3VLVideoProcessor",
]

BATCH_SIZE, NUM_PATCHES = 3, 4


def small_config() -> MiniMaxM3VLConfig:
    """Two layers, as many as the suites allow: a dense one, and a sparse one with small blocks."""
    config = tiny_config(
        text={
            "num_hidden_layers": 2,
            "vocab_size": 99,
            "max_position_embeddings": 512,
            "index_block_size": 8,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        image_token_index=4,
        video_token_index=5,
    )
    return MiniMaxM3VLConfig.from_dict(config.to_dict()) if STOCK else config


def random_ids(shape: tuple[int, int]) -> torch.Tensor:
    """Random ids that are neither special tokens nor placeholders."""
    return torch.randint(6, 90, shape)


class TextModelTester:
    """The facts and inputs of the language model that the suites ask for."""

    base_model_class = MiniMaxM3VLTextModel
    causal_lm_class = MiniMaxM3VLForCausalLM
    config_class = MiniMaxM3VLTextConfig
    is_training = True
    batch_size = BATCH_SIZE
    seq_length = encoder_seq_length = key_length = 7

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.pad_token_id = config.pad_token_id

    def get_config(self) -> MiniMaxM3VLTextConfig:
        return small_config().text_config

    def prepare_config_and_inputs_for_common(self):
        input_ids = random_ids((self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class MultimodalModelTester(TextModelTester):
    """The same for the whole model. Each text begins with an image of 2 x 2 patches, which become one token."""

    base_model_class = MiniMaxM3VLModel
    causal_lm_class = None
    conditional_generation_class = MiniMaxM3SparseForConditionalGeneration
    config_class = MiniMaxM3VLConfig

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.text_config = config.text_config.to_dict()
        self.vision_config = config.vision_config.to_dict()
        self.image_token_id = config.image_token_id
        self.vocab_size = config.text_config.vocab_size
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.pad_token_id = config.text_config.pad_token_id

    def get_config(self) -> MiniMaxM3VLConfig:
        return small_config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        vision = config.vision_config
        input_ids = random_ids((self.batch_size, self.seq_length))
        input_ids[:, 0] = self.image_token_id
        patch_width = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size * NUM_PATCHES, patch_width),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * self.batch_size),
        }
        return config, inputs
