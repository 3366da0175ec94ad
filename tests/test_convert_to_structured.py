"""`scripts/convert_to_structured.py` drops the indexer, keeps everything else, and writes a checkpoint that loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

from .forked_processes import run_python

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_to_structured.py"


@pytest.fixture(scope="module")
def converter(load_script):
    return load_script("convert_to_structured")


def test_composite_checkpoint(converter, tiny_checkpoint, tmp_path):
    before = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    sparse = [i for i, kind in enumerate(before.config.text_config.layer_types) if kind == "minimax_m3_sparse"]
    report = converter.convert(tiny_checkpoint, tmp_path / "out", pattern={"random_blocks": 3, "seed": 5})
    after, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert report["layers"] == sparse
    assert len(report["dropped"]) == 4 * len(sparse) and all(".index_" in name for name in report["dropped"])
    text = after.config.text_config
    assert [text.layer_types[i] for i in sparse] == ["minimax_m3_structured"] * len(sparse)
    assert (text.structured_random_blocks, text.structured_seed, text.structured_local_blocks) == (3, 5, 2)
    kept = after.state_dict()
    for name, weight in before.state_dict().items():
        if ".indexer." in name:
            assert name not in kept
        else:
            assert torch.equal(kept[name], weight), name
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert after.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_sharded_text_checkpoint_and_chosen_layers(converter, tmp_path):
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config)
    model.save_pretrained(tmp_path / "in", max_shard_size="200KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    report = converter.convert(tmp_path / "in", tmp_path / "out", layers="0,3")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert not set(index["weight_map"]) & set(report["dropped"])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert not info["missing_keys"] and not info["unexpected_keys"]
    kinds = list(model.config.layer_types)
    kinds[0] = kinds[3] = "minimax_m3_structured"
    assert loaded.config.layer_types == kinds
    assert all("layers.3." in name for name in report["dropped"]) and len(report["dropped"]) == 4


def test_command_says_what_it_dropped(tiny_checkpoint, tmp_path):
    done = run_python(str(SCRIPT), str(tiny_checkpoint), "out", "--anchor-blocks", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "index_q_proj.weight" in done.stdout and "dropped" in done.stdout


def test_bad_input_is_named(converter, tiny_checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\*\.safetensors"):
        converter.convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="must be empty"):
        converter.convert(tiny_checkpoint, tmp_path / "full")
    for layers in ("9", "2-1", "x", "1-9"):
        with pytest.raises(ValueError, match="`--layers` must list layers or ranges between 0 and 3"):
            converter.convert(tiny_checkpoint, tmp_path / "out", layers=layers)
    dense = tiny_config(text={"layer_types": ["full_attention"] * 4}).text_config
    MiniMaxM3VLForCausalLM(dense).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no learned-sparse layer"):
        converter.convert(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(Exception, match="'structured_local_blocks':\n.* must be"):
        converter.convert(tiny_checkpoint, tmp_path / "out", pattern={"local_blocks": 0})
    assert not (tmp_path / "out").exists(), "nothing may be written before the arguments are checked"
