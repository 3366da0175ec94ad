"""Requests that differ from another in one decision."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .request import STRATEGIES, MemoryRequest
from .weights import OPTIMIZERS, PRECISIONS

_MOST_DEVICES = 1024
_SHARES_OF_EXPERTS = (0.5, 0.25, 0.1, 0.05, 0.02)


def candidates(request: MemoryRequest, fits: Callable[[MemoryRequest], bool]) -> Iterator[tuple[str, MemoryRequest]]:
    """Requests that differ from `request` in one decision, each after its description.

    Args:
        request (MemoryRequest): The request.
        fits (Callable): Whether a request fits. A number is halved, or the devices doubled, until it does.
    """
    yield from _quantized(request)
    trains = request.training != "none"
    if request.training == "full":
        yield "training='lora'", replace(request, training="lora")
    if trains and not request.gradient_checkpointing:
        yield "gradient_checkpointing=True", replace(request, gradient_checkpointing=True)
    if trains:
        for optimizer in OPTIMIZERS:
            yield f"optimizer={optimizer!r}", replace(request, optimizer=optimizer)
    else:
        if request.cache == "dynamic":
            yield "cache='static'", replace(request, cache="static")
        yield from _fewer_experts(request, fits)
    for name, minimum in _HALVED[trains]:
        if name == "context" and not trains:
            minimum = max(minimum, request.new_tokens + 1)
        yield from _halved(request, fits, name, minimum)
    yield from _more_devices(request, fits)


# What may be halved, by whether there is training, and down to which value.
_HALVED = {
    True: (("batch_size", 1), ("context", 1024), ("loss_chunk", 128)),
    False: (("batch_size", 1), ("context", 1024), ("prefill_chunk", 1024)),
}


def _quantized(request: MemoryRequest) -> Iterator[tuple[str, MemoryRequest]]:
    training = "qlora" if request.training == "lora" else request.training
    for precision, kind in PRECISIONS.items():
        if precision in (request.precision, "float16") or (kind.is_quantized and training == "full"):
            continue
        if kind.is_quantized:
            if request.experts_on_device is not None and not _experts_can_be_on_host(request, precision):
                continue
            changed = replace(request, precision=precision, training=training, autocast=False)
            yield f"precision={precision!r}, training={training!r}", changed
        elif not request.is_quantized:
            yield f"precision={precision!r}", replace(request, precision=precision, autocast=False)


def _fewer_experts(
    request: MemoryRequest, fits: Callable[[MemoryRequest], bool]
) -> Iterator[tuple[str, MemoryRequest]]:
    """The largest of some shares of the experts on the device that fits, or the smallest, with the rest on the host."""
    held = 1.0 if request.experts_on_device is None else request.experts_on_device
    if request.strategy != "single" or not request.experts_can_be_on_host or not isinstance(held, float):
        return
    changed = None
    for share in _SHARES_OF_EXPERTS:
        if share >= held:
            continue
        smaller = replace(request, experts_on_device=share)
        try:
            is_enough = fits(smaller)
        except ValueError:  # too few experts for a token, or none at all
            break
        changed = smaller
        if is_enough:
            break
    if changed is not None:
        yield f"experts_on_device={changed.experts_on_device}", changed


def _experts_can_be_on_host(request: MemoryRequest, precision: str) -> bool:
    return replace(request, precision=precision, experts_on_device=None).experts_can_be_on_host


def _halved(
    request: MemoryRequest, fits: Callable[[MemoryRequest], bool], name: str, minimum: int
) -> Iterator[tuple[str, MemoryRequest]]:
    """The largest of the halves that fits, or the smallest of all."""
    value, changed = getattr(request, name), None
    while value // 2 >= minimum:
        value //= 2
        changed = replace(request, **{name: value})
        if fits(changed):
            break
    if changed is not None:
        yield f"{name}={value}", changed


def _more_devices(
    request: MemoryRequest, fits: Callable[[MemoryRequest], bool]
) -> Iterator[tuple[str, MemoryRequest]]:
    """Other strategies on the same devices, and the fewest devices, in doublings, that suffice for a strategy."""
    if request.experts_on_device is not None:  # for one device
        return
    for strategy in STRATEGIES[1:]:
        if strategy in ("fsdp2", "zero3", "ddp") and request.training == "none":
            continue
        if request.devices > 1 and strategy != request.strategy:  # one change alone, without more devices
            yield f"strategy={strategy!r}", replace(request, strategy=strategy)
            continue
        devices = _MOST_DEVICES if strategy == "ddp" else request.devices
        while devices < _MOST_DEVICES:
            devices *= 2
            changed = replace(request, devices=devices, strategy=strategy)
            try:
                is_enough = fits(changed)
            except ValueError:  # so many devices cannot share the experts, nor can twice as many
                break
            if is_enough:
                yield f"devices={devices}, strategy={strategy!r}", changed
                break
