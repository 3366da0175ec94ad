"""Shows how a training run goes: in the console, in the logs of `Trainer`, and as one HTML page."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from .monitoring.console import QuietProgress, evaluation_line, training_line
from .monitoring.pass_flops import peak_flops
from .monitoring.report import report_page
from .monitoring.samples import generate_samples, is_sharded
from .monitoring.tallies import COUNTS, LOSSES, PassTallies, expert_load

logger = logging.get_logger(__name__)

REPORT, SAMPLES = "report.html", "samples.jsonl"
WARNING = "warning"
GIB = 2**30


class RunMonitor(TrainerCallback):
    """A callback for `Trainer` and subclasses, such as TRL's `SFTTrainer`: it measures a run and shows it.

        RunMonitor(samples=2).attach(trainer)
        trainer.train()

    `attach` puts it before the callbacks that report to TensorBoard and others, so that they get its values too, and in
    the place of the lines that `Trainer` prints. `Trainer(callbacks=[RunMonitor()])` works as well: then the values are
    in `state.log_history`, in the console and in the report, but not in other reporters.

    Values of a log, beside those of `Trainer`: `tokens_per_second` and `learned_tokens_per_second` (of all processes,
    without evaluation and saving), `flops_per_second` of one device, `mfu` (its share of the device's peak, from 0 to 1),
    `peak_memory_gib` (of the device that uses most), `language_loss`, `balance_loss` and `indexer_loss` without their
    coefficients, where there is more than one, `expert_entropy`, `expert_most_used` and `expert_least_used` (see
    `expert_load`; mean, greatest and smallest of the layers), `selected_mass` (the share of the attention to all keys
    that the selected blocks hold, of a few queries that see more keys than that, in the first pass of the step), and
    `eta_seconds`. Reporters get the experts' load and the selected mass of each layer too, as `layer_03/expert_entropy`.
    With `logging_strategy="steps"`, the last step is logged too. A loss or a gradient that is no number is a warning.
    Evaluations have `eval_language_loss`, `eval_balance_loss`, `eval_indexer_loss` and `eval_selected_mass`.

    The main process writes `report.html` and `samples.jsonl` into `output_dir`, after each evaluation and save and at
    the end.

    Args:
        samples (int): Rows of the evaluation data whose prompts the model answers at each evaluation. Not where the
            weights are sharded over processes.
        max_new_tokens (int): Greatest length of such an answer, in tokens.
        peak (float, optional): Operations per second that a device reaches at most, for `mfu`. By default from the name
            of the GPU, for bfloat16 and float16.
        report (bool): Whether to write files.
        console (bool): Whether to print.
        facts (dict, optional): What the report says of the run, by name.
    """

    def __init__(
        self,
        samples: int = 0,
        max_new_tokens: int = 64,
        peak: float | None = None,
        report: bool = True,
        console: bool = True,
        facts: dict[str, str] | None = None,
    ):
        for name, value, least in (("samples", samples, 0), ("max_new_tokens", max_new_tokens, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")
        if peak is not None and peak <= 0:
            raise ValueError(f"`peak` must be a positive number of operations per second, got {peak!r}")
        self.num_samples, self.max_new_tokens, self.peak = samples, max_new_tokens, peak
        self.report, self.console = report, console
        self.facts = dict(facts or {})
        self.samples: list[dict[str, Any]] = []  # `step`, `prompt`, `answer` and `reference`
        self.layers: dict[int, dict[str, float]] = {}  # the last values of each layer
        self._tallies: PassTallies | None = None
        self._peak = peak
        self._start = self._window = self._mark = 0.0
        self._excluded = 0.0
        self._first_step = self._logged_step = 0
        self._same_rows = 1  # processes that have the same rows, as under tensor parallelism

    def attach(self, trainer: Trainer) -> "RunMonitor":
        """Puts the monitor before all callbacks of a trainer, and in the place of the lines that `Trainer` prints."""
        callbacks = trainer.callback_handler.callbacks
        if self.console:
            callbacks[:] = [
                QuietProgress() if type(callback) is ProgressCallback else callback
                for callback in callbacks
                if not isinstance(callback, PrinterCallback)
            ]
        callbacks.insert(0, self)
        return self

    # ---- events of `Trainer` ----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the hooks on the model, and starts the clock."""
        model = kwargs["model"]
        self._watch(model, args)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
        self._peak = self.peak or peak_flops(args.device, computed)
        self._start = self._window = self._mark = time.perf_counter()
        self._excluded, self._first_step, self._logged_step = 0.0, state.global_step, state.global_step
        file = Path(str(args.output_dir)) / SAMPLES
        self.samples, self.layers = [], {}
        self.facts.pop(WARNING, None)
        if state.global_step and file.is_file():  # the run continues
            self.samples = [sample for sample in read_samples(file) if sample["step"] <= state.global_step]
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for the selected mass in steps that will be logged."""
        if self._tallies is not None and not args.torch_compile:
            step, every = state.global_step + 1, max(int(state.logging_steps or 1), 1)
            by_steps = args.logging_strategy == "steps" and (step % every == 0 or step == state.max_steps)
            self._tallies.wants_mass = by_steps or (step == 1 and args.logging_first_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time, has the last step logged, and asks for the selected mass of an evaluation that may follow."""
        self._mark = time.perf_counter()
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than `logging_steps` would show nothing at all
        if self._tallies is not None:
            self._tallies.wants_mass = not args.torch_compile

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the values to the log."""
        if not logs or self._tallies is None:
            return
        prefixes = [key.removesuffix("loss") for key in logs if key.endswith("_loss")]
        evaluated = next((prefix for prefix in prefixes if prefix != "train_" and f"{prefix}runtime" in logs), None)
        if "loss" in logs:
            values, of_layers = self._training_values(args, state, "indexer_loss" in logs)
            text = training_line({**logs, **values}, state.global_step, state.max_steps)
            self._check_finite({**logs, **values}, args, state)
        elif evaluated is not None:
            values, of_layers = self._evaluation_values(args, evaluated), {}
            text = evaluation_line({**logs, **values}, state.global_step)
        else:
            return
        for name, value in values.items():
            logs.setdefault(name, value)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            for name, value in values.items():
                state.log_history[-1].setdefault(name, value)
        logs.update(of_layers)
        if self.console and state.is_world_process_zero:
            tqdm.write(text)
        self._mark = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the model answer some prompts, and writes the report."""
        model, processor = kwargs.get("model"), kwargs.get("processing_class")
        loader = kwargs.get("eval_dataloader")
        if self.num_samples and model is not None and processor is not None and loader is not None:
            if is_sharded(model, args):
                logger.warning_once("there are no sample generations, because the weights are sharded over processes")
            elif state.is_world_process_zero:
                self._add_samples(model, processor, loader, state.global_step)
        self._write(args, state)
        self._exclude()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the report."""
        self._write(args, state)
        self._exclude()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the hooks off the model, and writes the report. A later evaluation writes it again."""
        self.close()
        self._write(args, state)

    def close(self) -> None:
        """Takes the hooks off the model. The next training puts them on again."""
        if self._tallies is not None:
            self._tallies.remove()
            self._tallies = None

    # ---- what they do -----------------------------------------------------------------------------------------

    def _watch(self, model: Any, args: TrainingArguments) -> None:
        self.close()
        self._tallies = PassTallies(model)
        self._same_rows = getattr(model, "tp_size", None) or 1
        self._tallies.is_averaged = args.world_size // self._same_rows if args.average_tokens_across_devices else 1

    def _exclude(self) -> None:
        """Leaves the time since the last mark out of the rates."""
        now = time.perf_counter()
        self._excluded += now - self._mark
        self._mark = now

    def _training_values(
        self, args: TrainingArguments, state: TrainerState, has_indexer_loss: bool
    ) -> tuple[dict[str, float], dict[str, float]]:
        tallies = self._tallies
        assert tallies is not None
        masses = [f"{kind}_{number}" for number in tallies.sparse_layers for kind in ("mass", "mass_count")]
        names = [*COUNTS, *LOSSES, "summed", *masses]
        sums = dict(zip(names, tallies.read(names, True, args.device)))
        now = time.perf_counter()  # behind `read`, which waits for the device
        seconds = max(now - self._window - self._excluded, 1e-9)
        steps = max(state.global_step - self._logged_step, 1)
        for name in ("tokens", "learned", "flops"):
            sums[name] /= self._same_rows
        values = {"tokens_per_second": sums["tokens"] / seconds}
        if sums["learned"]:
            values["learned_tokens_per_second"] = sums["learned"] / seconds
        values["flops_per_second"] = sums["flops"] / seconds / max(args.world_size, 1)
        if self._peak is not None:
            values["mfu"] = values["flops_per_second"] / self._peak
        values["peak_memory_gib"] = peak_memory(args.device) / GIB
        passes = max(sums["passes"], 1.0)
        mean = 1 / (steps * max(args.world_size, 1)) if sums["summed"] else 1 / passes
        values |= self._losses(sums, {"language_loss": mean, "balance_loss": 1 / passes, "indexer_loss": mean})
        if has_indexer_loss:
            values.pop("indexer_loss", None)
        layers: dict[int, dict[str, float]] = {}
        for number, counts in tallies.read_experts(args.device).items():
            if load := expert_load(counts):
                layers[number] = load
        if layers:
            values["expert_entropy"] = sum(load["entropy"] for load in layers.values()) / len(layers)
            values["expert_most_used"] = max(load["most_used"] for load in layers.values())
            values["expert_least_used"] = min(load["least_used"] for load in layers.values())
        of_layers = {
            f"layer_{number:02}/expert_{name}": value
            for number, load in layers.items()
            for name, value in load.items()
        }
        mass, mass_of_layers = self._mass(sums)
        values |= {"selected_mass": mass} if mass is not None else {}
        for number, value in mass_of_layers.items():
            layers.setdefault(number, {})["selected_mass"] = value
            of_layers[f"layer_{number:02}/selected_mass"] = value
        if done := state.global_step - self._first_step:
            values["eta_seconds"] = (state.max_steps - state.global_step) * (now - self._start) / done
        for number, found in layers.items():
            self.layers[number] = self.layers.get(number, {}) | found
        self._window, self._excluded, self._logged_step = now, 0.0, state.global_step
        return values, of_layers

    def _evaluation_values(self, args: TrainingArguments, prefix: str) -> dict[str, float]:
        tallies = self._tallies
        assert tallies is not None
        masses = [f"{kind}_{number}" for number in tallies.sparse_layers for kind in ("mass", "mass_count")]
        names = ["passes", *LOSSES, *masses]
        sums = dict(zip(names, tallies.read(names, False, args.device)))
        values = self._losses(sums, dict.fromkeys(LOSSES, 1 / max(sums["passes"], 1.0)))
        mass, _ = self._mass(sums)
        values |= {"selected_mass": mass} if mass is not None else {}
        return {f"{prefix}{name}": value for name, value in values.items()}

    def _check_finite(self, values: dict[str, Any], args: TrainingArguments, state: TrainerState) -> None:
        """Warns once of a loss or a gradient that is no number, which `Trainer` logs as a loss of 0 or so."""
        # with fp16, `Trainer` skips steps whose gradients overflow
        names = ["language_loss"] if args.fp16 else ["language_loss", "grad_norm"]
        bad = [name for name in names if not math.isfinite(values.get(name) or 0.0)]
        if not bad or WARNING in self.facts:
            return
        self.facts[WARNING] = (
            f"{bad[0]} is {values[bad[0]]} at step {state.global_step}, or in a step since the log before it. What is "
            "saved from there on is likely of no use. Continue from an earlier checkpoint, with a smaller "
            "learning rate or in bf16"
        )
        if state.is_world_process_zero:
            logger.warning(self.facts[WARNING])

    def _losses(self, sums: dict[str, float], factors: dict[str, float]) -> dict[str, float]:
        """The losses apart. Where the language loss is the only one, it is `Trainer`'s, which hides what is no number."""
        others = {name: sums[name] * factors[name] for name in ("balance_loss", "indexer_loss") if sums[name]}
        has_language = (bool(others) and bool(sums["language_loss"])) or not math.isfinite(sums["language_loss"])
        return {"language_loss": sums["language_loss"] * factors["language_loss"]} | others if has_language else others

    def _mass(self, sums: dict[str, float]) -> tuple[float | None, dict[int, float]]:
        assert self._tallies is not None
        of_layers = {
            number: sums[f"mass_{number}"] / sums[f"mass_count_{number}"]
            for number in self._tallies.sparse_layers
            if sums[f"mass_count_{number}"]
        }
        return (sum(of_layers.values()) / len(of_layers) if of_layers else None), of_layers

    def _add_samples(self, model: Any, processor: Any, loader: Any, step: int) -> None:
        self.samples = [sample for sample in self.samples if sample["step"] != step]
        for sample in generate_samples(model, processor, loader, self.num_samples, self.max_new_tokens):
            self.samples.append({"step": step, **sample})
            if self.console:
                tqdm.write(f"  sample: {sample['answer']!r}")

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.report or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        page = report_page(f"Run {folder.name}", self.facts, state.log_history, self.layers, self.samples)
        (folder / REPORT).write_text(page, encoding="utf-8")
        if self.samples:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)
            (folder / SAMPLES).write_text(lines, encoding="utf-8")


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The samples of a file, up to a line that was cut off when the run was stopped."""
    samples = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            samples.append(json.loads(line))
        except ValueError:
            break
    return samples


def peak_memory(device: torch.device) -> float:
    """Bytes that a process had in use at most: on its GPU, else in memory. The greatest of all processes."""
    if device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated(device))
    elif sys.platform == "win32":
        return 0.0
    else:
        import resource

        # the unit is KiB on Linux and bytes on macOS
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = torch.tensor(peak, device=device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        peak = value.item()
    return peak
