"""Experts in 4 bits of bitsandbytes and in 8 bits of torchao: what is quantized, what it computes, what is saved."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_utils import LoadStateDictConfig

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM, mxfp8_config
from modeling_minimax_m3.fused import quantized_products
from modeling_minimax_m3.layers.moe import MiniMaxM3VLExperts
from modeling_minimax_m3.layers.quantized import QuantizedExperts
from modeling_minimax_m3.loading import quantized_checkpoints
from modeling_minimax_m3.loading.quantized_checkpoints import refuse_places

from .mxfp8_cases import NOTHING, tensors_in

pytestmark = pytest.mark.compatibility

CLASSES = {"composite": MiniMaxM3SparseForConditionalGeneration, "text": MiniMaxM3VLForCausalLM}
CONFIG = tiny_config(text={"hidden_size": 128, "intermediate_size": 64, "num_local_experts": 8})
BITS_4 = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4 twice": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
BITS_8 = {"float8": "Float8WeightOnlyConfig", "int8": "Int8WeightOnlyConfig"}
KINDS = [*BITS_4, *BITS_8]
EXPERTS_ALONE = ["lm_head", r".*_proj", r".*linear_[12]", r".*fc[12]"]  # names of what is not to be quantized


def quantization(kind: str, unquantized: list[str] | None = None):
    """A `quantization_config` of Transformers, without any switch of ours."""
    if kind in BITS_4:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=unquantized, **BITS_4[kind])
    configs = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(configs, BITS_8[kind])(), modules_to_not_convert=unquantized)


def experts_of(model: nn.Module) -> dict[str, MiniMaxM3VLExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MiniMaxM3VLExperts)}


def expert_bytes(model: nn.Module) -> int:
    states = [module.state_dict().values() for module in experts_of(model).values()]
    return sum(tensor.numel() * tensor.element_size() for tensors in states for tensor in tensors)


@torch.no_grad()
def logits_of(model: nn.Module, tokens=None) -> torch.Tensor:
    if tokens is None:
        tokens = torch.randint(2, 400, (2, 70), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=tokens).logits


def assert_same_files(folder: Path, other: Path) -> None:
    tensors, others = tensors_in(folder), tensors_in(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and tensor.shape == others[name].shape, name
        assert torch.equal(tensor.flatten().view(torch.uint8), others[name].flatten().view(torch.uint8)), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in bfloat16."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in CLASSES}
    for name, folder in folders.items():
        CLASSES[name](CONFIG if name == "composite" else CONFIG.text_config).to(torch.bfloat16).save_pretrained(folder)
    return folders


@pytest.fixture
def load(plain):
    def load(kind: str | None = None, name: str = "text", unquantized=None, **options):
        if kind is not None:
            options["quantization_config"] = quantization(kind, unquantized)
        return CLASSES[name].from_pretrained(plain[name], **options).eval()

    return load


def by_the_library(kind: str, weights: torch.Tensor) -> torch.Tensor:
    """What the library makes of each expert alone, in bfloat16."""
    if kind in BITS_4:
        functional = pytest.importorskip("bitsandbytes").functional
        numbers = []
        for matrix in weights:
            options = {"compress_statistics": "twice" in kind, "quant_type": kind[:3]}
            numbers.append(functional.dequantize_4bit(*functional.quantize_4bit(matrix.contiguous(), **options)))
        return torch.stack(numbers)
    configs = pytest.importorskip("torchao.quantization")
    numbers = []
    for matrix in weights:
        layer = nn.Linear(*reversed(matrix.shape), bias=False)
        layer.weight = nn.Parameter(matrix.float())  # in which torchao computes the scales
        configs.quantize_(layer, getattr(configs, BITS_8[kind])())
        numbers.append(layer.weight.qdata.float() * layer.weight.scale.reshape(-1, 1))
    return torch.stack(numbers).to(torch.bfloat16)


class TestWhatIsQuantized:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", CLASSES)
    def test_bytes_of_experts(self, load, kind, name):
        """By the configs that the libraries' users write."""
        model = load(kind, name)
        assert all(type(experts) is QuantizedExperts for experts in experts_of(model).values())
        assert expert_bytes(model) <= (0.30 if kind in BITS_4 else 0.53) * expert_bytes(load(name=name))
        for experts in experts_of(model).values():
            assert not any(parameter.requires_grad for parameter in experts.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_numbers_are_those_of_the_library(self, load, kind):
        weights = {name: module.state_dict() for name, module in experts_of(load()).items()}
        for name, experts in experts_of(load(kind)).items():
            for weight in experts.weight_names:
                numbers = experts.stored_weight(weight).dequantize(torch.bfloat16)
                expected = by_the_library(kind, weights[name][weight])
                assert not torch.equal(numbers, weights[name][weight])
                if kind in BITS_4:
                    assert torch.equal(numbers, expected)
                else:  # torchao multiplies by the inverse of the scale, so a few numbers between two values differ
                    assert (numbers != expected).float().mean() < 5e-3
                    torch.testing.assert_close(numbers, expected, rtol=2**-3, atol=expected.abs().max().item() / 127)

    @pytest.mark.parametrize("kind", ["nf4", "float8"])
    def test_switched_off(self, load, kind):
        model = load(kind, unquantized=["lm_head", "mlp.experts"])
        assert all(type(experts) is MiniMaxM3VLExperts for experts in experts_of(model).values())
        assert expert_bytes(model) == expert_bytes(load())
        assert type(model.model.layers[1].self_attn.q_proj.weight) is not nn.Parameter

    @pytest.mark.parametrize("kind", ["nf4 twice", "float8"])
    def test_one_layer_switched_off(self, load, kind, tmp_path):
        """Experts of both kinds have their names on disk side by side."""
        model = load(kind, "composite", unquantized=["lm_head", "layers.2.mlp.experts"])
        kinds = {name[-13:-12]: type(experts) for name, experts in experts_of(model).items()}
        assert kinds == {"1": QuantizedExperts, "2": MiniMaxM3VLExperts, "3": QuantizedExperts}
        model.save_pretrained(tmp_path)
        names = [name for name in tensors_in(tmp_path) if ".block_sparse_moe.experts." in name]
        assert {re.search(r"layers\.(\d)", name)[1] for name in names if name.endswith(".w1.weight")} == {"2"}
        assert {re.search(r"layers\.(\d)", name)[1] for name in names if name.endswith("gate_up_proj")} == {"1", "3"}
        again = CLASSES["composite"].from_pretrained(tmp_path)
        assert torch.equal(logits_of(again), logits_of(model))

    @pytest.mark.parametrize("kind", ["nf4", "float8"])
    def test_stock_is_left_to_transformers(self, plain, stock, kind):
        model = stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
            plain["composite"], quantization_config=quantization(kind)
        )
        assert not any(isinstance(module, QuantizedExperts) for module in model.modules())

    @pytest.mark.parametrize("kind", ["nf4", "fp4 twice"])
    def test_bitsandbytes_gets_one_expert_at_a_time(self, load, kind, monkeypatch):
        """It counts elements in 32 bits."""
        functional = pytest.importorskip("bitsandbytes").functional
        sizes, quantize = [], functional.quantize_4bit
        record = lambda tensor, *rest, **options: sizes.append(tensor.numel()) or quantize(tensor, *rest, **options)  # noqa: E731
        monkeypatch.setattr(functional, "quantize_4bit", record)
        load(kind, unquantized=EXPERTS_ALONE)
        assert sizes == 3 * (8 * [64 * 128] + 8 * [2 * 64 * 128]) or sizes == 3 * (8 * [2 * 64 * 128] + 8 * [64 * 128])
        assert quantized_products.DEQUANTIZED_BYTES // 2 < 2**31

    def test_shapes_that_do_not_fit(self, tmp_path):
        config = tiny_config(text={"intermediate_size": 3}).text_config
        MiniMaxM3VLForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"layers.1.mlp.experts cannot be quantized.*64 x 3.*llm_int8_skip_modules"
        ):
            MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, quantization_config=quantization("nf4"))


