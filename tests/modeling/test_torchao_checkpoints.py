"""Models quantized by torchao: a saved model loads again with the same numbers, and so does its own copy."""

import pytest
import torch
from transformers import TorchAoConfig

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM

quantization = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("model_class", [MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM])
@torch.no_grad()
def test_round_trips(model_class, kind, tmp_path):
    torch.manual_seed(0)
    config = tiny_config() if model_class is MiniMaxM3SparseForConditionalGeneration else tiny_config().text_config
    model_class(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    scheme = TorchAoConfig(getattr(quantization, kind)())
    model = model_class.from_pretrained(tmp_path / "plain", quantization_config=scheme)
    tokens = torch.randint(2, 400, (1, 70))
    expected = model(input_ids=tokens).logits
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        model = model_class.from_pretrained(folder)
        assert torch.equal(model(input_ids=tokens).logits, expected)
