"""Whether a model fits on the devices, before anything is loaded: `plan_memory(config, MemoryRequest(...))`.

The plan is an estimate from the configuration. docs/memory.md says what it counts and what it leaves out.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, released_config

from . import memory_passes as passes
from .memory_weights import (
    OPTIMIZERS,
    PARTS,
    PRECISIONS,
    QUANTIZABLE_PARTS,
    UNQUANTIZED_PARTS,
    Weight,
    adapters,
    is_quantized,
    list_weights,
    optimizer_bytes,
    stored_bytes,
)
from .training.language_loss import CHUNK_TOKENS

GIB = 2**30
TRAINING = ("none", "lora", "qlora", "full", "indexers")
STRATEGIES = ("single", "device_map", "fsdp2", "zero3", "tensor_parallel", "expert_parallel", "ddp")
CACHES = ("dynamic", "static")
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What `generate` reads at a time.
PREFILL_TOKENS = 32768
# Outside of PyTorch's allocator: the CUDA context with the loaded kernels, and the buffers of NCCL.
CONTEXT_GIB, NCCL_GIB = 0.6, 0.8
# Experts that are dequantized at a time, where a pass has many tokens.
DEQUANTIZED_EXPERT_BYTES = 2 * GIB
_MOST_DEVICES = 1024
# Of each process's own rows, so that more processes mean more rows.
_DATA_PARALLEL = ("fsdp2", "zero3", "ddp")

Config = MiniMaxM3VLConfig | MiniMaxM3VLTextConfig


@dataclass(frozen=True)
class MemoryRequest:
    """What is to run, and on what. All sizes of memory are GiB.

    Args:
        precision (str): Of the loaded weights: a key of `PRECISIONS`. The quantized ones are `"mxfp8"` (as released),
            `"fp8"` and `"int8"` (torchao), `"nf4"` and `"nf4-double"` (bitsandbytes, the latter with double
            quantization).
        unquantized_parts (tuple[str, ...]): Parts that a quantized precision leaves in bfloat16. Embeddings, norms
            and router always stay.
        context (int): Tokens of a row: prompt and generated ones, or the rows of a training batch.
        new_tokens (int): How many tokens of `context` are generated. Only for `training="none"`.
        batch_size (int): Rows of a pass; with `fsdp2`, `zero3` and `ddp`, and with `expert_parallel` in training, of
            each process.
        training (str): `"none"` (generation), `"lora"`, `"qlora"` (LoRA on a quantized precision), `"full"` or
            `"indexers"`.
        train_vision (bool): Whether a full training also trains the vision tower.
        lora_rank (int): Rank of the adapters.
        lora_targets (tuple[str, ...]): Ends of the names of the linear layers that get adapters.
        lora_experts (bool): Whether the routed experts get adapters.
        autocast (bool): Whether autocast computes in bfloat16 with weights in float32.
        prepared_for_kbit (bool): Whether PEFT's `prepare_model_for_kbit_training` makes the unquantized weights and
            the hidden states float32. Only for `"qlora"`.
        optimizer (str): One of `OPTIMIZERS`. Paged states count as host memory.
        gradient_checkpointing (bool): Whether a layer keeps its input alone.
        gradient_accumulation_steps (int): Passes of an optimizer step. Above 1, all gradients are there in every pass
            but the first.
        loss_chunk (int): Tokens whose logits exist at the same time in training.
        cache (str): `"dynamic"`, which doubles when it is full, or `"static"`.
        prefill_chunk (int): Tokens of a row that `generate` reads at a time.
        devices (int): Number of devices.
        device_gib (float or None): Memory of each. None: unknown, so that the plan does not say what fits.
        strategy (str): How devices share the work: one of `STRATEGIES`.
        margin (float): Share of each device that stays free, for what the allocator cannot use.

    Raises:
        ValueError: A field is out of range, or contradicts another. The message names the field.
    """

    precision: str = "bf16"
    unquantized_parts: tuple[str, ...] = UNQUANTIZED_PARTS
    context: int = 8192
    new_tokens: int = 256
    batch_size: int = 1
    training: str = "none"
    train_vision: bool = False
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ATTENTION_TARGETS
    lora_experts: bool = False
    autocast: bool = False
    prepared_for_kbit: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    loss_chunk: int = CHUNK_TOKENS
    cache: str = "dynamic"
    prefill_chunk: int = PREFILL_TOKENS
    devices: int = 1
    device_gib: float | None = None
    strategy: str = "single"
    margin: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", PRECISIONS),
            ("training", TRAINING),
            ("optimizer", OPTIMIZERS),
            ("cache", CACHES),
            ("strategy", STRATEGIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in (
            *("context", "batch_size", "lora_rank", "gradient_accumulation_steps", "loss_chunk", "prefill_chunk"),
            "devices",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)!r}")
        for part in self.unquantized_parts:
            if part not in QUANTIZABLE_PARTS:
                raise ValueError(f"`unquantized_parts` must be among {', '.join(QUANTIZABLE_PARTS)}, got {part!r}")
        if self.training == "none" and not 0 <= self.new_tokens < self.context:
            raise ValueError(
                f"`new_tokens` must be from 0 to context - 1 = {self.context - 1}, got {self.new_tokens!r}"
            )
        if self.device_gib is not None and not self.device_gib > 0:
            raise ValueError(f"`device_gib` must be positive or None, got {self.device_gib!r}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"`margin` must be at least 0 and below 1, got {self.margin!r}")
        if self.strategy == "single" and self.devices > 1:
            raise ValueError(
                f"`strategy` must be one for several devices ({', '.join(STRATEGIES[1:])}) where `devices` is "
                f"{self.devices}, got 'single'"
            )
        if self.training in ("lora", "full") and self.is_quantized:
            more = ", which is 'qlora'" if self.training == "lora" else ""
            raise ValueError(
                f"`precision` must not be quantized with training={self.training!r}, got {self.precision!r}{more}"
            )
        if self.training == "qlora" and not self.is_quantized:
            raise ValueError(f"`precision` must be quantized with training='qlora', got {self.precision!r}")
        if self.autocast and self.precision != "float32":
            raise ValueError(f"`autocast` needs precision='float32', got precision={self.precision!r}")
        if self.prepared_for_kbit and self.training != "qlora":
            raise ValueError(f"`prepared_for_kbit` needs training='qlora', got training={self.training!r}")
        if self.training in ("lora", "qlora") and not self.lora_targets and not self.lora_experts:
            raise ValueError("`lora_targets` must name a linear layer where `lora_experts` is False, got none")

    @property
    def is_quantized(self) -> bool:
        """Whether some weights are quantized."""
        return PRECISIONS[self.precision].is_quantized

    @property
    def usable_gib(self) -> float | None:
        """Memory of a device that a plan may fill."""
        return None if self.device_gib is None else self.device_gib * (1 - self.margin)


@dataclass(frozen=True)
class DevicePlan:
    """The memory of one device at its largest moment.

    Args:
        name (str): `cuda:0`, or `each of N devices`.
        gib (dict[str, float]): GiB of each part, those of the weights first. Parts of no memory are left out.
        moment (str): When the device needs the most.
        layers (tuple[int, ...]): The decoder layers that it computes.
    """

    name: str
    gib: dict[str, float]
    moment: str
    layers: tuple[int, ...]

    @property
    def total_gib(self) -> float:
        """Sum of all parts."""
        return sum(self.gib.values())


@dataclass(frozen=True)
class Change:
    """A single change of a request.

    Args:
        description (str): The change, by the fields of `MemoryRequest`.
        request (MemoryRequest): The changed request.
        gib (float): What the fullest device then needs.
        fits (bool): Whether that fits.
    """

    description: str
    request: MemoryRequest
    gib: float
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What a request needs.

    Args:
        request (MemoryRequest): The request.
        devices (tuple[DevicePlan, ...]): One for each device, or a single one that stands for all.
        parameters (dict[str, int]): Number of parameters of each part of the model.
        trained_parameters (int): How many parameters are trained, those of adapters included.
        paged_gib (float): States of a paged optimizer, in host memory, for each process.
    """

    request: MemoryRequest
    devices: tuple[DevicePlan, ...]
    parameters: dict[str, int]
    trained_parameters: int
    paged_gib: float
    _model: "_Model" = field(repr=False, compare=False)

    @property
    def total_gib(self) -> float:
        """What the fullest device needs."""
        return max(device.total_gib for device in self.devices)

    @property
    def fits(self) -> bool | None:
        """Whether every device has room. None where `device_gib` is unknown."""
        usable = self.request.usable_gib
        return None if usable is None else self.total_gib <= usable

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Single changes that need less memory: those that fit come first, the smallest need first among them."""
        if self.request.usable_gib is None:
            return ()
        found = []
        for description, request in _candidates(self.request, self._model):
            plan = _plan(self._model, request)
            if plan.total_gib < self.total_gib:
                found.append(Change(description, request, plan.total_gib, bool(plan.fits)))
        return tuple(sorted(found, key=lambda change: (not change.fits, change.gib)))

    def device_map(self) -> dict[str, int]:
        """The `device_map` for `from_pretrained` that a plan of the strategy `device_map` assumes.

        Raises:
            ValueError: The plan has another strategy.
        """
        if self.request.strategy != "device_map":
            raise ValueError(f"`device_map` needs the strategy 'device_map', got {self.request.strategy!r}")
        return _device_map(self._model, _split_over_devices(self._model, self.request))

    def table(self) -> str:
        """The parts of every device as text, whether they fit, and the changes where they do not."""
        columns = [device.gib for device in self.devices]
        names = list(dict.fromkeys(name for name in (*PARTS, *_OTHER_ROWS) if any(name in gib for gib in columns)))
        heads = [device.name for device in self.devices]
        rows = [["GiB", *heads], *([name, *(_figure(gib.get(name)) for gib in columns)] for name in names)]
        rows.append(["total", *(_figure(device.total_gib) for device in self.devices)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads) + 1)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(-1, "-" * len(lines[0]))
        moments = dict.fromkeys(device.moment for device in self.devices)
        lines.append(f"largest moment: {', '.join(moments)}")
        total = sum(self.parameters.values())
        lines.append(f"{total:,} parameters" + (f", {self.trained_parameters:,} trained" if self._trains else ""))
        if self.paged_gib:
            lines.append(f"beside that {self.paged_gib:.2f} GiB of paged optimizer states in host memory")
        return "\n".join([*lines, *self._verdict()])

    @property
    def _trains(self) -> bool:
        return self.request.training != "none"

    def _verdict(self) -> list[str]:
        request = self.request
        if request.usable_gib is None:
            return ["the memory of a device is unknown: give it as `device_gib`"]
        room = (
            f"{request.usable_gib:.2f} GiB, {1 - request.margin:.0%} of the {request.device_gib:.2f} GiB of a device"
        )
        if self.fits:
            return [f"fits: at most {self.total_gib:.2f} of {room}"]
        lines = [f"does not fit: {self.total_gib:.2f} GiB are needed, and there are {room}"]
        fitting = [change for change in self.changes if change.fits]
        lines.append("one of these changes makes it fit:" if fitting else "no single change makes it fit; the best:")
        return lines + [f"  {change.description}: {change.gib:.2f} GiB" for change in fitting or self.changes[:5]]


_OTHER_ROWS = (
    *("adapters", "float32 weights", "gathered weights", "dequantized weights", "merged experts"),
    *(
        "autocast weights",
        "cache",
        "activations",
        "workspaces",
        "loss and logits",
        "gradients",
        "optimizer",
        "CUDA context",
    ),
)


def plan_memory(config: Config | str | os.PathLike, request: MemoryRequest) -> MemoryPlan:
    """Plans the memory of each device.

    Args:
        config (config, str or PathLike): The model's configuration, or what `read_config` reads.
        request (MemoryRequest): What is to run, and on what.

    Raises:
        ValueError: `lora_targets` names no linear layer of the model, or the model lacks what is to be trained.
    """
    if not isinstance(config, MiniMaxM3VLConfig | MiniMaxM3VLTextConfig):
        config = read_config(config)
    return _plan(_Model(config), request)


def read_config(source: str | os.PathLike, layers: int | None = None) -> Config:
    """Reads the configuration of a model, without its weights.

    Args:
        source (str or PathLike): A `config.json`, the folder of a checkpoint, its name on the Hub, or `released` for
            the released geometry.
        layers (int or None): How many of the first layers to keep. None: all.

    Raises:
        ValueError: It is the configuration of another model, or `layers` is not among its layers.
    """
    if str(source) == "released" and not Path(source).exists():
        config = released_config()
    else:
        config = AutoConfig.from_pretrained(source)
    if not isinstance(config, MiniMaxM3VLConfig | MiniMaxM3VLTextConfig):
        raise ValueError(f"`config` must be of a MiniMax-M3, got a {type(config).__name__} from {source}")
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise ValueError(f"`layers` must be from 1 to {text.num_hidden_layers}, got {layers}")
        text.layer_types, text.mlp_layer_types = text.layer_types[:layers], text.mlp_layer_types[:layers]
        text.num_hidden_layers = layers
    return config


def saved_precision(config: Config) -> str:
    """The precision in which the checkpoint of a configuration is saved, a key of `PRECISIONS`.

    Raises:
        ValueError: The checkpoint is quantized in a way that the planner does not know.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return _DTYPES.get(_dtype_of(config), "bf16")
    entries = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(entries.get("quant_method"), "value", entries.get("quant_method")))
    if method in ("mxfp8", "fp8"):
        return "mxfp8"
    if method == "bitsandbytes":
        if entries.get("load_in_8bit"):
            return "int8"
        return "nf4-double" if entries.get("bnb_4bit_use_double_quant") else "nf4"
    if method == "torchao":
        return "int8" if "int8" in str(entries.get("quant_type")).lower() else "fp8"
    raise ValueError(f"`precision` must be given: the checkpoint's quantization {method!r} is unknown to the planner")


