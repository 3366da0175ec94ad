"""`register_for_auto_class`: what is saved afterwards loads as our class by an Auto class and `trust_remote_code`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig, tiny_config
from configuration_minimax_m3.auto_class import SOURCE
from modeling_minimax_m3 import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLModel,
    MiniMaxM3VLTextModel,
    MiniMaxM3VLVisionModel,
)
from processing_minimax_m3 import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

pytestmark = pytest.mark.compatibility

CODE_FILE = "minimax_m3_classes.py"
MODELS = {
    MiniMaxM3SparseForConditionalGeneration: ("AutoModelForImageTextToText", lambda config: config),
    MiniMaxM3VLModel: ("AutoModel", lambda config: config),
    MiniMaxM3VLForCausalLM: ("AutoModelForCausalLM", lambda config: config.text_config),
    MiniMaxM3VLTextModel: ("AutoModel", lambda config: config.text_config),
    MiniMaxM3VLVisionModel: ("AutoModel", lambda config: config.vision_config),
}


def name_of(cls: type) -> str:
    return f"minimax_m3_classes.{cls.__name__}"


def auto_map_of(file: Path) -> dict[str, str]:
    return json.loads(file.read_text())["auto_map"]


@pytest.fixture
def register():
    """Register a class, until the test ends."""
    registered = []

    def call(cls: type, *args: str) -> None:
        cls.register_for_auto_class(*args)
        registered.append(cls)

    yield call
    for cls in registered:
        for attribute in {"_auto_class", "_auto_class_by_import"} & set(vars(cls)):
            delattr(cls, attribute)


@pytest.mark.parametrize("model_class", MODELS)
def test_models(register, model_class, tmp_path):
    auto_class, part = MODELS[model_class]
    register(model_class, auto_class)
    model = model_class(part(tiny_config()))
    model.save_pretrained(tmp_path)
    assert auto_map_of(tmp_path / "config.json") == {
        auto_class: name_of(model_class),
        "AutoConfig": name_of(type(model.config)),
    }
    assert [file.name for file in tmp_path.glob("*.py")] == [CODE_FILE]
    loaded = model_class.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("config_class", [MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig])
def test_configs(register, config_class, tmp_path):
    register(config_class)
    config_class().save_pretrained(tmp_path)
    assert auto_map_of(tmp_path / "config.json") == {"AutoConfig": name_of(config_class)}
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)) is config_class


@pytest.mark.parametrize("processor_class", [MiniMaxM3VLImageProcessor, MiniMaxM3VLVideoProcessor])
def test_parts_of_a_processor(register, processor_class, tmp_path):
    register(processor_class)
    processor_class().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    auto_class = "Auto" + processor_class.__name__.removeprefix("MiniMaxM3VL")
    assert auto_map_of(file) == {auto_class: name_of(processor_class)}
    assert (tmp_path / CODE_FILE).exists()


def test_nothing_is_registered(tmp_path):
    MiniMaxM3VLTextModel(tiny_config().text_config).save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert not (tmp_path / CODE_FILE).exists()


def test_wrong_auto_class():
    with pytest.raises(ValueError, match="AutoModelForNothing is not a valid auto class"):
        MiniMaxM3VLTextModel.register_for_auto_class("AutoModelForNothing")


LOAD = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, what = sys.argv[1:]
for trust in (False, True):
    if what == "processor":
        loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
        parts = [loaded.image_processor, loaded.video_processor, loaded]
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust)
        parts = [loaded.config, loaded]
    print(*(type(part).__module__.partition(".")[0] for part in parts))
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("model", "configuration_minimax_m3 modeling_minimax_m3"),
        ("processor", "processing_minimax_m3 processing_minimax_m3 processing_minimax_m3"),
    ],
)
def test_loading_where_nothing_imports_the_package(register, tiny_checkpoint, monkeypatch, what, expected, tmp_path):
    register(MiniMaxM3SparseForConditionalGeneration, "AutoModelForImageTextToText")
    for processor_class in (MiniMaxM3VLProcessor, MiniMaxM3VLImageProcessor, MiniMaxM3VLVideoProcessor):
        register(processor_class)
    MiniMaxM3SparseForConditionalGeneration.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "saved")
    MiniMaxM3VLProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # A process of its own: Transformers reads the variable when it is imported.
    run = subprocess.run([sys.executable, "-c", LOAD, "saved", what], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stock, ours = run.stdout.splitlines()
    assert set(stock.split()) == {"transformers"}
    assert ours == expected


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_minimax_m3", None)
    with pytest.raises(ImportError, match="the package minimax-m3-transformers, which has to be installed"):
        exec(SOURCE, {})


def test_classes_of_others_are_copied(register, monkeypatch, tmp_path):
    """A class derived from ours is published as Transformers describes."""
    file = tmp_path / "my_model.py"
    file.write_text(
        "from modeling_minimax_m3 import MiniMaxM3VLForCausalLM\n\n\n"
        "class MyModel(MiniMaxM3VLForCausalLM):\n    pass\n"
    )
    spec = importlib.util.spec_from_file_location("my_model", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_model", module)
    spec.loader.exec_module(module)
    register(MiniMaxM3VLForCausalLM, "AutoModelForCausalLM")  # not to be inherited
    register(module.MyModel, AutoModelForCausalLM)
    module.MyModel(tiny_config().text_config).save_pretrained(tmp_path / "saved")
    assert auto_map_of(tmp_path / "saved" / "config.json") == {"AutoModelForCausalLM": "my_model.MyModel"}
    assert [saved.name for saved in (tmp_path / "saved").glob("*.py")] == ["my_model.py"]
