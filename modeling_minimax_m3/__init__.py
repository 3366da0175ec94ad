"""MiniMax-M3 for Transformers. Importing this package registers its classes with the Auto classes."""

from .expert_offloading import ExpertOffload, offload_experts
from .loading.mxfp8_quantizer import mxfp8_config
from .models.multimodal import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLModel
from .models.outputs import MiniMaxM3VLCausalLMOutputWithPast, MiniMaxM3VLModelOutputWithPast
from .models.pretrained import MiniMaxM3VLPreTrainedModel
from .models.sequence_classification import (
    MiniMaxM3VLForSequenceClassification,
    MiniMaxM3VLTextForSequenceClassification,
)
from .models.text import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextModel
from .models.vision import MiniMaxM3VLVisionModel
from .registration import register
from .version import __version__ as __version__

register()

__all__ = [
    "ExpertOffload",
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLCausalLMOutputWithPast",
    "MiniMaxM3VLForCausalLM",
    "MiniMaxM3VLForSequenceClassification",
    "MiniMaxM3VLModel",
    "MiniMaxM3VLModelOutputWithPast",
    "MiniMaxM3VLPreTrainedModel",
    "MiniMaxM3VLTextForSequenceClassification",
    "MiniMaxM3VLTextModel",
    "MiniMaxM3VLVisionModel",
    "mxfp8_config",
    "offload_experts",
]
