"""After an import of the processors alone, without the model, Transformers loads our processors."""

import json

import pytest

from ..forked_processes import run_python

pytestmark = pytest.mark.compatibility

LOAD = """
import json, sys, transformers
from processing_minimax_m3 import MiniMaxM3VLProcessor
assert "modeling_minimax_m3" not in sys.modules
loaders = {
    "ours": MiniMaxM3VLProcessor,
    "auto": transformers.AutoProcessor,
    "image": transformers.AutoImageProcessor,
    "video": transformers.AutoVideoProcessor,
}
loaded = {name: loader.from_pretrained(sys.argv[1]) for name, loader in loaders.items()}
parts = [loaded.pop("image"), loaded.pop("video")]
for joint in loaded.values():
    parts += [joint, joint.image_processor, joint.video_processor]
print(json.dumps([type(part).__module__ for part in parts]))
"""
FILES = {
    "ours": {},
    # as in the released checkpoint, no class is named, so the type of the configuration decides
    "released": {"config.json": {"model_type": "minimax_m3_vl"}, "preprocessor_config.json": {"patch_size": 14}},
}


@pytest.mark.parametrize("name", FILES)
def test_processors_without_the_model(name, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    if name == "released":
        (tmp_path / "processor_config.json").unlink()
    for file, content in FILES[name].items():
        (tmp_path / file).write_text(json.dumps(content))
    result = run_python("-c", LOAD, str(tmp_path), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout.splitlines()[-1])
    assert len(modules) == 8
    assert all(module.startswith("processing_minimax_m3.") for module in modules), modules