_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bf16"}


def _dtype_of(config: Config) -> torch.dtype | None:
    dtype = config.dtype if config.dtype is not None else config.get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def detected_devices() -> tuple[int, float] | None:
    """The number of CUDA devices and the GiB of the smallest. None where there is none."""
    count = torch.cuda.device_count()
    if count == 0:
        return None
    return count, min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / GIB


def _figure(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f}"


# ---- one device -------------------------------------------------------------------------------------------------


class _Model:
    """A configuration with the list of its parameters."""

    def __init__(self, config: Config):
        self.config = config
        self.text = config.get_text_config()
        self.weights = list_weights(config)
        self.layers = range(self.text.num_hidden_layers)


@dataclass(frozen=True)
class _Trained:
    """What a request trains: the weights, which may be new ones, and the bytes of their elements."""

    weights: list[Weight]
    are_new: bool
    weight_bytes: int  # of an element where the optimizer reads it
    gradient_bytes: int


def _trained(model: _Model, request: MemoryRequest) -> _Trained:
    if request.training == "none":
        return _Trained([], False, 0, 0)
    if request.training in ("lora", "qlora"):
        added = adapters(model.weights, request.lora_targets, request.lora_rank, request.lora_experts)
        return _Trained(added, True, 4, 4)  # PEFT makes adapters float32
    if request.training == "indexers":
        weights = [weight for weight in model.weights if weight.part == "indexer"]
        if not weights:
            raise ValueError("`training` must not be 'indexers', because the model has no indexer")
    else:
        weights = [
            weight
            for weight in model.weights
            if weight.requires_grad and (request.train_vision or weight.part != "vision")
        ]
    # The sharding engines of Accelerate train float32 weights, and compute in bfloat16.
    size = 4 if request.strategy in ("fsdp2", "zero3") else int(PRECISIONS[request.precision].element_bytes)
    size = 2 if size < 2 else size  # the unquantized part of a quantized model
    return _Trained(weights, False, size, size)


