"""Processing for MiniMax-M3: text, images and videos to model inputs."""

from .chat_template import load_chat_template
from .image_processing import MiniMaxM3VLImageProcessor
from .processor import MiniMaxM3VLProcessor
from .video_processing import MiniMaxM3VLVideoProcessor

__all__ = [
    "MiniMaxM3VLImageProcessor",
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLVideoProcessor",
    "load_chat_template",
]
