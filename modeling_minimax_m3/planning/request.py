"""What a plan is asked for: the request, and what of it a configuration and this machine tell."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import AutoConfig

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, released_config

from ..training.language_loss import CHUNK_TOKENS
from .weights import OPTIMIZERS, PRECISIONS, QUANTIZABLE_PARTS, UNQUANTIZED_PARTS

GIB = 2**30
TRAINING = ("none", "lora", "qlora", "full", "indexers")
STRATEGIES = ("single", "device_map", "fsdp2", "zero3", "tensor_parallel", "expert_parallel", "ddp")
CACHES = ("dynamic", "static")
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What `generate` reads at a time.
PREFILL_TOKENS = 32768
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bf16"}

Config: TypeAlias = MiniMaxM3VLConfig | MiniMaxM3VLTextConfig


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
        lora_save (tuple[str, ...]): Ends of the names of modules that LoRA trains whole (PEFT's `modules_to_save`).
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
        experts_on_device (float, int, str or None): Room on the device for experts that stay on the host, as in
            `offload_experts`: a share of all of them (a float up to 1), or bytes (an int, or a text such as `"20GiB"`).
            None: no expert stays on the host. Only for generation on one device with plain experts or those in MXFP8.
        devices (int): Number of devices.
        device_gib (float or None): Memory of each. None: unknown, so that the plan does not say what fits.
        strategy (str): How devices share the work: one of `STRATEGIES`.
        host_gib (float or None): Memory of the host for each process. None: unknown, and then not checked.
        margin (float): Share of each device, and of the host, that stays free, for what the allocator cannot use.

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
    lora_save: tuple[str, ...] = ()
    autocast: bool = False
    prepared_for_kbit: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    loss_chunk: int = CHUNK_TOKENS
    cache: str = "dynamic"
    prefill_chunk: int = PREFILL_TOKENS
    experts_on_device: float | int | str | None = None
    devices: int = 1
    device_gib: float | None = None
    strategy: str = "single"
    host_gib: float | None = None
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
        for name in ("device_gib", "host_gib"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number of GiB or None, got {getattr(self, name)!r}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"`margin` must be at least 0 and below 1, got {self.margin!r}")
        if self.strategy == "single" and self.devices > 1:
            raise ValueError(
                f"`strategy` must be one for several devices ({', '.join(STRATEGIES[1:])}) where `devices` is "
                f"{self.devices}, got 'single'"
            )
        if self.training in ("lora", "full") and self.is_quantized:
            more = ": training='qlora' is for it" if self.training == "lora" else ""
            raise ValueError(
                f"`precision` must not be quantized with training={self.training!r}, got {self.precision!r}{more}"
            )
        if self.training == "qlora" and not self.is_quantized:
            raise ValueError(
                f"`precision` must be quantized with training='qlora', such as 'mxfp8', got {self.precision!r}: "
                "training='lora' is for it"
            )
        if self.training == "indexers" and self.is_quantized and "indexer" not in self.unquantized_parts:
            raise ValueError(
                "`unquantized_parts` must hold 'indexer' with training='indexers', got a quantized indexer"
            )
        if self.autocast and self.precision != "float32":
            raise ValueError(f"`autocast` needs precision='float32', got precision={self.precision!r}")
        if self.prepared_for_kbit and self.training != "qlora":
            raise ValueError(f"`prepared_for_kbit` needs training='qlora', got training={self.training!r}")
        if self.training in ("lora", "qlora") and not self.lora_targets and not self.lora_experts:
            raise ValueError("`lora_targets` must name a linear layer where `lora_experts` is False, got none")

        if self.experts_on_device is not None:
            self._check_experts_on_device()

    def _check_experts_on_device(self) -> None:
        room = self.experts_on_device
        if isinstance(room, float) and not 0 < room <= 1:
            raise ValueError(
                f"`experts_on_device` must be a share between 0 and 1 (a float), or bytes (an int or a text such as "
                f"'20GiB'), got {room!r}"
            )
        if not isinstance(room, float):
            try:
                convert_file_size_to_int(room)
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"`experts_on_device` must be a size such as '20GiB', got {room!r}") from error
        if self.training != "none" or self.strategy != "single":
            raise ValueError(
                "`experts_on_device` needs training='none', strategy='single' and devices=1, got "
                f"training={self.training!r}, strategy={self.strategy!r} and devices={self.devices}"
            )
        if not self.experts_can_be_on_host:
            raise ValueError(
                f"`experts_on_device` needs plain experts or those in mxfp8, got precision={self.precision!r}"
            )

    @property
    def experts_can_be_on_host(self) -> bool:
        """Whether `offload_experts` takes experts in this precision."""
        is_plain = not self.is_quantized or "routed experts" in self.unquantized_parts
        return is_plain or self.precision == "mxfp8"

    @property
    def is_quantized(self) -> bool:
        """Whether some weights are quantized."""
        return PRECISIONS[self.precision].is_quantized

    @property
    def usable_gib(self) -> float | None:
        """Memory of a device that a plan may fill."""
        return None if self.device_gib is None else self.device_gib * (1 - self.margin)

    @property
    def usable_host_gib(self) -> float | None:
        """Memory of the host that a plan may fill."""
        return None if self.host_gib is None else self.host_gib * (1 - self.margin)


def read_config(source: str | os.PathLike, layers: int | None = None) -> Config:
    """Reads the configuration of a model, without its weights.

    Args:
        source (str or PathLike): A `config.json`, the folder of a checkpoint, its name on the Hub, or `released` for
            the released geometry.
        layers (int or None): How many of the first layers to keep. None: all.

    Raises:
        ValueError: There is no such configuration, it is an adapter's or another model's, or `layers` is not among its
            layers.
    """
    is_released = str(source) == "released" and not Path(source).exists()
    config = released_config() if is_released else _load_config(source)
    if not isinstance(config, MiniMaxM3VLConfig | MiniMaxM3VLTextConfig):
        raise ValueError(f"`config` must be of a MiniMax-M3, got a {type(config).__name__} from {source}")
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise ValueError(f"`layers` must be from 1 to {text.num_hidden_layers}, got {layers}")
        text.layer_types, text.mlp_layer_types = text.layer_types[:layers], text.mlp_layer_types[:layers]
        text.num_hidden_layers = layers
    return config


def _load_config(source: str | os.PathLike) -> Any:
    """The configuration of `source`, of any model, with errors that say what `source` is."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"`config` must be a checkpoint, and {source} is an adapter: pass the one it was trained on"
            )
        raise ValueError(f"`config` must be a checkpoint, and the folder {source} has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if path.exists():
            raise ValueError(f"`config`: {source} cannot be read: {error}") from error
        if path.is_absolute() or str(source).startswith("."):  # no name on the Hub, so that its rules do not matter
            raise ValueError(f"`config`: there is no file or folder {source}") from error
        raise ValueError(
            f"`config` must be a config.json, a folder, a name on the Hub or 'released': {source} is no file or folder "
            f"here, and cannot be read from the Hub: {error}"
        ) from error


def detected_host_gib() -> float:
    """The GiB of the host's memory, or of the container that this process is in."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CONTAINER_LIMIT.is_file() and (text := _CONTAINER_LIMIT.read_text().strip()).isdigit():
        size = min(size, int(text))
    return size / GIB


def detected_devices() -> tuple[int, float] | None:
    """The number of CUDA devices and the GiB of the smallest. None where there is none."""
    count = torch.cuda.device_count()
    if count == 0:
        return None
    return count, min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / GIB