def _share(weight: Weight, request: MemoryRequest) -> float:
    """The part of a weight that one device holds, where all devices hold equally much."""
    strategy, trains = request.strategy, request.training != "none"
    if strategy in ("fsdp2", "zero3") or (strategy == "expert_parallel" and trains):
        is_cut = True  # beside expert parallelism in training, FSDP2 shards all but the experts
    elif strategy in ("tensor_parallel", "expert_parallel"):
        is_cut = weight.part in ("routed experts", "embeddings", "head") or (
            weight.part == "attention" and weight.is_linear
        )
    else:
        is_cut = False
    return 1 / request.devices if is_cut else 1


def _plan(model: _Model, request: MemoryRequest) -> MemoryPlan:
    trained = _trained(model, request)
    if request.strategy == "device_map":
        places = _split_over_devices(model, request)
        devices = tuple(
            _device(model, request, trained, f"cuda:{index}", lambda weight, index=index: places(weight) == index)
            for index in range(request.devices)
        )
    else:
        name = "cuda:0" if request.devices == 1 else f"each of {request.devices} devices"
        devices = (_device(model, request, trained, name, lambda weight: True),)
    parameters = dict.fromkeys(PARTS, 0)
    for weight in model.weights:
        parameters[weight.part] += weight.elements
    paged = 0.0
    if request.optimizer.startswith("paged"):
        paged = sum(_states(weight, request, trained) for weight in trained.weights) / GIB
    return MemoryPlan(
        request=request,
        devices=devices,
        parameters={part: count for part, count in parameters.items() if count},
        trained_parameters=sum(weight.elements for weight in trained.weights),
        paged_gib=paged,
        _model=model,
    )


