"""Train a small MiniMax-M3 from scratch, on text, code, recall, tools, pictures and videos that the machine makes.

    python scripts/pretrain.py --output_dir run --max_steps 8000
    python scripts/pretrain.py --output_dir run --max_steps 8000 --resume_from_checkpoint true
    python scripts/pretrain.py --output_dir longer --max_steps 500 --init_from run/final --stages 32768:1
    accelerate launch --num_processes 8 scripts/pretrain.py --output_dir run --max_steps 8000

Besides the options of `PretrainingOptions`, the script takes every field of `TrainingArguments`. The folder gets the
checkpoints of the run, the curves as JSON lines (`curves.jsonl`), and at the end the model in bfloat16 with tokenizer,
processor and chat template (`final`). docs/pretraining.md explains the data, the phases and the figures.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Everything is on this machine; both are read when Transformers and its tokenizers are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import GenerationConfig, HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from checkpoint_folder import check_checkpoint
from configuration_minimax_m3 import MiniMaxM3VLConfig, small_config, tiny_config
from make_tiny_checkpoint import build_processor
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.commands.run_checks import check_run
from modeling_minimax_m3.commands.saved_checkpoints import checkpoint_to_resume
from modeling_minimax_m3.conversion.source import read_json
from name_lists import check_once
from pretraining_run import (
    CurveLog,
    IndexerPhases,
    PackTrainer,
    StopAtNaN,
    TimeLimit,
    check_steps_left,
    keep_options,
)
from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.pretraining import (
    WEIGHTS,
    LongRows,
    Packs,
    Stage,
    collate_packs,
    parse_stages,
    resize_to_drawn_sizes,
)
from processing_minimax_m3.pretraining.mixture import check_weights
from processing_minimax_m3.pretraining.packs import SHORT_TOKENS
from processing_minimax_m3.pretraining.tokenizer_texts import tokenizer_texts
from replace_when_done import replace_when_done

CONFIGS = {"small": small_config, "tiny": tiny_config}
DEFAULTS = {  # of `TrainingArguments`, where ours differ
    "max_steps": 8000,
    "per_device_train_batch_size": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
    "warmup_steps": 0.03,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "optim": "adamw_torch_fused",
    "logging_steps": 50,
    "logging_nan_inf_filter": False,  # it would wait for the device at every step
    "save_steps": 2000,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 1000,
    "dataloader_num_workers": max(0, min(14, (os.cpu_count() or 1) - 2)),
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "report_to": "none",
}


@dataclass
class PretrainingOptions:
    """Options beside those of `TrainingArguments`."""

    config: str = field(default="small", metadata={"help": "small (7M parameters) or tiny (for tests)"})
    init_from: str = field(
        default="",
        metadata={
            "help": "folder of a finished run (`final`), whose weights, sizes and tokenizer this run starts with"
        },
    )
    pack_tokens: int = field(default=32768, metadata={"help": "tokens of a pack; a batch counts packs"})
    stages: str = field(
        default="2048:0.4,8192:0.7,16384:1",
        metadata={"help": "curriculum: most tokens of a row, and the share of the steps at which the stage ends"},
    )
    tasks: str = field(
        default="", metadata={"help": "weights of tasks, such as image=4,video=2; others are left out. Default: all"}
    )
    indexer_loss_coef: float = field(default=1.0, metadata={"help": "weight of the indexers' loss"})
    indexer_warmup_share: float = field(
        default=0.0,
        metadata={
            "help": "share of the steps in which sparse layers attend to all keys by `indexer_warmup`. Rows of a first "
            "stage that have no more blocks than a query selects need none: their attention is dense in any case"
        },
    )
    long_share: float = field(
        default=LongRows.share, metadata={"help": "share of the packs that begin with a long row"}
    )
    long_spread: float = field(
        default=LongRows.spread,
        metadata={"help": "longest length of the long rows of a stage, divided by the shortest"},
    )
    most_positions: int = field(
        default=LongRows.most_positions,
        metadata={
            "help": "positions of half of the long rows jump, and stay below this number, so that the model meets "
            "distances of longer rows; 0: none do"
        },
    )
    eval_packs: int = field(default=8, metadata={"help": "held-out packs of an evaluation"})
    time_limit: float = field(default=0.0, metadata={"help": "seconds after which the run saves and stops; 0: none"})

    def weights(self) -> dict[str, float]:
        """The weights of the tasks."""
        if not self.tasks:
            return dict(WEIGHTS)
        pairs = []
        for part in self.tasks.split(","):
            name, _, weight = part.partition("=")
            try:
                pairs.append((name.strip(), float(weight or 1)))
            except ValueError as error:
                raise ValueError(f"`--tasks` must be NAME=WEIGHT,..., got {part!r} in {self.tasks!r}.") from error
        check_once([name for name, _ in pairs], "--tasks")
        weights = dict(pairs)
        check_weights(weights)
        return weights

    def parsed_stages(self) -> tuple[Stage, ...]:
        return parse_stages(self.stages)

    def long_rows(self) -> LongRows:
        """Raises `ValueError` for values out of range."""
        if not 0 <= self.long_share <= 1:
            raise ValueError(f"`--long_share` must be from 0 to 1, got {self.long_share}.")
        if not self.long_spread >= 1:
            raise ValueError(f"`--long_spread` must be at least 1, got {self.long_spread}.")
        if self.most_positions < 0:
            raise ValueError(f"`--most_positions` must be at least 0, got {self.most_positions}.")
        return LongRows(self.long_share, self.long_spread, self.most_positions)


def read_options(argv: list[str]) -> tuple[PretrainingOptions, TrainingArguments]:
    kinds: Any = (PretrainingOptions, TrainingArguments)
    parser = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0])
    given = {part.split("=")[0] for part in argv if part.startswith("--")}
    defaults = dict(DEFAULTS)
    if not given & {"--bf16", "--fp16"} and "--use_cpu" not in given:
        defaults["bf16"] = torch.cuda.is_available()
    # PyTorch warns of pinned memory without an accelerator.
    defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
    parser.set_defaults(**defaults)
    options, training = parser.parse_args_into_dataclasses(argv)
    if options.init_from and "--config" in given:
        raise ValueError("`--config` has no effect with `--init_from`, whose folder has the configuration.")
    if options.init_from:
        check_checkpoint(Path(options.init_from), "--init_from")
    if options.config not in CONFIGS:
        raise ValueError(f"`--config` must be one of {sorted(CONFIGS)}, got {options.config!r}.")
    if not 0 <= options.indexer_warmup_share <= 1:
        raise ValueError(f"`--indexer_warmup_share` must be from 0 to 1, got {options.indexer_warmup_share}.")
    if not options.time_limit >= 0:
        raise ValueError(f"`--time_limit` must be at least 0 seconds, got {options.time_limit}.")
    if not 0 <= options.indexer_loss_coef < math.inf:
        raise ValueError(f"`--indexer_loss_coef` must be a number from 0, got {options.indexer_loss_coef}.")
    if training.dataloader_num_workers < 0:
        raise ValueError(f"`--dataloader_num_workers` must be at least 0, got {training.dataloader_num_workers}.")
    if training.max_steps < 1:
        raise ValueError(f"`--max_steps` must be at least 1, since the data have no end, got {training.max_steps}.")
    if training.train_sampling_strategy != "sequential":
        raise ValueError(f"`--train_sampling_strategy` must be sequential, got {training.train_sampling_strategy}.")
    if options.time_limit and training.world_size > 1:
        raise ValueError("`--time_limit` works in one process, because processes do not stop at the same step.")
    return options, training


def check_shared_memory(training: TrainingArguments, pack_tokens: int) -> None:
    """Raises `ValueError` if the batches that wait in the workers may not fit into /dev/shm, which kills workers."""
    shared = Path("/dev/shm")
    if not training.dataloader_num_workers or not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    waiting = training.dataloader_num_workers * (training.dataloader_prefetch_factor or 2) + 1
    # measured: a pack of the default mixture has up to 0.4 patches a token, of 1176 numbers
    pixel_bytes = 2 if training.bf16 else 4
    needed = int(waiting * training.per_device_train_batch_size * pack_tokens * 0.4 * 1176 * pixel_bytes)
    if needed > free:
        raise ValueError(
            f"/dev/shm has {free / 2**20:.0f} MiB free, but {training.dataloader_num_workers} workers may need "
            f"{needed / 2**20:.0f} MiB. Lower `--dataloader_num_workers`, or give the container more (--shm-size)."
        )


def check_jumps(long_rows: LongRows, stages: tuple[Stage, ...]) -> None:
    """Raises `ValueError` if no long row of any stage is short enough for its positions to jump."""
    shortest = min(max(int(stage.max_length / long_rows.spread), SHORT_TOKENS) for stage in stages)
    if 0 < long_rows.most_positions <= shortest:
        raise ValueError(
            f"`--most_positions` must be above the length of the shortest long rows, {shortest} tokens, or 0 for no jumps, "
            f"got {long_rows.most_positions}."
        )


def check_rows_fit(packs: Packs) -> None:
    """Raises `ValueError` if no row fits into any of the packs, which would have nothing to learn or to score."""
    if not any(packs.rows(index) for index in range(len(packs))):
        raise ValueError(
            f"no row of {', '.join(packs.weights)} fits into {packs.stages[-1].max_length} tokens, the longest rows of "
            f"`--stages`, in {len(packs)} held-out packs. Allow longer rows, or raise `--eval_packs`."
        )


def dense_steps(config: MiniMaxM3VLConfig, stages: tuple[Stage, ...], max_steps: int, warmup_steps: int) -> int:
    """How many of the first steps have dense attention: in the warm-up, or because a query selects all its blocks."""
    selected = config.text_config.index_topk_blocks * config.text_config.index_block_size
    ends = [stage.end for stage in stages if stage.max_length <= selected]
    return max(warmup_steps, round(max(ends, default=0.0) * max_steps))


def prepare_model(
    options: PretrainingOptions, weights: dict[str, float], seed: int
) -> tuple[MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLProcessor]:
    """A new model and its tokenizer, or those of an earlier run, with weights in float32."""
    if options.init_from:
        processor = MiniMaxM3VLProcessor.from_pretrained(options.init_from)
        try:
            model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(options.init_from, dtype=torch.float32)
        except RuntimeError as error:  # Transformers has printed which weights have other shapes
            raise ValueError(
                f"`--init_from`: the weights in {options.init_from} do not fit its config.json: {error}"
            ) from error
    else:
        config = CONFIGS[options.config]()
        processor = build_processor(config, tokenizer_texts(weights, seed))
        model = MiniMaxM3SparseForConditionalGeneration(config)
    resize_to_drawn_sizes(processor)
    model.config.text_config.output_router_logits = True  # with the routers' loss, so that experts stay balanced
    return model, processor


def prepare(argv: list[str]) -> PackTrainer:
    """Builds tokenizer, model and data, and checks everything that can be checked before training."""
    options, training = read_options(argv)
    weights = options.weights()
    check_run(training)
    output = Path(str(training.output_dir))
    training.resume_from_checkpoint = resume = checkpoint_to_resume(training.resume_from_checkpoint, output)
    if resume is not None:
        check_steps_left(Path(resume), training.max_steps)
    check_shared_memory(training, options.pack_tokens)
    set_seed(training.seed)
    packs_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    data: dict[str, Any] = {"tokens": options.pack_tokens, "weights": weights, "seed": training.seed}
    stages, long_rows = options.parsed_stages(), options.long_rows()
    check_jumps(long_rows, stages)
    model, processor = prepare_model(options, weights, training.seed)
    num_packs = packs_per_step * training.max_steps
    train = Packs(processor, "train", num_packs, stages=stages, long_rows=long_rows, **data)
    heldout = Packs(processor, "heldout", options.eval_packs, stages=[Stage(1.0, stages[-1].max_length)], **data)
    check_rows_fit(heldout)

    model.set_indexer_training(options.indexer_loss_coef, warmup=options.indexer_warmup_share > 0)
    warmup_steps = round(options.indexer_warmup_share * training.max_steps)
    callbacks: list[TrainerCallback] = [
        IndexerPhases(options.indexer_loss_coef, warmup_steps),
        CurveLog(output / "curves.jsonl", packs_per_step * options.pack_tokens),
        StopAtNaN(),
    ]
    if options.time_limit:
        callbacks.append(TimeLimit(options.time_limit))
    trainer = PackTrainer(
        model,
        training,
        data_collator=partial(collate_packs, pixel_dtype=torch.bfloat16 if training.bf16 else torch.float32),
        train_dataset=train,
        eval_dataset=heldout,
        callbacks=callbacks,
    )
    trainer.processor, trainer.options = processor, options
    keep_options(trainer, output / "options.json", packs_per_step)
    if options.init_from and (record := Path(options.init_from) / "training.json").is_file():
        trainer.earlier_run = read_json(record)
    if training.process_index == 0:
        size = model.num_parameters()
        print(f"{size:,} parameters, {size * 2 / 1e6:.1f} MB in bfloat16")
        print(f"{training.max_steps} steps of {packs_per_step * options.pack_tokens:,} tokens")
        print(
            f"dense attention in the first {dense_steps(model.config, stages, training.max_steps, warmup_steps)} steps"
        )
    return trainer


def save_final(trainer: PackTrainer, target: Path, argv: list[str], metrics: dict[str, Any]) -> None:
    """Saves the model in bfloat16 as a checkpoint of its own, with how it was made: all of it or nothing."""
    with replace_when_done(target) as folder:
        folder.mkdir()
        write_final(trainer, folder, argv, metrics)


def write_final(trainer: PackTrainer, folder: Path, argv: list[str], metrics: dict[str, Any]) -> None:
    """Writes the files of `save_final`."""
    processor: MiniMaxM3VLProcessor = trainer.processor
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.set_indexer_training(0.0)
    model.config.text_config.output_router_logits = False
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # with `--init_from` they have that of the training, float32
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("is_local", "local_files_only"):  # with `--init_from`, how that folder was read
        tokenizer.init_kwargs.pop(name, None)
    processor.save_pretrained(folder)
    curves = Path(str(trainer.args.output_dir)) / "curves.jsonl"
    logs = [json.loads(line) for line in curves.read_text().splitlines()]
    record: dict[str, Any] = {
        "command": ["python", "scripts/pretrain.py", *argv],
        "options": asdict(trainer.options),
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "seconds": [round(log["train_runtime"], 1) for log in logs if "train_runtime" in log],  # of each process
        "commit": commit_of_this_file(),
        "python": sys.version.split()[0],  # the texts are those of this release
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "heldout": {name: value for name, value in metrics.items() if name.startswith("eval_")},
    }
    if trainer.earlier_run is not None:
        earlier = dict(trainer.earlier_run)
        record["earlier_runs"] = [*earlier.pop("earlier_runs", []), earlier]
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def commit_of_this_file() -> str | None:
    """The commit of the working tree; None where there is no Git or no repository."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: Iterable[str] | None = None) -> PackTrainer:
    """Trains. Errors of arguments end the program with their message."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        trainer = prepare(arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"pretrain: {error}") from error
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except FloatingPointError as error:
        raise SystemExit(f"pretrain: {error}") from error
    is_done = trainer.state.global_step >= trainer.args.max_steps
    metrics = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if metrics.get("step") != trainer.state.global_step:
        metrics = trainer.evaluate()
    if trainer.args.process_index == 0:
        if is_done:
            save_final(trainer, Path(str(trainer.args.output_dir)) / "final", arguments, metrics)
            print(f"saved to {trainer.args.output_dir}/final")
        else:
            print(f"stopped at step {trainer.state.global_step}: go on with --resume_from_checkpoint true")
    return trainer


if __name__ == "__main__":
    main()
