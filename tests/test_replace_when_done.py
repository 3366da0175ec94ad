"""Scripts write their output completely or not at all, at whatever moment they are interrupted."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import matplotlib.figure
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import processing_minimax_m3
from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, msa


@pytest.fixture
def replace_when_done(load_script):
    return load_script("replace_when_done").replace_when_done


def contents(path: Path):
    """The bytes of a file, or the bytes of each file in a folder, or None if nothing exists."""
    if path.is_dir():
        return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


# ---- the helper ---------------------------------------------------------------------------------------------------


def test_file_appears_when_the_block_ends(replace_when_done, tmp_path):
    target = tmp_path / "new" / "picture.png"
    for text in ("first", "second"):
        before = contents(target)
        with replace_when_done(target) as unfinished:
            assert unfinished.name == "picture.png"  # the suffix may choose a format
            unfinished.write_text(text)
            assert contents(target) == before
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_folder_replaces_an_earlier_one_of_the_same_files(replace_when_done, tmp_path):
    target = tmp_path / "checkpoint"
    for text in ("first", "second"):
        with replace_when_done(target) as unfinished:
            (unfinished / "part").mkdir(parents=True)
            (unfinished / "part" / "file").write_text(text)
        assert contents(target) == {Path("part/file"): text.encode()}
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_would_lose_files_is_refused(replace_when_done, tmp_path):
    target = tmp_path / "checkpoint"
    (target / "part").mkdir(parents=True)
    (target / "part" / "notes.txt").write_text("mine")
    before = contents(target)
    refused = pytest.raises(FileExistsError, match=r"checkpoint holds part.notes\.txt, which would be lost")
    with refused, replace_when_done(target) as unfinished:
        (unfinished / "part").mkdir(parents=True)
    assert contents(target) == before
    with pytest.raises(IsADirectoryError), replace_when_done(target) as unfinished:
        unfinished.write_text("a file")
    assert contents(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_link_to_a_folder_stays_a_link(replace_when_done, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with replace_when_done(tmp_path / "link") as unfinished:
        unfinished.mkdir()
        (unfinished / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").is_file()


def test_mount_point_is_refused_before_the_work(replace_when_done, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(OSError, match="is a mount point"), replace_when_done(tmp_path / "volume"):
        raise AssertionError("the block must not run")


# ---- those who use it ---------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """An exception that no code catches, like KeyboardInterrupt."""


def interrupted(*args, **kwargs):
    raise Interrupted


def convert(load_script, tmp_path, monkeypatch):
    """Stops after the first file of weights."""
    script = load_script("convert_to_structured")
    source = tmp_path / "source"
    MiniMaxM3VLForCausalLM(tiny_config().text_config).save_pretrained(source, max_shard_size="200KB")
    written = []

    def save(tensors, path, metadata=None):
        if written:
            raise Interrupted
        save_file(tensors, path, metadata=metadata)
        written.append(path)

    monkeypatch.setattr(script, "save_file", save)
    return lambda target: script.convert(source, target)


def convert_the_last_step(load_script, tmp_path, monkeypatch):
    """Stops with all weights and the source's configuration written, which would load as a model of random indexers."""
    script = load_script("convert_to_structured")
    source = tmp_path / "source"
    config = tiny_config().text_config
    MiniMaxM3VLForCausalLM(config).save_pretrained(source)
    monkeypatch.setattr(type(config), "save_pretrained", interrupted)
    return lambda target: script.convert(source, target)


def make_checkpoint(load_script, tmp_path, monkeypatch):
    """Stops with the model written, but no processor."""
    monkeypatch.setattr(processing_minimax_m3.MiniMaxM3VLProcessor, "save_pretrained", interrupted)
    return load_script("make_tiny_checkpoint").make_tiny_checkpoint


def stop_pictures(monkeypatch):
    def save(figure, path, **options):
        Path(path).write_bytes(b"half a pict")
        raise Interrupted

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)


def plot_selections(load_script, tmp_path, monkeypatch):
    stop_pictures(monkeypatch)
    script = load_script("plot_selection")
    return lambda target: script.plot_selections({0: torch.zeros(8, 1, 1, dtype=torch.int32)}, 4, target)


def plot_pattern(load_script, tmp_path, monkeypatch):
    stop_pictures(monkeypatch)
    script = load_script("plot_pattern")
    pattern = msa.StructuredPattern(local_blocks=1, anchor_blocks=1, anchor_stride=4, random_blocks=1, seed=0)
    return lambda target: script.plot_pattern(target, pattern, [64], block_size=8, heads=1, layer_idx=0)


def plot_training(load_script, tmp_path, monkeypatch):
    stop_pictures(monkeypatch)
    monkeypatch.setattr("sys.path", list(sys.path))
    path = Path(__file__).resolve().parents[1] / "examples" / "train_indexer.py"
    spec = importlib.util.spec_from_file_location("train_indexer", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = [{"step": 0, "kl": 1.0, "oracle": 0.5, "best keys": 0.4, "indexer": 0.3, "own block": 0.2}]
    return lambda target: example.plot(history, 1, target)


def write_video(load_script, tmp_path, monkeypatch):
    """Stops after more frames than the encoder buffers."""
    photograph = tmp_path / "ramp.png"
    Image.linear_gradient("L").convert("RGB").save(photograph)
    frames = iter([av.VideoFrame.from_image(Image.new("RGB", (64, 64)))] * 100)
    script = load_script("panning_video")
    fake = SimpleNamespace(from_image=lambda image: next(frames, None) or interrupted())
    monkeypatch.setattr(script.av, "VideoFrame", fake)
    return lambda target: script.write_panning_video(photograph, target, seconds=30, fps=5, side=64)


FOLDERS = (convert, convert_the_last_step, make_checkpoint)
PICTURES = (plot_selections, plot_pattern, plot_training)
CASES = [(writer, "out", earlier) for writer in FOLDERS for earlier in ("nothing", "an empty folder")]
CASES += [(writer, "picture.png", earlier) for writer in PICTURES for earlier in ("nothing", "a file")]
CASES += [(write_video, "clip.mp4", earlier) for earlier in ("nothing", "a file")]
CASES += [(make_checkpoint, "out", "a checkpoint")]


@pytest.mark.parametrize(
    ("writer", "name", "earlier"), CASES, ids=[f"{writer.__name__}-{earlier}" for writer, _, earlier in CASES]
)
def test_interrupted_writers_leave_what_was_there(writer, name, earlier, load_script, tmp_path, monkeypatch):
    target = tmp_path / "place" / name
    target.parent.mkdir()
    if earlier == "an empty folder":
        target.mkdir()
    elif earlier == "a file":
        target.write_bytes(b"earlier")
    elif earlier == "a checkpoint":
        load_script("make_tiny_checkpoint").make_tiny_checkpoint(target, seed=1)
    before = contents(target)
    write = writer(load_script, tmp_path, monkeypatch)
    with pytest.raises(Interrupted):
        write(target)
    assert contents(target) == before
    assert list(target.parent.iterdir()) == ([] if earlier == "nothing" else [target])


def test_tiny_checkpoint_replaces_an_earlier_one_and_nothing_else(load_script, tmp_path):
    make_tiny_checkpoint = load_script("make_tiny_checkpoint").make_tiny_checkpoint
    weights = [
        (make_tiny_checkpoint(tmp_path / "out", seed=seed) / "model.safetensors").read_bytes() for seed in (1, 2)
    ]
    assert weights[0] != weights[1]
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=re.escape("holds notes.txt, which would be lost")):
        make_tiny_checkpoint(tmp_path / "out")
