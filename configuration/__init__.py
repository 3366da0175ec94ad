"""Configuration of MiniMax-M3: text, vision and whole model, and presets."""

from .multimodal import MiniMaxM3VLConfig
from .presets import released_config, small_config, tiny_config
from .text import MiniMaxM3VLTextConfig
from .vision import MiniMaxM3VLVisionConfig

__all__ = [
    "MiniMaxM3VLConfig",
    "MiniMaxM3VLTextConfig",
    "MiniMaxM3VLVisionConfig",
    "released_config",
    "small_config",
    "tiny_config",
]
