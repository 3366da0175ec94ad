"""The command `minimax-m3`, also as `python -m modeling_minimax_m3`."""

import sys
from importlib import import_module
from types import ModuleType

# Each is a module of `commands` with `main(argv)`, and loads only when it is called.
COMMANDS = {
    "check": "read all rows of a data set, and report every fault with its file, row and field",
    "show": "show one row as the model sees it, with the learned tokens marked",
    "train": "fine-tune a checkpoint, whole or with LoRA",
    "evaluate": "measure loss, perplexity and accuracy on files",
    "merge": "add an adapter to the weights of its checkpoint, or export it",
    "chat": "chat with a checkpoint in the terminal",
}
# Packages that come with the extra `train` alone.
OF_TRAINING = ("datasets", "peft")


def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand that `argv` (by default the command line) names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        _load(name).main(rest)
        return
    lines = [f"  {command:<8} {text}" for command, text in COMMANDS.items()]
    usage = "\n".join(
        ["usage: minimax-m3 COMMAND ...", "", *lines, "", "minimax-m3 COMMAND --help lists its options."]
    )
    if name in ("-h", "--help"):
        print(usage)
        return
    raise SystemExit(f"minimax-m3: the command must be one of {', '.join(COMMANDS)}, got {name!r}\n\n{usage}")


def _load(name: str) -> ModuleType:
    """The module of a subcommand. Ends the program if it needs a package that is not installed."""
    try:
        return import_module(f".commands.{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in OF_TRAINING:
            raise
        message = f"minimax-m3 {name} needs {error.name}: pip install {' '.join(OF_TRAINING)}"
        raise SystemExit(message) from error


if __name__ == "__main__":
    main()
