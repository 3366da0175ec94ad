"""The benchmark of a whole model: floors, tables and picture, and its workloads on a tiny model."""

import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configuration_minimax_m3 import tiny_config

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "gpu": "a card",
    "torch": "2",
    "transformers": "5",
    "date": "2026-01-01 00:00:00 UTC",
    "matmul_tflops": 780.0,
    "copy_bytes_per_second": 4.2e12,
    "read_bytes_per_second": 4.2e12,
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def model_step():
    return importlib.import_module("benchmarks.model_step")


@pytest.fixture
def floors():
    return importlib.import_module("benchmarks.model_step_floors")


@pytest.fixture
def report():
    return importlib.import_module("benchmarks.model_step_report")


def tiny_model(implementation):
    implementations = importlib.import_module("benchmarks.implementations")
    config = implementations.text_config(implementation, tiny_config().text_config)
    torch.manual_seed(0)
    return implementations.classes(implementation).MiniMaxM3VLForCausalLM(config).eval()


# --- floors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(floors):
    return floors.Rates(MACHINE["matmul_tflops"], MACHINE["read_bytes_per_second"])


def test_weights_are_those_of_a_model(floors):
    """All numbers in the matrices of a tiny model, of which a token uses those of its experts alone."""
    model = tiny_model("ours")
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() > 1)
    embedding = model.model.embed_tokens.weight.numel()
    counted = floors.weights(model.config)
    experts = counted["routed experts"] * model.config.num_local_experts // model.config.num_experts_per_tok
    assert sum(counted.values()) - counted["routed experts"] + experts == matrices - embedding


def test_floor_of_a_token_is_the_time_of_its_bytes(floors, rates):
    config = floors.layers_config(1, 3)
    keys_and_values = 2 * 2 * 4 * 128 * (8193 + 3 * 16 * 128) + 3 * 8193 * 2 * 128
    used = 2 * sum(floors.weights(config).values()) + keys_and_values
    assert floors.pass_ms(config, rates, 1, 8192) == pytest.approx(1e3 * used / 4.2e12)
    layer = floors.sparse_layer_ms(
        {3 + sparse - 2: floors.pass_ms(floors.layers_config(1, sparse), rates, 1, 8192) for sparse in (3, 6)}
    )
    assert layer == pytest.approx(0.19, abs=0.01)


