"""Fixtures for comparing our models with stock Transformers' on equal weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock_configuration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock_modeling

from configuration_minimax_m3 import MiniMaxM3VLConfig, tiny_config


def fill_with_noise(module: nn.Module, seed: int) -> None:
    """Random parameters and buffers, larger than a fresh model's, so that every part of it shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        scale = 0.5 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
        if name.endswith("embed_tokens.weight"):
            scale = 1.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)


class Prescribed(LogitsProcessor):
    """Makes generation follow given tokens, so that near-ties between words cannot send two runs apart."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.tokens[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


@pytest.fixture(scope="session")
def stock() -> Any:
    """Stock Transformers' modeling module, whose class names are the same as ours."""
    return stock_modeling


@pytest.fixture(scope="session")
def to_stock_config() -> Callable[[Any], Any]:
    """Turn one of our configs into the stock config of the same name."""

    def convert(config):
        values = config.to_dict()
        stock_config = getattr(stock_configuration, type(config).__name__)(**values)
        stock_config._attn_implementation = config._attn_implementation
        stock_config._experts_implementation = config._experts_implementation
        return stock_config

    return convert


@pytest.fixture(scope="session")
def make_pair(to_stock_config) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Build the stock module and ours for one config, with the same random weights."""

    def build(ours: type[nn.Module], config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        config = copy.deepcopy(config)
        stock_module = getattr(stock_modeling, ours.__name__)(to_stock_config(config))
        fill_with_noise(stock_module, seed)
        our_module = ours(config)
        our_module.load_state_dict(stock_module.state_dict())
        return stock_module.to(dtype).eval(), our_module.to(dtype).eval()

    return build


@pytest.fixture
def config() -> MiniMaxM3VLConfig:
    return tiny_config()


@pytest.fixture(scope="session")
def make_patches() -> Callable[..., torch.Tensor]:
    """Random pixel patches for a grid of `(time, height, width)` rows."""

    def make(config: MiniMaxM3VLConfig, grid_thw: torch.Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        vision = config.vision_config
        width = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(int(grid_thw.prod(-1).sum()), width, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_inputs(make_patches) -> Callable[..., dict[str, torch.Tensor]]:
    """One row of random text with the placeholders of images and videos, and their pixels.

    Args of the fixture's value: the config; `images` and `videos`, rows of `(time, height, width)` in patches, which
    stand behind each other in the text, one ordinary token apart; `length`, tokens in all; `seed`; `dtype`.
    """

    def make(
        config: MiniMaxM3VLConfig,
        *,
        images: list[list[int]] | None = None,
        videos: list[list[int]] | None = None,
        length: int = 60,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ordinary = min(config.image_token_id, config.video_token_id)
        input_ids = torch.randint(1, ordinary, (1, length), generator=generator)
        inputs, position = {}, 2
        for grid, token_id, pixel_name, grid_name in (
            (images, config.image_token_id, "pixel_values", "image_grid_thw"),
            (videos, config.video_token_id, "pixel_values_videos", "video_grid_thw"),
        ):
            if not grid:
                continue
            grid_thw = torch.tensor(grid)
            for tokens in (grid_thw.prod(-1) // config.vision_config.spatial_merge_size**2).tolist():
                input_ids[0, position : position + tokens] = token_id
                position += tokens + 1
            inputs[pixel_name] = make_patches(config, grid_thw, seed=seed + len(inputs), dtype=dtype)
            inputs[grid_name] = grid_thw
        assert position <= length, f"the placeholders take {position} tokens, length is {length}"
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs}

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Random ordinary token ids `(batch, length)`."""

    def make(config: Any, batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, config.get_text_config().vocab_size, (batch, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Norm of the difference over the norm of the expected tensor."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        actual, expected = actual.detach().double(), expected.detach().double()
        return ((actual - expected).norm() / expected.norm()).item()

    return measure
