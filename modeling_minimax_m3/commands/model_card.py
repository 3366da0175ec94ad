"""The README of a trained adapter or checkpoint: what it was made of, how, and how well it does."""

import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..conversion.tensor_files import hash_file
from ..version import __version__
from .card_examples import examples_of, loading

CARD = "README.md"
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate")
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class DataFile:
    """A file or data set of a run.

    Args:
        name (str): Path, or name on the Hub.
        role (str): "training" or "evaluation".
        rows (int, optional): Its rows. None for a stream.
        sha256 (str, optional): Hash of a file.
    """

    name: str
    role: str
    rows: int | None
    sha256: str | None


def describe_data(name: str, role: str, rows: int | None) -> DataFile:
    """A file with its hash, which reads all of it, or a data set without one."""
    return DataFile(name, role, rows, hash_file(Path(name)) if Path(name).is_file() else None)


@dataclass
class ModelCard:
    """What a card says.

    Args:
        title (str): Its heading, and the name of the model.
        base (str, optional): The checkpoint that it starts from. None for a model that was trained from scratch.
        is_adapter (bool): Whether the weights are an adapter of PEFT.
        is_composite (bool): Whether the model reads images and videos.
        usage (str): Python that loads it.
        command (list of str): The command that made it. Values of options for tokens are hidden.
        data (list of DataFile): What it was trained and evaluated on.
        notes (list of str): What became of the rows.
        options (dict): The options of the run.
        scores (dict): Losses and other scores, by name.
        adapters (dict): Hashes of merged adapters, by name.
        examples (dict): Python that continues from `usage`, by heading.
        opening (str): What the model is, in place of the sentence that names its base.
        sections (dict): Markdown below the scores, by heading.
        made_with (dict, optional): Versions of packages and the device. Default: those of this process.
        lists_scores (bool): Whether `scores` are a table of the text. Without it they are only in the metadata.
        license (str, optional): Its identifier, such as "apache-2.0".
    """

    title: str
    base: str | None
    is_adapter: bool
    is_composite: bool
    usage: str
    command: Sequence[str]
    data: Sequence[DataFile] = ()
    notes: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    opening: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] | None = None
    license: str | None = None
    lists_scores: bool = True

    def __str__(self) -> str:
        """The card as Markdown, behind its metadata as YAML."""
        parts = [f"---\n{self._metadata()}\n---\n", f"# {self.title}\n", self._opening()]
        parts.append(f"```python\n{self.usage}\n```\n")
        if self.scores and self.lists_scores:
            rows = [(name, f"{value:.6g}") for name, value in self.scores.items()]
            parts.append("## Scores\n\n" + as_table(("score", "value"), rows))
        parts += [f"## {heading}\n\n{text}" for heading, text in self.sections.items()]
        if self.examples:
            parts.append("## Examples\n\nEach continues from the code at the top.\n")
            parts += [f"### {heading}\n\n```python\n{code}\n```\n" for heading, code in self.examples.items()]
        if self.data:
            files = [(f"`{one.name}`", one.role, "" if one.rows is None else f"{one.rows:,}", f"`{one.sha256}`" if one.sha256 else "") for one in self.data]  # fmt: skip
            parts.append("## Data\n\n" + as_table(("file", "used for", "rows", "SHA-256"), files))
            parts.append("".join(f"- {note}\n" for note in self.notes))
        if self.adapters:
            rows = [(f"`{name}`", f"`{sha}`") for name, sha in self.adapters.items()]
            parts.append("## Merged adapters\n\n" + as_table(("adapter", "SHA-256 of its weights"), rows))
        if self.options:
            rows = [(f"`{name}`", f"`{value}`") for name, value in hide_secrets(self.options).items()]
            parts.append("## Options\n\n" + as_table(("option", "value"), rows))
        parts.append(f"## Made by\n\n```bash\n{hide_in_command(self.command)}\n```\n")
        made_with = versions() if self.made_with is None else self.made_with
        parts.append(as_table(("package", "version"), list(made_with.items())))
        return "\n".join(part for part in parts if part)

    def _opening(self) -> str:
        if self.opening:
            return f"{self.opening}\n"
        kind = "LoRA adapter for" if self.is_adapter else "Checkpoint made from"
        return f"{kind} `{self.base}`, a MiniMax-M3 model.\n"

    def _metadata(self) -> str:
        # only evaluations are results; the loss of training is in the text
        numbers = {n: value for n, value in self.scores.items() if n.startswith("eval_") and math.isfinite(value)}
        source = next((one.name for one in self.data if one.role == "evaluation"), "held-out rows")
        task = "image-text-to-text" if self.is_composite else "text-generation"
        results = [
            EvalResult(
                task_type=task, dataset_type="custom", dataset_name=source, metric_type=name, metric_value=value
            )
            for name, value in numbers.items()
        ]
        hub = sorted({one.name for one in self.data if one.sha256 is None and not Path(one.name).exists()})
        card = ModelCardData(
            base_model=self.base,
            library_name="peft" if self.is_adapter else "transformers",
            pipeline_tag=task,
            tags=["minimax-m3", *(["lora", f"base_model:adapter:{self.base}"] if self.is_adapter else [])],
            datasets=hub or None,
            model_name=self.title,
            eval_results=results or None,
            license=self.license,
        )
        return card.to_yaml()


def versions() -> dict[str, str]:
    """The packages that took part, and Python."""
    found = {"minimax-m3-transformers": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _is_secret(name: str) -> bool:
    words = name.strip("-").partition("=")[0].replace("-", "_").split("_")
    return bool({"token", "password", "secret", "key"} & set(words))


def hide_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the values of those that hold a secret, such as `hub_token`."""
    return {name: HIDDEN if _is_secret(name) else value for name, value in options.items()}


def hide_in_command(command: Sequence[str]) -> str:
    """A command for a shell, without secrets."""
    shown, is_next_hidden = [], False
    for word in command:
        is_option = word.startswith("--")
        if is_next_hidden and not is_option:
            shown.append(HIDDEN)
        elif is_option and "=" in word and _is_secret(word):
            shown.append(f"{word.partition('=')[0]}={HIDDEN}")
        else:
            shown.append(word)
        is_next_hidden = is_option and "=" not in word and _is_secret(word)
    return shlex.join(shown)


def as_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, whose cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines)  # fmt: skip


def usage_of(is_composite: bool, path: str, base: str | None = None) -> dict[str, Any]:
    """`usage` and `examples` of the card of a checkpoint, or of an adapter on its base."""
    if is_composite:
        checkpoint, adapter = (path, None) if base is None else (base, path)
        examples = examples_of(checkpoint, is_adapter=base is not None)
        return {"usage": loading(checkpoint, adapter), "examples": examples}
    checkpoint = path if base is None else base
    load = f'model = AutoModelForCausalLM.from_pretrained("{checkpoint}", dtype="auto", device_map="auto")'
    if base is None:
        return {"usage": f"from transformers import AutoModelForCausalLM\n\n{load}"}
    return {
        "usage": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'import modeling_minimax_m3\n\n{load}\nmodel = PeftModel.from_pretrained(model, "{path}")'
    }
