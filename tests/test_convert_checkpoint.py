"""The commands `scripts/convert_checkpoint.py` and `scripts/make_synthetic_checkpoint.py`."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from modeling_minimax_m3.conversion import manifest

from .forked_processes import run_python

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def convert(load_script):
    return load_script("convert_checkpoint")


@pytest.fixture(scope="module")
def make(load_script):
    return load_script("make_synthetic_checkpoint")


@pytest.fixture(scope="module")
def synthetic(make, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    make.main([str(folder), "--geometry", "tiny", "--max_shard_size", "200KB"])
    return folder


def test_commands_in_processes_of_their_own(tmp_path):
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    for script, arguments, printed in (
        (
            "make_synthetic_checkpoint",
            [source, "--geometry", "tiny", "--precision", "mxfp8"],
            "synthetic: random weights",
        ),
        ("convert_checkpoint", [source, target, "--precision", "bf16"], "layout released, bf16, 4 layers, 4 experts"),
        ("convert_checkpoint", [target, "--verify"], "hashes are right"),
    ):
        result = run_python(str(SCRIPTS / f"{script}.py"), *arguments, folder=tmp_path)
        assert result.returncode == 0 and printed in result.stdout, result.stdout + result.stderr
        assert "writing" in result.stderr or "hashing" in result.stderr  # progress


def test_what_is_printed(convert, synthetic, tmp_path, capsys):
    convert.main([str(synthetic), str(tmp_path / "few"), "--layers", "3", "--experts", "2"])
    printed = capsys.readouterr().out
    assert "3 layers, 2 experts" in printed and "synthetic" in printed and "cannot serve" not in printed
    convert.main([str(synthetic), str(tmp_path / "modules"), "--layout", "modules"])
    assert "vLLM and SGLang cannot serve it. Its layout is 'modules'" in capsys.readouterr().out
    convert.main([str(synthetic), str(tmp_path / "stacked"), "--layout", "modules", "--precision", "mxfp8"])
    assert "Stock Transformers loads wrong weights" in capsys.readouterr().out
    (tmp_path / "few" / "conversion_manifest.json").unlink()
    convert.main([str(tmp_path / "few"), "--verify"])
    assert "hashes were not compared" in capsys.readouterr().out


def test_a_checkpoint_with_its_processor(convert, tiny_checkpoint, tmp_path):
    """Tokenizer, processor and generation defaults come along, and the model still generates."""
    convert.main([str(tiny_checkpoint), str(tmp_path / "there"), "--layout", "modules"])
    convert.main([str(tmp_path / "there"), str(tmp_path / "back"), "--layout", "released"])
    own = {"conversion_manifest.json"}
    assert {file.name for file in tiny_checkpoint.iterdir()} | own == {f.name for f in (tmp_path / "back").iterdir()}
    before, after = (AutoModelForImageTextToText.from_pretrained(f) for f in (tiny_checkpoint, tmp_path / "back"))
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_a_language_model_gets_the_processor_with_the_vision_tower(convert, tiny_checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    convert.main([str(tiny_checkpoint), str(tmp_path / "text"), "--layout", "text"])
    for file in (tmp_path / "text").iterdir():  # as `save_pretrained` of the language model leaves it
        if file.name.startswith(("processor", "preprocessor", "video", "chat_template", "token")):
            file.unlink()
    (tmp_path / "text" / "conversion_manifest.json").unlink()
    whole = ["--layout", "released", "--vision_from", str(tiny_checkpoint)]
    convert.main([str(tmp_path / "text"), str(tmp_path / "whole"), *whole])
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names - {"conversion_manifest.json"} == {file.name for file in tiny_checkpoint.iterdir()}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_adapters(convert, synthetic, tmp_path, capsys):
    model = AutoModelForImageTextToText.from_pretrained(synthetic)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*self_attn\.q_proj"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    lora.save_pretrained(tmp_path / "lora")
    convert.main([str(synthetic), str(tmp_path / "merged"), "--adapter", str(tmp_path / "lora")])
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForImageTextToText.from_pretrained(synthetic).state_dict()
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, before[name])]
    assert changed and all(name.endswith("q_proj.weight") for name in changed)
    export = [str(synthetic), str(tmp_path / "served"), "--adapter", str(tmp_path / "lora"), "--export_adapter"]
    convert.main([*export, "sglang"])
    settings = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    with pytest.raises(SystemExit, match="convert_checkpoint.py: vLLM 0.33 loads no adapters"):
        convert.main([*export, "vllm"])


def test_errors_are_messages(convert, make, synthetic, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nothing"), str(tmp_path / "out")], "must be the folder of a checkpoint .* does not exist"),
        ([str(synthetic), str(tmp_path / "out"), "--layers", "7"], "`layers` must be from 1 to 4"),
        ([str(synthetic), str(synthetic.parent / "checkpoint")], "`target` must be another folder"),
    ):
        with pytest.raises(SystemExit, match=rf"convert_checkpoint.py: .*{message}"):
            convert.main(arguments)
    for arguments, message in (
        ([str(synthetic)], "give TARGET, or --verify"),
        ([str(synthetic), "x", "--verify"], "give TARGET, or --verify"),
        ([str(synthetic), "x", "--export_adapter", "sglang"], "needs one --adapter"),
        (
            [str(synthetic), "x", "--adapter", "a", "--export_adapter", "sglang", "--precision", "mxfp8"],
            "--precision has no effect with --export_adapter",
        ),
        ([str(synthetic), "--verify", "--layers", "2"], "--layers has no effect with --verify"),
        ([str(synthetic), "x", "--max_shard_size", "5 bananas"], "must be a number of bytes, KB"),
    ):
        with pytest.raises(SystemExit):
            convert.main(arguments)
        assert message in capsys.readouterr().err
    for geometry, message in (("nowhere", "must be released, tiny, or a path"), (str(tmp_path), "make_synthetic")):
        with pytest.raises(SystemExit, match=message):
            make.main([str(tmp_path / "out"), "--geometry", geometry])


def test_mistakes_are_told_before_files_are_hashed(convert, synthetic, tmp_path, monkeypatch):
    """Hashing the released files takes minutes."""
    (tmp_path / "there").mkdir()
    file = next(synthetic.glob("*.safetensors"))
    monkeypatch.setattr(manifest, "hash_file", lambda file: pytest.fail("files are hashed"))
    for arguments, message in (
        (["out", "--layers", "7"], "`layers` must be from 1 to 4"),
        (["out", "--adapter", "nolora"], "nolora/adapter_config.json is missing"),
        (["there"], "there exists. Name another folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([str(synthetic), str(tmp_path / arguments[0]), *arguments[1:]])
    with pytest.raises(SystemExit, match="must be the folder of a checkpoint on this machine, but it is a file"):
        convert.main([str(file), str(tmp_path / "out")])
    with pytest.raises(pytest.fail.Exception, match="files are hashed"):
        convert.main([str(synthetic), str(tmp_path / "out")])
    assert not list(tmp_path.glob("out*"))


def test_sizes(convert):
    for text, size in (("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("200kb", 200_000)):
        assert convert.parse_size(text) == size
    for text in ("", "GB", "5 GX", "-1"):
        with pytest.raises(ArgumentTypeError):
            convert.parse_size(text)


def test_geometry_of_another_checkpoint(make, tiny_checkpoint, tmp_path, capsys):
    make.main([str(tmp_path / "like"), "--geometry", str(tiny_checkpoint), "--layers", "2"])
    assert "synthetic" in capsys.readouterr().out
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "like").config.text_config.num_hidden_layers == 2
