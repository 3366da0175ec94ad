"""Fine-tune a MiniMax-M3 checkpoint, whole or with LoRA, on texts or chats.

    minimax-m3 train --model CHECKPOINT --dataset rows.jsonl --output_dir run --lora
    minimax-m3 train run.yaml --learning_rate 1e-4
    accelerate launch scripts/finetune.py run.yaml

A YAML or JSON file may hold options by the names of the flags. Flags override the file. `--help` first lists the
options of the command. It also takes every option of Transformers' `TrainingArguments`: `--bf16`,
`--activation_checkpointing`, `--report_to tensorboard`, `--resume_from_checkpoint true`, and so on.

A row of the data is a chat, a text, or a prompt with its completion. docs/data.md has the formats. The model learns the
assistant's turns of a chat, all of a text, and the completion of a prompt. All rows are checked before the model is
loaded. A data set is a name on the Hub, a folder, or files (`.jsonl`, `.json`, `.parquet`, `.csv`, `.arrow`).
"""

import math
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.data import RowFault
from processing_minimax_m3.data.sources import are_files, is_saved

from ..layers.layer_types import attention_type
from ..run_monitor import RunMonitor
from ..trainer_logging import IndexerLossLogging
from .adapters import add_adapters, check_adapters, check_fit, check_resumed, open_adapter_config
from .checkpoint import auto_class, is_composite, load_processor, read_config
from .idle_options import refuse_idle
from .model_card import CARD, DataFile, ModelCard, describe_data, hide_in_command, usage_of
from .quantization import check_quantization, loading_options, quantization_of
from .run_checks import check_run
from .run_memory import check_memory
from .saved_checkpoints import check_unfinished, checkpoint_to_resume
from .train_arguments import DataArguments, LoraArguments, ModelArguments, parse_arguments
from .train_data import RunData, lengths_of, read_data
from .weight_sharding import adapter_weights, check_sharding, sharding_options

logger = logging.get_logger(__name__)


def check_arguments(
    model: ModelArguments,
    lora: LoraArguments,
    data: DataArguments,
    training: TrainingArguments,
    given_options: set[str],
) -> None:
    """Raises ValueError for arguments that would fail or do nothing later, before anything is loaded."""
    if (lora.lora or lora.adapter) and find_spec("peft") is None:
        raise ValueError("--lora and --adapter need PEFT: pip install peft")
    if data.max_length < 2:
        raise ValueError(f"--max_length must be at least 2, got {data.max_length}")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps, because the number of rows is unknown")
    if lora.lora and lora.lora_alpha == 0:
        raise ValueError("--lora_alpha must not be 0, because adapters of that scale change nothing and learn nothing")
    if data.num_proc is not None and data.num_proc < 1:
        raise ValueError(f"--num_proc must be at least 1, got {data.num_proc}")
    if data.max_rows is not None and data.max_rows < 0:
        raise ValueError(f"--max_rows must be at least 0, got {data.max_rows}")
    if data.streaming and data.eval_fraction:
        raise ValueError(
            "--eval_fraction cannot hold out rows of a stream, whose number is unknown: leave --streaming out"
        )
    sources = [data.dataset, data.eval_dataset] if data.eval_dataset else [data.dataset]
    refuse_idle(
        given_options,
        adapter=lora.adapter is not None,
        no_lora=not lora.lora and lora.adapter is None,
        lora=lora.lora or lora.adapter is not None,
        label_smoothing=bool(training.label_smoothing_factor),
        no_evaluation=not (data.eval_dataset or data.eval_split or data.eval_fraction),
        held_out=bool(data.eval_fraction),
        packing=data.packing,
        any_run=True,
        streaming=data.streaming,
        no_named_data=all(are_files(names) or is_saved(names[0]) for names in sources),
    )
    check_run(training)
    training.resume_from_checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, Path(training.output_dir))
    if training.resume_from_checkpoint is not None:
        check_unfinished(Path(training.resume_from_checkpoint), training.max_steps)


