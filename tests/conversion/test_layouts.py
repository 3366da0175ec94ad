"""Names, shapes and dtypes: of the released files, of what models save, and of modules."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as stock_configuration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock_modeling

from configuration_minimax_m3 import released_config, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.conversion.layouts import is_quantized, released_dtype, released_shapes, stored_tensors

# Counted in the headers of the published files, MiniMaxAI/MiniMax-M3 and MiniMaxAI/MiniMax-M3-MXFP8.
BF16_TENSORS, BF16_VALUES, BF16_BYTES = 23_416, 427_040_140_160, 854_172_958_720
MXFP8_TENSORS = 45_838
MXFP8_VALUES = {"bfloat16": 3_323_221_760, "e4m3": 423_670_579_200, "scales": 13_239_705_600, "float32": 46_339_200}

CONFIGS = {
    "tiny": tiny_config(),
    "uneven": tiny_config(text={"num_hidden_layers": 3, "num_local_experts": 3, "shared_intermediate_size": 96}),
    "all dense": tiny_config(text={"mlp_layer_types": ["dense"] * 4, "layer_types": ["full_attention"] * 4}),
    "structured": tiny_config(text={"layer_types": ["minimax_m3_structured"] * 4}),
    "tied": tiny_config(text={"tie_word_embeddings": True}),
}


def shapes_of(state_dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def test_released_counts():
    shapes = released_shapes(released_config())
    values = {name: math.prod(shape) for name, shape in shapes.items()}
    assert (len(shapes), sum(values.values())) == (BF16_TENSORS, BF16_VALUES)
    assert sum(count * released_dtype(name).itemsize for name, count in values.items()) == BF16_BYTES

    quantized = {name for name, shape in shapes.items() if is_quantized(name, shape)}
    plain = {name: count for name, count in values.items() if name not in quantized}
    of_dtype = dict.fromkeys((torch.float32, torch.bfloat16), 0)
    for name, count in plain.items():
        of_dtype[released_dtype(name)] += count
    e4m3 = sum(values[name] for name in quantized)
    assert len(shapes) + len(quantized) == MXFP8_TENSORS
    assert {
        "bfloat16": of_dtype[torch.bfloat16],
        "e4m3": e4m3,
        "scales": e4m3 // 32,
        "float32": of_dtype[torch.float32],
    } == MXFP8_VALUES


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layouts_of_our_models(config, tmp_path):
    whole = MiniMaxM3SparseForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    assert shapes_of(load_file(tmp_path / "model.safetensors")) == released_shapes(config)

    for layout, model in (("modules", whole), ("text", MiniMaxM3VLForCausalLM(config.text_config))):
        parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # tied ones once
        parameters |= {name: tuple(tensor.shape) for name, tensor in model.named_buffers() if "e_score" in name}
        assert {tensor.name: tensor.shape for tensor in stored_tensors(config, layout)} == parameters


def test_layout_that_stock_saves(tmp_path):
    config = tiny_config()
    stock_config = stock_configuration.MiniMaxM3VLConfig(**config.to_dict())
    stock_modeling.MiniMaxM3SparseForConditionalGeneration(stock_config).save_pretrained(tmp_path)
    assert shapes_of(load_file(tmp_path / "model.safetensors")) == released_shapes(config)
