"""Processing for MiniMax-M3: text, images and videos to model inputs. Importing it registers the processors.

    collator.py           batches for fine-tuning on chats with images and videos
    processor.py          text, images and videos together: placeholders in the text, counts for serving engines
    image_processing.py   from images to patches
    video_processing.py   from videos to patches; sampling.py chooses the frames
    video_decoding.py     from files to frames; video_pyav.py and video_torchcodec.py use these libraries
    video_metadata.py     the times of frames; video_orientation.py turns frames upright
    resize.py             the resize rule
    patches.py            from frames to patches
    media.py              nested inputs, decoding and checks of images and videos
    image_sources.py      paths, addresses, base64 text; downloads.py reads from the web
    media_limits.py       limits of what the processors read
    messages.py           checks of a chat before any media is loaded
    control_tokens.py     keeps control tokens in users' text ordinary text
    registration.py       registers the processors with Transformers' Auto classes
    chat_template.jinja   from messages to a prompt; chat_template.py loads it
    special_tokens.py     the control tokens of the tokenizer

This package does not know the model, except for the class of its configuration. The two share only the sizes of
patches, and each reads these from a file of its own.
"""

from .chat_template import load_chat_template
from .collator import MultimodalChatCollator
from .image_processing import MiniMaxM3VLImageProcessor
from .media_limits import MediaLimits, get_media_limits, set_media_limits
from .processor import MiniMaxM3VLProcessor
from .registration import register_processors
from .video_processing import MiniMaxM3VLVideoProcessor

register_processors()

__all__ = [
    "MediaLimits",
    "MiniMaxM3VLImageProcessor",
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLVideoProcessor",
    "MultimodalChatCollator",
    "get_media_limits",
    "load_chat_template",
    "set_media_limits",
]