def _device(
    model: _Model, request: MemoryRequest, trained: _Trained, name: str, is_here: Callable[[Weight], bool]
) -> DevicePlan:
    """The plan of one device, which holds the weights that `is_here` accepts."""
    weights = [weight for weight in model.weights if is_here(weight)]
    own = replace(trained, weights=[weight for weight in trained.weights if is_here(weight)])
    layers = sorted({weight.layer for weight in weights if weight.layer is not None})
    rows: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for weight in weights:
        rows[weight.part] += _stored(weight, request) * _share(weight, request)
    has_head = request.strategy != "device_map" or any(
        weight.part == "norms" and weight.layer is None for weight in weights
    )
    if request.training == "none":
        moments = _generation_moments(model, request, layers, has_head)
    else:
        rows |= _states_rows(request, own)
        moments = _training_moments(model, request, own, layers, has_head)
    rows |= _passing_weights(request, weights, own)
    rows["CUDA context"] = GIB * (CONTEXT_GIB + (NCCL_GIB if _has_processes(request) else 0))
    moment, largest = max(moments.items(), key=lambda item: sum(item[1].values()))
    gib = {row: size / GIB for row, size in (rows | largest).items() if size}
    return DevicePlan(name, gib, moment, tuple(layers))


def _stored(weight: Weight, request: MemoryRequest) -> float:
    return stored_bytes(
        weight, request.precision, request.unquantized_parts, unquantized_bytes=4 if request.prepared_for_kbit else 2
    )


