"""Models whose experts and linear layers stay in MXFP8: the answers of the dequantized model, from half of its bytes."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import FineGrainedFP8Config

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLModel,
    mxfp8_config,
)
from modeling_minimax_m3.fused import quantized_products, weight_formats
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts
from modeling_minimax_m3.layers.mxfp8 import Mxfp8Experts, Mxfp8Linear, Mxfp8Module
from modeling_minimax_m3.loading import quantized_checkpoints

from .mxfp8_cases import LAYERS, NOT_QUANTIZED, NOTHING, tensors_in, write_released

pytestmark = pytest.mark.compatibility

CLASSES = {"composite": MiniMaxM3SparseForConditionalGeneration, "text": MiniMaxM3VLForCausalLM}
CONFIG = tiny_config(text={"num_local_experts": 8})
# Linear layers that the released checkpoint leaves in bfloat16, by their names in the model.
PLAIN = re.compile(r"(^|\.)(lm_head|vision_tower|multi_modal_projector)(\.|$)")


def same_bytes(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_same_files(folder: Path, other: Path) -> None:
    tensors, others = tensors_in(folder), tensors_in(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not same_bytes(tensors[name], others[name])] == []


def load(folder: Path, model_class=MiniMaxM3SparseForConditionalGeneration, **options):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert info == NOTHING
    return model.eval()


def quantization_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def changed(folder: Path, target: Path, tensors=lambda tensors: None, **quantization) -> Path:
    """A copy of a checkpoint with other tensors or another `quantization_config`."""
    shutil.copytree(folder, target)
    held = tensors_in(target)
    tensors(held)
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


def modules_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def expert_bytes(model: nn.Module) -> int:
    experts = modules_of(model, MiniMaxM3VLExperts).values()
    return sum(tensor.numel() * tensor.element_size() for module in experts for tensor in module.state_dict().values())


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**{name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}).logits


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp8") / "released"
    write_released(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in bfloat16."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in CLASSES}
    for name, folder in folders.items():
        CLASSES[name](CONFIG if name == "composite" else CONFIG.text_config).to(torch.bfloat16).save_pretrained(folder)
    return folders


@pytest.fixture
def inputs(make_inputs):
    return make_inputs(CONFIG, images=[[1, 4, 6]], videos=[[2, 4, 4]], length=120)


@pytest.fixture
def tokens():
    return {"input_ids": torch.randint(2, 400, (2, 70), generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def dequantized(monkeypatch) -> list[torch.Size]:
    """The shapes that are dequantized from now on."""
    shapes, dequantize = [], weight_formats.dequantize_mxfp8

    def record(values, scales, dtype):
        shapes.append(values.shape)
        return dequantize(values, scales, dtype)

    monkeypatch.setattr(weight_formats, "dequantize_mxfp8", record)
    return shapes


class TestAnswers:
    """Bit for bit those of the model that Transformers dequantizes while loading it."""

    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_logits(self, released, inputs, dtype, implementation):
        options = {"dtype": dtype, "experts_implementation": implementation}
        expected = logits_of(load(released, quantization_config=mxfp8_config(dequantize=True), **options), inputs)
        assert torch.equal(logits_of(load(released, **options), inputs), expected)

    def test_generation(self, released, inputs):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for quantization in (None, mxfp8_config(dequantize=True)):
            model = load(released, quantization_config=quantization)
            given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            outputs.append(model.generate(**given, **options))
        ours, expected = outputs
        assert torch.equal(ours.sequences, expected.sequences)
        assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits))

    def test_groups_of_experts(self, released, tokens, dequantized, monkeypatch):
        model = load(released)
        expected = logits_of(model, tokens)
        largest = max(shape.numel() for shape in dequantized if len(shape) == 3)
        assert largest == 8 * 64 * 64  # all experts at a time: they are small
        dequantized.clear()
        most = 3 * 64 * 64  # elements
        monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 2 * most)
        assert torch.equal(logits_of(model, tokens), expected)
        assert max(shape.numel() for shape in dequantized if len(shape) == 3) == most

    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
    def test_only_chosen_experts(self, released, dequantized, implementation):
        model = load(released, experts_implementation=implementation)
        logits_of(model, {"input_ids": torch.tensor([[5]])})
        chosen = CONFIG.text_config.num_experts_per_tok
        assert {shape[0] for shape in dequantized if len(shape) == 3} == {chosen}

    def test_routing_without_experts(self, released):
        """Expert parallelism marks pairs that other processes compute."""
        experts = load(released).model.language_model.layers[1].mlp.experts
        torch.manual_seed(0)
        states = torch.randn(5, 64, dtype=torch.bfloat16)
        ids = torch.tensor([[0, 8], [8, 8], [7, 3], [8, 2], [1, 0]])
        weights = torch.rand(5, 2)
        outputs = []
        for implementation in ("grouped_mm", "batched_mm", "eager"):
            experts.config._experts_implementation = implementation
            outputs.append(experts(states, ids, weights))
            assert torch.equal(outputs[-1][1], torch.zeros(64, dtype=torch.bfloat16))
            torch.testing.assert_close(outputs[-1], outputs[0], rtol=2e-2, atol=1e-4)
            assert experts(states, torch.full_like(ids, 8), weights).abs().sum() == 0

    def test_float32_states(self, released):
        """As after `prepare_model_for_kbit_training`: products in the dtype of the model, results in that of the states."""
        layers = load(released).model.language_model.layers
        states = torch.randn(6, 64).bfloat16()
        ids, weights = torch.tensor([[0, 3]] * 6), torch.full((6, 2), 0.5)
        for module, choice in ((layers[0].self_attn.q_proj, ()), (layers[1].mlp.experts, (ids, weights))):
            result = module(states.float(), *choice)
            assert result.dtype == torch.float32 and torch.equal(result.bfloat16(), module(states, *choice))

    def test_stock_still_dequantizes(self, released, stock, inputs):
        """Other models are Transformers' affair."""
        theirs = stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
            released, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
        ).to(torch.float32)  # Transformers 5.23 leaves the vision tower in bfloat16
        assert not modules_of(theirs, Mxfp8Module)
        ours = logits_of(load(released, dtype=torch.float32), inputs)
        torch.testing.assert_close(ours, logits_of(theirs, inputs), rtol=1e-5, atol=1e-5)


