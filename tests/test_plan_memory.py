"""scripts/plan_memory.py, and how scripts/finetune.py uses the plan."""

import importlib
import json
import re
from pathlib import Path

import pytest

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import memory_plan
from modeling_minimax_m3.planning.devices import OTHER_ROWS

from .forked_processes import run_python

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def command(load_script, monkeypatch):
    """The script on a machine without devices."""
    monkeypatch.setattr(memory_plan, "detected_devices", lambda: None)
    return load_script("plan_memory")


# ---- the command --------------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit(command, capsys):
    assert command.main(["released", "--devices", "2", "--device_gib", "141"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["GiB", "cuda:0", "cuda:1"]
    names = [line.split("  ")[0] for line in lines[1:12]]
    assert {"embeddings", "attention", "dense MLPs", "routed experts", "shared experts", "router", "head"} <= set(
        names
    )
    assert any(line.startswith("does not fit: ") for line in lines)
    first = lines.index("one of these changes makes it fit:") + 1
    assert all(line.endswith(" GiB") for line in lines[first:])
    assert any("precision='nf4'" in line for line in lines[first:])


def test_a_plan_that_fits(command, capsys):
    flags = ["--precision", "mxfp8", "--devices", "8", "--device_gib", "80", "--context", "131072"]
    assert command.main(["released", *flags]) == 0
    assert "\nfits: at most " in capsys.readouterr().out


def test_json(command, capsys, tiny_checkpoint):
    flags = ["--training", "lora", "--lora_targets", "q_proj", "v_proj", "--gradient_checkpointing"]
    assert command.main([str(tiny_checkpoint), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["request"]["precision"] == "float32", "as the checkpoint is saved"
    assert found["request"]["lora_targets"] == ["q_proj", "v_proj"]
    assert found["fits"] is None and found["trained_parameters"] > 0


def test_a_checkpoint_whose_quantizer_left_the_experts(command, capsys, tiny_checkpoint, tmp_path):
    """8 bits of bitsandbytes: the plan has the experts in bfloat16 without being told."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    needs = {}
    for bits in (4, 8):
        config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        command.main([str(tmp_path), "--json"])
        needs[bits] = json.loads(capsys.readouterr().out)["devices"][0]["gib"]["routed experts"]
    assert needs[8] == pytest.approx(needs[4] * 2 / 0.5625, rel=1e-3)
    command.main([str(tmp_path), "--precision", "nf4", "--json"])
    assert json.loads(capsys.readouterr().out)["devices"][0]["gib"]["routed experts"] == needs[4]


def test_experts_on_the_host_of_this_machine(command, capsys, monkeypatch):
    monkeypatch.setattr(memory_plan, "detected_devices", lambda: (4, 79.1))
    monkeypatch.setattr(memory_plan, "detected_host_gib", lambda: 256.0)
    assert command.main(["released", "--precision", "mxfp8", "--experts_on_device", "0.1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    request = found["request"]
    assert (request["devices"], request["experts_on_device"], request["host_gib"]) == (1, 0.1, 256.0)
    assert found["host_gib"] == pytest.approx(413, abs=1)
    flags = ["--precision", "mxfp8", "--experts_on_device", "20GiB", "--host_gib", "512"]
    assert command.main(["released", *flags]) == 0
    assert "GiB of weights in host memory" in capsys.readouterr().out


def test_devices_of_this_machine(command, capsys, monkeypatch):
    monkeypatch.setattr(memory_plan, "detected_devices", lambda: (4, 139.8))
    assert command.main(["released", "--precision", "mxfp8", "--json"]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["devices"], request["device_gib"], request["strategy"]) == (4, 139.8, "device_map")
    command.main(["released", "--training", "lora", "--json"])
    assert json.loads(capsys.readouterr().out)["request"]["strategy"] == "fsdp2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["released", "--devices", "2", "--strategy", "single"], "plan_memory.py: `strategy` must be"),
        (["released", "--layers", "0"], "plan_memory.py: `layers` must be from 1 to 60, got 0"),
        (["released", "--training", "qlora"], "plan_memory.py: `precision` must be quantized"),
        (
            ["no/such/folder"],
            "plan_memory.py: `config` must be a config.json, .*: no/such/folder is no file or folder here",
        ),
        (["/no/such/folder"], "plan_memory.py: `config`: there is no file or folder /no/such/folder$"),
    ],
)
def test_errors(command, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main(arguments)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": "{}"},
            "`config` must be a checkpoint, and {} is an adapter: pass the one it was trained",
        ),
        ({}, "`config` must be a checkpoint, and the folder {} has no config.json"),
        ({"config.json": "{"}, "`config`: {} cannot be read: .*not a valid JSON file"),
        ({"config.json": '{"model_type": "gpt2"}'}, "`config` must be of a MiniMax-M3, got a GPT2Config from {}"),
    ],
)
def test_errors_of_a_folder(command, tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="plan_memory.py: " + message.replace("{}", re.escape(str(tmp_path)))):
        command.main([str(tmp_path)])


def test_a_short_context_needs_no_other_flag(command, capsys, tiny_checkpoint):
    command.main([str(tiny_checkpoint), "--context", "100", "--json"])
    assert json.loads(capsys.readouterr().out)["request"]["new_tokens"] == 99
    with pytest.raises(SystemExit, match="`new_tokens` must be from 0 to context - 1 = 99, got 100"):
        command.main([str(tiny_checkpoint), "--context", "100", "--new_tokens", "100"])
    with pytest.raises(SystemExit, match="`context` must be a positive integer, got 0"):
        command.main([str(tiny_checkpoint), "--context", "0"])


def test_every_field_has_a_flag(command):
    assert set(command.FLAGS) == set(memory_plan.MemoryRequest.__dataclass_fields__)


def test_help_names_the_defaults(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "generated tokens of a row; default: 256" in out
    assert "get adapters; default: q_proj k_proj v_proj o_proj" in out
    assert "default: None" not in out and "default: False" not in out


def test_it_runs_as_a_command(tmp_path):
    script = str(ROOT / "scripts" / "plan_memory.py")
    done = run_python(script, "released", "--device_gib", "80", folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "does not fit" in done.stdout


def test_page_explains_every_row_and_strategy():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    explained = {name.strip(" `") for row in rows for name in row.split(",")}
    assert {*memory_plan.PARTS, *OTHER_ROWS, *memory_plan.STRATEGIES} - {"single"} <= explained
    assert all(f"`{precision}`" in page for precision in memory_plan.PRECISIONS if precision != "float16")


@pytest.mark.parametrize("page", ["README.md", "docs/memory.md", "scripts/plan_memory.py"])
def test_commands_of_the_pages_are_valid(command, page, tiny_checkpoint):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^ *python scripts/plan_memory.py (.*?) *(?:#.*)?$", text, re.MULTILINE)
    assert commands
    for flags in commands:
        assert command.main(flags.replace("CHECKPOINT", str(tiny_checkpoint)).split()) in (0, 1)


# ---- fine-tuning --------------------------------------------------------------------------------------------------


@pytest.fixture
def finetune():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture
def run_memory():
    return importlib.import_module("modeling_minimax_m3.commands.run_memory")


@pytest.fixture
def arguments(tiny_checkpoint, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "Block 7 holds the keys of its own sequence."}) + "\n")
    quick = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "1", "--save_strategy", "no"]
    paths = ["--model", str(tiny_checkpoint), "--dataset", str(data), "--output_dir", str(tmp_path / "run")]
    return [*paths, *quick]


def test_what_cannot_fit_is_not_loaded(finetune, run_memory, arguments, monkeypatch, capsys):
    monkeypatch.setattr(run_memory, "planned_devices", lambda training: (1, 0.4))
    monkeypatch.setattr(finetune, "load_model", lambda *args: pytest.fail("the model was loaded"))
    message = r"train: the run needs about 0\.6 GiB on a device of 0\.4 GiB.* --ignore_plan starts it"
    with pytest.raises(SystemExit, match=message):
        finetune.main([*arguments, "--lora"])
    out = capsys.readouterr().out
    assert out.startswith("memory plan\nGiB") and "does not fit" in out


def test_what_may_fit_is_tried_with_a_warning(finetune, run_memory, arguments, monkeypatch, caplog):
    monkeypatch.setattr(run_memory, "planned_devices", lambda training: (1, 0.55))
    finetune.prepare([*arguments, "--lora"])
    assert "the run needs about 0.6 GiB on a device of 0.6 GiB" in caplog.text


def test_ignored_plan_is_printed(finetune, run_memory, arguments, monkeypatch, capsys):
    monkeypatch.setattr(run_memory, "planned_devices", lambda training: (1, 0.5))
    finetune.prepare([*arguments, "--lora", "--ignore_plan"])
    assert "does not fit" in capsys.readouterr().out


def test_a_run_that_fits_is_planned_and_prepared(finetune, run_memory, arguments, monkeypatch, capsys):
    monkeypatch.setattr(run_memory, "planned_devices", lambda training: (1, 80.0))
    finetune.prepare(arguments)
    out = capsys.readouterr().out
    assert "fits: at most" in out and out.index("memory plan") < out.index("training ")


def test_a_run_that_cannot_be_planned_goes_on(finetune, run_memory, arguments, monkeypatch, caplog):
    def refuse(config):
        raise ValueError("`precision` must be given")

    monkeypatch.setattr(run_memory, "planned_devices", lambda training: (1, 0.5))
    monkeypatch.setattr(memory_plan, "saved_precision", refuse)
    finetune.prepare(arguments)
    assert "there is no memory plan: `precision` must be given" in caplog.text


def test_longest_row(finetune, arguments, monkeypatch):
    planned = []
    monkeypatch.setattr(
        finetune, "check_memory", lambda config, model, lora, longest, training: planned.append(longest)
    )
    trainer = finetune.prepare(arguments)
    finetune.prepare([*arguments, "--streaming"])
    assert planned == [max(len(row["input_ids"]) for row in trainer.train_dataset), 4096]


def test_a_cpu_has_no_plan(finetune, arguments, capsys):
    finetune.prepare(arguments)
    assert "memory plan" not in capsys.readouterr().out


def test_request_of_a_run(finetune, run_memory, arguments, monkeypatch):
    flags = [
        *("--lora", "--lora_rank", "8", "--lora_experts", "--lora_save", "lm_head", "--bf16"),
        *("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--max_length", "300"),
        *("--activation_checkpointing", "--optim", "adafactor"),
    ]
    model, lora, _, training, _ = finetune.parse_arguments([*arguments, *flags])
    config = tiny_config(dtype="float32")
    request = run_memory.memory_request(config, model, lora, 128, training, (1, 80.0))
    assert request == memory_plan.MemoryRequest(
        precision="float32",
        autocast=True,
        context=128,
        batch_size=3,
        training="lora",
        lora_rank=8,
        lora_experts=True,
        lora_save=("lm_head",),
        optimizer="adafactor",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        device_gib=80.0,
    )
    for variable, strategy in (("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "zero3"), ("A", "ddp")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            found = run_memory.memory_request(config, model, lora, 128, training, (8, 80.0))
        assert (found.strategy, found.devices) == (strategy, 8)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for model.dtype in ("auto", "bfloat16"):  # a dtype leaves quantized weights as they are
        found = run_memory.memory_request(config, model, lora, 128, training, (1, 80.0))
        assert (found.precision, found.training, found.autocast) == ("int8", "qlora", False)
        assert "routed experts" in found.unquantized_parts, "which that quantizer does not take"
    config.quantization_config = {"quant_method": "mxfp8"}
    assert run_memory.memory_request(config, model, lora, 128, training, (1, 80.0)).training == "qlora"
    lora.lora = False
    assert run_memory.memory_request(config, model, lora, 128, training, (1, 80.0)) is None
