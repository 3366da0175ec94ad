"""Experts on the host, as `modeling_minimax_m3.offload_experts` holds them: a part of them in slots on the device."""

from accelerate.utils import convert_file_size_to_int

from .holdings import Model, loaded_bytes
from .request import MemoryRequest


def share_in_slots(model: Model, request: MemoryRequest) -> float:
    """The part of the routed experts that the device holds. 1 where they are not on the host.

    Raises:
        ValueError: `experts_on_device` leaves room for fewer experts than a token uses, or the model has none.
    """
    room = request.experts_on_device
    if room is None:
        return 1
    experts = [weight for weight in model.weights if weight.part == "routed experts"]
    if not experts:
        raise ValueError("`experts_on_device` must be None, because the model has no routed experts")
    count = sum({weight.layer: weight.shape[0] for weight in experts}.values())
    size = sum(loaded_bytes(weight, request) for weight in experts) / count
    slots = int(room * count) if isinstance(room, float) else min(count, int(convert_file_size_to_int(room) / size))
    least = max(2, model.text.num_experts_per_tok)
    if slots < least:
        raise ValueError(
            f"`experts_on_device` must leave room for {least} experts of {size:,.0f} bytes, as many as a token uses in "
            f"a layer, got {room!r}, room for {slots}"
        )
    return slots / count


def host_bytes(model: Model, request: MemoryRequest) -> float:
    """What the host holds: all experts, and while the model is loaded all other weights too."""
    if request.experts_on_device is None:
        return 0
    return sum(loaded_bytes(weight, request) for weight in model.weights)