class TestLoading:
    def test_what_stays_in_mxfp8(self, released):
        model = load(released)
        linear = modules_of(model, nn.Linear)
        unquantized = [name for name, module in linear.items() if not isinstance(module, Mxfp8Linear)]
        # This checkpoint has quantized indexers.
        assert unquantized == [name for name in linear if PLAIN.search(name)]
        assert all(type(experts) is Mxfp8Experts for experts in modules_of(model, MiniMaxM3VLExperts).values())
        assert model.dtype == model.config.dtype == torch.bfloat16
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, Mxfp8Module):
                assert parameter.dtype == torch.bfloat16
            else:
                expected = torch.uint8 if name.endswith("_scale_inv") else torch.float8_e4m3fn
                assert parameter.dtype == expected and not parameter.requires_grad

    def test_quantized_indexers_are_not_trained(self, released):
        model = load(released)
        model.set_indexer_training(0.1)
        indexer = model.model.language_model.layers[3].self_attn.indexer
        assert {name for name, parameter in indexer.named_parameters() if parameter.requires_grad} == {
            "q_norm.weight",
            "k_norm.weight",
        }

    @pytest.mark.parametrize("name", CLASSES)
    def test_bytes_of_experts(self, released, plain, name):
        whole = expert_bytes(load(plain[name], CLASSES[name]))
        assert expert_bytes(load(plain[name], CLASSES[name], quantization_config=mxfp8_config())) <= 0.52 * whole
        if name == "composite":
            assert expert_bytes(load(released)) <= 0.52 * whole

    @pytest.mark.parametrize("config", [mxfp8_config, FineGrainedFP8Config], ids=lambda config: config.__name__)
    def test_config_without_a_list(self, released, plain, config, tmp_path):
        """It takes away the list of the checkpoint, which may quantize more layers than the released one."""
        load(released, quantization_config=config()).save_pretrained(tmp_path / "first")
        assert_same_files(tmp_path / "first", released)
        assert sorted(quantization_in(tmp_path / "first")["ignored_layers"]) == sorted(NOT_QUANTIZED)
        names = [*NOT_QUANTIZED, f"{LAYERS}0.mlp.up_proj", f"{LAYERS}2.block_sparse_moe.experts", "index_q_proj"]
        model = load(plain["composite"], quantization_config=mxfp8_config(modules_to_not_convert=names))
        model.save_pretrained(tmp_path / "other")
        again = load(tmp_path / "other", quantization_config=config())
        assert again.state_dict().keys() == model.state_dict().keys()

    def test_model_without_a_head(self, plain, tokens, tmp_path):
        model = load(plain["composite"], quantization_config=mxfp8_config())
        model.save_pretrained(tmp_path)
        for quantization in (None, mxfp8_config()):
            body = MiniMaxM3VLModel.from_pretrained(tmp_path, quantization_config=quantization)
            assert body.state_dict().keys() == model.model.state_dict().keys()
            expected = model.model(**tokens).last_hidden_state
            assert torch.equal(body(**tokens).last_hidden_state, expected)

    def test_float32_routers(self, released, inputs, tmp_path):
        """So they are released. They take the dtype of the model."""

        def widen(tensors):
            for name in tensors:
                if name.endswith("block_sparse_moe.gate.weight"):
                    tensors[name] = tensors[name].float()

        model = load(changed(released, tmp_path / "changed", widen))
        assert model.model.language_model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
        assert torch.equal(logits_of(model, inputs), logits_of(load(released), inputs))

    def test_unused_weights_of_the_release(self, released, tmp_path):
        def add(tensors):
            tensors["mtp.layers.0.proj.weight"] = torch.zeros(32, 32).to(torch.float8_e4m3fn)
            tensors["mtp.layers.0.proj.weight_scale_inv"] = torch.zeros(32, 1, dtype=torch.uint8)

        load(changed(released, tmp_path / "changed", add))

    def test_file_without_scales(self, released, tmp_path):
        folder = changed(
            released, tmp_path / "changed", lambda tensors: tensors.pop(f"{LAYERS}0.self_attn.q_proj.weight_scale_inv")
        )
        with pytest.raises(
            ValueError, match="no tensor for .*layers.0.self_attn.q_proj.weight_scale_inv .*ignored_layers"
        ):
            load(folder)

    def test_scales_of_an_ignored_layer(self, released, tmp_path):
        folder = changed(released, tmp_path / "changed", ignored_layers=[*NOT_QUANTIZED, f"{LAYERS}1.self_attn"])
        with pytest.raises(ValueError, match="scales for .*layers.1.self_attn.*ignored_layers"):
            load(folder)

    def test_blocks_of_another_size(self, released, tmp_path):
        folder = changed(released, tmp_path / "changed", weight_block_size=[128, 128])
        with pytest.raises(ValueError, match=r"`weight_block_size` of MXFP8 must be \(1, 32\), got \[128, 128\]"):
            load(folder)

    def test_dequantizing_a_plain_checkpoint(self, plain):
        with pytest.raises(ValueError, match="`dequantize=True` is for checkpoints in MXFP8.*not quantized"):
            load(plain["composite"], quantization_config=mxfp8_config(dequantize=True))

    def test_a_text_in_place_of_names(self):
        with pytest.raises(ValueError, match="`modules_to_not_convert` must be a list of names, got 'lm_head'"):
            mxfp8_config("lm_head")

    def test_part_of_a_quantized_model(self, released):
        with pytest.raises(ValueError, match="quantized weights"):
            MiniMaxM3VLForCausalLM.from_pretrained(released)

    def test_offloaded(self, released, tokens, tmp_path):
        """Accelerate moves weights to the device for each call, and gives them back to be saved."""
        layers = {f"model.language_model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
        others = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.norm")
        devices = (
            {f"model.{name}": "cpu" for name in (*others, "language_model.rotary_emb")} | {"lm_head": "cpu"} | layers
        )
        model = load(released, device_map=devices, offload_folder=tmp_path / "offload")
        experts = model.model.language_model.layers[3].mlp.experts
        assert experts._parameters["down_proj"].is_meta and experts.down_proj.dtype == torch.float8_e4m3fn
        assert torch.equal(logits_of(model, tokens), logits_of(load(released), tokens))
        model.save_pretrained(tmp_path / "saved")
        assert_same_files(tmp_path / "saved", released)


class TestSaving:
    def test_same_bytes_names_and_config(self, released, inputs, tmp_path):
        """Twice, and after a forward."""
        folder = released
        for target in (tmp_path / "first", tmp_path / "second"):
            model = load(folder)
            expected = logits_of(model, inputs)
            model.save_pretrained(target)
            assert_same_files(target, released)
            saved = quantization_in(target)
            assert {name: saved[name] for name in quantization_in(released)} == quantization_in(released)
            folder = target
        assert torch.equal(logits_of(load(folder), inputs), expected)

    def test_shards(self, released, tmp_path):
        load(released).save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_same_files(tmp_path, released)
        model = load(tmp_path)
        model.save_pretrained(tmp_path / "again")
        assert_same_files(tmp_path / "again", released)

    def test_module_names(self, released, inputs, tmp_path):
        model = load(released)
        model.save_pretrained(tmp_path, save_original_format=False)
        assert set(tensors_in(tmp_path)) == set(model.state_dict())
        for quantization in (None, mxfp8_config(dequantize=True)):
            again = load(tmp_path, quantization_config=quantization)
            assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))

    def test_dequantized_afterwards(self, released, inputs, tmp_path):
        model = load(released)
        expected = logits_of(model, inputs)
        model.dequantize()
        assert not modules_of(model, Mxfp8Module) and torch.equal(logits_of(model, inputs), expected)
        model.save_pretrained(tmp_path)
        load(released, quantization_config=mxfp8_config(dequantize=True)).save_pretrained(tmp_path / "loaded")
        assert_same_files(tmp_path, tmp_path / "loaded")


