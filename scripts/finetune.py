"""Fine-tune a MiniMax-M3 checkpoint, whole or with LoRA, on texts or chats.

    python scripts/finetune.py --model CHECKPOINT --dataset rows.jsonl --output_dir run --lora
    python scripts/finetune.py run.yaml --learning_rate 1e-4
    accelerate launch scripts/finetune.py run.yaml

A YAML or JSON file may hold options by the names of the flags. Flags override the file. `--help` first lists the
options of the script. It also takes every option of Transformers' `TrainingArguments`: `--bf16`,
`--activation_checkpointing`, `--report_to tensorboard`, `--resume_from_checkpoint true`, and so on.

A row of the data is a chat or a text. A chat stands in a column `messages`, and the model learns the assistant's
turns. Columns `tools` and `chat_template_kwargs`, such as `{"thinking_mode": "enabled"}`, may stand beside it. A text
stands in a column `text`, and the model learns all of it. Images and videos of a chat stand in its messages, or in
columns `images` and `videos`, as paths, URLs or the objects that `datasets` makes of them. A data set is a name on the
Hub, a folder, or files (`.jsonl`, `.json`, `.parquet`, `.csv`, `.arrow`).
"""

import argparse
import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import modeling_minimax_m3  # noqa: F401  (registers the classes)
from idle_options import refuse_idle
from modeling_minimax_m3.layers.layer_types import attention_type
from modeling_minimax_m3.trainer_logging import IndexerLossLogging
from processing_minimax_m3 import MiniMaxM3VLProcessor, MultimodalChatCollator
from processing_minimax_m3.chat_template import THINKING_MODES, check_thinking_mode
from processing_minimax_m3.collator import named_in_errors, template_variables, without_none
from run_memory import check_memory

logger = logging.get_logger(__name__)

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
MEDIA_COLUMNS = ("images", "videos")
# The modules that get adapters by default, on request (EXPERTS), and never (VISION).
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
VISION = ("vision_tower", "multi_modal_projector")


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Folder of a checkpoint, or its name on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Type of the loaded weights; auto keeps the saved type."})
    attn_implementation: str | None = field(default=None, metadata={"help": "For dense layers: sdpa, eager, ..."})
    train_vision: bool = field(
        default=False, metadata={"help": "Also train the vision tower and its projector; the data must have images."}
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the experts' load-balancing loss; default: the checkpoint's."}
    )
    indexer_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the loss that trains the indexers of sparse layers; 0 freezes them."}
    )
    ignore_plan: bool = field(
        default=False, metadata={"help": "Load the model even if the memory plan says that it does not fit."}
    )


@dataclass
class LoraArguments:
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the weights."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_targets: list[str] = field(
        default_factory=lambda: list(ATTENTION),
        metadata={"help": "Linear layers of the language model that get adapters, by the end of their names."},
    )
    lora_experts: bool = field(default=False, metadata={"help": "Also put adapters on the routed experts."})
    lora_save: list[str] = field(
        default_factory=list, metadata={"help": "Modules that are trained whole and saved with the adapters."}
    )


