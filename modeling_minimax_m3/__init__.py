"""MiniMax-M3 for Transformers. Importing this package registers its classes with the Auto classes."""

from .multimodal import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLModel
from .outputs import MiniMaxM3VLCausalLMOutputWithPast, MiniMaxM3VLModelOutputWithPast
from .pretrained import MiniMaxM3VLPreTrainedModel
from .registration import register
from .text import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextModel
from .vision import MiniMaxM3VLVisionModel

register()

__all__ = [
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLCausalLMOutputWithPast",
    "MiniMaxM3VLForCausalLM",
    "MiniMaxM3VLModel",
    "MiniMaxM3VLModelOutputWithPast",
    "MiniMaxM3VLPreTrainedModel",
    "MiniMaxM3VLTextModel",
    "MiniMaxM3VLVisionModel",
]