def load_config(arguments: ModelArguments, max_length: int, given_options: set[str]) -> PreTrainedConfig:
    """The checkpoint's configuration, with the changes that the arguments make."""
    config = read_config(arguments.model)
    text = config.get_text_config()
    if max_length > text.max_position_embeddings:
        logger.warning(
            f"--max_length is {max_length}, but `max_position_embeddings` of the model is {text.max_position_embeddings}: "
            "the model was not trained on positions beyond it."
        )
    refuse_idle(
        given_options,
        no_vision=not is_composite(config),
        no_experts="sparse" not in text.mlp_layer_types,
        no_indexers=not any(attention_type(name).layer_type.has_indexer for name in text.layer_types),
    )
    text.indexer_loss_coef = arguments.indexer_loss_coef
    if arguments.router_aux_loss_coef is not None:
        text.output_router_logits = True
        text.router_aux_loss_coef = arguments.router_aux_loss_coef
    return config


def load_model(arguments: ModelArguments, config: PreTrainedConfig, with_media: bool) -> PreTrainedModel:
    model = auto_class(config).from_pretrained(
        arguments.model,
        config=config,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        **loading_options(arguments.quantization, arguments.dtype, config),
        **sharding_options(arguments),
    )
    model.skip_logits = True  # an evaluation needs the loss alone, as training does
    if is_composite(config):
        # Text never reaches these, and data parallelism waits for the gradient of every trainable parameter.
        model.model.vision_tower.requires_grad_(with_media and arguments.train_vision)
        model.model.multi_modal_projector.requires_grad_(with_media and arguments.train_vision)
    return model


