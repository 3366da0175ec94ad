"""Adapters of PEFT: merged as PEFT merges them, and exported for SGLang."""

import copy
import json

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.conversion.adapters import export_adapter, open_adapter
from modeling_minimax_m3.mxfp8 import dequantize_mxfp8, quantize_mxfp8

pytestmark = pytest.mark.compatibility
# These tests take the matrices of an adapter apart, which PEFT 0.18 stores in another orientation.
stores_as_newer_peft = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.19"), reason="PEFT 0.18 stores experts in another orientation"
)

ATTENTION = {"target_modules": r".*language_model.*self_attn\.[qkvo]_proj|model\.layers.*self_attn\.[qkvo]_proj"}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PARTS = {
    "attention": ATTENTION,
    "experts": EXPERTS,
    "both": {**EXPERTS, **ATTENTION},
    "one parameter of experts": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "fused MLPs and indexers": {"target_modules": ["gate_up_proj", "down_proj", "indexer.q_proj", "indexer.k_proj"]},
    "rsLoRA": {**EXPERTS, **ATTENTION, "use_rslora": True},
    "patterns": {**ATTENTION, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.o_proj": 2}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Float32 checkpoints of a whole model and of a language model, and the models."""
    torch.manual_seed(0)
    whole = MiniMaxM3SparseForConditionalGeneration(tiny_config()).eval()
    text = MiniMaxM3VLForCausalLM(tiny_config().text_config).eval()
    folder = tmp_path_factory.mktemp("bases")
    models = {"whole": whole, "text": text}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder, models


def make_adapter(model, folder, **options):
    """Save an adapter with random matrices. Returns the merged model of PEFT."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("base", ["whole", "text"])
def test_merged_as_peft_merges(bases, converted, base, part, tmp_path):
    folder, models = bases
    expected = make_adapter(models[base], tmp_path / "lora", **PARTS[part]).state_dict()
    merged = converted(folder / base, tmp_path / "merged", adapters=(tmp_path / "lora",))
    auto_class = AutoModelForImageTextToText if base == "whole" else AutoModelForCausalLM
    result = auto_class.from_pretrained(merged).state_dict()
    assert set(result) == set(expected)
    before = models[base].state_dict()
    changed = [name for name in result if not torch.equal(result[name], before[name])]
    assert changed == [name for name in expected if not torch.equal(expected[name], before[name])] != []
    for name in changed:
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=1e-6)  # sums in another order


def test_adapter_of_a_language_model_on_a_whole_one(bases, converted, read, tmp_path):
    folder, models = bases
    make_adapter(models["text"], tmp_path / "lora", **PARTS["both"])
    of_text = read(converted(folder / "text", tmp_path / "text", adapters=(tmp_path / "lora",)))
    on_whole = converted(folder / "whole", tmp_path / "whole", adapters=(tmp_path / "lora",), layout="text")
    before = {kind: read(converted(folder / kind, tmp_path / f"{kind}-text", layout="text")) for kind in models}
    for name, tensor in read(on_whole).items():
        delta, expected = tensor - before["whole"][name], of_text[name] - before["text"][name]
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)


def test_several_adapters_add_up(bases, converted, read, tmp_path):
    folder, models = bases
    for name in ("attention", "experts"):
        make_adapter(models["whole"], tmp_path / name, **PARTS[name])
    both = converted(folder / "whole", tmp_path / "ab", adapters=(tmp_path / "attention", tmp_path / "experts"))
    twice = converted(folder / "whole", tmp_path / "aa", adapters=(tmp_path / "attention",) * 2)
    once = read(converted(folder / "whole", tmp_path / "a", adapters=(tmp_path / "attention",)))
    plain = read(folder / "whole")
    name = "language_model.model.layers.2.self_attn.q_proj.weight"
    torch.testing.assert_close(read(twice)[name] - plain[name], 2 * (once[name] - plain[name]), rtol=0, atol=1e-6)
    assert torch.equal(read(both)[name], once[name])


@stores_as_newer_peft
@pytest.mark.parametrize("source", ["bf16", "mxfp8"])
@pytest.mark.parametrize("precision", ["bf16", "mxfp8"])
def test_merged_into_either_precision(synthetic, converted, read, source, precision, tmp_path):
    """The sum is made in float32 and rounded once."""
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config())
    make_adapter(model, tmp_path / "lora", **PARTS["both"])
    merged = read(
        converted(synthetic[source], tmp_path / "merged", adapters=(tmp_path / "lora",), precision=precision)
    )
    plain = read(converted(synthetic[source], tmp_path / "plain", precision="bf16"))
    matrices = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.2."
    a, b = (matrices[f"{prefix}self_attn.v_proj.lora_{matrix}.weight"] for matrix in "AB")
    attention = 2.0 * b @ a
    (outer,) = [name for name in matrices if name == f"{prefix}mlp.experts.lora_A.weight"]
    inner = outer.replace("experts.", "experts.base_layer.")
    of_gate_up = next(name for name in (outer, inner) if matrices[name].shape[1] == 64)
    a, b = matrices[of_gate_up].view(4, 4, 64), matrices[of_gate_up.replace("lora_A", "lora_B")].view(64, 4, 4)
    expert = 2.0 * b[:, :, 3] @ a[3]
    moe = "block_sparse_moe.experts.3."
    for name, delta in (
        ("self_attn.v_proj", attention),
        (f"{moe}w1", expert[:32]),
        (f"{moe}w3", expert[32:]),
        ("self_attn.index_q_proj", torch.zeros(64, 64)),
    ):
        name = f"language_model.model.layers.2.{name}.weight"
        expected = plain[name].float() + delta
        if precision == "bf16":
            torch.testing.assert_close(merged[name].float(), expected, rtol=2**-8, atol=1e-6)
        else:
            stored = dequantize_mxfp8(merged[name], merged[f"{name}_scale_inv"], torch.float32)
            torch.testing.assert_close(stored, dequantize_mxfp8(*quantize_mxfp8(expected), torch.float32))


def test_merged_and_cut_at_once(bases, converted, read, tmp_path):
    folder, models = bases
    make_adapter(models["whole"], tmp_path / "lora", **PARTS["both"])
    merged = converted(folder / "whole", tmp_path / "merged", adapters=(tmp_path / "lora",))
    cut = {"layers": 3, "experts": 2}
    then_cut = read(converted(merged, tmp_path / "then", **cut))
    at_once = read(converted(folder / "whole", tmp_path / "once", adapters=(tmp_path / "lora",), **cut))
    assert set(at_once) == set(then_cut) and all(torch.equal(at_once[name], then_cut[name]) for name in at_once)


@stores_as_newer_peft
def test_experts_as_older_peft_stores_them(bases, converted, read, tmp_path):
    """PEFT 0.18 took the rows of an expert's weight for its inputs, so B @ A is the transposed addition."""
    folder, models = bases
    make_adapter(models["whole"], tmp_path / "new", **PARTS["one parameter of experts"])
    matrices = load_file(tmp_path / "new" / "adapter_model.safetensors")
    old = {}
    for name in [name for name in matrices if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = matrices[name], matrices[other]  # (E * r, 32), (64, r * E)
        old[name] = b.view(64, 4, 4).permute(2, 1, 0).reshape(16, 64).contiguous()
        old[other] = a.view(4, 4, 32).permute(2, 1, 0).reshape(32, 16).contiguous()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "adapter_model.safetensors")
    (tmp_path / "old" / "adapter_config.json").write_bytes((tmp_path / "new" / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match="do not fit the weight"):
        open_adapter(tmp_path / "old", tiny_config())
    edit(tmp_path / "old", peft_version="0.18.1")
    results = [
        read(converted(folder / "whole", tmp_path / f"out-{k}", adapters=(tmp_path / k,))) for k in ("new", "old")
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-6)
    edit(tmp_path / "old", peft_version=None)
    with pytest.raises(ValueError, match="`peft_version` must say which PEFT"):
        open_adapter(tmp_path / "old", tiny_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "an adapter with `use_dora` cannot be merged here, got True"),
        ({"bias": "all"}, "`bias` must be 'none', got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` cannot be merged here"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4'"),
    ],
)
def test_other_adapters_are_refused_by_name(bases, changes, message, tmp_path):
    make_adapter(bases[1]["whole"], tmp_path / "lora", **ATTENTION)
    edit(tmp_path / "lora", **changes)
    with pytest.raises(ValueError, match=message):
        open_adapter(tmp_path / "lora", tiny_config())


def test_adapters_that_do_not_fit_are_refused_by_name(bases, tmp_path):
    folder = tmp_path / "lora"
    make_adapter(bases[1]["whole"], folder, **ATTENTION)
    with pytest.raises(ValueError, match=r"is on model.language_model.layers.3.self_attn.\w_proj, which this model"):
        open_adapter(folder, tiny_config(text={"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"matrices A \(4, 64\) and B \(\d+, 4\), which do not fit the weight"):
        open_adapter(folder, tiny_config(text={"head_dim": 64}))
    matrices = load_file(folder / "adapter_model.safetensors")
    one = next(name for name in matrices if "lora_A" in name)
    save_file({**matrices, "base_model.model.lm_head.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight, which is not a matrix of LoRA"):
        open_adapter(folder, tiny_config())
    for dropped, kept in ((one, "lora_A"), (one.replace("lora_A", "lora_B"), "lora_B")):
        save_file({k: v for k, v in matrices.items() if k != dropped}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"without its {kept}"):
            open_adapter(folder, tiny_config())
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a complete safetensors file"):
        open_adapter(folder, tiny_config())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        open_adapter(folder, tiny_config())


def test_numbers_that_are_none_are_named(bases, converted, tmp_path):
    folder, models = bases
    make_adapter(models["whole"], tmp_path / "lora", **ATTENTION)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    matrices = load_file(file)
    matrices["base_model.model.model.language_model.layers.2.self_attn.o_proj.lora_B.weight"][3] = torch.nan
    save_file(matrices, file)
    with pytest.raises(
        ValueError, match=r"lora: the adapter adds infinite or NaN values to .*layers.2.self_attn.o_proj.weight"
    ):
        converted(folder / "whole", tmp_path / "out", adapters=(tmp_path / "lora",))


def delta_of(folder, name, rank):
    """What SGLang computes: one rank and one scaling for all layers."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == rank and not settings["use_rslora"] and not settings["alpha_pattern"]
    matrices = load_file(folder / "adapter_model.safetensors")
    a, b = (matrices[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    assert a.shape[0] == b.shape[1] == rank
    return settings["lora_alpha"] / settings["r"] * b @ a


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 6}, "lora_alpha": 5}])
def test_export_for_sglang(bases, options, tmp_path):
    _, models = bases
    targets = r".*language_model.*self_attn\.(q|v|o)_proj"
    merged = make_adapter(models["whole"], tmp_path / "lora", **{"target_modules": targets} | options).state_dict()
    export_adapter(tmp_path / "lora", tmp_path / "out", tiny_config(), "sglang")
    before = models["whole"].state_dict()
    rank = max(4, *options.get("rank_pattern", {"": 0}).values())
    for layer in range(4):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):  # SGLang joins the first three
            name = f"model.language_model.layers.{layer}.self_attn.{module}.weight"
            delta = delta_of(tmp_path / "out", f"language_model.model.layers.{layer}.self_attn.{module}", rank)
            torch.testing.assert_close(delta, merged[name] - before[name], rtol=0, atol=1e-6)
    with pytest.raises(FileExistsError, match="exists"):
        export_adapter(tmp_path / "lora", tmp_path / "out", tiny_config(), "sglang")


@pytest.mark.parametrize(
    ("part", "engine", "message"),
    [
        ("attention", "vllm", "vLLM 0.33 loads no adapters for MiniMax-M3.*Merge"),
        (
            "experts",
            "sglang",
            r"cannot load the adapter on model.language_model.layers.1.mlp.experts.(gate_up|down)_proj.*Merge",
        ),
        ("fused MLPs and indexers", "sglang", "SGLang 0.5.23 takes adapters on q_proj, k_proj, v_proj, o_proj"),
        ("attention", "tgi", "`engine` must be one of sglang, vllm, got 'tgi'"),
    ],
)
def test_export_refuses_by_name(bases, part, engine, message, tmp_path):
    make_adapter(bases[1]["whole"], tmp_path / "lora", **PARTS[part])
    with pytest.raises(ValueError, match=message):
        export_adapter(tmp_path / "lora", tmp_path / "out", tiny_config(), engine)
    assert not (tmp_path / "out").exists()