def _states(weight: Weight, request: MemoryRequest, trained: _Trained) -> float:
    return optimizer_bytes(weight.shape, request.optimizer, trained.weight_bytes) * _share(weight, request)


def _has_processes(request: MemoryRequest) -> bool:
    return request.devices > 1 and request.strategy != "device_map"


def _compute_bytes(request: MemoryRequest) -> int:
    is_half = request.autocast or request.strategy in ("fsdp2", "zero3")
    return 4 if request.precision == "float32" and not is_half else 2


def _states_rows(request: MemoryRequest, trained: _Trained) -> dict[str, float]:
    """Adapters, float32 copies of the weights, and the optimizer's states."""
    rows = {"adapters": 0.0, "float32 weights": 0.0, "optimizer": 0.0}
    for weight in trained.weights:
        share = _share(weight, request)
        if trained.are_new:
            rows["adapters"] += trained.weight_bytes * weight.elements * share
        elif request.strategy == "zero3":
            rows["float32 weights"] += 4 * weight.elements * share
        elif request.strategy == "fsdp2":  # in place of the loaded weight
            rows["float32 weights"] += (4 * weight.elements - _stored(weight, request)) * share
        if not request.optimizer.startswith("paged"):
            rows["optimizer"] += _states(weight, request, trained)
    return rows


