"""The one place that tells Transformers about our processors, so that its Auto classes return them.

A saved processor names its parts by class, and our classes have the names of Transformers' own. So without this,
`MiniMaxM3VLProcessor.from_pretrained` would put Transformers' image and video processor into ours.
"""

from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers import MiniMaxM3VLConfig as StockConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from configuration_minimax_m3 import MiniMaxM3VLConfig

from .image_processing import MiniMaxM3VLImageProcessor
from .processor import MiniMaxM3VLProcessor
from .video_processing import MiniMaxM3VLVideoProcessor


def register_processors() -> None:
    """Register the three processors. Calling it again changes nothing."""
    # Transformers' configuration too: files that name no class are read by it unless our model is imported.
    for config_class in (MiniMaxM3VLConfig, StockConfig):
        AutoImageProcessor.register(
            config_class, image_processor_classes={"torchvision": MiniMaxM3VLImageProcessor}, exist_ok=True
        )
        AutoVideoProcessor.register(
            config_class, video_processor_classes={"torchvision": MiniMaxM3VLVideoProcessor}, exist_ok=True
        )
        AutoProcessor.register(config_class, MiniMaxM3VLProcessor, exist_ok=True)
    # AutoProcessor looks a saved class name up among the built-in names first, and would find stock's.
    PROCESSOR_MAPPING_NAMES.pop(MiniMaxM3VLConfig.model_type, None)
