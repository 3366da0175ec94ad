"""Processing for MiniMax-M3: text, images and videos to model inputs. Importing it registers the processors.

    collator.py           batches for fine-tuning on chats with images and videos
    processor.py          the three together: placeholders in the text, counts, what serving engines ask for
    image_processing.py   images to patches
    video_processing.py   videos to patches; sampling.py: which frames
    video_decoding.py     videos from files; video_pyav.py, video_torchcodec.py: through these libraries
    video_metadata.py     the times of frames; video_orientation.py: turning them upright
    resize.py             the resize rule
    patches.py            cutting frames into patches
    media.py              nesting, decoding and checks of images and videos
    image_sources.py      paths, addresses, base64 text; downloads.py: from the web; media_limits.py: how much of it
    messages.py           what a chat may hold, checked before any media is loaded
    control_tokens.py     keeps control tokens that somebody typed text
    registration.py       tells Transformers' Auto classes about the processors
    chat_template.jinja   from messages to a prompt; chat_template.py: its loader
    special_tokens.py     the tokenizer's control tokens

Nothing here knows the model but for its configuration's class; the only shared facts are the sizes of patches, which
both read from their own files.
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