def _passing_weights(request: MemoryRequest, weights: list[Weight], trained: _Trained) -> dict[str, float]:
    """Weights that exist while a layer runs: gathered from other devices, dequantized, or merged with adapters."""
    rows = dict.fromkeys(("gathered weights", "dequantized weights", "merged experts", "autocast weights"), 0.0)
    if request.autocast:  # autocast keeps its copies of trained weights to the end of a pass
        copied = 0 if trained.are_new else sum(w.elements * _share(w, request) for w in trained.weights)
        rows["autocast weights"] = 2 * (copied or max((w.elements for w in weights), default=0))
    if request.devices > 1:
        rows["gathered weights"] = _gathered_bytes(request, weights, trained)
    quantized = [w for w in weights if is_quantized(w, request.precision, request.unquantized_parts)]
    if quantized:
        rows["dequantized weights"] = max(
            min(2 * weight.elements, DEQUANTIZED_EXPERT_BYTES)
            if weight.part == "routed experts"
            else 2 * weight.elements
            for weight in quantized
        )
    if request.training == "lora" and request.lora_experts:
        # PEFT adds the product of the adapters to all experts of a layer: the sums of a layer's two weights, and for
        # one weight the product in float32, its scaled copy and the gradient of the sum.
        experts = [weight.elements for weight in weights if weight.part == "routed experts"]
        layer = max((w.layer for w in weights if w.part == "routed experts"), default=None)
        sums = sum(w.elements for w in weights if w.part == "routed experts" and w.layer == layer)
        rows["merged experts"] = _share_of_experts(request) * (2 * sums + 10 * max(experts, default=0))
    return rows


def _share_of_experts(request: MemoryRequest) -> float:
    is_cut = request.strategy in ("tensor_parallel", "expert_parallel")
    return 1 / request.devices if is_cut else 1


def _gathered_bytes(request: MemoryRequest, weights: list[Weight], trained: _Trained) -> float:
    """Weights, and gradients, that a sharding engine holds whole for a while."""
    trains = request.training != "none"
    if request.strategy not in ("fsdp2", "zero3") and not (request.strategy == "expert_parallel" and trains):
        return 0
    moved = [w for w in weights if request.strategy != "expert_parallel" or w.part != "routed experts"]
    size = {w.name: _stored(w, request) if request.is_quantized else 2 * w.elements for w in moved}
    gradients = {} if trained.are_new else {w.name: 2 * w.elements for w in trained.weights}
    layers: dict[int, float] = {}
    layer_gradients: dict[int, float] = {}
    root = 0.0
    for weight in moved:
        if weight.layer is not None:
            layers[weight.layer] = layers.get(weight.layer, 0) + size[weight.name]
            layer_gradients[weight.layer] = layer_gradients.get(weight.layer, 0) + gradients.get(weight.name, 0)
        elif ".vision_tower." not in weight.name:
            root += size[weight.name] + gradients.get(weight.name, 0)
    # FSDP2 gathers the next layer while one runs, and the root stays gathered. ZeRO-3 gathers module by module.
    ahead = 1 if request.strategy == "zero3" else 2
    return root + ahead * max(layers.values(), default=0) + max(layer_gradients.values(), default=0)


def _generation_moments(
    model: _Model, request: MemoryRequest, layers: list[int], has_head: bool
) -> dict[str, dict[str, float]]:
    """What the device holds in the passes of `generate`, beside the weights."""
    rows, prompt, size = request.batch_size, request.context - request.new_tokens, _compute_bytes(request)
    new = min(prompt, request.prefill_chunk)
    is_static = request.cache == "static"
    of_prompt = passes.cache_capacity(prompt, prompt, new, False)
    capacity = passes.cache_capacity(request.context, prompt, new, False)
    if is_static:
        of_prompt = capacity = request.context
    logits = passes.last_logits_bytes(model.text, rows, size) if has_head else 0

    def cache_of(tokens: int) -> float:
        return sum(passes.cache_bytes(model.text, layer, rows * tokens, size) for layer in layers)

    moments = {}
    for moment, tokens, keys, held in (
        ("prefill", new, prompt, of_prompt),
        ("decoding", 1, request.context, capacity),
    ):
        peaks = [
            passes.prefill_bytes(model.text, layer, rows, tokens, keys, size, request.devices == 1) for layer in layers
        ]
        activations, workspace = max(peaks, key=sum, default=(0, 0))
        moments[moment] = {
            "cache": cache_of(held),
            "activations": activations,
            "workspaces": workspace,
            "loss and logits": logits,
        }
    return moments


