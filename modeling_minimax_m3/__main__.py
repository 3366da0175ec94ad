"""The command `minimax-m3`, also as `python -m modeling_minimax_m3`."""

import sys
from importlib import import_module

# Each is a module of `commands` with `main(argv)`, and loads only when it is called.
COMMANDS = {
    "check": "read all rows of a data set, and report every fault with its file, row and field",
    "show": "show one row as the model sees it, with the learned tokens marked",
    "train": "fine-tune a checkpoint, whole or with LoRA",
    "evaluate": "measure loss, perplexity and accuracy on files",
    "merge": "add an adapter to the weights of its checkpoint, or export it",
    "chat": "chat with a checkpoint in the terminal",
}


def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand that `argv` (by default the command line) names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        import_module(f".commands.{name}", __package__).main(rest)
        return
    lines = [f"  {command:<8} {text}" for command, text in COMMANDS.items()]
    usage = "\n".join(
        ["usage: minimax-m3 COMMAND ...", "", *lines, "", "minimax-m3 COMMAND --help lists its options."]
    )
    if name in ("-h", "--help"):
        print(usage)
        return
    raise SystemExit(f"minimax-m3: the command must be one of {', '.join(COMMANDS)}, got {name!r}\n\n{usage}")


if __name__ == "__main__":
    main()
