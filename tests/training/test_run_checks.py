"""What would stop a run after its model is loaded is an error before."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers.integrations import integration_utils


@pytest.fixture(scope="module")
def train():
    return importlib.import_module("modeling_minimax_m3.commands.train")


@pytest.fixture
def flags(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # no weights are loaded
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "Block 7."}) + "\n")
    return ["--model", str(tiny_checkpoint), "--dataset", str(data), "--max_steps", "1"]


CASES = {
    "batch": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0"),
    "evaluation batch": (
        ["--per_device_eval_batch_size", "0", "--eval_split", "train"],
        "--per_device_eval_batch_size must be at least 1, got 0",
    ),
    "accumulation": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps.* 0|got 0"),
    "optimizer": (["--optim", "lomo"], "--optim lomo needs a package: .*lomo"),
    "optimizer by its error": (["--optim", "adamw_anyprecision"], "--optim adamw_anyprecision needs a package: .*install"),
    "kernels": (["--use_liger_kernel"], "--use_liger_kernel needs a package: pip install liger-kernel"),
    "learning rate": (["--learning_rate", "-1"], "--optim adamw.* refuses a value of --learning_rate.*: .* -1.0"),
    "betas": (["--adam_beta2", "2"], "refuses a value of .*--adam_beta2.*: .* 2.0"),
    "schedule": (
        ["--lr_scheduler_type", "cosine_with_min_lr"],
        "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_kwargs {} cannot be made: .*min_lr",
    ),
    "schedule's values": (
        ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"cycles": 2}'],
        "--lr_scheduler_type cosine with --lr_scheduler_kwargs {'cycles': 2} cannot be made: .*cycles",
    ),
    "epochs": (
        ["--max_steps", "-1", "--num_train_epochs", "0"],
        "--num_train_epochs must be above 0 without --max_steps, got 0.0",
    ),
    "reporter": (["--report_to", "wandb"], "--report_to wandb needs a package: pip install wandb"),
    "unknown reporter": (["--report_to", "wands"], "--report_to must be none, all or some of .*, got 'wands'"),
    "hub": (["--push_to_hub"], "--push_to_hub needs the Hub and a token that may write: .*no token found"),
    "hub without network": (["--push_to_hub", "--hub_token", "hf_abc"], "--push_to_hub needs the Hub .*offline"),
    "dtype": (["--dtype", "int8"], "--dtype must be one of auto, bfloat16, float16, float32, bf16, .*, got 'int8'"),
    "processes": (["--num_proc", "0"], "--num_proc must be at least 1, got 0"),
    "rows": (["--max_rows", "-1"], "--max_rows must be at least 0, got -1"),
    "fraction": (["--eval_fraction", "1"], "--eval_fraction must be at least 0 and below 1, got 1.0"),
    "fraction of a stream": (["--eval_fraction", "0.5", "--streaming"], "--eval_fraction cannot hold out rows of a stream"),
    "fraction of one row": (["--eval_fraction", "0.5"], "--eval_fraction needs at least two rows, got 1"),
    "media": (["--check_media", "no"], "--check_media must be decode or header, got 'no'"),
    "unknown option": (["--lorra"], "there is no option --lorra; --lora is near"),
    "unknown value": (["--quux=1"], "there is no option --quux. --help lists all"),
    "stray file": (["--lora", "true", "more.jsonl"], "'more.jsonl' belongs to no option: files of data follow --dataset"),
    "model": (["--model", "nowhere"], "--model nowhere is no folder here, and cannot be read from the Hub: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_errors_come_before_weights_are_loaded(train, flags, tmp_path, case, monkeypatch):
    more, message = CASES[case]
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(SystemExit, match=f"(?s)train: .*{message}"):
        train.main([*flags, "--output_dir", str(tmp_path / "run"), "--use_cpu", *more])


def test_fsdp2_whose_weights_one_process_loads(monkeypatch):
    """As in the configuration that `accelerate config` writes by default. The one of `examples/` has false."""
    checks = importlib.import_module("modeling_minimax_m3.commands.run_checks")
    given = ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for name, value in given:
        monkeypatch.setenv(name, value)
    training = SimpleNamespace(fsdp=None, fsdp_config=None)
    with pytest.raises(
        ValueError, match="set fsdp_cpu_ram_efficient_loading: false in the .* accelerate launch.*--fsdp_size"
    ):
        checks.check_fsdp(training)
    monkeypatch.setenv("FSDP_VERSION", "1")
    checks.check_fsdp(training)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    training.fsdp = True
    with pytest.raises(ValueError, match="set cpu_ram_efficient_loading to false in --fsdp_config"):
        checks.check_fsdp(training)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    checks.check_fsdp(training)


def test_a_folder_that_cannot_be_written(train, flags, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/run"):
        with pytest.raises(
            SystemExit, match=f"train: --output_dir .*{folder} cannot be written: .*(exists|directory)"
        ):
            train.main([*flags, "--output_dir", str(tmp_path / folder), "--use_cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
def test_bf16_without_a_gpu_names_the_option(train, flags, tmp_path):
    with pytest.raises(SystemExit, match="train: --bf16 needs a GPU, or --use_cpu to compute in bfloat16 on the CPU"):
        train.main([*flags, "--output_dir", str(tmp_path / "run"), "--bf16"])


def test_short_names_of_dtypes(train, flags, tmp_path, monkeypatch):
    monkeypatch.undo()
    trainer = train.prepare([*flags, "--output_dir", str(tmp_path / "run"), "--use_cpu", "--dtype", "bf16"])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizers_and_schedules_that_can_be_made_pass(optimizer, schedule, tmp_path):
    checks = importlib.import_module("modeling_minimax_m3.commands.run_checks")
    options = {"optim": optimizer, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": SCHEDULES[schedule]}
    checks.check_run(TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options))
