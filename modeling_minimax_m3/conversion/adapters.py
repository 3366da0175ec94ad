"""LoRA adapters of PEFT: what they add to the weights of a checkpoint, and their export for SGLang.

An adapter on a linear layer has the matrices A (rank, inputs) and B (outputs, rank) and adds `scaling * B @ A`. On the
experts of a layer, through `target_parameters`, A is (E * rank, inputs), where the rows of an expert lie behind each
other, and B is (outputs, rank * E), where the columns of an expert are E apart.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from configuration_minimax_m3 import MiniMaxM3VLConfig

from .layouts import StoredTensor, released_shapes, stored_tensors
from .source import read_json
from .tensor_files import Region, TensorFileWriter, TensorSpec, hash_file, in_file_order, read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_ENDING_A, _ENDING_B = ".lora_A.weight", ".lora_B.weight"
# Switches of an adapter that computes something else than `scaling * B @ A`.
OTHER_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "modules_to_save"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)
# Initialisations that change the weights of the model that they are for.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Before this release, PEFT took the outputs of experts for their inputs.
_FIRST_OUTPUTS_FIRST = Version("0.19.0")


@dataclass(frozen=True)
class Target:
    """The matrices on one linear layer, or on the stacked weights of a layer's experts.

    Args:
        tensor (StoredTensor): The weight, as a module has it.
        a, b (Region): The matrices.
        rank (int): Of one matrix or expert.
        scaling (float): Factor on the product.
        experts (int): Number of experts; 1 for a linear layer.
        is_transposed (bool): Whether the product is (inputs, outputs), as older PEFT has it for experts.
    """

    tensor: StoredTensor
    a: Region
    b: Region
    rank: int
    scaling: float
    experts: int
    is_transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter of PEFT that fits a model.

    Args:
        folder (Path): Its folder.
        config (dict): Content of `adapter_config.json`.
        targets (tuple[Target, ...]): What it adds to.
        identity (str): SHA-256 of its file.
    """

    folder: Path
    config: dict[str, Any]
    targets: tuple[Target, ...]
    identity: str

    @property
    def file(self) -> Path:
        """The file of the matrices."""
        return self.folder / ADAPTER_FILE


