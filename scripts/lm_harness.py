"""Run the lm-eval harness on a MiniMax-M3 with this package's classes, our tasks (examples/lm_eval) beside its own.

    pip install lm-eval
    python scripts/lm_harness.py run --model hf --model_args pretrained=CHECKPOINT --tasks minimax_m3_code
    python scripts/lm_harness.py run --model hf-multimodal --model_args pretrained=CHECKPOINT --apply_chat_template \
        --tasks minimax_m3_image,minimax_m3_digits

All arguments are those of `lm_eval`. Without this script, the harness would load the classes that Transformers ships.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

TASKS = Path(__file__).resolve().parents[1] / "examples" / "lm_eval"


def with_our_tasks(arguments: list[str]) -> list[str]:
    """Adds the folder of our tasks to the commands that read tasks, unless the arguments name another folder."""
    if not arguments or arguments[0] not in ("run", "ls", "validate"):
        return arguments
    if any(argument.split("=")[0] == "--include_path" for argument in arguments):
        return arguments
    return [*arguments, "--include_path", str(TASKS)]


def main(argv: Iterable[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise SystemExit("lm_harness: the harness is not installed: `pip install lm-eval`.") from error
    import modeling_minimax_m3  # noqa: F401 - registers the classes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv = ["lm_eval", *with_our_tasks(arguments)]
    cli_evaluate()


if __name__ == "__main__":
    main()
