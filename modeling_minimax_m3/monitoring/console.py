"""One line for each logging step, for people."""

from typing import Any

from transformers import ProgressCallback


class QuietProgress(ProgressCallback):
    """The progress bars of `Trainer` without its lines of values."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the values to the monitor."""


def format_time(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_count(number: float) -> str:
    """A number in four letters or so, such as 12.3k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def training_line(values: dict[str, Any], step: int, max_steps: int) -> str:
    """The values of a training log in one line. Values that are missing have no place in it."""
    parts = [f"step {step}/{max_steps}"]
    names = {"loss": "loss", "language_loss": "language", "balance_loss": "balance", "indexer_loss": "indexer"}
    parts += [f"{name} {values[key]:.4g}" for key, name in names.items() if key in values]
    if "grad_norm" in values:
        parts.append(f"gradient {values['grad_norm']:.3g}")
    if "learning_rate" in values:
        parts.append(f"rate {values['learning_rate']:.2e}")
    if "tokens_per_second" in values:
        learned = values.get("learned_tokens_per_second")
        more = "" if learned is None else f" ({format_count(learned)} learned)"
        parts.append(f"{format_count(values['tokens_per_second'])} tokens/s{more}")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    elif "flops_per_second" in values:
        parts.append(f"{format_count(values['flops_per_second'])}FLOP/s")
    if "peak_memory_gib" in values:
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    if "expert_entropy" in values:
        parts.append(
            f"experts {values['expert_entropy']:.3f} "
            f"({values['expert_least_used']:.2%} to {values['expert_most_used']:.2%})"
        )
    if "selected_mass" in values:
        parts.append(f"selected {values['selected_mass']:.1%}")
    if "eta_seconds" in values:
        parts.append(f"{format_time(values['eta_seconds'])} left")
    return "  ".join(parts)


def evaluation_line(values: dict[str, Any], step: int) -> str:
    """The values of an evaluation in one line."""
    found = [f"{key} {value:.4g}" for key, value in values.items() if key.endswith(("_loss", "_mass", "_accuracy"))]
    return "  ".join([f"step {step}", *found])