class TestQuantizingWhileLoading:
    @pytest.mark.parametrize("name", CLASSES)
    def test_round_trip(self, plain, name, tokens, tmp_path):
        model = load(plain[name], CLASSES[name], quantization_config=mxfp8_config())
        unquantized = {n for n, module in modules_of(model, nn.Linear).items() if not isinstance(module, Mxfp8Linear)}
        assert unquantized == {n for n in modules_of(model, nn.Linear) if PLAIN.search(n)}
        expected = logits_of(model, tokens)
        model.save_pretrained(tmp_path / "first")
        again = load(tmp_path / "first", CLASSES[name])
        assert torch.equal(logits_of(again, tokens), expected)
        again.save_pretrained(tmp_path / "second")
        assert_same_files(tmp_path / "first", tmp_path / "second")
        unpacked = load(tmp_path / "first", CLASSES[name], quantization_config=mxfp8_config(dequantize=True))
        assert torch.equal(logits_of(unpacked, tokens), expected)

    def test_layout_is_the_released_one(self, released, plain, tmp_path):
        model = load(plain["composite"], quantization_config=mxfp8_config(modules_to_not_convert=NOT_QUANTIZED))
        model.save_pretrained(tmp_path)
        tensors, others = tensors_in(tmp_path), tensors_in(released)
        assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in others.items()
        }
        saved = quantization_in(tmp_path)
        assert {name: saved[name] for name in quantization_in(released)} == quantization_in(released)

    def test_default_list_has_names_on_disk(self, plain, tmp_path):
        load(plain["composite"], quantization_config=mxfp8_config()).save_pretrained(tmp_path)
        unquantized = [
            name.removesuffix(".weight")
            for name, tensor in tensors_in(tmp_path).items()
            if tensor.ndim >= 2 and tensor.element_size() > 1 and f"{name}_scale_inv" not in tensors_in(tmp_path)
        ]
        listed = quantization_in(tmp_path)["ignored_layers"]
        assert all(any(f"{name}.".startswith(f"{entry}.") for entry in listed) for name in unquantized)
        assert all(any(f"{name}.".startswith(f"{entry}.") for name in unquantized) for entry in listed)

    def test_numbers_are_close(self, plain):
        """Values of 3 bits behind the leading one are off by 1/16 at most, the smallest of a group by less than that."""
        model = load(plain["text"], CLASSES["text"], quantization_config=mxfp8_config())
        names = [f"{name}.{weight}" for name, m in modules_of(model, Mxfp8Module).items() for weight in m.weight_names]
        weights = load(plain["text"], CLASSES["text"]).state_dict()
        model.dequantize()
        for name in names:
            distance, largest = (
                (model.state_dict()[name] - weights[name]).abs().float(),
                weights[name].abs().float().amax(),
            )
            assert (distance <= weights[name].abs() / 16 + largest * 2.0**-15).all(), name
            assert distance.sum() > 0

    @pytest.mark.parametrize(
        "name, plain_layer",
        [
            (f"{LAYERS}0.mlp.gate_proj", "layers.0.mlp.gate_up_proj"),
            ("model.language_model.layers.0.mlp.gate_up_proj", "layers.0.mlp.gate_up_proj"),
            (r".*layers\.0\.mlp\.gate_up_proj", "layers.0.mlp.gate_up_proj"),
            (f"{LAYERS}1.block_sparse_moe.experts", "layers.1.mlp.experts"),
            ("mlp.experts", "layers.1.mlp.experts"),
        ],
    )
    def test_named_modules_stay(self, plain, name, plain_layer, tokens, tmp_path):
        names = [*NOT_QUANTIZED, name]
        model = load(plain["composite"], quantization_config=mxfp8_config(modules_to_not_convert=names))
        layer = model.get_submodule(f"model.language_model.{plain_layer}")
        assert type(layer) in (nn.Linear, MiniMaxM3VLExperts)
        assert isinstance(model.model.language_model.layers[1].self_attn.q_proj, Mxfp8Linear)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(load(tmp_path), tokens), logits_of(model, tokens))

    def test_rows_that_do_not_fit(self, plain):
        with pytest.raises(ValueError, match="vision_tower.* has rows of 48 values.*modules_to_not_convert"):
            load(plain["composite"], quantization_config=mxfp8_config(modules_to_not_convert=["lm_head"]))


