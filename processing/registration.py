"""Registers our processors with Transformers, so that its Auto classes return them.

A saved processor names its parts by class, and our classes have the same names as Transformers' own. Without the
registration, `MiniMaxM3VLProcessor.from_pretrained` would put Transformers' image and video processors into ours.
"""

from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers import MiniMaxM3VLConfig as StockConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from configuration_minimax_m3 import MiniMaxM3VLConfig

from .image_processing import MiniMaxM3VLImageProcessor
from .processor import MiniMaxM3VLProcessor
from .video_processing import MiniMaxM3VLVideoProcessor


def register_processors() -> None:
    """Registers the three processors. A second call changes nothing."""
    # Also for Transformers' configuration, which reads files that name no class until our model is imported.
    for config_class in (MiniMaxM3VLConfig, StockConfig):
        AutoImageProcessor.register(
            config_class, image_processor_classes={"torchvision": MiniMaxM3VLImageProcessor}, exist_ok=True
        )
        AutoVideoProcessor.register(
            config_class, video_processor_classes={"torchvision": MiniMaxM3VLVideoProcessor}, exist_ok=True
        )
        AutoProcessor.register(config_class, MiniMaxM3VLProcessor, exist_ok=True)
    # AutoProcessor first looks a saved class name up among the built-in names, where it would find stock's class.
    PROCESSOR_MAPPING_NAMES.pop(MiniMaxM3VLConfig.model_type, None)