class TestAnswers:
    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits(self, load, kind, implementation):
        """Bit for bit those of a plain model with the same numbers."""
        model = load(kind, unquantized=EXPERTS_ALONE, experts_implementation=implementation)
        reference = load(experts_implementation=implementation)
        for name, experts in experts_of(reference).items():
            quantized = model.get_submodule(name)
            for weight in quantized.weight_names:
                getattr(experts, weight).data = quantized.stored_weight(weight).dequantize(torch.bfloat16)
        assert not any(type(module).__name__ == "Linear4bit" for module in model.modules())
        assert torch.equal(logits_of(model), logits_of(reference))
        one = torch.tensor([[7]])
        assert torch.equal(logits_of(model, one), logits_of(reference, one))

    @pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
    def test_generation(self, load, kind):
        model = load(kind, unquantized=EXPERTS_ALONE)
        tokens = torch.randint(2, 400, (2, 20), generator=torch.Generator().manual_seed(1))
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = model.generate(input_ids=tokens, **options)
        for length in range(20, 28):
            expected = logits_of(model, generated[:, :length])[:, -1]
            chosen = expected.gather(1, generated[:, length, None])[:, 0]
            assert (chosen >= expected.amax(-1) - 2e-2).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_groups_of_experts(self, load, kind, monkeypatch):
        model = load(kind)
        expected = logits_of(model)
        monkeypatch.setattr(quantized_products, "DEQUANTIZED_BYTES", 3 * 128 * 128 * 2)
        assert torch.equal(logits_of(model), expected)

    def test_dtype_of_products(self, load):
        """That of bitsandbytes where the user has chosen one, else the model's: float32 is bitsandbytes' default."""
        from transformers import BitsAndBytesConfig

        for chosen, loaded, expected in [
            (None, torch.bfloat16, torch.bfloat16),
            (None, torch.float32, torch.float32),
            (torch.float32, torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32, torch.bfloat16),
        ]:
            quantization("nf4")
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=chosen)
            model = load(quantization_config=config, dtype=loaded)
            experts = model.model.layers[1].mlp.experts
            assert experts.compute_dtype == expected
            states, ids = torch.randn(4, 128), torch.tensor([[0, 3]] * 4)
            result = experts(states, ids, torch.full((4, 2), 0.5))
            assert result.dtype == torch.float32
            assert torch.equal(result, result.bfloat16().float()) == (expected == torch.bfloat16)


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", CLASSES)
    def test_round_trips(self, load, kind, name, tmp_path):
        """Twice, with the same bytes, and after a forward."""
        model = load(kind, name)
        expected = logits_of(model)
        for folder in (tmp_path / "first", tmp_path / "second"):
            model.save_pretrained(folder)
            model, info = CLASSES[name].from_pretrained(folder, output_loading_info=True)
            assert info == NOTHING
            assert all(type(experts) is QuantizedExperts for experts in experts_of(model).values())
            assert torch.equal(logits_of(model), expected)
        assert_same_files(tmp_path / "first", tmp_path / "second")

    @pytest.mark.parametrize("kind", KINDS)
    def test_names_and_dtypes(self, load, kind, tmp_path):
        load(kind, "composite").save_pretrained(tmp_path)
        start = "language_model.model.layers.1.block_sparse_moe.experts.down_proj"
        found = {name: value for name, value in tensors_in(tmp_path).items() if name.startswith(start)}
        described = {name.removeprefix(start): (value.dtype, tuple(value.shape)) for name, value in found.items()}
        if kind in BITS_8:
            dtype = torch.float8_e4m3fn if kind == "float8" else torch.int8
            assert described == {"": (dtype, (8, 128, 64)), f"_{kind}_scale": (torch.float32, (8, 128, 1))}
        elif "twice" in kind:
            assert described == {
                "": (torch.uint8, (8, 128, 32)),
                "_absmax": (torch.uint8, (8, 128)),
                "_nested_absmax": (torch.float32, (8, 1)),
                "_nested_offset": (torch.float32, (8,)),
            }
        else:
            assert described == {"": (torch.uint8, (8, 128, 32)), "_absmax": (torch.float32, (8, 128))}

    @pytest.mark.parametrize(
        "options",
        [{"max_shard_size": "20KB"}, {"save_original_format": False}],
        ids=lambda options: next(iter(options)),
    )
    @pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "float8"])
    def test_options(self, load, kind, options, tmp_path):
        model = load(kind, "composite")
        model.save_pretrained(tmp_path / "first", **options)
        assert (len(list((tmp_path / "first").glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
        again, info = CLASSES["composite"].from_pretrained(tmp_path / "first", output_loading_info=True)
        assert info == NOTHING
        assert torch.equal(logits_of(again), logits_of(model))
        again.save_pretrained(tmp_path / "second", **options)
        assert_same_files(tmp_path / "first", tmp_path / "second")

    @pytest.mark.parametrize("reloaded", [False, True], ids=["just quantized", "reloaded"])
    @pytest.mark.parametrize("kind", ["nf4", "nf4 twice"])
    def test_dequantized(self, load, plain, kind, reloaded, tmp_path):
        model = load(kind, "composite")
        if reloaded:
            model.save_pretrained(tmp_path / "quantized")
            model = CLASSES["composite"].from_pretrained(tmp_path / "quantized")
        stored = experts_of(model)
        model.dequantize()
        for name, experts in experts_of(model).items():
            assert type(experts) is MiniMaxM3VLExperts
            for weight in experts.state_dict():
                assert torch.equal(
                    getattr(experts, weight), stored[name].stored_weight(weight).dequantize(torch.bfloat16)
                )
        model.save_pretrained(tmp_path / "plain")
        assert tensors_in(tmp_path / "plain").keys() == tensors_in(plain["composite"]).keys()
        assert torch.equal(logits_of(CLASSES["composite"].from_pretrained(tmp_path / "plain")), logits_of(model))

    @pytest.mark.parametrize("kind", ["nf4", "float8"])
    def test_plain_experts_of_older_checkpoints(self, load, kind, tmp_path):
        """Their config names no experts to be left alone: the quantizer knew none."""
        model = load(kind, "composite", unquantized=["lm_head", "mlp.experts"])
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if key in config["quantization_config"]:
                config["quantization_config"][key] = ["lm_head"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = CLASSES["composite"].from_pretrained(tmp_path)
        assert all(type(experts) is MiniMaxM3VLExperts for experts in experts_of(again).values())
        assert torch.equal(logits_of(again), logits_of(model))

    @pytest.mark.parametrize(
        "gone",
        ["down_proj", "gate_up_proj", "down_proj_absmax", "gate_up_proj_nested_absmax", "gate_up_proj_nested_offset"],
    )
    def test_missing_tensor(self, load, gone, tmp_path):
        load("nf4 twice").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[f"model.layers.2.mlp.experts.{gone}"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"no tensor for model.layers.2.mlp.experts.{gone}, which experts in NF4"
        ):
            MiniMaxM3VLForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("kind", ["nf4", "nf4 twice"])
    def test_model_without_a_head(self, load, kind, tmp_path):
        from modeling_minimax_m3 import MiniMaxM3VLTextModel

        model = load(kind)
        model.save_pretrained(tmp_path)
        body = MiniMaxM3VLTextModel.from_pretrained(tmp_path)
        tokens = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


class TestPlaces:
    @pytest.mark.parametrize("kind", ["nf4 twice", "float8"])
    def test_device_map(self, load, kind, tmp_path):
        model = load(kind, "composite", device_map={"": "cpu"})
        model.save_pretrained(tmp_path)
        again = CLASSES["composite"].from_pretrained(tmp_path, device_map={"": "cpu"})
        assert torch.equal(logits_of(again), logits_of(load(kind, "composite")))

    @pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "float8"])
    def test_memory_of_a_device_map(self, load, kind):
        """`device_map="auto"` reckons with the bytes that the experts have."""
        model = load(kind)
        for name, module in experts_of(model).items():
            counted = sum(
                parameter.numel() * model.hf_quantizer.param_element_size(model, f"{name}.{leaf}", parameter)
                for leaf, parameter in module.state_dict().items()
            )
            assert counted == sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())

    @pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "int8"])
    def test_casts_and_copies(self, load, kind):
        model = load(kind)
        expected = logits_of(model)
        experts = model.model.layers[1].mlp.experts
        before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
        experts.half().float().double().bfloat16()
        for name, tensor in experts.state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert torch.equal(logits_of(copy.deepcopy(model)), expected)

    @pytest.mark.parametrize("kind", ["float8", "mxfp8"])
    def test_quantizing_to_the_disk_is_refused(self, load, kind, tmp_path):
        """Transformers would leave the weights of the checkpoint there."""
        devices = {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
        devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        config = mxfp8_config() if kind == "mxfp8" else quantization(kind)
        with pytest.raises(
            ValueError, match=r"`device_map` must not put model.layers.3.* on the disk.*save_pretrained"
        ):
            load(quantization_config=config, device_map=devices, offload_folder=tmp_path)

    @pytest.mark.parametrize("kind", ["nf4", "float8"])
    def test_spreading_over_processes_is_refused(self, load, kind):
        """The plans would cut the weights and leave the scales whole."""
        model = load(kind)
        spread = LoadStateDictConfig(device_mesh=object())
        with pytest.raises(NotImplementedError, match=r"layers.1.mlp.experts cannot be spread over processes.*mxfp8"):
            refuse_places(model, spread)
        refuse_places(model, LoadStateDictConfig())
        refuse_places(load(quantization_config=mxfp8_config()), spread)


class TestChoicesOfTorchao:
    """Configs by name of a module, and configs that experts cannot take."""

    @pytest.fixture
    def configs(self):
        return pytest.importorskip("torchao.quantization")

    @pytest.fixture
    def load_named(self, load, configs):
        def load_named(**by_name):
            from transformers import TorchAoConfig

            chosen = {name.replace("experts", r"re:.*mlp\.experts"): config for name, config in by_name.items()}
            return load(quantization_config=TorchAoConfig(configs.FqnToConfig(chosen)))

        return load_named

    def test_by_pattern(self, configs, load_named):
        model = load_named(experts=configs.Float8WeightOnlyConfig())
        assert {experts.weight_format.name for experts in experts_of(model).values()} == {"float8"}
        assert type(model.model.layers[1].self_attn.q_proj.weight) is nn.Parameter

    def test_by_patterns_of_weights(self, configs, load):
        from transformers import TorchAoConfig

        config = configs.Int8WeightOnlyConfig()
        names = {rf"re:.*\.experts\.{weight}": config for weight in QuantizedExperts.weight_names}
        model = load(quantization_config=TorchAoConfig(configs.FqnToConfig(names)))
        assert {experts.weight_format.name for experts in experts_of(model).values()} == {"int8"}

    def test_by_default(self, configs, load_named):
        model = load_named(_default=configs.Float8WeightOnlyConfig())
        assert all(type(experts) is QuantizedExperts for experts in experts_of(model).values())

    @pytest.mark.parametrize("name", ["Int4WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
    def test_refused(self, configs, load_named, name):
        with pytest.raises(ValueError, match=f"`quant_type` gives {name} to model.layers.1.mlp.experts.gate_up_proj"):
            load_named(experts=getattr(configs, name)())

    def test_one_weight_of_two(self, configs, load):
        from transformers import TorchAoConfig

        names = {r"re:.*\.experts\.down_proj": configs.Float8WeightOnlyConfig()}
        with pytest.raises(
            ValueError, match="gives NoneType to .*gate_up_proj and Float8WeightOnlyConfig to .*down_proj"
        ):
            load(quantization_config=TorchAoConfig(configs.FqnToConfig(names)))


class TestReports:
    """Experts that a quantizer leaves alone are reported once, with the bytes and the switch."""

    @pytest.fixture
    def warnings(self, monkeypatch) -> list[str]:
        messages: list[str] = []
        monkeypatch.setattr(quantized_checkpoints.logger, "warning_once", messages.append)
        return messages

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_to_report(self, load, warnings, kind, tmp_path):
        load(kind).save_pretrained(tmp_path)
        MiniMaxM3VLForCausalLM.from_pretrained(tmp_path)
        assert warnings == []

    @pytest.mark.parametrize("kind", ["nf4", "fp4 twice", "float8"])
    def test_switched_off(self, load, warnings, kind, tmp_path):
        model = load(kind, unquantized=["lm_head", "mlp.experts"])
        model.save_pretrained(tmp_path)
        MiniMaxM3VLForCausalLM.from_pretrained(tmp_path)
        switch = "llm_int8_skip_modules" if kind in BITS_4 else "modules_to_not_convert"
        assert len(warnings) == 2 and all(f"Take them out of `{switch}`" in message for message in warnings)
        assert f"torch.bfloat16: {expert_bytes(model):,} bytes" in warnings[0]
        assert "The checkpoint was saved so" in warnings[1] and "The checkpoint" not in warnings[0]
        (size,) = re.findall(r"([\d,]+) bytes", warnings[0])[1:]
        assert int(size.replace(",", "")) == pytest.approx(expert_bytes(load(kind)), rel=0.05)

    def test_8_bits_of_bitsandbytes(self, load, warnings):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        model = load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        (message,) = warnings
        assert f"{expert_bytes(model):,} bytes" in message
        assert "mxfp8_config()" in message and "BitsAndBytesConfig(load_in_4bit=True)" in message
