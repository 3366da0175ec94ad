"""What would stop a run later is found before anything is loaded: packages, sizes, folders, the Hub."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils
from transformers.utils import is_liger_kernel_available

# Packages whose names differ from those of their reporters.
PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
# Reporters that Transformers' `is_..._available` knows by another name.
CHECKS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}


def check_run(training: TrainingArguments) -> None:
    """Raises ValueError for options of `TrainingArguments` that would fail after the model is loaded."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(training, name)}")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise ValueError(f"--num_train_epochs must be above 0 without --max_steps, got {training.num_train_epochs}")
    check_reporters([training.report_to] if isinstance(training.report_to, str) else training.report_to or [])
    check_optimizer(training)
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs a package: pip install liger-kernel")
    check_fsdp(training)
    check_output(Path(str(training.output_dir)))
    if training.push_to_hub:
        check_hub(training.hub_token)


def check_reporters(names: list[str]) -> None:
    """Raises ValueError for a reporter that is unknown or whose package is missing."""
    known = set(integration_utils.INTEGRATION_TO_CALLBACK)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--report_to must be none, all or some of {', '.join(sorted(known))}, got {unknown[0]!r}")
    for name in names:
        if not getattr(integration_utils, f"is_{CHECKS.get(name, name)}_available")():
            raise ValueError(f"--report_to {name} needs a package: pip install {PACKAGES.get(name, name)}")


def check_optimizer(training: TrainingArguments) -> None:
    """Raises ValueError if the package of the optimizer is missing, or if optimizer or schedule refuse their values."""
    name = getattr(training.optim, "value", training.optim)
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(training)
    except ImportError as error:
        raise ValueError(f"--optim {name} needs a package: {error}") from error
    except ValueError as error:
        # some optimizers say it this way; other errors come from the missing model
        if "install" in str(error) or "import" in str(error):
            raise ValueError(f"--optim {name} needs a package: {error}") from error
        return
    if kind.__module__.startswith("torch.optim"):  # others may need a GPU
        try:
            optimizer = kind([torch.zeros(1)], **values)
        except (TypeError, ValueError) as error:
            options = "--learning_rate, --adam_beta1, --adam_beta2, --adam_epsilon or --optim_args"
            raise ValueError(f"--optim {name} refuses a value of {options}: {error}") from error
        check_schedule(training, optimizer)


def check_schedule(training: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a schedule of the learning rate that cannot be made."""
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    more: Any = training.lr_scheduler_kwargs or {}  # a mapping once the arguments are parsed
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=more)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {more} cannot be made: {error}"
        ) from error


def check_fsdp(training: TrainingArguments) -> None:
    """Raises ValueError if one process is to load the weights and send them to the others, as Accelerate cannot."""
    is_launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    given = training.fsdp_config if isinstance(training.fsdp_config, dict) else {}
    version = os.environ.get("FSDP_VERSION") if is_launched else given.get("version", 2)
    is_efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true"  # `--fsdp_config` sets it too
    if (is_launched or training.fsdp) and str(version) == "2" and is_efficient:
        where = "fsdp_cpu_ram_efficient_loading: false in the configuration of accelerate launch"
        if not is_launched:
            where = "cpu_ram_efficient_loading to false in --fsdp_config"
        raise ValueError(
            f"with FSDP2, Accelerate cannot send the buffers of this model from the process that loads it: set {where}. "
            "With torchrun and --fsdp_size each process reads only its part of the checkpoint"
        )


def check_output(folder: Path, name: str = "--output_dir") -> None:
    """Makes the folder for results, which the argument `name` gives.

    Raises:
        ValueError: It cannot be made, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder} cannot be written: {error.strerror or error}") from error


def check_output_file(path: Path, name: str) -> None:
    """The same for a file, which may be there: makes its folder."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, but {path} is a folder")
    check_output(path.parent, name)


def check_hub(token: str | None) -> None:
    """Raises ValueError if the Hub cannot be reached, or does not accept the token."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=token)
    except Exception as error:  # without network, without a token, with one that is not valid
        raise ValueError(
            f"--push_to_hub needs the Hub and a token that may write: {str(error).strip() or type(error).__name__}"
        ) from error
