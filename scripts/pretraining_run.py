"""What `pretrain.py` adds to Transformers' `Trainer`: phases of the indexers, curves, a time limit, scores, resuming."""

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from modeling_minimax_m3.conversion.source import read_json
from modeling_minimax_m3.trainer_logging import IndexerLossLogging
from processing_minimax_m3.pretraining import Packs, collate_packs
from replace_when_done import replace_when_done


class IndexerPhases(TrainerCallback):
    """Lets sparse layers attend to all keys in the first steps, and then to those that the indexers choose.

    The phase follows from the number of the step, so a resumed run is in the right one.
    """

    def __init__(self, coefficient: float, warmup_steps: int):
        self.coefficient, self.warmup_steps = coefficient, warmup_steps
        self._is_warmup: bool | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        is_warmup = state.global_step < self.warmup_steps
        if is_warmup != self._is_warmup:
            getattr(model, "module", model).set_indexer_training(self.coefficient, warmup=is_warmup)
            self._is_warmup = is_warmup


class CurveLog(TrainerCallback):
    """Writes each log as a JSON line, with the step, the tokens so far and the seconds of this process.

    A run that resumes drops the lines behind its checkpoint, and goes on.
    """

    def __init__(self, path: Path, tokens_per_step: int):
        self.path, self.tokens_per_step = path, tokens_per_step
        self.started, self.first_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.perf_counter(), state.global_step
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if state.global_step and self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or not self.started:
            return
        seconds = time.perf_counter() - self.started
        steps = state.global_step - self.first_step
        record = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        record |= {"seconds": round(seconds, 2), "tokens_per_second": round(steps * self.tokens_per_step / seconds)}
        with self.path.open("a") as file:
            file.write(json.dumps(record | {name: value for name, value in logs.items() if name != "epoch"}) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinite where a run was stopped while it wrote the line."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class StopAtNaN(TrainerCallback):
    """Ends a run whose loss is no number: all weights are NaN by then, and nothing after that is of use."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}, since the last log at most {args.logging_steps:g} steps "
                "before. Go on from a checkpoint before it with a lower `--learning_rate`."
            )


class TimeLimit(TrainerCallback):
    """Saves and stops after a number of seconds, so that a later process can go on."""

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.started > self.seconds and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class PackTrainer(IndexerLossLogging, Trainer):
    """A `Trainer` whose evaluation scores packs: loss by modality, share of right answers by task and question.

    Attributes:
        processor (MiniMaxM3VLProcessor), options: Set by the script, for what it saves.
        earlier_run (dict, optional): training.json of the run whose weights this one started with.
    """

    processor: Any = None
    options: Any = None
    earlier_run: dict[str, Any] | None = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores all packs of the data set, in every process. See `score_packs`."""
        packs: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        started = time.perf_counter()
        with self.compute_loss_context_manager():
            scores = score_packs(model, packs, min(self.args.dataloader_num_workers, len(packs)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def check_steps_left(checkpoint: Path, max_steps: int) -> None:
    """Raises `ValueError` if a checkpoint has more steps than the run is to have. With as many, its end is written again."""
    done = read_json(checkpoint / "trainer_state.json")["global_step"]
    if done > max_steps:
        raise ValueError(f"`--max_steps` must be at least {done}, the step of {checkpoint}, got {max_steps}.")


def keep_options(trainer: PackTrainer, path: Path, packs_per_step: int) -> None:
    """Writes what decides about the data and the model of a run, beside its checkpoints.

    A run that resumes compares it. The number of steps may grow: then the stages of the curriculum get longer.

    Raises:
        ValueError: The run resumes with another value, so that it would go on with other data than it began with.
    """
    free = ("eval_packs", "time_limit", "indexer_loss_coef", "indexer_warmup_share")
    kept = {name: value for name, value in asdict(trainer.options).items() if name not in free}
    kept |= {"seed": trainer.args.seed, "packs of a step": packs_per_step}
    if trainer.args.resume_from_checkpoint is not None and path.is_file():
        for name, earlier in read_json(path).items():
            if kept.get(name, earlier) != earlier:
                raise ValueError(
                    f"`--resume_from_checkpoint` goes on with the data that the run began with, but `{name}` was {earlier!r} "
                    f"and is {kept[name]!r} now. Give the earlier value, or begin a run of its own with `--init_from`."
                )
    elif trainer.args.process_index == 0:
        with replace_when_done(path) as unfinished:
            unfinished.write_text(json.dumps(kept, indent=1) + "\n")


@torch.no_grad()
def score_packs(model: torch.nn.Module, packs: Packs, num_workers: int = 0) -> dict[str, float]:
    """Scores a model on packs of rows, which `num_workers` processes make.

    An answer is right if each of its tokens, its end included, is the most probable one behind the right tokens before
    it. Greedy decoding writes exactly the right answers, up to rounding: its first wrong token would be one here.

    Returns:
        `loss` and `loss_MODALITY` in nats a learned token, `accuracy_TASK` and `accuracy_TASK_QUESTION` as shares of
        answers, `answers_TASK` as their number, and `expert_load` as the largest share of choices that an expert got in
        any layer, times the number of experts.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    losses: defaultdict[str, float] = defaultdict(float)
    tokens: defaultdict[str, int] = defaultdict(int)
    right: defaultdict[str, int] = defaultdict(int)
    total: defaultdict[str, int] = defaultdict(int)
    load = torch.zeros((), device=device)
    for pack in DataLoader(packs, batch_size=None, num_workers=num_workers):
        inputs = {name: value.to(device) for name, value in collate_packs([pack]).items()}
        labels = inputs.pop("labels")[0]
        places = (labels != -100).nonzero().flatten()  # never the first token of a row
        outputs = model(**inputs, logits_to_keep=places - 1, use_cache=False, output_router_logits=True)
        logits = outputs.logits[0].float()
        values = torch.nn.functional.cross_entropy(logits, labels[places], reduction="none")
        hits = np.zeros(len(labels), bool)
        hits[places.cpu().numpy()] = (logits.argmax(-1) == labels[places]).cpu().numpy()
        load = load + expert_choices(model, outputs.router_logits)
        row_of = np.searchsorted(np.cumsum(pack["lengths"]), places.cpu().numpy(), side="right")
        nats = values.cpu().numpy()
        for row, modality in enumerate(pack["modalities"]):
            losses[modality] += float(nats[row_of == row].sum())
            tokens[modality] += int((row_of == row).sum())
        for task, question, start, end in pack["answers"]:
            for name in (task, f"{task}_{question}"):
                right[name] += bool(hits[start:end].all())
                total[name] += 1
    model.train(was_training)
    shares = load / load.sum(-1, keepdim=True)
    scores = {"loss": sum(losses.values()) / sum(tokens.values())}
    scores |= {f"loss_{name}": losses[name] / max(1, tokens[name]) for name in sorted(losses)}
    scores |= {f"accuracy_{name}": right[name] / total[name] for name in sorted(total)}
    scores |= {f"answers_{name}": total[name] for name in sorted({name.split("_")[0] for name in total})}
    scores["expert_load"] = float(shares.max() * shares.shape[-1])
    return {name: round(value, 5) for name, value in scores.items()}


def expert_choices(model: Any, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How often each expert of each layer was chosen: (layers, experts)."""
    config = model.config.get_text_config()
    chosen = torch.stack(tuple(router_logits)).float().topk(config.num_experts_per_tok, dim=-1).indices
    return torch.nn.functional.one_hot(chosen, config.num_local_experts).sum((1, 2)).float()