def test_floor_of_a_pass_reads_all_experts_and_computes_the_rest(floors, rates):
    config = floors.layers_config(1, 3)
    costs = floors.pass_costs(config, 4096, 32768)
    expert = 3 * 6144 * 3072
    assert costs["routed experts"].bytes == pytest.approx(3 * 128 * expert * 2, rel=1e-6)
    assert rates.ms(costs["routed experts"]) == pytest.approx(10.4, abs=0.1)
    assert costs["dense attention"].flops == 4 * 64 * 128 * (4096 * 32768 + 4096 * 4097 // 2)
    assert costs["head"].flops == 2 * 6144 * 200064, "the last token alone gets logits"
    chunks = floors.chunks_ms(config, rates, 4096, 1024)
    assert chunks == pytest.approx(sum(floors.pass_ms(config, rates, 1024, past) for past in range(0, 4096, 1024)))


def test_floor_of_training_counts_the_recomputation(floors, rates):
    config = floors.layers_config(1, 2, 64)
    forward, step = floors.pass_costs(config, 8192, 0), floors.training_costs(config, 8192)
    assert step["projections"].flops == 4 * forward["projections"].flops
    assert step["head"].flops == 3 * 8192 * forward["head"].flops
    assert floors.model_flops_utilization(config, rates, 8192, 350.0) == pytest.approx(0.42, abs=0.01)


def test_experts_hit_by_few_and_by_many_tokens(floors):
    config = floors.layers_config(1, 1)
    assert floors.experts_hit(config, 1) == 4
    assert floors.experts_hit(config, 16) == pytest.approx(51, abs=0.1)
    assert floors.experts_hit(config, 8192) == pytest.approx(128)


def test_sixty_layers_add_up(floors):
    """3 dense layers of 2, 57 sparse ones of 1, and a head of 0.5."""
    head = 0.5
    assert floors.released_ms({4: 2 + 3 + head, 7: 2 + 6 + head}, head) == pytest.approx(3 * 2 + 57 + head)


# --- tables and picture ------------------------------------------------------------------------------------------


def full_record(model_step, report):
    """A record with a plausible figure for each case."""
    rows = []
    for implementation in ("ours", "stock"):
        for case in model_step.CASES:
            if implementation == "stock" and not case.stock:
                continue
            ms = 1.55 if case.model != "7 layers" else 2.27
            row = {"implementation": implementation, **case.key(), "ms": ms * (1 if implementation == "ours" else 4)}
            if case.work.startswith("decode step"):
                row["kernels"] = 200
            if case.group == "memory":
                row["extra_gib"] = 7.0
            if case.group == "million":
                row["chunks"] = 31
            if case.group == "training":
                row["peak_gib"] = 50.0
            if case.work.startswith("token"):
                row |= {"first_run_s": 31.5, "second_run_s": 1.0}
            if case.work.startswith("routed"):
                row["experts_hit"] = 50
            if case.work.startswith("output head"):
                row["ms"] = 0.6
            if case.group == "leak":
                memory = {"tensors": 10.0, "held": 20.0, "card": 30.0}
                row |= {"calls": 1000, "captures": 990, "before_mib": memory, "after_mib": memory | {"card": 31.0}}
            if case.group == "breakdown":
                del row["ms"]
                parts = {"projections": 0.5, "routed experts": 0.7, "head": 0.2}
                row |= {"wall_ms": 1.55, "parts_ms": parts, "gaps_ms": 0.15, "kernels": 200, "longest": []}
            if implementation == "stock" and "ms" in row:
                row["ms_by_setting"] = {"cuDNN": 9.0, "no cuDNN": row["ms"]}
            rows.append(report.with_floor(row, MACHINE))
    return {"machine": MACHINE, "state": "complete", "failed": {}, "rows": rows}


def test_tables_of_a_full_record(model_step, report):
    text = report.tables(full_record(model_step, report))
    step = next(line for line in text.splitlines() if line.startswith("| decode step in a CUDA graph, 8k cached "))
    assert [cell.strip() for cell in step.split("|")[2:-1]] == ["4 layers", "1.55", "-", "1.32", "-", "1.18", "200"]
    layer = next(line for line in text.splitlines() if line.startswith("| one sparse layer of it"))
    assert [cell.strip() for cell in layer.split("|")[3:6]] == ["0.24", "-", "0.189"]
    assert "1000 calls of generate, 990 captures: MiB more" in text and "card +1" in text
    assert "chunks done before the time limit" in text
    assert "| training step, 8k, 3 layers with 64 experts: ms with cuDNN's attention" in text
    assert "share of the matmul rate by 6N" in text
    assert "An extrapolation, not a measurement" in text
    assert "| routed experts " in text and "0.7 (0.32" in text


def test_tables_of_a_part_of_a_record(report):
    assert report.tables({"machine": MACHINE, "rows": []}).startswith("Milliseconds.")
    row = {"implementation": "ours", "group": "memory", "model": "7 layers", "work": "prefill in one call"}
    row |= {"new": 131072, "past": 0, "batch": 1, "failed": "OutOfMemoryError: no"}
    assert report.with_floor(row, MACHINE) == row
    assert "7 layers" not in report.tables({"machine": MACHINE, "rows": [row]})


def test_runs_of_groups_become_one_record(model_step, report):
    record = full_record(model_step, report)
    expected = model_step.expected_rows()
    halves = [record | {"rows": record["rows"][start::2]} for start in (0, 1)]
    merged = report.merge(halves, expected)
    assert merged["state"] == "complete" and [report.key_of(row) for row in merged["rows"]] == expected
    again = {**record["rows"][0], "ms": 1.0}
    merged = report.merge([halves[0], record | {"rows": [again]}], expected)
    assert merged["rows"][0]["ms"] == 1.0, "the later run counts"
    assert merged["state"].startswith("partial, without: ours, decode, 4 layers")
    with pytest.raises(ValueError, match="different cards"):
        report.merge([record, record | {"machine": MACHINE | {"gpu": "another"}}], expected)


def test_the_picture_is_made_from_the_record(model_step, report, tmp_path):
    pytest.importorskip("matplotlib")
    record = full_record(model_step, report)
    for name in ("a.svg", "b.svg"):
        report.plot(record, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text
    assert text == (tmp_path / "b.svg").read_text()
    with pytest.raises(ValueError, match="no breakdown"):
        report.plot(record | {"rows": []}, tmp_path / "c.svg")


def test_the_page_has_the_tables_of_the_stored_record(report, tmp_path):
    record = json.loads((ROOT / "benchmarks/results/model_step.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    assert report.docs_text(record) in page, "run `python -m benchmarks.model_step --docs`"
    copy = tmp_path / "page.md"
    copy.write_text(page)
    report.write_docs(record, copy)
    assert copy.read_text() == page
    copy.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.write_docs(record, copy)


def test_groups_are_chosen_by_name(model_step):
    assert model_step.groups_of("decode,leak") == ["decode", "leak"]
    with pytest.raises(ValueError, match="no such group of cases: decoding"):
        model_step.groups_of("decoding")
    cases = model_step.chosen("stock", "4 layers", ["decode", "turns"])
    assert {case.group for case in cases} == {"decode"} and all(case.stock for case in cases)
    keys = model_step.expected_rows()
    assert len(set(keys)) == len(keys), "each row has a key of its own"


def test_merging_needs_no_gpu(model_step, report, monkeypatch, tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(full_record(model_step, report)))
    monkeypatch.setattr(sys, "argv", ["model_step", "--merge", str(path), "--output", str(tmp_path / "out")])
    model_step.main()
    assert json.loads((tmp_path / "out.json").read_text())["state"] == "complete"
    assert "a card" in (tmp_path / "out.md").read_text()


def test_each_result_is_printed_and_recorded(model_step, report, monkeypatch, tmp_path, capsys):
    gpu = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(gpu, "ceilings", lambda: MACHINE)
    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    commands = []

    class Child:
        """Prints a good row, a failed one, and a line of a library."""

        returncode = 0

        def __init__(self, command, **options):
            commands.append(command)
            option = {name: command[command.index(name) + 1] for name in ("--implementation", "--model")}
            rows = [
                {"implementation": option["--implementation"], **case.key()}
                for case in model_step.chosen(*option.values(), ["prefill"])
            ]
            rows[0] |= {"ms": 55.0}
            for row in rows[1:]:
                row |= {"failed": "OutOfMemoryError: no"}
            self.stdout = ["a warning\n", *(json.dumps(row) + "\n" for row in rows)]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(model_step, "subprocess", SimpleNamespace(Popen=Child, PIPE=None))
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["model_step", "--cases", "prefill", "--output", str(output)])
    with pytest.raises(SystemExit, match="2 cases failed"):
        model_step.main()
    record = json.loads(output.with_suffix(".json").read_text())
    assert [row.get("ms") for row in record["rows"]] == [55.0, None, 55.0, None, 55.0]
    assert record["rows"][0]["floor_ms"] == pytest.approx(35.8, abs=0.1)
    assert "ours, prefill, 4 layers, prefill, 32768, 0, 1" in record["failed"]
    assert len(commands) == 3, "one process for each implementation and size of the model"
    assert '"ms": 55.0' in capsys.readouterr().out


# --- the workloads ---------------------------------------------------------------------------------------------------


class Graph:
    def __init__(self, function=lambda: None):
        self.replay = function


@pytest.fixture
def on_cpu(monkeypatch):
    """Stand-ins for what needs a GPU: the workloads run as they are, and their figures mean nothing."""
    workloads = importlib.import_module("benchmarks.model_step_workloads")
    captured = importlib.import_module("modeling_minimax_m3.runtime.captured_decoding")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 2**21))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    step = captured._CapturedPass
    monkeypatch.setattr(step, "_on_side_stream", lambda self, function: function())
    monkeypatch.setattr(step, "_capture", lambda self: setattr(self, "_graph", Graph(self._forward)))
    monkeypatch.setattr(workloads, "in_graph", lambda function: (function(), Graph(function))[1])
    for module in (workloads, importlib.import_module("benchmarks.model_step_breakdown")):
        monkeypatch.setattr(module, "time_ms", workloads.synchronized_ms)
    monkeypatch.setattr(workloads, "CHUNK", 64)
    monkeypatch.setattr(workloads, "PIECE", 32)
    return workloads


def names_of_cases():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.model_step import CASES
    finally:
        sys.path.remove(str(ROOT))
    return [
        pytest.param(implementation, position, id=f"{implementation}-{case.group}-{case.work}-{case.model}-{position}")
        for implementation in ("ours", "stock")
        for position, case in enumerate(CASES)
        if implementation == "ours" or case.stock
        if case.model != "7 layers" or case.group == "million"
    ]


@pytest.mark.parametrize("implementation, position", names_of_cases())
def test_each_work_runs_on_a_tiny_model(model_step, report, on_cpu, implementation, position):
    case = model_step.CASES[position]
    case = replace(case, new=min(case.new, 100), past=min(case.past, 90), batch=min(case.batch, 3))
    measure = case.measure
    if case.group == "leak":
        measure = partial(model_step.leak, calls=5)
    model = tiny_model(implementation)
    model.generation_config.disable_compile = True
    figures = on_cpu.measured(implementation, model, replace(case, measure=measure))
    assert figures.get("ms", figures.get("wall_ms")) > 0
    if implementation == "stock" and case.group in ("prefill", "training"):
        assert set(figures["ms_by_setting"]) == {"cuDNN", "no cuDNN"}
    row = {"implementation": implementation, **case.key(), **figures}
    if case.group not in ("leak", "breakdown"):
        assert report.with_floor(row, MACHINE)["floor_ms"] > 0
    assert json.loads(json.dumps(row)) == row
