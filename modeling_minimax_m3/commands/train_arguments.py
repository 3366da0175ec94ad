"""The options of `train`: model, adapters and data. All others are those of `TrainingArguments`."""

import argparse
import difflib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from processing_minimax_m3.chat_template import THINKING_MODES, check_thinking_mode

from .quantization import HELP as QUANTIZATION_HELP

# The modules that get adapters by default.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Folder of a checkpoint, or its name on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the loaded weights: auto (as saved), bfloat16 (bf16), float16 (fp16), float32 (fp32)."
        },
    )
    quantization: str | None = field(default=None, metadata={"help": QUANTIZATION_HELP})
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
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "Shard all weights over so many processes while they are loaded, by FSDP2. Start them by torchrun."
        },
    )
    ep_size: int = field(
        default=1, metadata={"help": "With --fsdp_size: share the routed experts out over so many of the processes."}
    )
    ignore_plan: bool = field(
        default=False, metadata={"help": "Load the model even if the memory plan says that it does not fit."}
    )

    def __post_init__(self) -> None:
        self.dtype = SHORT_DTYPES.get(self.dtype, self.dtype)
        if self.dtype not in ("auto", *SHORT_DTYPES.values()):
            names = ", ".join(("auto", *SHORT_DTYPES.values(), *SHORT_DTYPES))
            raise ValueError(f"--dtype must be one of {names}, got {self.dtype!r}")


@dataclass
class LoraArguments:
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the weights."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of an adapter to train further, with its own rank and modules."}
    )
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
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Hold out this share of the training rows, and evaluate on them."}
    )
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
    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack rows into rows of --max_length tokens, without cutting any. Each attends only to itself."
        },
    )
    media_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the images and videos whose paths are not absolute. Default: the current folder."
        },
    )
    check_media: str = field(
        default="decode",
        metadata={"help": "What is read of images and videos before training: decode (all of it) or header."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as it is needed; needs --max_steps."})
    padding_free: bool = field(
        default=True, metadata={"help": "Concatenate the rows of a batch instead of padding them."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    samples: int = field(
        default=2, metadata={"help": "Rows of the evaluation data whose prompts the model answers at each evaluation."}
    )
    sample_tokens: int = field(default=64, metadata={"help": "Greatest length of such an answer, in tokens."})

    def __post_init__(self) -> None:
        check_thinking_mode(self.thinking_mode, "--thinking_mode")
        if self.check_media not in ("decode", "header"):
            raise ValueError(f"--check_media must be decode or header, got {self.check_media!r}")
        if self.samples < 0:
            raise ValueError(f"--samples must be at least 0, got {self.samples}")
        if self.sample_tokens < 1:
            raise ValueError(f"--sample_tokens must be at least 1, got {self.sample_tokens}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction must be at least 0 and below 1, got {self.eval_fraction}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and names defaults."""


def describe_unknown(argument: str, options: list[str]) -> str:
    """The message for an argument that no option takes."""
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option: files of data follow --dataset, and a file of options comes first"
    name = argument.partition("=")[0]
    near = difflib.get_close_matches(name, options, 1)
    return f"there is no option {name}{f'; {near[0]} is near' if near else ''}. --help lists all"


def parse_arguments(
    argv: list[str],
    description: str | None = None,
) -> tuple[ModelArguments, LoraArguments, DataArguments, TrainingArguments, set[str]]:
    """Parses flags, and the values of a YAML or JSON file that comes before them.

    Args:
        argv (list[str]): The command line.
        description (str, optional): What `--help` says first.

    Returns:
        The four groups of arguments, and the names of the given options. Options that only switch something off are
        not among these names.
    """
    values = {}
    parser = HfArgumentParser(
        (ModelArguments, LoraArguments, DataArguments, TrainingArguments),
        prog="minimax-m3 train",
        usage="minimax-m3 train [OPTIONS.yaml] --model CHECKPOINT --dataset FILE ... --output_dir FOLDER [OPTION ...]\n"
        "       minimax-m3 train --help lists all options",
        description=description,
        formatter_class=HelpFormatter,
    )
    # The defaults of `Trainer` show nothing of a run of less than 500 steps, and a loss that is no number as 0.
    parser.set_defaults(logging_steps=10, logging_nan_inf_filter=False)
    # PyTorch warns of pinned memory without an accelerator.
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available())
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
    try:
        *arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:
        if "bf16/gpu" in str(error):
            raise ValueError("--bf16 needs a GPU, or --use_cpu to compute in bfloat16 on the CPU") from error
        raise
    if rest:
        raise ValueError(describe_unknown(rest[0], list(parser._option_string_actions)))
    unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
    given = values.keys() | {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    chosen = {name: value for part in arguments for name, value in vars(part).items() if name in given}
    return *arguments, {name for name, value in chosen.items() if value and value != "no"}