def _training_moments(
    model: _Model, request: MemoryRequest, trained: _Trained, layers: list[int], has_head: bool
) -> dict[str, dict[str, float]]:
    """What the device holds in a training step, beside the weights and the optimizer's states."""
    tokens, size = request.batch_size * request.context, _compute_bytes(request)
    parts = {weight.part for weight in trained.weights}
    indexer_only = request.training == "indexers"
    sizes = {
        layer: passes.training_bytes(
            model.text,
            layer,
            tokens,
            request.context,
            element_bytes=size,
            residual_bytes=4 if request.prepared_for_kbit or request.autocast else size,
            trains_attention="attention" in parts,
            trains_mlp=bool(parts & {"dense MLPs", "routed experts", "shared experts"}),
            trains_indexer=indexer_only or model.text.indexer_loss_coef > 0,
            indexer_only=indexer_only,
        )
        for layer in layers
    }
    saved = {layer: 0 if request.gradient_checkpointing else sizes[layer].saved for layer in layers}
    copies = 2 if request.strategy == "ddp" and request.devices > 1 else 1  # DDP sums gradients in buckets of its own
    gradients: dict[int | None, float] = dict.fromkeys((None, *layers), 0.0)
    for weight in trained.weights:
        gradients[weight.layer] += copies * trained.gradient_bytes * weight.elements * _share(weight, request)
    all_gradients = sum(gradients.values())
    accumulates = request.gradient_accumulation_steps > 1 or copies > 1
    kept = sum(sizes[layer].input + saved[layer] for layer in layers)
    moments = {}
    if has_head:
        moments["the loss"] = {
            "activations": kept,
            "loss and logits": passes.loss_bytes(model.text, tokens, request.loss_chunk, size),
            "gradients": all_gradients if accumulates else gradients[None],
        }
    there = gradients[None]
    for layer in reversed(layers):
        there += gradients[layer]
        moments[f"backward of layer {layer}"] = {
            "activations": kept - saved[layer] + sizes[layer].backward - sizes[layer].workspace,
            "workspaces": sizes[layer].workspace,
            "gradients": all_gradients if accumulates else there,
        }
        kept -= sizes[layer].input + saved[layer]
    step = 0.0
    if request.optimizer == "adafactor":  # gradient, update and weight of a tensor in float32
        step = 12 * max((weight.elements * _share(weight, request) for weight in trained.weights), default=0)
    moments["the optimizer's step"] = {"workspaces": step, "gradients": all_gradients}
    return moments


# ---- layers over devices ----------------------------------------------------------------------------------------


def _split_over_devices(model: _Model, request: MemoryRequest) -> Callable[[Weight], int]:
    """Places neighbouring layers on each device so that the fullest holds as little as possible."""
    tokens = request.batch_size * request.context
    trained = _trained(model, request)
    of_layer = {
        layer: float(passes.cache_bytes(model.text, layer, tokens, 2)) if request.training == "none" else 0.0
        for layer in model.layers
    }
    before = after = 0.0
    sizes = [(weight, _stored(weight, request)) for weight in model.weights]
    sizes += [
        (
            weight,
            (trained.gradient_bytes + (trained.weight_bytes if trained.are_new else 0)) * weight.elements
            + (0 if request.optimizer.startswith("paged") else _states(weight, request, trained)),
        )
        for weight in trained.weights
    ]
    for weight, size in sizes:
        if weight.layer is not None:
            of_layer[weight.layer] += size
        elif _is_behind_layers(weight):
            after += size
        else:
            before += size
    items = [before, *(of_layer[layer] for layer in model.layers), after]
    devices = _balanced(items, request.devices)

    def place(weight: Weight) -> int:
        if weight.layer is not None:
            return devices[weight.layer + 1]
        return devices[-1] if _is_behind_layers(weight) else devices[0]

    return place


def _is_behind_layers(weight: Weight) -> bool:
    return weight.part in ("norms", "head")


def _balanced(items: list[float], devices: int) -> list[int]:
    """The device of each item, in order, so that the largest sum of a device is as small as possible."""

    def fill(capacity: float) -> list[int]:
        device, held, places = 0, 0.0, []
        for item in items:
            if held and held + item > capacity:
                device, held = device + 1, 0.0
            held += item
            places.append(device)
        return places

    low, high = max(items), sum(items)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle)[-1] < devices else (middle, high)
    return fill(high)