def open_adapter(folder: Path, config: MiniMaxM3VLConfig) -> Adapter:
    """Read the headers of an adapter and check that it fits a model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is another kind of adapter, or does not fit the model. The message names the key or the tensor.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    _check_kind(settings, folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{folder / ADAPTER_FILE} is missing.")
    stored, _ = read_header(folder / ADAPTER_FILE)
    modules = _modules(config)
    targets = []
    for name in stored:
        if not (name.startswith(_PREFIX) and name.endswith((_ENDING_A, _ENDING_B))):
            raise ValueError(f"{folder / ADAPTER_FILE} holds {name}, which is not a matrix of LoRA.")
        if name.endswith(_ENDING_B) and name.removesuffix(_ENDING_B) + _ENDING_A not in stored:
            raise ValueError(f"{folder / ADAPTER_FILE} holds {name} without its lora_A.")
        if name.endswith(_ENDING_A):
            target = name.removesuffix(_ENDING_A)
            if target + _ENDING_B not in stored:
                raise ValueError(f"{folder / ADAPTER_FILE} holds {name} without its lora_B.")
            targets.append(_target(target, stored[name], stored[target + _ENDING_B], modules, settings, folder))
    if not targets:
        raise ValueError(f"{folder / ADAPTER_FILE} holds no matrices.")
    return Adapter(folder, settings, tuple(targets), hash_file(folder / ADAPTER_FILE))


def _check_kind(settings: dict[str, Any], folder: Path) -> None:
    if str(settings.get("peft_type")).upper() != "LORA":
        raise ValueError(f"{folder}: `peft_type` must be 'LORA', got {settings.get('peft_type')!r}.")
    for name in OTHER_KINDS:
        if settings.get(name):
            raise ValueError(f"{folder}: an adapter with `{name}` cannot be merged here, got {settings[name]!r}.")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{folder}: `bias` must be 'none', got {settings['bias']!r}.")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise ValueError(
            f"{folder}: `init_lora_weights` is {start!r}, so the adapter belongs to weights that were changed when it "
            "was made. Let PEFT convert it to a plain adapter first (`path_initial_model_for_weight_conversion`)."
        )


def _modules(config: MiniMaxM3VLConfig) -> dict[str, list[StoredTensor]]:
    """Weights by the name of their module, in the whole model and in the language model alone."""
    modules: dict[str, list[StoredTensor]] = {}
    for layout in ("text", "modules"):
        for tensor in stored_tensors(config, layout):
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2:
                modules.setdefault(tensor.name.removesuffix(".weight"), [tensor])
            elif len(tensor.shape) == 3:
                modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    return modules


def _target(
    name: str,
    a: Region,
    b: Region,
    modules: Mapping[str, list[StoredTensor]],
    settings: dict[str, Any],
    folder: Path,
) -> Target:
    path = name.removeprefix(_PREFIX)
    while path.endswith(".base_layer"):  # several parameters of a module are wrapped one around the other
        path = path.removesuffix(".base_layer")
    if path not in modules:
        raise ValueError(f"{folder / ADAPTER_FILE}: {name} is on {path}, which this model does not have as a layer.")
    for tensor in modules[path]:
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        outputs, inputs = tensor.shape[-2:]
        transposed = experts > 1 and _is_transposed(settings, folder)
        if transposed:
            outputs, inputs = inputs, outputs
        total = a.shape[0]
        if (a.shape, b.shape) == ((total, inputs), (outputs, total)) and total % experts == 0:
            rank = total // experts
            return Target(tensor, a, b, rank, _scaling(path, tensor, rank, settings), experts, transposed)
    shapes = " or ".join(str(tensor.shape) for tensor in modules[path])
    raise ValueError(
        f"{folder / ADAPTER_FILE}: {name} has the matrices A {a.shape} and B {b.shape}, which do not fit the weight "
        f"{shapes} of this model."
    )


def _is_transposed(settings: dict[str, Any], folder: Path) -> bool:
    version = settings.get("peft_version")
    if version is None:
        raise ValueError(
            f"{folder}: `peft_version` must say which PEFT made an adapter on experts, because releases before "
            f"{_FIRST_OUTPUTS_FIRST} store it the other way round, got None."
        )
    return Version(str(version).partition("@")[0]) < _FIRST_OUTPUTS_FIRST


def _scaling(path: str, tensor: StoredTensor, rank: int, settings: dict[str, Any]) -> float:
    """`lora_alpha / rank`, or over the root of the rank for rsLoRA, with the patterns that PEFT matches to names."""
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (path, tensor.name)):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


class AdapterDeltas:
    """What adapters add to weights. It holds the matrices of one layer's target at a time.

    Args:
        adapters (Sequence[Adapter]): The adapters, whose additions are summed.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        self.adapters = tuple(adapters)
        self._targets: dict[str, list[tuple[Target, int]]] = {}
        for adapter in adapters:
            for target in adapter.targets:
                for number, part in enumerate(target.tensor.parts):
                    self._targets.setdefault(part, []).append((target, number))
        self._loaded: dict[Target, tuple[torch.Tensor, torch.Tensor]] = {}

    def __contains__(self, name: object) -> bool:
        """Whether something is added to the weight with this released name."""
        return name in self._targets

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """What is added to rows `start` to `stop` of a weight, as (rows, columns) in float32."""
        total: torch.Tensor | None = None
        targets = self._targets[name]
        if any(target not in self._loaded for target, _ in targets):
            self._loaded = {target: (target.a.read().float(), target.b.read().float()) for target, _ in targets}
        for target, number in targets:
            a, b = self._loaded[target]
            rows = target.tensor.shape[-2]
            parts_of_expert = len(target.tensor.parts) // target.experts
            expert, part = divmod(number, parts_of_expert)
            first = part * (rows // parts_of_expert) + start
            last = first + stop - start
            if target.experts > 1:
                a = a.view(target.experts, target.rank, -1)[expert]
                b = b.view(b.shape[0], target.rank, target.experts)[..., expert]
            delta = (b @ a[:, first:last]).T if target.is_transposed else b[first:last] @ a
            delta = delta.contiguous().mul_(target.scaling)
            total = delta if total is None else total.add_(delta)
        assert total is not None
        if not bool(total.isfinite().all()):
            folders = ", ".join(str(adapter.folder) for adapter in self.adapters)
            raise ValueError(f"{folders}: the adapter adds infinite or NaN values to {name}.")
        return total


SERVED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
ENGINES = ("sglang", "vllm")


def export_adapter(folder: Path, target: Path, config: MiniMaxM3VLConfig, engine: str) -> None:
    """Write an adapter in the form that a serving engine loads.

    SGLang 0.5.23 takes adapters on the attention projections. It joins query, key and value, so all three get matrices,
    of zeros where the adapter has none. It knows one rank and one scaling, so other scalings are multiplied into B.

    Args:
        folder (Path): Folder of the adapter.
        target (Path): Folder to write, which must not exist.
        config (MiniMaxM3VLConfig): Config of the whole model.
        engine (str): One of `ENGINES`.

    Raises:
        FileExistsError: `target` exists.
        ValueError: The engine cannot load the adapter. The message names what it lacks.
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if engine == "vllm":
        raise ValueError(
            "vLLM 0.33 loads no adapters for MiniMax-M3 (its class lacks SupportsLoRA). Merge the adapter."
        )
    if target.exists():
        raise FileExistsError(f"{target} exists. Name another folder.")
    adapter = open_adapter(folder, config)
    shapes = released_shapes(config)
    given: dict[str, Target] = {}
    for one in adapter.targets:
        name = one.tensor.parts[0]
        module = name.removesuffix(".weight").rpartition(".")[2]
        if one.experts > 1 or ".experts." in name:
            raise ValueError(
                f"SGLang 0.5.23 cannot load the adapter on {one.tensor.name}: with adapters on experts it gives dense "
                "layers the width of an expert. Merge the adapter."
            )
        if module not in SERVED_MODULES or not name.startswith("language_model."):
            raise ValueError(
                f"SGLang 0.5.23 takes adapters on {', '.join(SERVED_MODULES)} of the language model, got one on "
                f"{one.tensor.name}. Merge the adapter."
            )
        given[name] = one
    rank = max(one.rank for one in given.values())
    plain = {(one.rank, one.scaling) for one in given.values()} == {(rank, adapter.config["lora_alpha"] / rank)}
    names = _with_joined_projections(given)
    alpha = adapter.config["lora_alpha"] if plain else rank

    matrices: dict[str, torch.Tensor] = {}
    dtype = next(iter(given.values())).a.dtype
    for name in names:
        outputs, inputs = shapes[name]
        a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        if name in given:
            one = given[name]
            a[: one.rank] = one.a.read()
            b[:, : one.rank] = one.b.read().float() * (1 if plain else one.scaling)
        for ending, matrix in ((_ENDING_A, a), (_ENDING_B, b)):
            matrices[_PREFIX + name.removesuffix(".weight") + ending] = matrix.to(dtype)
    unfinished = target.with_name(f"{target.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    specs = in_file_order(TensorSpec(name, dtype, tuple(matrix.shape)) for name, matrix in matrices.items())
    writer = TensorFileWriter(unfinished / ADAPTER_FILE, specs, {"format": "pt"})
    for spec in specs:
        writer.write(matrices[spec.name])
    writer.close()
    settings = adapter.config | {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_parameters": None,
        "target_modules": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}),
    }
    (unfinished / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.rename(target)


def _with_joined_projections(given: Mapping[str, Target]) -> list[str]:
    names = set(given)
    for name in given:
        prefix, module = name.removesuffix(".weight").rsplit(".", 1)
        if module != "o_proj":
            names |= {f"{prefix}.{other}.weight" for other in ("q_proj", "k_proj", "v_proj")}
    return sorted(names)
