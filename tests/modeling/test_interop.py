"""Checkpoints of stock Transformers load here and the other way round: the same keys on disk, the same outputs."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM, MiniMaxM3VLModel

pytestmark = pytest.mark.compatibility

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


@pytest.fixture(params=["composite", "text"])
def pair(request, make_pair, make_inputs, config):
    """(stock model, our model, inputs) with equal weights."""
    if request.param == "composite":
        ours, part = MiniMaxM3SparseForConditionalGeneration, config
        inputs = make_inputs(config, images=[[1, 4, 6]], videos=[[2, 4, 4]], length=120)
    else:
        ours, part = MiniMaxM3VLForCausalLM, config.text_config
        inputs = make_inputs(config, length=120)
    return *make_pair(ours, part), inputs


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal_logits(model, reference, inputs) -> None:
    with torch.no_grad():
        logits, expected = model(**inputs).logits, reference(**inputs).logits
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("direction", ["stock to ours", "ours to stock"])
def test_round_trip(pair, tmp_path, direction, sharded):
    stock_model, our_model, inputs = pair
    source, target = (stock_model, our_model) if direction == "stock to ours" else (our_model, stock_model)
    source.save_pretrained(tmp_path, **({"max_shard_size": "200KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded, info = type(target).from_pretrained(tmp_path, output_loading_info=True)
    assert info == NOTHING
    for name, value in source.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert_equal_logits(loaded, source, inputs)


def test_files_are_the_same(pair, tmp_path):
    stock_model, our_model, _ = pair
    for model, folder in ((stock_model, "stock"), (our_model, "ours")):
        model.save_pretrained(tmp_path / folder)
    torch.testing.assert_close(saved_tensors(tmp_path / "ours"), saved_tensors(tmp_path / "stock"), rtol=0, atol=0)


def test_composite_files_have_the_released_names(make_pair, config, tmp_path):
    make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1].save_pretrained(tmp_path)
    names = set(saved_tensors(tmp_path))
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.1.block_sparse_moe.e_score_correction_bias",
        "language_model.model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "language_model.model.layers.1.block_sparse_moe.gate.weight",
        "language_model.model.layers.1.block_sparse_moe.shared_experts.up_proj.weight",
        "language_model.model.layers.2.self_attn.index_q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "patch_merge_mlp.linear_2.bias",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } <= names


def test_backbone_loads_from_the_whole_checkpoint(make_pair, config, tmp_path):
    _, model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)
    model.save_pretrained(tmp_path)
    backbone, info = MiniMaxM3VLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    torch.testing.assert_close(backbone.state_dict(), model.model.state_dict(), rtol=0, atol=0)


def test_multi_token_prediction_weights_are_left_alone(pair, tmp_path):
    _, model, _ = pair
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.layers.0.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert type(model).from_pretrained(tmp_path, output_loading_info=True)[1] == NOTHING


@pytest.mark.parametrize("edit", ["missing", "unexpected", "mismatched"])
def test_damaged_files_are_reported_as_stock_reports_them(pair, tmp_path, edit):
    stock_model, our_model, _ = pair
    our_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    if edit == "missing":
        del tensors[name]
    elif edit == "unexpected":
        tensors[name.replace("q_proj", "gate")] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    expected = type(stock_model).from_pretrained(tmp_path, **options)[1]
    info = type(our_model).from_pretrained(tmp_path, **options)[1]
    assert info == expected
    assert {key for key, values in info.items() if values} == {f"{edit}_keys"}


def test_released_style_config_file(make_pair, make_inputs, tmp_path):
    """The released file names the sparse layers by the legacy keys."""
    config = tiny_config()
    stock_model, our_model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)
    our_model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values["text_config"]
    text["moe_layer_freq"] = [int(kind == "sparse") for kind in text.pop("mlp_layer_types")]
    text["sparse_attention_config"] = {
        "use_sparse_attention": True,
        "sparse_attention_freq": [int(kind == "minimax_m3_sparse") for kind in text.pop("layer_types")],
        "sparse_num_index_heads": text.pop("index_n_heads"),
        "sparse_index_dim": text.pop("index_head_dim"),
        "sparse_block_size": text.pop("index_block_size"),
        "sparse_topk_blocks": text.pop("index_topk_blocks"),
        "sparse_local_block": text.pop("index_local_blocks"),
        "sparse_init_block": 0,
        "sparse_score_type": "max",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert info == NOTHING
    assert_equal_logits(loaded, stock_model, make_inputs(config, images=[[1, 4, 4]], length=120))


class TestLoadingOptions:
    @pytest.fixture
    def folder(self, pair, tmp_path):
        pair[1].save_pretrained(tmp_path)
        return tmp_path

    @pytest.fixture
    def auto_class(self, pair):
        return AutoModelForCausalLM if isinstance(pair[1], MiniMaxM3VLForCausalLM) else AutoModelForImageTextToText

    @pytest.mark.parametrize(
        "options",
        [{"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": "auto"}, {"use_safetensors": True}],
        ids=lambda options: next(iter(options)),
    )
    def test_outputs_are_equal(self, pair, folder, auto_class, options):
        _, model, inputs = pair
        loaded = auto_class.from_pretrained(folder, **options)
        assert type(loaded) is type(model)
        assert loaded.dtype == torch.float32
        # Buffers that no file holds are computed after loading.
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(loaded.get_buffer(name), buffer)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)

    def test_dtype_auto_reads_the_file(self, pair, auto_class, tmp_path):
        pair[1].to(torch.bfloat16).save_pretrained(tmp_path)
        assert auto_class.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
        assert auto_class.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16

    def test_bfloat16_equals_stock(self, pair, auto_class, folder):
        stock_model, _, inputs = pair
        loaded = auto_class.from_pretrained(folder, dtype=torch.bfloat16)
        reference = type(stock_model).from_pretrained(folder, dtype=torch.bfloat16)
        float_inputs = {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in inputs.items()}
        with torch.no_grad():
            logits, expected = (model(**float_inputs).logits.float() for model in (loaded, reference))
        # Roundings of bfloat16 flip some selections, so most tokens agree and not all.
        error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < 3e-2


def test_adapters_go_both_ways(make_pair, make_inputs, config, tmp_path):
    """An adapter trained on one model names modules of the other."""
    stock_model, our_model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)
    inputs = make_inputs(config, images=[[1, 4, 4]], length=120)
    for source, target, folder in ((stock_model, our_model, "stock"), (our_model, stock_model, "ours")):
        lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_up_proj", "merge_linear_1"])
        adapted = get_peft_model(source, lora)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        adapted.save_pretrained(tmp_path / folder)
        adapted.eval()
        received = PeftModel.from_pretrained(target, tmp_path / folder).eval()
        assert_equal_logits(received, adapted, inputs)
        with torch.no_grad(), received.disable_adapter():
            plain = received(**inputs).logits
        with torch.no_grad():
            assert not torch.allclose(received(**inputs).logits, plain, atol=1e-2)
        adapted.unload()
        received.unload()
