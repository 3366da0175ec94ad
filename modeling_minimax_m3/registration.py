"""Tells Transformers about our classes, so that its Auto classes and pipelines return them.

Transformers has a model of the same name. Registering replaces what the Auto classes resolve to; stock's own classes
stay importable and go on working.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig
from processing_minimax_m3.registration import register_processors

from .loading.bnb_quantizer import register_bnb_quantizer
from .loading.fused_projections import with_fused_projections
from .loading.mxfp8_quantizer import register_quantizer
from .loading.torchao_quantizer import register_torchao_quantizer
from .models.multimodal import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLModel
from .models.sequence_classification import (
    MiniMaxM3VLForSequenceClassification,
    MiniMaxM3VLTextForSequenceClassification,
)
from .models.text import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextModel
from .models.vision import MiniMaxM3VLVisionModel


def register() -> None:
    """Register configurations, models, processors and checkpoint names. Calling it again changes nothing."""
    for config_class in (MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

    AutoModel.register(MiniMaxM3VLConfig, MiniMaxM3VLModel, exist_ok=True)
    AutoModel.register(MiniMaxM3VLTextConfig, MiniMaxM3VLTextModel, exist_ok=True)
    AutoModel.register(MiniMaxM3VLVisionConfig, MiniMaxM3VLVisionModel, exist_ok=True)
    AutoModelForCausalLM.register(MiniMaxM3VLTextConfig, MiniMaxM3VLForCausalLM, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(MiniMaxM3VLConfig, MiniMaxM3SparseForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MiniMaxM3VLTextConfig, MiniMaxM3VLTextForSequenceClassification, exist_ok=True
    )
    AutoModelForSequenceClassification.register(MiniMaxM3VLConfig, MiniMaxM3VLForSequenceClassification, exist_ok=True)

    register_processors()
    register_quantizer()
    register_bnb_quantizer()
    register_torchao_quantizer()

    # Transformers converts checkpoint names only for its own classes and for model types registered by hand.
    register_checkpoint_conversion_mapping(
        MiniMaxM3VLConfig.model_type,
        with_fused_projections(get_checkpoint_conversion_mapping(MiniMaxM3VLConfig.model_type)),
        overwrite=True,
    )