class TestCasts:
    def test_weights_keep_their_dtypes(self, released):
        model = load(released)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.element_size() == 1}
        model.model.language_model.layers.half().float().double()
        model.to(torch.float32)
        after = model.state_dict()
        assert before and all(same_bytes(tensor, after[name]) for name, tensor in before.items())
        assert {after[name].dtype for name in after.keys() - before.keys()} == {torch.float32}
        with pytest.raises(ValueError, match="not supported for quantized"):
            model.half()

    def test_copies(self, released, tokens):
        model = load(released)
        assert torch.equal(logits_of(copy.deepcopy(model), tokens), logits_of(model, tokens))


class TestPlainExperts:
    """A quantizer that leaves the experts alone is reported once, with the bytes and the switch."""

    @pytest.fixture
    def warnings(self, monkeypatch) -> list[str]:
        messages = []
        monkeypatch.setattr(quantized_checkpoints.logger, "warning_once", messages.append)
        return messages

    def test_left_out_by_name(self, plain, warnings):
        names = [*NOT_QUANTIZED, "mlp.experts"]
        model = load(plain["composite"], quantization_config=mxfp8_config(modules_to_not_convert=names))
        (message,) = warnings
        assert f"{expert_bytes(model):,} bytes" in message and "modules_to_not_convert" in message
        quantized = expert_bytes(load(plain["composite"], quantization_config=mxfp8_config()))
        assert f"{quantized:,} bytes" in message
        assert len(warnings) == 1

    def test_not_where_nothing_is_quantized(self, plain, released, warnings):
        load(plain["text"], CLASSES["text"])
        load(released)
        load(released, quantization_config=mxfp8_config(dequantize=True))
        assert warnings == []
