"""Conversions that are killed, resumed, replaced, and measured."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.conversion.synthetic import make_synthetic_checkpoint

from ..forked_processes import run_python
from .conftest import SHARD

FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_killed_at_any_point_then_resumed_gives_the_same_bytes(synthetic, contents, tmp_path):
    worker = str(FOLDER / "interrupted_worker.py")
    result = run_python(worker, str(synthetic["bf16"]), str(tmp_path), "0", folder=tmp_path.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    rounds = [json.loads(line) for line in result.stdout.splitlines()]
    expected = contents(tmp_path / "whole" / "out")
    assert len(expected) > 6 and sum(entry["killed"] for entry in rounds) > 15
    for entry in rounds:
        place = Path(entry["place"])
        assert entry["done"], entry
        assert contents(place / "out") == expected, entry
        assert [file.name for file in place.iterdir()] == ["out"], entry
    # The folder has its name only when all of it is there, so a run that is killed early leaves none.
    assert not rounds[0]["whole_before"] and {entry.get("whole_before") for entry in rounds} >= {True, False}


def stopped(converted, source, target, monkeypatch, **options):
    """Leaves a conversion that ended with the second file."""
    from modeling_minimax_m3.conversion import writing

    write_shard, done = writing._write_shard, []

    def write_two(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(write_shard(*arguments))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_shard", write_two)
        with pytest.raises(KeyboardInterrupt):
            converted(source, target, **options)
    return target.with_name(f"{target.name}.unfinished")


def test_finished_files_are_not_written_again(synthetic, converted, monkeypatch, tmp_path):
    unfinished = stopped(converted, synthetic["bf16"], tmp_path / "out", monkeypatch, layout="modules")
    assert not (tmp_path / "out").exists()
    finished = sorted(unfinished.glob("*.safetensors"))
    assert len(finished) == 2
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in finished}
    converted(synthetic["bf16"], tmp_path / "out", layout="modules")
    after = {name: (tmp_path / "out" / name).stat() for name in before}
    assert before == {name: (status.st_ino, status.st_mtime_ns) for name, status in after.items()}


def test_an_unfinished_conversion_of_something_else_is_kept(synthetic, converted, contents, monkeypatch, tmp_path):
    unfinished = stopped(converted, synthetic["bf16"], tmp_path / "out", monkeypatch, layout="modules")
    left = contents(unfinished)
    for options, different in (
        ({"layout": "text"}, "layout"),
        ({"layout": "modules", "layers": 3}, "layers"),
        ({"layout": "modules", "max_shard_size": 100_000}, "max_shard_size"),
    ):
        with pytest.raises(FileExistsError, match=rf"begun with other options.*{different}.*--restart"):
            converted(synthetic["bf16"], tmp_path / "out", **options)
    copy = tmp_path / "copy"
    shutil.copytree(synthetic["bf16"], copy)
    os.utime(next(copy.glob("*.safetensors")), (0, 0))  # written at another time
    with pytest.raises(FileExistsError, match="from other files.*inputs"):
        converted(copy, tmp_path / "out", layout="modules")
    assert contents(unfinished) == left
    converted(synthetic["bf16"], tmp_path / "out", layout="text", restart=True)
    assert (tmp_path / "out").exists() and not unfinished.exists()


def test_damaged_unfinished_files_are_named(synthetic, converted, monkeypatch, tmp_path):
    unfinished = stopped(converted, synthetic["bf16"], tmp_path / "out", monkeypatch, layout="modules")
    first = sorted(unfinished.glob("*.safetensors"))[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{first.name} was changed since an earlier run wrote it.*--restart"):
        converted(synthetic["bf16"], tmp_path / "out", layout="modules")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first.name} is missing, which an earlier run wrote"):
        converted(synthetic["bf16"], tmp_path / "out", layout="modules")


def test_a_full_disk_is_told_before_anything_is_read_or_written(synthetic, converted, monkeypatch, tmp_path):
    unfinished = stopped(converted, synthetic["bf16"], tmp_path / "out", monkeypatch, layout="modules")
    written = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in synthetic["bf16"].glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=total - written - 100_000))
    with pytest.raises(OSError, match=rf"{tmp_path} has 0.00 GiB free, but out.unfinished needs 0.00 GiB more"):
        converted(synthetic["bf16"], tmp_path / "out", layout="modules")
    with pytest.raises(OSError, match=rf"{tmp_path} has .* but new.unfinished needs"):
        converted(synthetic["bf16"], tmp_path / "of" / "all" / "new", layout="modules")
    assert not (tmp_path / "of").exists()
    # What was written needs no room again.
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=total - written))
    converted(synthetic["bf16"], tmp_path / "out", layout="modules")


def test_a_file_that_cannot_be_written_is_named(synthetic, converted, contents, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: '.*out.unfinished/model-00001-of-.*safetensors.tmp'"):
            converted(synthetic["bf16"], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    converted(synthetic["bf16"], tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()
    assert contents(tmp_path / "out") == contents(converted(synthetic["bf16"], tmp_path / "at_once"))


def test_nothing_is_overwritten_without_a_flag(synthetic, converted, contents, tmp_path):
    out = converted(synthetic["bf16"], tmp_path / "out", layers=2)
    before = contents(out)
    with pytest.raises(FileExistsError, match="out exists.*--overwrite"):
        converted(synthetic["bf16"], out, layers=3)
    assert contents(out) == before and not list(tmp_path.glob("*.unfinished"))
    converted(synthetic["bf16"], out, layers=3, overwrite=True)
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_never_replaced(synthetic, converted, tmp_path):
    for name, make in (
        ("notes", lambda folder: (folder / "notes.txt").touch()),
        ("nested", lambda folder: ((folder / "config.json").touch(), (folder / "run").mkdir())),
    ):
        folder = tmp_path / name
        folder.mkdir()
        make(folder)
        with pytest.raises(FileExistsError, match="holds other things than a checkpoint"):
            converted(synthetic["bf16"], folder, overwrite=True)
    unfinished = tmp_path / "out.unfinished"
    unfinished.mkdir()
    (unfinished / "precious").touch()
    for restart in (False, True):
        with pytest.raises(FileExistsError, match="holds something else than an unfinished checkpoint"):
            converted(synthetic["bf16"], tmp_path / "out", restart=restart)
    assert (unfinished / "precious").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_is_bounded_by_two_files(synthetic, tmp_path):
    """Of a checkpoint of 20 times the size of a file."""
    size = 24_000_000
    text = {"hidden_size": 512, "intermediate_size": 512, "shared_intermediate_size": 512, "num_local_experts": 64}
    # Some matrices are larger than a file, or need more than a file when they are quantized at once.
    text |= {"num_hidden_layers": 5, "vocab_size": 32768, "dense_intermediate_size": 8192}
    config = tiny_config(text=text)
    options = {"max_shard_size": size, "show_progress": False}
    make_synthetic_checkpoint(tmp_path / "large", config, **options)
    assert sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) > 20 * size
    model = MiniMaxM3SparseForConditionalGeneration(config)
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "gate_up_proj"], **targets)
    get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    folders = [str(folder) for folder in (synthetic["bf16"], tmp_path / "large", tmp_path / "lora")]
    command = [sys.executable, str(FOLDER / "memory_worker.py"), *folders, str(size)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth = {kind: value for line in result.stdout.splitlines() for kind, value in json.loads(line).items()}
    assert set(growth) == {"layout", "quantization", "adapter"}
    print("memory of conversions:", {kind: f"{value / 1e6:.1f} MB" for kind, value in growth.items()})
    assert all(value < 2 * size for value in growth.values()), growth