def _device_map(model: _Model, place: Callable[[Weight], int]) -> dict[str, int]:
    """Names of modules and their devices."""
    found: dict[str, int] = {}
    for weight in model.weights:
        if weight.layer is not None:
            name = weight.name.split(".layers.")[0] + f".layers.{weight.layer}"
        elif weight.part == "vision":
            name = ".".join(weight.name.split(".")[:2])
        else:
            name = weight.module
        found[name] = place(weight)
        if weight.part == "embeddings":  # the rotary embedding has no parameter
            found[weight.module.replace("embed_tokens", "rotary_emb")] = place(weight)
    return found


# ---- changes ----------------------------------------------------------------------------------------------------


def _candidates(request: MemoryRequest, model: _Model) -> Iterator[tuple[str, MemoryRequest]]:
    """Requests that differ in one decision."""
    yield from _quantized(request)
    trains = request.training != "none"
    if request.training == "full":
        yield "training='lora'", replace(request, training="lora")
    if trains and not request.gradient_checkpointing:
        yield "gradient_checkpointing=True", replace(request, gradient_checkpointing=True)
    if trains:
        for optimizer in OPTIMIZERS:
            yield f"optimizer={optimizer!r}", replace(request, optimizer=optimizer)
    elif request.cache == "dynamic":
        yield "cache='static'", replace(request, cache="static")
    for name, minimum in _HALVED[trains]:
        if name == "context" and not trains:
            minimum = max(minimum, request.new_tokens + 1)
        yield from _halved(request, model, name, minimum)
    yield from _more_devices(request, model)


# What may be halved, by whether there is training, and down to which value.
_HALVED = {
    True: (("batch_size", 1), ("context", 1024), ("loss_chunk", 128)),
    False: (("batch_size", 1), ("context", 1024), ("prefill_chunk", 1024)),
}


def _quantized(request: MemoryRequest) -> Iterable[tuple[str, MemoryRequest]]:
    training = "qlora" if request.training == "lora" else request.training
    for precision, kind in PRECISIONS.items():
        if precision in (request.precision, "float16") or (kind.is_quantized and training == "full"):
            continue
        if kind.is_quantized:
            changed = replace(request, precision=precision, training=training, autocast=False)
            yield f"precision={precision!r}, training={training!r}", changed
        elif not request.is_quantized:
            yield f"precision={precision!r}", replace(request, precision=precision, autocast=False)


def _halved(request: MemoryRequest, model: _Model, name: str, minimum: int) -> Iterator[tuple[str, MemoryRequest]]:
    """The largest of the halves that fits, or the smallest of all."""
    value, changed = getattr(request, name), None
    while value // 2 >= minimum:
        value //= 2
        changed = replace(request, **{name: value})
        if _plan(model, changed).fits:
            break
    if changed is not None:
        yield f"{name}={value}", changed


def _more_devices(request: MemoryRequest, model: _Model) -> Iterator[tuple[str, MemoryRequest]]:
    """Other strategies on the same devices, and the fewest devices, in doublings, that suffice for a strategy."""
    for strategy in STRATEGIES[1:]:
        if strategy in _DATA_PARALLEL and request.training == "none":
            continue
        if request.devices > 1 and strategy != request.strategy:  # one change alone, without more devices
            yield f"strategy={strategy!r}", replace(request, strategy=strategy)
            continue
        devices = _MOST_DEVICES if strategy == "ddp" else request.devices
        while devices < _MOST_DEVICES:
            devices *= 2
            changed = replace(request, devices=devices, strategy=strategy)
            if _plan(model, changed).fits:
                yield f"devices={devices}, strategy={strategy!r}", changed
                break


def as_dict(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as what JSON can hold."""
    return {
        "request": asdict(plan.request),
        "devices": [asdict(device) | {"total_gib": device.total_gib} for device in plan.devices],
        "parameters": plan.parameters,
        "trained_parameters": plan.trained_parameters,
        "paged_gib": plan.paged_gib,
        "total_gib": plan.total_gib,
        "fits": plan.fits,
        "changes": [
            {"description": change.description, "gib": change.gib, "fits": change.fits} for change in plan.changes
        ],
    }