@dataclass
class DataArguments:
    dataset: list[str] = field(metadata={"help": "Name on the Hub, folder, or files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: list[str] = field(
        default_factory=list, metadata={"help": "Data to evaluate on, if other than --dataset."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    messages_column: str = field(default="messages", metadata={"help": "Column of chats."})
    thinking_mode: str = field(
        default=THINKING_MODES[0],
        metadata={
            "help": "Thinking mode in the prompts of chats: adaptive, enabled or disabled. The column "
            "chat_template_kwargs of a row overrides it."
        },
    )
    max_length: int = field(
        default=4096,
        metadata={
            "help": "Greatest number of tokens of a row. Longer texts become several rows. Longer chats are cut, or "
            "left out if the cut would hit an image or a video."
        },
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use only this many rows of the training data."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as it is needed; needs --max_steps."})
    padding_free: bool = field(
        default=True, metadata={"help": "Concatenate the rows of a batch instead of padding them."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        check_thinking_mode(self.thinking_mode, "--thinking_mode")


# ---- arguments ----------------------------------------------------------------------------------------------------


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, LoraArguments, DataArguments, TrainingArguments, set[str]]:
    """Parses flags, and the values of a YAML or JSON file that comes before them.

    Args:
        argv (list[str]): The command line.

    Returns:
        The four groups of arguments, and the names of the given options. Options that only switch something off are
        not among these names.
    """
    values = {}
    parser = HfArgumentParser((ModelArguments, LoraArguments, DataArguments, TrainingArguments), description=__doc__)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file, *argv = argv
        if not Path(file).is_file():
            parser.error(f"there is no file {file}")
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            parser.error(f"{file} cannot be read: {error}")
        if not isinstance(values, dict):
            parser.error(f"{file} must hold names and values, got {type(values).__name__}")
        known = {action.dest: action for action in parser._actions}
        if unknown := sorted(map(str, set(values) - set(known))):
            parser.error(f"{file} has unknown options: {', '.join(unknown)}")
        values = {name: value for name, value in values.items() if value is not None or not known[name].required}
        for name, value in values.items():
            known[name].required = False
            if known[name].nargs in ("+", "*") and not isinstance(value, list):
                values[name] = [value]
        parser.set_defaults(**values)
    arguments = parser.parse_args_into_dataclasses(argv)
    unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
    given = values.keys() | {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    chosen = {name: value for part in arguments for name, value in vars(part).items() if name in given}
    return *arguments, {name for name, value in chosen.items() if value and value != "no"}


def check_arguments(
    model: ModelArguments,
    lora: LoraArguments,
    data: DataArguments,
    training: TrainingArguments,
    given_options: set[str],
) -> None:
    """Raises ValueError for arguments that would fail or do nothing later, before anything is loaded."""
    if lora.lora and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs PEFT: pip install peft")
    if "tensorboard" in training.report_to and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--report_to tensorboard needs TensorBoard: pip install tensorboard")
    if data.max_length < 2:
        raise ValueError(f"--max_length must be at least 2, got {data.max_length}")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps, because the number of rows is unknown")
    if lora.lora and lora.lora_alpha == 0:
        raise ValueError("--lora_alpha must not be 0, because adapters of that scale change nothing and learn nothing")
    sources = [data.dataset, data.eval_dataset] if data.eval_dataset else [data.dataset]
    refuse_idle(
        given_options,
        no_lora=not lora.lora,
        lora=lora.lora,
        label_smoothing=bool(training.label_smoothing_factor),
        no_evaluation=not (data.eval_dataset or data.eval_split),
        any_run=True,
        streaming=data.streaming,
        no_named_data=all(are_files(names) or is_saved(names[0]) for names in sources),
    )
    resumes = training.resume_from_checkpoint
    if str(resumes).lower() in ("true", "false"):
        training.resume_from_checkpoint = True if str(resumes).lower() == "true" else None
    folder = Path(training.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if isinstance(training.resume_from_checkpoint, str) and not Path(training.resume_from_checkpoint).is_dir():
        raise ValueError(f"--resume_from_checkpoint: there is no folder {training.resume_from_checkpoint}")
    if training.resume_from_checkpoint is True and last is None:
        raise ValueError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}")
    if training.resume_from_checkpoint is None and last is not None:
        raise ValueError(
            f"{folder} holds {Path(last).name} of an earlier run. Continue it with --resume_from_checkpoint true, or "
            "name another --output_dir"
        )


# ---- data ---------------------------------------------------------------------------------------------------------


def are_files(names: list[str]) -> bool:
    return all(Path(name).suffix in FILE_TYPES for name in names)


def is_saved(name: str) -> bool:
    """Whether `name` is a folder that `save_to_disk` wrote."""
    return any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def load_rows(names: list[str], split: str, data: DataArguments) -> Dataset | IterableDataset:
    """Loads one split of a data set: files, a folder, or a name on the Hub."""
    suffixes = {Path(name).suffix for name in names}
    if are_files(names):
        if split != "train":
            raise ValueError(
                f"files have only the split 'train', got {split!r}; --eval_dataset names other files to evaluate on"
            )
        if missing := [name for name in names if "://" not in name and not Path(name).is_file()]:
            raise ValueError(f"there is no file {', '.join(missing)}")
        types = sorted({FILE_TYPES[suffix] for suffix in suffixes})
        if len(types) > 1:
            raise ValueError(f"the files of a data set must be of one type, got {' and '.join(types)}: {names}")
        if empty := [name for name in names if Path(name).is_file() and not Path(name).stat().st_size]:
            raise ValueError(f"the file {', '.join(empty)} is empty")
        try:
            return load_dataset(types[0], data_files=names, split="train", streaming=data.streaming)
        except ValueError as error:  # older versions of datasets do not wrap this error
            raise ValueError(f"the data cannot be read: {error}") from error
    if len(names) > 1:
        raise ValueError(f"a data set of several names must consist of files ({', '.join(FILE_TYPES)}), got {names}")
    if is_saved(names[0]):
        rows = load_from_disk(names[0])
        if isinstance(rows, Dataset):
            rows = DatasetDict({"train": rows})
    else:
        rows = load_dataset(names[0], data.dataset_config, streaming=data.streaming)
    if split not in rows:
        raise ValueError(f"the split must be one of {', '.join(rows)} of {names[0]}, got {split!r}")
    rows = rows[split]
    return rows.to_iterable_dataset() if data.streaming and isinstance(rows, Dataset) else rows


def first_row(rows: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    for row in rows:
        return row
    raise ValueError(f"the {name} data has no rows")


def has_media(messages: list[dict[str, Any]]) -> bool:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"every row of chats must hold a list of messages, got {messages!r:.100}")
    # A message that only calls a tool may have no content.
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return any(isinstance(part, dict) and part.get("type") != "text" for content in contents for part in content)


def is_multimodal(rows: Dataset | IterableDataset, data: DataArguments, name: str) -> bool:
    """Whether the data have images or videos, in columns of their own or in the messages of the first hundred rows."""
    first = first_row(rows, name)
    if data.messages_column not in first:
        return False
    if any(column in first for column in MEDIA_COLUMNS):
        return True
    messages = rows.select_columns([data.messages_column])
    return any(has_media(row[data.messages_column]) for row in itertools.islice(messages, 100))


def with_collator_names(rows: Dataset | IterableDataset, collator: Any, data: DataArguments, name: str):
    """The rows whose images and videos fit and that have anything to learn.

    The collator reads these rows again when it makes their batch.
    """
    first = first_row(rows, name)
    if data.messages_column not in first:
        raise ValueError(
            f"the {name} data needs a column {data.messages_column!r}, because other data have images or videos"
        )
    if data.messages_column != "messages":
        rows = rows.rename_column(data.messages_column, "messages")

    def is_useful(row: dict[str, Any], index: int) -> bool:
        with named_in_errors(f"row {index} of the {name} data"):
            return collator.is_useful(row)

    options = {} if data.streaming else {"num_proc": data.num_proc, "desc": f"measuring the {name} data"}
    rows = rows.filter(is_useful, with_indices=True, **options)
    if next(iter(rows), None) is None:
        raise ValueError(
            f"no row of the {name} data has all of its images and videos, and anything to learn, within its first "
            f"{data.max_length} tokens (--max_length): chats need turns of the role 'assistant'"
        )
    return rows


def tokenise(rows: Dataset | IterableDataset, tokenizer: Any, data: DataArguments, name: str):
    """Converts rows to `input_ids` and `labels` of at most `max_length` tokens."""
    first = first_row(rows, name)
    is_chat = data.messages_column in first
    if not is_chat and data.text_column not in first:
        raise ValueError(
            f"the {name} data has the columns {', '.join(first)}, but needs {data.messages_column!r} (chats) or "
            f"{data.text_column!r} (texts); name other columns with --messages_column and --text_column"
        )
    if is_chat and not tokenizer.chat_template:
        raise ValueError("the data are chats, but the checkpoint's tokenizer has no chat template")

    def from_chat(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        with named_in_errors(f"row {index} of the {name} data"):
            variables = template_variables(row, {"thinking_mode": data.thinking_mode})
        if has_media(row[data.messages_column]):
            raise ValueError(
                f"the {name} data has an image or a video, but none in its first hundred rows, so the script reads only "
                "text"
            )
        encoded = tokenizer.apply_chat_template(
            row[data.messages_column],
            tools=without_none(row.get("tools")),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **variables,
        )
        ids = encoded["input_ids"][: data.max_length]
        return {
            "input_ids": ids,
            "labels": [token if learn else -100 for token, learn in zip(ids, encoded["assistant_masks"])],
        }

    def from_texts(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        for text in columns[data.text_column]:
            if not isinstance(text, str):
                raise ValueError(f"every row of the {name} data must hold a text, got {text!r:.100}")
        texts = tokenizer(columns[data.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = []
        for ids in texts:
            ids = [*ids, tokenizer.eos_token_id]
            pieces += [ids[start : start + data.max_length] for start in range(0, len(ids), data.max_length)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        # Nothing predicts the first token of a row, and `Trainer` would count its label if padding stands before it.
        return {"input_ids": pieces, "labels": [[-100, *piece[1:]] for piece in pieces]}

    options = {"remove_columns": list(first), "batched": not is_chat, "with_indices": is_chat}
    if not data.streaming:
        options |= {"num_proc": data.num_proc, "desc": f"tokenising the {name} data"}
    encoded = rows.map(from_chat if is_chat else from_texts, **options)
    # A chat may be cut before the assistant speaks.
    encoded = encoded.filter(lambda labels: any(label != -100 for label in labels[1:]), input_columns="labels")
    try:
        first_row(encoded, name)
    except ValueError:
        raise ValueError(
            f"no row of the {name} data has anything to learn within its first {data.max_length} tokens (--max_length)"
            + (": its chats need turns of the role 'assistant'" if is_chat else "")
        ) from None
    return encoded


def describe(rows: Dataset | IterableDataset) -> str:
    if isinstance(rows, IterableDataset):
        return "a stream of rows"
    if "input_ids" not in rows.column_names:
        return f"{len(rows)} chats with images or videos"
    tokens = sum(map(len, rows["input_ids"]))
    learned = sum(label != -100 for labels in rows["labels"] for label in labels[1:])
    return f"{len(rows)} rows, {tokens} tokens, {learned} of them learned"


def longest_row(rows: Dataset | IterableDataset, max_length: int) -> int:
    """The tokens of the longest row, or `max_length` where the rows are not known yet."""
    if isinstance(rows, IterableDataset) or "input_ids" not in rows.column_names:
        return max_length
    return max(map(len, rows["input_ids"]))


# ---- model --------------------------------------------------------------------------------------------------------


def load_config(arguments: ModelArguments, max_length: int, given_options: set[str]) -> PreTrainedConfig:
    """The checkpoint's configuration, with the changes that the arguments make."""
    config = AutoConfig.from_pretrained(arguments.model)
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


def is_composite(config: PreTrainedConfig) -> bool:
    return type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: PreTrainedConfig) -> type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]:
    return AutoModelForImageTextToText if is_composite(config) else AutoModelForCausalLM


def load_model(arguments: ModelArguments, config: PreTrainedConfig, with_media: bool) -> PreTrainedModel:
    model = auto_class(config).from_pretrained(
        arguments.model, config=config, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
    )
    model.skip_logits = True  # an evaluation needs the loss alone, as training does
    if is_composite(config):
        # Text never reaches these, and data parallelism waits for the gradient of every trainable parameter.
        model.model.vision_tower.requires_grad_(with_media and arguments.train_vision)
        model.model.multi_modal_projector.requires_grad_(with_media and arguments.train_vision)
    return model


def find_modules(
    model: PreTrainedModel, option: str, endings: list[str], is_possible: Callable[[str, torch.nn.Module], bool]
) -> list[str]:
    """Finds the full names of the possible modules whose name ends in one of the endings.

    Args:
        model (PreTrainedModel): The model.
        option (str): The option of the endings, for the message.
        endings (list[str]): Ends of module names.
        is_possible (Callable): Whether a module, by its name and itself, may be chosen.

    Returns:
        The sorted names.

    Raises:
        ValueError: No possible module has one of the endings. The message lists the possible ones.
    """
    possible = [name for name, module in model.named_modules() if is_possible(name, module)]
    found = {ending: [name for name in possible if f".{name}".endswith(f".{ending}")] for ending in endings}
    if unknown := [ending for ending, names in found.items() if not names]:
        there = sorted({last for name in possible if not (last := name.rpartition(".")[2]).isdigit()})
        raise ValueError(
            f"{option}: nothing to train ends in {', '.join(unknown)}; possible are {', '.join(filter(None, there))}"
        )
    return sorted(set(itertools.chain(*found.values())))


def add_adapters(model: PreTrainedModel, arguments: LoraArguments, with_media: bool) -> PreTrainedModel:
    """Puts adapters only on modules of the language model that the loss reaches.

    Raises:
        ValueError: A name matches no such module, or PEFT refuses the configuration.
    """
    from peft import LoraConfig, get_peft_model

    unreached = {"indexer"} if model.config.get_text_config().indexer_loss_coef == 0 else set()
    parts = {name: set(name.split(".")) for name, _ in model.named_modules()}
    saved = find_modules(
        model,
        "--lora_save",
        arguments.lora_save,
        lambda name, module: (
            not parts[name] & (unreached if with_media else {*unreached, *VISION})
            and not isinstance(module, torch.nn.ModuleList)
            and any(True for _ in module.parameters())
        ),
    )
    find_modules(
        model,
        "--lora_targets",
        arguments.lora_targets,
        lambda name, module: (
            isinstance(module, torch.nn.Linear)
            and not parts[name] & {*unreached, *VISION}
            and not any(f"{name}.".startswith(f"{other}.") for other in saved)
        ),
    )
    elsewhere = [part for part in (*VISION, *unreached) if any(part in names for names in parts.values())]
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_targets,
            exclude_modules=rf".*\b({'|'.join(elsewhere)})\b.*" if elsewhere else None,
            target_parameters=list(EXPERTS) if arguments.lora_experts else None,
            modules_to_save=saved or None,
        )
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot make the adapters: {error}") from error


def check_adapters(config: PreTrainedConfig, lora: LoraArguments, with_media: bool, given_options: set[str]) -> None:
    """Raises ValueError for adapters that cannot be made, or if an option needs adapters that are missing."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # the model's structure without its weights
        model = auto_class(config)._model_mapping[type(config)](copy.deepcopy(config))
        model = add_adapters(model, lora, with_media)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    refuse_idle(given_options, no_adapted_indexers=not any(".indexer." in name for name in trained))


class FinetuneTrainer(IndexerLossLogging, Trainer):
    """Trainer whose logs show the indexers' loss, if indexers are trained."""


def prepare(argv: list[str]) -> Trainer:
    """Does everything up to the first step.

    Raises:
        ValueError: Arguments, data or checkpoint do not fit together.
    """
    model_arguments, lora_arguments, data_arguments, training, given_options = parse_arguments(argv)
    check_arguments(model_arguments, lora_arguments, data_arguments, training, given_options)
    config = load_config(model_arguments, data_arguments.max_length, given_options)
    set_seed(training.seed)
    # The tokenizer of a text model names the processor of the composite model, for which a text model has no files.
    processor = (AutoProcessor if is_composite(config) else AutoTokenizer).from_pretrained(model_arguments.model)
    tokenizer = getattr(processor, "tokenizer", processor)

    with training.main_process_first(desc="reading the data"):
        data = {"training": load_rows(data_arguments.dataset, data_arguments.train_split, data_arguments)}
        if data_arguments.max_rows is not None:
            data["training"] = data["training"].take(data_arguments.max_rows)
        if data_arguments.eval_dataset or data_arguments.eval_split:
            names = data_arguments.eval_dataset or data_arguments.dataset
            split = data_arguments.eval_split or ("train" if are_files(names) else data_arguments.train_split)
            data["evaluation"] = load_rows(names, split, data_arguments)
        columns = [list(first_row(rows, name)) for name, rows in data.items()]
        chats = [data_arguments.messages_column in names for names in columns]
        with_media = any(is_multimodal(rows, data_arguments, name) for name, rows in data.items())
        refuse_idle(
            given_options,
            no_chats=not any(chats) and f"the columns are {', '.join(dict.fromkeys(itertools.chain(*columns)))}",
            no_texts=all(chats),
            media=with_media,
            no_media=not with_media,
            own_attention=not with_media
            and not any(attention_type(name).is_dense for name in config.get_text_config().layer_types),
        )
        if lora_arguments.lora:
            check_adapters(config, lora_arguments, with_media, given_options)
        if with_media:
            if not isinstance(processor, MiniMaxM3VLProcessor):
                raise ValueError("the data have images or videos, but the checkpoint reads text only")
            collator = MultimodalChatCollator(
                processor,
                max_length=data_arguments.max_length,
                chat_template_kwargs={"thinking_mode": data_arguments.thinking_mode},
            )
            training.remove_unused_columns = False  # the collator reads these columns
            # Dispatching would cut every tensor of a batch, pixels included, to as many rows as the batch has.
            training.accelerator_config.dispatch_batches = False
        else:
            collator = (
                DataCollatorWithFlattening() if data_arguments.padding_free else DataCollatorForSeq2Seq(tokenizer)
            )
        read, reader = (with_collator_names, collator) if with_media else (tokenise, tokenizer)
        given, data = data, {name: read(rows, reader, data_arguments, name) for name, rows in data.items()}

    longest = longest_row(data["training"], data_arguments.max_length)
    check_memory(config, model_arguments, lora_arguments, longest, training)
    model = load_model(model_arguments, config, with_media)
    if lora_arguments.lora:
        model = add_adapters(model, lora_arguments, with_media)
    if training.process_index == 0:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for name, rows in data.items():
            print(f"{name} data: {describe(rows)}")
            if with_media and not data_arguments.streaming and (left_out := len(given[name]) - len(rows)):
                print(f"{name} data: left out {left_out} rows, whose media or answers end after --max_length")
        print(f"training {trained:,} of {model.num_parameters():,} parameters", flush=True)
    training.prediction_loss_only = True
    return FinetuneTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=data["training"],
        eval_dataset=data.get("evaluation"),
        processing_class=processor,
    )


def main(argv: Iterable[str] | None = None) -> Trainer:
    try:
        trainer = prepare(list(sys.argv[1:] if argv is None else argv))
    except DatasetGenerationError as error:
        raise SystemExit(f"finetune.py: the data cannot be read: {error.__cause__ or error}") from error
    except jinja2.TemplateError as error:  # for example an unknown role
        raise SystemExit(f"finetune.py: a chat does not fit the chat template: {error}") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"finetune.py: {error}") from error
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = result.metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    if trainer.args.process_index == 0:
        print(f"saved to {trainer.args.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
