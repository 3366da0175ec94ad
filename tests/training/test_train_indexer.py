"""`examples/train_indexer.py` on a barely trained model, so that it takes seconds."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_indexer.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("train_indexer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loss_falls_and_the_coverage_rises(example, monkeypatch, tmp_path, capsys):
    options = {"output": tmp_path / "out", "model-steps": 2, "warmup-steps": 25, "sparse-steps": 2}
    monkeypatch.setattr("sys.argv", ["train_indexer.py", *(f"--{name}={value}" for name, value in options.items())])
    example.main()
    history = json.loads((tmp_path / "out" / "indexer_training.json").read_text())
    assert [entry["step"] for entry in history] == list(range(27))
    first, last = history[0], history[-1]
    assert history[24]["kl"] < 0.8 * first["kl"]  # the last of the warm-up: the loss still runs over the same keys
    assert last["indexer"] > first["indexer"] + 0.005
    for entry in (first, last):
        assert entry["own block"] < entry["indexer"] < entry["oracle"] < 1
        assert entry["indexer"] < entry["best keys"] < entry["oracle"]
        assert entry["of oracle"] == pytest.approx(entry["indexer"] / entry["oracle"], abs=1e-4)
    assert first["oracle"] == last["oracle"], "the model itself is frozen"
    assert (tmp_path / "out" / "indexer_training.png").stat().st_size > 5000
    assert "indexer / oracle" in capsys.readouterr().out
