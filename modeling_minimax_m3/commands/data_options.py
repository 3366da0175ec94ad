"""The options of commands that read data without training."""

import argparse
import os
from pathlib import Path
from typing import Any

from processing_minimax_m3.chat_template import THINKING_MODES
from processing_minimax_m3.data import Encoder, Reading, Rows, open_rows
from processing_minimax_m3.data.sources import RowSource

from .checkpoint import load_processor


def output_file(text: str) -> Path:
    """An option's file that is written last: refused before any work if that is bound to fail."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    if not os.access(path.parent, os.W_OK):
        why = "cannot be written to" if path.parent.is_dir() else "does not exist"
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written to: {str(path.parent)!r} {why}")
    return path


def add_data_options(
    parser: argparse.ArgumentParser, model_help: str = "checkpoint whose tokenizer and chat template read the data"
) -> None:
    parser.add_argument(
        "dataset", nargs="+", help="files, or a folder, or a name on the Hub; docs/data.md has the formats"
    )
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument("--dataset_config", help="configuration of a data set on the Hub")
    parser.add_argument("--split", default="train", help="split of the data set (train)")
    parser.add_argument("--messages_column", default="messages", help="column of chats (messages)")
    parser.add_argument("--text_column", default="text", help="column of texts (text)")
    parser.add_argument(
        "--thinking_mode",
        choices=THINKING_MODES,
        default=THINKING_MODES[0],
        help="thinking mode of chats that name none (adaptive)",
    )
    parser.add_argument("--media_folder", help="folder of images and videos whose paths are not absolute (.)")
    parser.add_argument("--max_length", type=int, default=4096, help="greatest number of tokens of a row (4096)")


def open_sources(arguments: argparse.Namespace, streaming: bool = False) -> list[RowSource]:
    """The files of the data set.

    Raises:
        ValueError: A file or an option is wrong.
    """
    if arguments.max_length < 2:
        raise ValueError(f"--max_length must be at least 2, got {arguments.max_length}")
    return open_rows(arguments.dataset, arguments.split, arguments.dataset_config, streaming)


def open_reading(arguments: argparse.Namespace, decode_media: bool = False) -> tuple[Encoder, Reading, Any]:
    """What encodes rows, how they are read, and the checkpoint's processor or tokenizer.

    Raises:
        ValueError: An option is wrong.
    """
    processor = load_processor(arguments.model)
    reading = Reading(
        messages_column=arguments.messages_column,
        text_column=arguments.text_column,
        chat_template_kwargs={"thinking_mode": arguments.thinking_mode},
        media_folder=arguments.media_folder,
    )
    return Encoder(processor, decode_media), reading, processor


def open_data(arguments: argparse.Namespace) -> tuple[Rows, Encoder, Reading, Any]:
    """The rows, and what `open_reading` gives.

    Raises:
        ValueError: A file or an option is wrong.
    """
    return Rows(open_sources(arguments)), *open_reading(arguments)
