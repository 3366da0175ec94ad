"""The CPU benchmarks run, agree with stock, and report no figures where they disagree."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    import benchmarks.__main__ as command

    return command


@pytest.mark.parametrize("scenario", ["layer-forward", "layer-train"])
def test_a_layer_is_compared_before_it_is_reported(benchmarks, monkeypatch, scenario):
    run, module = benchmarks.SCENARIOS[scenario]
    monkeypatch.setattr(benchmarks.measure, "repeat", lambda run, first_seconds: [first_seconds])
    # more blocks than a query selects, so that the selection matters
    (stock, measured), (ours, _) = (run(of, 1500) for of in (benchmarks.STOCK, benchmarks.OURS))
    assert measured["seconds"] > 0 and measured["extra_bytes"] > 0 and measured["flops"] > 0
    report = module.disagreement(stock, ours)
    assert report["tokens"] == 1500
    assert module.refusal(report) is None

    wrong_output = {**ours, "out": ours["out"] * 1.0001}
    assert "out differs" in module.refusal(module.disagreement(stock, wrong_output))
    wrong_selection = {**ours, "selected": ours["selected"] + 1}
    assert "select different blocks" in module.refusal(module.disagreement(stock, wrong_selection))
    if scenario == "layer-train":
        name = "grad of k_proj.weight"
        assert name in module.refusal(module.disagreement(stock, {**ours, name: ours[name] * 1.0001}))


def test_decoding_is_compared_before_it_is_reported(benchmarks, monkeypatch):
    monkeypatch.setattr(benchmarks.decode, "NEW_TOKENS", 4)
    (stock, measured), (ours, _) = (benchmarks.decode.decode(of, 100) for of in (benchmarks.STOCK, benchmarks.OURS))
    assert measured["runs"] == 4 and measured["parts"]["index scoring"] > 0
    assert benchmarks.decode.refusal(benchmarks.decode.disagreement(stock, ours)) is None
    wrong = {"logits": ours["logits"] * 1.001}
    assert "logits differ" in benchmarks.decode.refusal(benchmarks.decode.disagreement(stock, wrong))


def test_disagreement_takes_the_figures_away(benchmarks):
    rows = [{"of": of, "seconds": 1.0, "parts": {}} for of in (benchmarks.STOCK, benchmarks.OURS)]
    partners = {}
    for row, factor in zip(rows, (1.0, 1.5)):
        case = benchmarks.Case("decode", 2048, row["of"])
        benchmarks.compare(case, row, {"logits": factor * torch.ones(2, 3)}, partners)
    for row in rows:
        assert "seconds" not in row and "disagree" in row["refused"]


def test_ratios_need_their_cases(benchmarks):
    def row(scenario, tokens, of, **figures):
        return {"scenario": scenario, "tokens": tokens, "of": of, **figures}

    rows = [
        row("layer-forward", 8192, "stock", seconds=40.0, extra_bytes=10e9),
        row("layer-forward", 8192, "ours", seconds=1.0, extra_bytes=1e9),
    ]
    faster, smaller = benchmarks.ratios(rows)
    assert faster == {"what": "layer forward at 8192 tokens, times faster than stock", "value": 40.0}
    assert smaller == {"what": "layer forward at 8192 tokens, share of stock's extra memory", "value": 0.1}
    assert benchmarks.ratios(rows[:1]) == []


def test_load_of_others_leaves_out_our_own(benchmarks, monkeypatch):
    clocks = benchmarks.measure.OtherLoad._clocks
    _, busy, own = clocks()
    burn = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    _, busy_after, own_after = clocks()
    # each clock ticks in hundredths of a second
    assert own_after - own > 0.9, "a child's time counts as ours"
    assert busy_after - busy > 0.9, "a child's time counts as busy"

    # 4 core-seconds are busy within 2 seconds, and 1 of them is ours
    readings = iter([(0.0, 10.0, 1.0), (2.0, 14.0, 2.0)])
    monkeypatch.setattr(benchmarks.measure.OtherLoad, "_clocks", staticmethod(lambda: next(readings)))
    with benchmarks.measure.OtherLoad() as others:
        pass
    assert others.cores == 1.5
