"""Whether a model fits on the devices, before anything is loaded: `plan_memory(config, MemoryRequest(...))`.

The plan is an estimate from the configuration. docs/memory.md says what it counts and what it leaves out.
"""

import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

from .planning import devices as device_memory
from .planning.changes import candidates
from .planning.devices import DevicePlan
from .planning.holdings import Model, trained_of
from .planning.request import (
    CACHES,
    DTYPES,
    GIB,
    STRATEGIES,
    TRAINING,
    Config,
    MemoryRequest,
    detected_devices,
    detected_host_gib,
    read_config,
)
from .planning.saved_checkpoints import saved_precision, saved_unquantized_parts
from .planning.weights import OPTIMIZERS, PARTS, PRECISIONS, QUANTIZABLE_PARTS, UNQUANTIZED_PARTS

__all__ = [
    "CACHES",
    "Change",
    "Config",
    "DTYPES",
    "DevicePlan",
    "MemoryPlan",
    "MemoryRequest",
    "OPTIMIZERS",
    "PARTS",
    "PRECISIONS",
    "QUANTIZABLE_PARTS",
    "STRATEGIES",
    "TRAINING",
    "UNQUANTIZED_PARTS",
    "as_dict",
    "detected_devices",
    "detected_host_gib",
    "plan_memory",
    "read_config",
    "saved_precision",
    "saved_unquantized_parts",
]