class FinetuneTrainer(IndexerLossLogging, Trainer):
    """Trainer whose logs show the indexers' loss, that knows the lengths of its rows, and writes the card of a run.

    Attributes:
        card (ModelCard, optional): What the card says. The scores are filled in.
    """

    card: ModelCard | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss. No pass keeps keys and values for later tokens, whatever the config of the text model says."""
        return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the model; of one in shards with adapters the adapters alone, for which PEFT would gather all of it."""
        if state_dict is None and self.is_distributed_loading_by_transformers and hasattr(self.model, "peft_config"):
            state_dict = adapter_weights(self.model)
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md, also before a push to the Hub."""
        if self.card is None or not self.is_world_process_zero():
            return
        scores: dict[str, float] = {"steps": self.state.global_step}
        for entry in self.state.log_history:  # the last values
            scores |= {name: value for name, value in entry.items() if name == "train_loss" or name.endswith("_loss")}
        if "eval_loss" in scores:
            scores["eval_perplexity"] = math.exp(min(scores["eval_loss"], 700.0))
        self.card.scores = scores
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).write_text(str(self.card), encoding="utf-8")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = lengths_of(self.train_dataset)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        lengths = lengths_of(eval_dataset)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(self.args.eval_batch_size, lengths=lengths)


def check_data(found: RunData, config: PreTrainedConfig, given_options: set[str]) -> None:
    """Raises ValueError for options that would do nothing with these data."""
    kinds = ", ".join(sorted(found.kinds))
    refuse_idle(
        given_options,
        no_chats="chat" not in found.kinds and f"the rows are of the kind {kinds}",
        no_texts="text" not in found.kinds,
        media=found.has_media,
        no_media=not found.has_media,
        own_attention=not found.has_media
        and not any(attention_type(name).is_dense for name in config.get_text_config().layer_types),
    )


def prepare(argv: list[str]) -> Trainer:
    """Does everything up to the first step.

    Raises:
        ValueError: Arguments, data or checkpoint do not fit together.
    """
    model_arguments, lora_arguments, data_arguments, training, given_options = parse_arguments(argv, __doc__)
    check_arguments(model_arguments, lora_arguments, data_arguments, training, given_options)
    config = load_config(model_arguments, data_arguments.max_length, given_options)
    check_quantization(model_arguments.quantization, config)
    quantization = model_arguments.quantization or quantization_of(config)
    if quantization and not (lora_arguments.lora or lora_arguments.adapter):
        raise ValueError("quantized weights cannot be trained: add --lora, which trains adapters over them")
    adapter = None
    if lora_arguments.adapter is not None:
        adapter, lora_arguments = open_adapter_config(lora_arguments.adapter, lora_arguments)
    if training.resume_from_checkpoint is not None:
        check_resumed(str(training.resume_from_checkpoint), lora_arguments)
    check_sharding(model_arguments, lora_arguments, training, config, quantization, adapter)
    set_seed(training.seed)
    processor = load_processor(model_arguments.model, config)
    if adapter is not None:
        check_fit(config, str(lora_arguments.adapter), adapter, given_options, bool(quantization))
    elif lora_arguments.lora:  # names that fit nothing, before the data are read
        check_adapters(config, lora_arguments, True, given_options)

    with training.main_process_first(desc="reading the data"):
        data = read_data(data_arguments, training, processor)
    check_data(data, config, given_options)
    if lora_arguments.lora and adapter is None and not data.has_media:
        check_adapters(config, lora_arguments, False, given_options)
    if isinstance(processor, MiniMaxM3VLProcessor) and (data.has_media or data_arguments.streaming):
        training.remove_unused_columns = False  # the collator reads these columns
        # Dispatching would cut every tensor of a batch, pixels included, to as many rows as the batch has.
        training.accelerator_config.dispatch_batches = False

    check_memory(config, model_arguments, lora_arguments, data.longest, training)
    model = load_model(model_arguments, config, data.has_media)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(lora_arguments.adapter), is_trainable=True)
    elif lora_arguments.lora:
        model = add_adapters(model, lora_arguments, data.has_media)
    if training.process_index == 0:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for line in data.summary:
            print(line)
        print(f"training {trained:,} of {model.num_parameters():,} parameters", flush=True)
    training.prediction_loss_only = True
    trainer = FinetuneTrainer(
        model,
        training,
        data_collator=data.collator,
        train_dataset=data.rows["training"],
        eval_dataset=data.rows.get("evaluation"),
        processing_class=processor,
    )
    facts = {"command": hide_in_command(["minimax-m3", "train", *argv]), "data": "\n".join(data.summary)}
    RunMonitor(data_arguments.samples, data_arguments.sample_tokens, facts=facts).attach(trainer)
    if training.process_index == 0:
        groups = (model_arguments, lora_arguments, data_arguments, training)
        values = {name: value for group in groups for name, value in vars(group).items() if name in given_options}
        chosen = {name: getattr(value, "value", value) for name, value in values.items()}
        trainer.card = make_card(training, data, chosen, model_arguments.model, lora_arguments.lora, config, argv)
    return trainer


def make_card(
    training: TrainingArguments,
    data: RunData,
    options: dict[str, Any],
    base: str,
    is_adapter: bool,
    config: PreTrainedConfig,
    argv: list[str],
) -> ModelCard:
    """What the card of a run says before there are scores."""
    folder = str(training.output_dir)
    files: list[DataFile] = [describe_data(*source) for source in data.sources]
    return ModelCard(
        title=Path(folder).name,
        base=base,
        is_adapter=is_adapter,
        is_composite=is_composite(config),
        **usage_of(is_composite(config), folder, base if is_adapter else None),
        command=["minimax-m3", "train", *argv],
        data=files,
        notes=data.summary,
        options=options,
    )


def main(argv: Iterable[str] | None = None) -> Trainer:
    """Trains. Errors of arguments and data end the program with their message."""
    try:
        trainer = prepare(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train: {error}") from error
    try:
        result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except RowFault as fault:  # of a stream, whose rows are read as they are needed
        raise SystemExit(f"train: {fault}") from fault
    trainer.save_model()
    trainer.save_state()
    metrics = result.metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    trainer.create_model_card()
    if trainer.args.process_index == 0:
        print(f"saved to {trainer.args.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
