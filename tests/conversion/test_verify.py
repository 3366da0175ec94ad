"""Checkpoints that are cut off, renamed, incomplete or changed are refused, and the message names the file."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.conversion.convert import Conversion, convert
from modeling_minimax_m3.conversion.manifest import MANIFEST, verify
from modeling_minimax_m3.conversion.source import open_checkpoint


@pytest.fixture(params=["bf16", "mxfp8"])
def folder(request, synthetic, tmp_path):
    """A checkpoint that the test may damage."""
    shutil.copytree(synthetic[request.param], tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) >= 4
    return tmp_path / "checkpoint"


def refuse(folder, message, error=ValueError, *, manifest=True):
    """Both the check and a conversion refuse the folder; with `manifest` False also without its manifest."""
    for has_manifest in (True,) if manifest else (True, False):
        if not has_manifest:
            (folder / MANIFEST).unlink()
        for attempt in (lambda: verify(folder, show_progress=False), lambda: convert_to(folder)):
            with pytest.raises(error, match=message):
                attempt()
    assert not list(folder.parent.glob("out*"))


def convert_to(folder):
    convert(folder, folder.parent / "out", Conversion(), show_progress=False)


def nth(folder, number):
    """One of the files of weights."""
    return sorted(folder.glob("*.safetensors"))[number]


def change_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_complete_checkpoints_pass(folder):
    checkpoint, has_manifest = verify(folder, show_progress=False)
    assert has_manifest and checkpoint.layout == "released"
    (folder / MANIFEST).unlink()
    assert verify(folder, show_progress=False)[1] is False


def test_manifest_lists_every_file(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {file.name for file in folder.iterdir()} - {MANIFEST}
    assert manifest["weights"] == len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.parametrize("cut", [1, 10_000], ids=["one byte", "many bytes"])
def test_cut_off(folder, cut):
    file = nth(folder, 0)
    file.write_bytes(file.read_bytes()[:-cut])
    refuse(folder, file.name, manifest=False)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_cut_off_in_the_header(folder, length):
    nth(folder, 0).write_bytes(nth(folder, 0).read_bytes()[:length])
    refuse(folder, nth(folder, 0).name, manifest=False)


def test_longer(folder):
    with nth(folder, 0).open("ab") as file:
        file.write(b"\0")
    refuse(folder, nth(folder, 0).name, manifest=False)


def test_missing(folder):
    file = nth(folder, 0)
    file.unlink()
    refuse(folder, f"{file.name} is missing", FileNotFoundError, manifest=False)


def test_renamed(folder):
    file = nth(folder, 0)
    file.rename(folder / "other.safetensors")
    refuse(folder, f"{file.name} is missing", FileNotFoundError, manifest=False)


def test_swapped_names(folder):
    files = sorted(folder.glob("*.safetensors"))[:2]
    files[0].rename(folder / "aside")
    files[1].rename(files[0])
    (folder / "aside").rename(files[1])
    refuse(folder, files[0].name, manifest=False)


def test_added(folder):
    shutil.copy(nth(folder, 0), folder / "extra.safetensors")
    refuse(folder, "extra.safetensors is not in model.safetensors.index.json: it was renamed", manifest=False)


def test_changed_values_are_found_by_the_hash(folder):
    change_last_byte(nth(folder, 2))
    refuse(folder, f"{nth(folder, 2).name} was changed: its SHA-256")
    verify(folder, hashes=False, show_progress=False)  # on request hashes are not compared


def test_changed_companions_are_found(folder):
    with (folder / "README.md").open("a") as file:
        file.write("x")
    refuse(folder, "README.md must have")


def test_tensor_of_another_file(folder):
    name, second = "language_model.lm_head.weight", nth(folder, 1).name
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: second}))
    (folder / MANIFEST).unlink()
    refuse(folder, f"{nth(folder, 0).name} holds {name}, which model.safetensors.index.json expects in {second}")


def test_tensor_that_no_file_holds(folder):
    file = nth(folder, 0).name
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({"ghost": file}))
    (folder / MANIFEST).unlink()
    refuse(folder, f"{file} does not hold ghost")


def test_broken_index_config_and_manifest(folder):
    (folder / MANIFEST).write_text("{}")
    refuse(folder, f"{MANIFEST} must be a manifest of format 1, got None")
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors.index.json").write_text("[]")
    refuse(folder, "model.safetensors.index.json must hold a JSON object, got a list")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuse(folder, "`weight_map` must be an object")
    (folder / "model.safetensors.index.json").unlink()
    refuse(folder, "must hold model.safetensors.index.json or model.safetensors alone", FileNotFoundError)
    edit(folder / "config.json", lambda config: config["text_config"].update({"num_hidden_layers": 5}))
    refuse(folder, "config.json: .*must have one entry per layer, got 4 entries for num_hidden_layers=5")
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json is not readable JSON")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refuse(folder, "`model_type` must be 'minimax_m3_vl' or 'minimax_m3_vl_text', got 'llama'")
    (folder / "config.json").unlink()
    refuse(folder, "config.json is missing", FileNotFoundError)


def test_other_quantization(folder):
    edit(folder / "config.json", lambda config: config.update({"quantization_config": {"quant_method": "gptq"}}))
    (folder / MANIFEST).unlink()
    refuse(folder, "only the `quant_method` 'mxfp8' can be converted, got 'gptq'")


@pytest.fixture
def single(tmp_path):
    """A checkpoint in one file, and its tensors."""
    torch.manual_seed(0)
    MiniMaxM3SparseForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "single")
    file = tmp_path / "single" / "model.safetensors"
    return file, load_file(file)


NAME = "language_model.model.layers.1.block_sparse_moe.experts.2.w3.weight"


def test_tensors_that_the_config_does_not_describe(single):
    file, tensors = single
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != NAME}, rf"has no {NAME}, and lacks 1 of the \d+ tensors"),
        (
            tensors | {"language_model.mtp.0.weight": torch.zeros(1)},
            "holds language_model.mtp.0.weight, which its config",
        ),
        (
            tensors | {NAME: tensors[NAME][:-1].clone()},
            rf"{NAME} must have the shape \(32, 64\) by the config, got \(31, 64\)",
        ),
        (tensors | {NAME: tensors[NAME].to(torch.uint8)}, f"{NAME} must be in torch.float32 or .*, got torch.uint8"),
        (tensors | {NAME: tensors[NAME].to(torch.int32)}, f"{NAME} must have a dtype of .*BF16.*, got I32"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(file.parent)


def test_mxfp8_without_scales_or_values(synthetic, read, tmp_path):
    shutil.copytree(synthetic["mxfp8"], tmp_path / "single")
    for file in (tmp_path / "single").glob("model*"):
        file.unlink()
    (tmp_path / "single" / MANIFEST).unlink()
    tensors = read(synthetic["mxfp8"])
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != f"{NAME}_scale_inv"}, f"has no {NAME}_scale_inv"),
        (tensors | {NAME: tensors[NAME].float()}, f"{NAME} must be in torch.float8_e4m3fn, got torch.float32"),
        (tensors | {f"{NAME}_scale_inv": torch.ones(32, 2)}, f"{NAME}_scale_inv must be in torch.uint8"),
    ):
        save_file(changed, tmp_path / "single" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "single")


def test_headers_that_contradict_themselves(single):
    file, _ = single
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for change, message in (
        (lambda entry: entry.update(shape=[1, 1]), f"{NAME} must have 4 bytes by its shape, got 8192"),
        (lambda entry: entry.update(data_offsets=[0, 8192]), "overlap or leave gaps"),
        (lambda entry: entry.pop("shape"), "has no readable safetensors header"),
    ):
        changed = json.loads(json.dumps(header))
        change(changed[NAME])
        encoded = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
        with pytest.raises(ValueError, match=message):
            open_checkpoint(file.parent)
