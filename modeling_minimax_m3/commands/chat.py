"""Chat with a checkpoint in the terminal, with images and videos, and with an adapter or without.

    minimax-m3 chat --model CHECKPOINT
    minimax-m3 chat --model CHECKPOINT --adapter run
    minimax-m3 chat --model CHECKPOINT --prompt "What is this?" --image photo.png   # one answer

In a chat, `/image PATH` and `/video PATH` put a file before the next message, `/reset` begins anew, and `/exit` or
Ctrl-D ends. Reasoning is dim, or stands behind "thinking:" if the output is no terminal. Ctrl-C ends an answer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from transformers import StoppingCriteria

from processing_minimax_m3 import MiniMaxM3ResponseStreamer
from processing_minimax_m3.chat_template import THINKING_MODES

from .checkpoint import is_composite, load_processor, read_config
from .running_model import add_model_options, check_model_options, load_running_model

DIM, PLAIN = "\033[2m", "\033[0m"
COMMANDS = "/image PATH, /video PATH, /reset, /exit"


class Stop(StoppingCriteria):
    """Ends an answer when it is asked to."""

    def __init__(self) -> None:
        self.is_asked = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
        """Whether to end."""
        return self.is_asked


class Printer:
    """Prints the events of an answer as they come, reasoning and content apart.

    Args:
        out (TextIO): Where to print.
        has_colour (bool): Whether the output takes escape sequences.
    """

    def __init__(self, out: TextIO, has_colour: bool):
        self._out, self._has_colour = out, has_colour
        self._field: str | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        field, kind = event["field"], event["type"]
        if field in ("tool_calls", "invalid_tool_calls"):
            if kind == "region_close":
                self._end_field()
                self._write(f"{'tool call' if field == 'tool_calls' else 'unreadable tool call'}: {event['value']}\n")
            return
        if kind == "region_chunk":
            if field != self._field:
                self._end_field()
                self._field = field
                if field == "reasoning_content":
                    self._write(DIM if self._has_colour else "thinking: ")
            self._write(event["text"])

    def _end_field(self) -> None:
        if self._field == "reasoning_content" and self._has_colour:
            self._write(PLAIN)
        if self._field is not None:
            self._write("\n")
        self._field = None

    def end(self) -> None:
        """Ends the answer."""
        self._end_field()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Chat:
    """A conversation with a model.

    Args:
        model (PreTrainedModel): The model, in evaluation mode.
        processor (processor or tokenizer): Its processor.
        variables (dict): Variables of the chat template.
        options (dict): Options of `generate`.
        system (str, optional): The system message.
    """

    def __init__(self, model: Any, processor: Any, variables: dict, options: dict, system: str | None = None):
        self._model, self._processor = model, processor
        self._variables, self._options, self._system = variables, options, system
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.messages: list[dict[str, Any]] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def answer(self, text: str, media: Sequence[tuple[str, str]], printer: Printer) -> dict[str, Any]:
        """Answers a message, and keeps both.

        Args:
            text (str): The message.
            media (sequence): "image" or "video" with a path, for what stands before the text.
            printer (Printer): Prints the answer as it comes.

        Returns:
            The answer, as `parse_response` has it.

        Raises:
            ValueError: An image or a video cannot be read. The conversation stays as it was.
        """
        content: Any = text
        if media:
            content = [{"type": kind, "path": path} for kind, path in media] + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self._processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self._variables,
        ).to(self._model.device)
        streamer, stop = MiniMaxM3ResponseStreamer(self._processor), Stop()
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                self._model.generate(**inputs, streamer=streamer, stopping_criteria=[stop], **self._options)
            except BaseException as error:  # the thread that prints raises it
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        while True:
            try:
                for event in streamer:
                    printer(dict(event))
                break
            except KeyboardInterrupt:
                stop.is_asked = True
        thread.join()
        printer.end()
        if failed:
            raise failed[0]
        message = streamer.message or {"role": "assistant", "content": ""}
        self.messages = [*messages, {key: value for key, value in message.items() if key != "invalid_tool_calls"}]
        return message


def check_media(kind: str, path: str, reads_media: bool) -> tuple[str, str]:
    """A file that can be put before a message.

    Raises:
        ValueError: There is no such file, or the checkpoint reads text only.
    """
    if not reads_media:
        raise ValueError(f"the checkpoint reads text only, got the {kind} {path!r}")
    if "://" not in path and not Path(path).expanduser().is_file():
        raise ValueError(f"there is no file {path!r}")
    return kind, path if "://" in path else str(Path(path).expanduser())


def talk(chat: Chat, printer: Printer, reads_media: bool) -> None:
    """Reads messages from the terminal until it ends."""
    media: list[tuple[str, str]] = []
    print(f"commands: {COMMANDS}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        name, _, rest = line.partition(" ")
        try:
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                chat.reset()
                media = []
            elif name in ("/image", "/video"):
                media.append(check_media(name[1:], rest.strip(), reads_media))
            elif name.startswith("/") and "/" not in name[1:]:
                print(f"commands: {COMMANDS}")
            elif line:
                chat.answer(line, media, printer)
                media = []
        except (ValueError, OSError) as error:
            print(f"chat: {error}", file=sys.stderr)
            media = []


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(
        "minimax-m3 chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or its name on the Hub")
    add_model_options(parser)
    parser.add_argument("--prompt", help="answer this one message and end")
    parser.add_argument("--image", action="append", default=[], help="put this image before --prompt; repeatable")
    parser.add_argument("--video", action="append", default=[], help="put this video before --prompt; repeatable")
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--thinking_mode", choices=THINKING_MODES, default=THINKING_MODES[0], help="whether to reason first (adaptive)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="greatest length of an answer (2048)")
    parser.add_argument(
        "--temperature", type=float, help="of sampling; 0 takes the likeliest token (default: the checkpoint's)"
    )
    parser.add_argument(
        "--top_p", type=float, help="probability of the likeliest tokens to sample from (default: the checkpoint's)"
    )
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and (arguments.image or arguments.video):
        parser.error("--image and --video belong to --prompt; in a chat, /image and /video name files")
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"chat: {error}")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Answers `--prompt`, or chats. Files and options are checked before the weights are loaded."""
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.temperature is not None and arguments.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, got {arguments.temperature}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, got {arguments.top_p}")
    if arguments.temperature == 0 and arguments.top_p is not None:
        raise ValueError("--top_p would do nothing with --temperature 0")
    config = read_config(arguments.model)
    check_model_options(arguments, config)
    reads_media = is_composite(config)
    media = [
        *(check_media("image", path, reads_media) for path in arguments.image),
        *(check_media("video", path, reads_media) for path in arguments.video),
    ]
    processor = load_processor(arguments.model, config)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature == 0:
        options["do_sample"] = False
    elif arguments.temperature is not None or arguments.top_p is not None:
        options |= {"do_sample": True, "temperature": arguments.temperature or 1.0}
        options |= {"top_p": arguments.top_p} if arguments.top_p is not None else {}
    model = load_running_model(arguments.model, arguments, config)
    printer = Printer(sys.stdout, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    chat = Chat(model, processor, {"thinking_mode": arguments.thinking_mode}, options, arguments.system)
    if arguments.prompt is not None:
        return chat.answer(arguments.prompt, media, printer)
    talk(chat, printer, reads_media)
    return None


if __name__ == "__main__":
    main()
