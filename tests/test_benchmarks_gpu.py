"""What the GPU benchmarks do besides measuring: records that grow, tables, ratios and checks. No test needs a GPU."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config

SCRIPTS = [
    "cuda",
    "cuda_training",
    "cuda_structured",
    "cuda_decode",
    "cuda_layer",
    "cuda_model",
    "model_step",
    "language_loss",
    "host_experts",
    "memory_plan",
    "qlora",
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def gpu(script, monkeypatch):
    """The shared module, which believes in a card of 1 TFLOP/s."""
    module = script("gpu")
    rates = {"matmul_tflops": 1.0, "copy_bytes_per_second": 2e12, "read_bytes_per_second": 2e12}
    monkeypatch.setattr(module, "ceilings", lambda: rates)
    monkeypatch.setattr(module, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    return module


def start(gpu, monkeypatch, output, *options):
    monkeypatch.setattr(sys, "argv", ["cuda", "--output", str(output), *options])
    run = gpu.Run("cuda", gpu.parse_arguments("cuda", ""), lambda record: f"{sorted(record['ms'])}")
    run.record["ms"] = {}
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_it_says_so(script, monkeypatch, name, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        script(name).main()
    assert not list(tmp_path.iterdir())


def test_every_case_is_on_disk_before_the_next_starts(gpu, monkeypatch, tmp_path):
    run = start(gpu, monkeypatch, tmp_path / "out")
    seen = []

    def measure(tokens: int, part: str) -> None:
        if run.record["ms"]:
            seen.append(json.loads((tmp_path / "out.json").read_text()))
        run.record["ms"][f"{tokens} {part}"] = 1.0

    run.cases([(8, "select"), (8, "dense"), (16, "select")], measure)
    assert [record["state"] for record in seen] == [
        "partial, without: 8, dense; 16, select",
        "partial, without: 16, select",
    ]
    assert [list(record["ms"]) for record in seen] == [["8 select"], ["8 select", "8 dense"]]
    assert json.loads((tmp_path / "out.json").read_text())["state"] == "complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]
    run.finish()


def test_a_failed_case_is_recorded_and_the_others_run(gpu, monkeypatch, tmp_path, capsys):
    run = start(gpu, monkeypatch, tmp_path / "out")

    def measure(tokens: int) -> None:
        if tokens == 8:
            raise RuntimeError("no room")
        run.record["ms"][tokens] = 1.0

    run.cases([(8,), (16,)], measure)
    assert run.record["failed"] == {"8": "RuntimeError: no room"} and list(run.record["ms"]) == [16]
    assert "Failed: 8: RuntimeError: no room" in (tmp_path / "out.md").read_text()
    with pytest.raises(SystemExit, match="1 cases failed"):
        run.finish()


def test_no_case_starts_when_its_seconds_are_over(gpu, monkeypatch, tmp_path):
    run = start(gpu, monkeypatch, tmp_path / "out", "--seconds", "100")
    clock = iter([0, 60, 120])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock) + run._started)
    run.cases([("a",), ("b",), ("c",)], lambda name: run.record["ms"].update({name: 1.0}))
    assert list(run.record["ms"]) == ["a", "b"]
    assert "Not complete: partial, without: c." in (tmp_path / "out.md").read_text()


def test_clustered_lists_are_as_long_as_selections(gpu):
    tokens, stay = 24 * gpu.BLOCK, 16
    lists = gpu.clustered_blocks(tokens, stay, device="cpu")
    own = torch.arange(tokens) // gpu.BLOCK
    listed = lists >= 0
    assert torch.equal(listed.sum(-1), (own + 1).clamp(max=gpu.TOPK)[:, None].expand(-1, gpu.KV_HEADS))
    assert not (listed[..., 1:] & ~listed[..., :-1]).any(), "left-packed"
    assert torch.equal(lists.amax(-1), own[:, None].expand(-1, gpu.KV_HEADS).int()), "the own block is the last one"
    assert (lists[..., 1:] < lists[..., :-1])[listed[..., 1:]].all(), "no block twice"
    by_stay = lists[20 * gpu.BLOCK :].unflatten(0, (-1, stay))
    assert torch.equal(by_stay, by_stay[:, :1].expand_as(by_stay))


def test_flops_agree_with_plain_loops(gpu):
    tokens = 18 * gpu.BLOCK + 5
    keys = sum(t % gpu.BLOCK + 1 + min(t // gpu.BLOCK, gpu.TOPK - 1) * gpu.BLOCK for t in range(tokens))
    assert gpu.selected_flops(tokens) == keys * 4 * gpu.HEADS * gpu.DIM


def columns(text: str) -> list[dict[str, str]]:
    """The rows of the tables in a text, as cells by column."""
    rows, header = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line[2:-2].split(" | ")] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
        elif not line.startswith("| --"):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def test_ratios_of_prefill(script):
    row = {"select": 10.0, "random": 20.0, "clustered": 10.0, "step random": 40.0, "step clustered": 30.0}
    row |= {"vLLM select": 15.0, "SGLang select": 13.0, "vLLM random": 50.0, "dense": 790.0}
    flops = 512 * 131072**2
    text = script("cuda").tables({"machine": {"matmul_tflops": flops / 5e-3 / 1e12}, "ms": {131072: row}})
    times, over = columns(text)
    assert times["selection"] == "10 (50%)" and times["step random"] == "40"
    assert over["vLLM / select"] == "1.5" and over["SGLang / select"] == "1.3" and over["vLLM / random"] == "2.5"
    assert over["SGLang / random"] == "-", "it was not measured"
    assert over["dense / step random"] == "19.8"


def test_ratios_of_training(script):
    row = {
        part: {"both": 10.0, "gib": 1.0, "forward": 3.0} for part in ("select", "random", "random_loss", "clustered")
    }
    row |= {"dense": {"both": 75.0}, "flash-msa": {"both": 240.0}}
    tables = script("cuda_training").tables
    random, clustered = columns(tables({"machine": {"matmul_tflops": 1e3}, "rows": {32768: row}}))
    assert random["dense / step"] == "2.5" and random["flash-msa / step"] == "8"
    assert clustered["dense / step"] == "-", "the loss of its step was not measured"


def test_ratios_of_decoding_structured_layers_and_models(script):
    def case(batch, context, **layouts):
        row = {"batch": batch, "context": context, "new": 1, "floor_us": 100.0}
        return row | {layout: {"step": {"us": us}} for layout, us in layouts.items()}

    machine = {"empty_kernel_us": 1.0}
    text = script("cuda_decode").tables(
        {"cases": [case(1, 1 << 20, contiguous=111.0, paged=113.0)], "machine": machine}
    )
    assert "| 111.0      | 11.0% " in text and "| 113.0 | 13.0% " in text

    parts = {"lists": 1.0, "lists_torch": 2.0, "attention": 7.0}
    rows = {65536: parts | {"total": 8.0, "share": 0.7}, 1048576: parts | {"total": 144.0, "share": 0.6}}
    text = script("cuda_structured").tables({"ms": rows, "dense_ms": {1048576: 144.0 * 149}})
    assert "The largest time per token is 1.12 times the smallest." in text
    assert "149 times as long" in text

    def model(of, tokens, rate, gib):
        figures = {"tokens_per_second": rate, "peak_gib": gib, "parameters": 1e9}
        return {"implementation": of, "tokens": tokens} | figures

    rows = [model("stock", 4, 9.0, 9.0), model("stock", 8, 5.0, 30.0), model("ours", 8, 20.0, 5.0)]
    rows.append(model("ours", 64, 20.0, 33.0))
    text = script("cuda_model").tables({"rows": rows, "out_of_memory": []})
    ratios = [
        (row["tokens/s over stock's at its longest"], row["GiB over stock's at its longest"]) for row in columns(text)
    ]
    assert ratios == [("-", "-"), ("-", "-"), ("4", "0.167"), ("4", "1.1")]


def test_cases_of_the_memory_planner(script):
    """As many cases as the planner is judged by: each of over 10 GiB, and of each kind enough."""
    cases = script("memory_plan").CASES
    assert len(cases) >= 8
    requests = [case.request for case in cases.values()]
    assert sum(request.training != "none" for request in requests) >= 2
    assert sum(request.is_quantized for request in requests) >= 2
    assert sum(request.devices == 2 for request in requests) == 1
    for case in cases.values():
        assert all(10 < device.total_gib < 0.9 * 139 for device in case.plan().devices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "static"},
        {"training": "lora", "gradient_checkpointing": True},
        {"training": "full", "optimizer": "sgd"},
        {"training": "indexers"},
        {"precision": "mxfp8"},
        {"training": "qlora", "precision": "mxfp8", "lora_experts": True, "gradient_checkpointing": True},
        {"precision": "fp8", "unquantized_parts": ("vision", "attention", "indexer", "dense MLPs", "shared experts")},
        {"experts_on_device": 0.5},
    ],
    ids=str,
)
def test_works_of_the_memory_planner_run(script, monkeypatch, options):
    """On the tiny model and a CPU."""
    module = script("memory_plan")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module.Case, "config", lambda case: tiny_config().text_config)
    request = module.MemoryRequest(context=40, new_tokens=4, **options)
    model = module.build(module.Case(0, 0, None, request))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    plan = module.Case(0, 0, None, request).plan()
    if request.is_quantized:
        held = sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ".experts." in name and "lora" not in name
        )
        planned = sum(device.gib["routed experts"] for device in plan.devices) * 2**30
        assert held == pytest.approx(planned, rel=0.02)
    if request.training == "none":
        module.run_generation(model, request)
        return
    module.run_training(model, request)
    assert sum(model.get_parameter(name).numel() for name in trained) == plan.trained_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) >= sum(plan.parameters.values())


def test_nf4_of_the_memory_planner_has_the_planned_bytes(script, monkeypatch):
    pytest.importorskip("bitsandbytes")
    module = script("memory_plan")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module.Case, "config", lambda case: tiny_config().text_config)
    case = module.Case(0, 0, None, module.MemoryRequest(context=40, new_tokens=4, precision="nf4"))
    model = module.build(case)
    held = sum(tensor.nbytes for name, tensor in model.named_parameters() if ".experts." in name)
    assert held == pytest.approx(case.plan().devices[0].gib["routed experts"] * 2**30)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "q_proj" in name} == {torch.uint8}


def test_a_case_of_the_memory_planner_that_fails_ends_no_other(gpu, script, monkeypatch, tmp_path):
    """Real processes: without a GPU each says so. One case fails by its own process, one needs more cards."""
    module = script("memory_plan")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    output = tmp_path / "plan"
    command = ["memory_plan", "--cases", "generate, 32k", "LoRA, 8k", "two cards", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    seen = []

    def in_own_process(function, arguments, seconds):
        (name,) = arguments
        seen.append(name)
        assert seconds == 120
        if name == "generate, 32k":
            return real(function, arguments, 60)
        row = {"device": "cuda:0", "estimate_gib": 49.0, "peak_gib": 50.0, "reserved_gib": 51.0, "moment": "prefill"}
        return {"devices": [row], "seconds": 1.0}

    real = module.in_own_process
    monkeypatch.setattr(module, "in_own_process", in_own_process)
    with pytest.raises(SystemExit, match="1 cases failed"):
        module.main()
    record = json.loads(output.with_suffix(".json").read_text())
    assert list(record["failed"]) == ["generate, 32k"]
    assert "needs a CUDA GPU" in record["failed"]["generate, 32k"]
    assert list(record["skipped"]) == ["two cards, generate, 32k, 7 layers"]
    assert record["skipped"]["two cards, generate, 32k, 7 layers"] == "needs 2 GPUs, and this machine has 1"
    assert "LoRA, 8k" in record["cases"] and "two cards, generate, 32k, 7 layers" not in seen
    assert {"gpu", "commit", "command", "torch", "transformers", "peft"} <= set(record["machine"])
    assert "Skipped: two cards" in output.with_suffix(".md").read_text()


def fail():
    raise ValueError("no such weights")


def end_without_result(*_):
    os._exit(7)


def wait_for_ever(*_):
    time.sleep(600)


def test_a_process_of_its_own_that_fails_ends_or_hangs(script, monkeypatch):
    own_process = script("own_process")
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):  # the process has imports of its own
        own_process.in_own_process(fail, (), 60)
    monkeypatch.setattr(own_process, "_send_result", end_without_result)
    with pytest.raises(RuntimeError, match="its process ended with exit code 7"):
        own_process.in_own_process(fail, (), 60)
    monkeypatch.setattr(own_process, "_send_result", wait_for_ever)
    with pytest.raises(RuntimeError, match="took more than 1 s"):
        own_process.in_own_process(fail, (), 1)


def test_cases_of_the_memory_planner_by_text(script):
    module = script("memory_plan")
    assert module.chosen(["NF4", "static"]) == [name for name in module.CASES if "NF4" in name or "static" in name]
    assert module.chosen(["generate, 32k"]) == ["generate, 32k"], "not those that go on"
    assert module.chosen([""]) == list(module.CASES)
    with pytest.raises(SystemExit, match="--cases: 'int4' must be in the name of a case: generate, 32k; "):
        module.chosen(["int4"])


def test_plans_are_within_five_percent_of_the_measured_peaks(script):
    """The record has peaks of an H200. A change of the planner, or of what it counts, shows here."""
    module = script("memory_plan")
    record = json.loads((Path(module.__file__).parent / "results" / "memory_plan.json").read_text())
    module.replan(record)
    rows = [(name, row) for name, found in record["cases"].items() for row in found["devices"]]
    assert len(rows) >= 8
    for name, row in rows:
        assert row["peak_gib"] > 10
        assert abs(module.difference(row)) < 0.05, name


@pytest.mark.parametrize("record, form", [("qlora_bf16", "bf16"), ("qlora", "MXFP8"), ("qlora", "4 bits (NF4)")])
def test_plans_of_adapters_on_experts_are_within_five_percent(script, record, form):
    """Peaks of seven layers on an H200."""
    qlora, memory_plan = script("qlora"), script("memory_plan")
    found = json.loads((Path(qlora.__file__).parent / "results" / f"{record}.json").read_text())["speed"][form]
    plan = memory_plan.Case(1, 6, None, qlora.request_of(form)).plan()
    difference = memory_plan.allocated_estimate(plan.devices[0]) / found["peak_gib"] - 1
    assert abs(difference) < 0.05, difference


def test_differences_of_the_memory_planner(script):
    row = {"device": "cuda:0", "estimate_gib": 49.0, "peak_gib": 50.0, "reserved_gib": 51.0, "moment": "prefill"}
    other = row | {"estimate_gib": 51.5, "device": "cuda:1"}
    text = script("memory_plan").tables({"cases": {"generate": {"devices": [row, other]}}})
    assert "-2.0%" in text and "+3.0%" in text
    assert text.endswith("The largest difference is 3.0%.")
    assert script("memory_plan").tables({"cases": {}}).startswith("|")


def test_tables_can_be_made_at_every_moment(script):
    machine = {"matmul_tflops": 1.0, "relative_error": 1e-3, "empty_kernel_us": 1.0}
    empty = {"ms": {}, "dense_ms": {}, "rows": {}, "cases": [], "machine": machine}
    for name in ("cuda", "cuda_training", "cuda_structured", "cuda_decode", "cuda_layer"):
        assert "| " in script(name).tables(empty)
    for name in ("cuda_model", "language_loss"):
        assert "| " in script(name).tables({**empty, "rows": [], "out_of_memory": ["stock, 8192"]})

    text = script("cuda").tables({**empty, "ms": {8192: {"select": 10.0}, 32768: {"select": 4.0, "vLLM select": 9.0}}})
    assert "10 (" in text and "vLLM / select" in text and "| 2.25 " in text
    half = {8192: {"select": {"both": 1.0}, "random": {"both": 2.0, "gib": 1.0, "forward": 1.0}}}
    assert "2 (1.00)" in script("cuda_training").tables({**empty, "rows": half})
    row = {"batch": 1, "context": 8192, "new": 1, "floor_us": 2.0, "vLLM, paged": {"us": 19.0}}
    assert "| 19.0 " in script("cuda_decode").tables({**empty, "cases": [row]})
    only_ours = {"ours, forward, 8192": {"ms": 4.0, "gib": 1.0}, "ours, forward, 131072": {"ms": None, "gib": None}}
    text = script("cuda_layer").tables({**empty, "rows": only_ours})
    assert "not run" in text and "out of memory" in text


def test_a_baseline_with_different_results_is_not_timed(script):
    baselines = script("baselines")
    ours = torch.arange(1000).view(100, 10)
    baselines.check_selection("one", ours.flip(-1), ours)
    wrong = ours.clone()
    wrong[:2, 0] = -1
    with pytest.raises(RuntimeError, match="one is not timed: only 98.0% of its selections"):
        baselines.check_selection("one", wrong, ours)
    baselines.check_output("one", ours.float() * 1.01, ours.float())
    with pytest.raises(RuntimeError, match="differs"):
        baselines.check_output("one", torch.full((100, 10), float("nan")), ours.float())


def test_a_baseline_that_cannot_be_loaded_is_reported(script, monkeypatch, tmp_path, capsys):
    baselines = script("baselines")
    for variable in ("MINIMAX_M3_VLLM", "MINIMAX_M3_SGLANG"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "flash_msa").mkdir()
    (tmp_path / "flash_msa/__init__.py").write_text("import a_package_that_is_missing")
    monkeypatch.setenv("MINIMAX_M3_FLASH_MSA", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert baselines.load_triton_baselines() == {} and baselines.load_flash_msa() is None
    said = capsys.readouterr().out
    assert "MINIMAX_M3_VLLM names no directory" in said and "a_package_that_is_missing" in said