@dataclass(frozen=True)
class Change:
    """A single change of a request.

    Args:
        description (str): The change, by the fields of `MemoryRequest`.
        request (MemoryRequest): The changed request.
        gib (float): What the fullest device then needs.
        host_gib (float): What the host then needs for each process.
        fits (bool): Whether that fits.
    """

    description: str
    request: MemoryRequest
    gib: float
    host_gib: float
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
        host_gib (float): Those and the weights that the host holds where experts stay there, for each process.
    """

    request: MemoryRequest
    devices: tuple[DevicePlan, ...]
    parameters: dict[str, int]
    trained_parameters: int
    paged_gib: float
    host_gib: float
    _model: Model = field(repr=False, compare=False)

    @property
    def total_gib(self) -> float:
        """What the fullest device needs."""
        return max(device.total_gib for device in self.devices)

    @property
    def fits(self) -> bool | None:
        """Whether every device has room, and the host where `host_gib` is known. None where `device_gib` is unknown."""
        usable = self.request.usable_gib
        return None if usable is None else self.total_gib <= usable and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether the host has room. True where `host_gib` is unknown."""
        usable = self.request.usable_host_gib
        return usable is None or self.host_gib <= usable

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Single changes that need less memory: those that fit come first, the smallest need first among them."""
        if self.request.usable_gib is None:
            return ()
        found = []
        for description, request in candidates(self.request, lambda other: bool(_plan(self._model, other).fits)):
            try:
                plan = _plan(self._model, request)
            except ValueError:  # so many devices cannot share the experts
                continue
            if plan.total_gib < self.total_gib or (not self.fits_host and plan.host_gib < self.host_gib):
                found.append(Change(description, request, plan.total_gib, plan.host_gib, bool(plan.fits)))
        return tuple(sorted(found, key=lambda change: (not change.fits, change.gib)))

    def with_request(self, request: MemoryRequest) -> "MemoryPlan":
        """The plan of another request for the same model, which is not built again."""
        return _plan(self._model, request)

    def device_map(self) -> dict[str, int]:
        """The `device_map` for `from_pretrained` that a plan of the strategy `device_map` assumes.

        Raises:
            ValueError: The plan has another strategy.
        """
        if self.request.strategy != "device_map":
            raise ValueError(f"`device_map` needs the strategy 'device_map', got {self.request.strategy!r}")
        return device_memory.device_map(self._model, self.request)

    def table(self) -> str:
        """The parts of every device as text, whether they fit, and the changes where they do not."""
        columns = [device.gib for device in self.devices]
        names = list(
            dict.fromkeys(name for name in (*PARTS, *device_memory.OTHER_ROWS) if any(name in gib for gib in columns))
        )
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
        if self.host_gib > self.paged_gib:
            lines.append(
                f"beside that {self.host_gib:.2f} GiB of weights in host memory, page-locked for the most part"
            )
        return "\n".join([*lines, *self._verdict()])

    @property
    def _trains(self) -> bool:
        return self.request.training != "none"

    def _verdict(self) -> list[str]:
        request = self.request
        if request.usable_gib is None:
            return ["the memory of a device is unknown: `device_gib` (`--device_gib`) gives it"]
        room = (
            f"{request.usable_gib:.2f} GiB, {1 - request.margin:.0%} of the {request.device_gib:.2f} GiB of a device"
        )
        if self.fits:
            return [f"fits: at most {self.total_gib:.2f} of {room}"]
        needed = f"{self.total_gib:.2f} GiB are needed, and there are {room}"
        if not self.fits_host:
            needed += (
                f"; {self.host_gib:.2f} GiB of the host are needed, and there are {request.usable_host_gib:.2f} GiB, "
                f"{1 - request.margin:.0%} of {request.host_gib:.2f}"
            )
        lines = [f"does not fit: {needed}"]
        shown = [change for change in self.changes if change.fits] or self.changes[:5]
        if not shown:
            return [*lines, "no single change needs less"]
        lines.append(
            "one of these changes makes it fit:" if shown[0].fits else "no single change makes it fit; the best:"
        )
        return lines + [
            f"  {change.description}: {change.gib:.2f} GiB"
            + (f", and {change.host_gib:.2f} GiB of host memory" if change.host_gib else "")
            for change in shown
        ]


def plan_memory(config: Config | str | os.PathLike, request: MemoryRequest) -> MemoryPlan:
    """Plans the memory of each device.

    Args:
        config (config, str or PathLike): The model's configuration, or what `read_config` reads.
        request (MemoryRequest): What is to run, and on what.

    Raises:
        ValueError: `lora_targets` names no linear layer of the model, the model lacks what is to be trained, or
            `devices` does not divide the experts that are to be shared.
    """
    if not isinstance(config, MiniMaxM3VLConfig | MiniMaxM3VLTextConfig):
        config = read_config(config)
    return _plan(Model(config), request)


def _plan(model: Model, request: MemoryRequest) -> MemoryPlan:
    experts = model.text.num_local_experts
    if request.strategy == "expert_parallel" and experts % request.devices:
        raise ValueError(
            f"`devices` must divide the {experts} experts of a layer with strategy='expert_parallel', got "
            f"{request.devices}"
        )
    parameters = dict.fromkeys(PARTS, 0)
    for weight in model.weights:
        parameters[weight.part] += weight.elements
    return MemoryPlan(
        request=request,
        devices=device_memory.device_plans(model, request),
        parameters={part: count for part, count in parameters.items() if count},
        trained_parameters=sum(weight.elements for weight in trained_of(model, request).weights),
        paged_gib=device_memory.paged_bytes(model, request) / GIB,
        host_gib=device_memory.bytes_on_host(model, request) / GIB,
        _model=model,
    )


def _figure(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f}"


def as_dict(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as what JSON can hold."""
    return {
        "request": asdict(plan.request),
        "devices": [asdict(device) | {"total_gib": device.total_gib} for device in plan.devices],
        "parameters": plan.parameters,
        "trained_parameters": plan.trained_parameters,
        "paged_gib": plan.paged_gib,
        "host_gib": plan.host_gib,
        "total_gib": plan.total_gib,
        "fits": plan.fits,
        "changes": [
            {
                "description": change.description,
                "gib": change.gib,
                "host_gib": change.host_gib,
                "fits": change.fits,
            }
            for change in plan.changes
        ],
    }
