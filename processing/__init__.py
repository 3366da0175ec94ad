"""Processing for MiniMax-M3: text, images and videos to model inputs. Importing it registers the processors.

`README.md` has the role of each file.
"""

from .chat_template import load_chat_template
from .data.collator import MultimodalChatCollator
from .image_processing import MiniMaxM3VLImageProcessor
from .media_limits import MediaLimits, get_media_limits, set_media_limits
from .processor import MiniMaxM3VLProcessor
from .registration import register_processors
from .response_parser import MiniMaxM3ResponseParser
from .response_streamer import MiniMaxM3ResponseStreamer
from .response_template import RESPONSE_TEMPLATE, add_response_template
from .video_processing import MiniMaxM3VLVideoProcessor

register_processors()

__all__ = [
    "RESPONSE_TEMPLATE",
    "MediaLimits",
    "MiniMaxM3ResponseParser",
    "MiniMaxM3ResponseStreamer",
    "MiniMaxM3VLImageProcessor",
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLVideoProcessor",
    "MultimodalChatCollator",
    "add_response_template",
    "get_media_limits",
    "load_chat_template",
    "set_media_limits",
]
