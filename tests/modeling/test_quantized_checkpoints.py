"""Models quantized by bitsandbytes: a saved model loads again, with the same numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM

bitsandbytes = pytest.importorskip("bitsandbytes")

CLASSES = {"composite": MiniMaxM3SparseForConditionalGeneration, "text": MiniMaxM3VLForCausalLM}
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that are not quantized. A row has two blocks of 64 values, so the order of scales shows."""
    torch.manual_seed(0)
    config = tiny_config(text={"hidden_size": 128, "num_hidden_layers": 2})
    folders = {}
    for name, model_class in CLASSES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        part = config if name == "composite" else config.text_config
        model_class(part).to(torch.bfloat16).save_pretrained(folders[name])
    return folders


@pytest.fixture(params=CLASSES)
def model_class(request) -> type[nn.Module]:
    return CLASSES[request.param]


@pytest.fixture
def quantize(folders, model_class):
    def load(kind: str, **options) -> nn.Module:
        name = next(name for name, value in CLASSES.items() if value is model_class)
        return model_class.from_pretrained(
            folders[name], quantization_config=BitsAndBytesConfig(**KINDS[kind], **options)
        )

    return load


def logits_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(2, 400, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(quantize, model_class, kind, tmp_path):
    """Also a second one, and after a forward, which changes the layers of bitsandbytes on some CPUs."""
    model = quantize(kind)
    expected = logits_of(model)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        assert torch.equal(logits_of(model), expected)
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert info == NOTHING
        assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "20KB"}, {"save_original_format": False}], ids=lambda options: next(iter(options))
)
def test_options_of_saving(quantize, model_class, options, tmp_path):
    model = quantize("nf4 twice")
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_stock_loads_what_is_saved(quantize, model_class, stock, kind, tmp_path):
    """Stock knows linear layers only, so the experts are left as they are."""
    model = quantize(kind, llm_int8_skip_modules=["lm_head", "mlp.experts"])
    model.save_pretrained(tmp_path)
    theirs = getattr(stock, model_class.__name__).from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("model_class", [MiniMaxM3SparseForConditionalGeneration], ids=["composite"])
def test_only_quantized_layers_are_saved_fused(quantize, model_class, tmp_path):
    """A fused layer that bitsandbytes left alone has the released names on disk, next to those that it quantized."""
    model = quantize("int8", llm_int8_skip_modules=["lm_head", "layers.0.mlp.gate_up_proj"])
    model.save_pretrained(tmp_path)
    layers = "language_model.model.layers."
    assert {name for name in names_in(tmp_path) if "gate_up" in name or "gate_proj" in name or ".up_proj" in name} == {
        f"{layers}0.mlp.gate_proj.weight",
        f"{layers}0.mlp.up_proj.weight",
        f"{layers}1.block_sparse_moe.shared_experts.gate_up_proj.weight",
        f"{layers}1.block_sparse_moe.shared_experts.gate_up_proj.SCB",
        f"{layers}1.block_sparse_moe.shared_experts.gate_up_proj.weight_format",
    }
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("reloaded", [False, True], ids=["just quantized", "reloaded"])
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_dequantized_is_saved_as_if_never_quantized(quantize, model_class, folders, kind, reloaded, tmp_path):
    model = quantize(kind)
    if reloaded:
        model.save_pretrained(tmp_path / "quantized")
        model = model_class.from_pretrained(tmp_path / "quantized")
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    plain = next(folder for name, folder in folders.items() if CLASSES[name] is model_class)
    assert names_in(tmp_path / "plain") == names_in(plain)
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path / "plain")), logits_of(model))


@pytest.mark.parametrize("model_class", [MiniMaxM3VLForCausalLM], ids=["text"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_after_an_evaluation(quantize, kind):
    model = quantize(kind)
    tokens = torch.randint(2, 400, (1, 70), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings().weight
    gradients = []
    for _ in range(2):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(embeddings.grad.clone())
        embeddings.grad = None
        logits_of(model)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
