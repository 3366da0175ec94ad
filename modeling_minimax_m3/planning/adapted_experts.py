"""What adapters on the routed experts hold beside their own weights, while a layer runs in training.

PEFT adds the adapters of unquantized experts to the weights. Since version 0.21 it hands on their two factors, and the
experts multiply these apart, as quantized experts do with any version.
"""

import importlib.metadata
from collections.abc import Sequence

from packaging.version import Version

from .holdings import Model, loaded_bytes
from .request import MemoryRequest
from .weights import Weight, is_quantized


def adapts_experts(request: MemoryRequest) -> bool:
    """Whether the routed experts get adapters."""
    return request.training in ("lora", "qlora") and request.lora_experts


def merged_bytes(request: MemoryRequest, weights: Sequence[Weight]) -> float:
    """Bytes of unquantized experts plus adapters.

    With the factors of PEFT 0.21, a sum exists once in a pass, and before the layer's experts compute: when an update is
    registered, PyTorch checks the shape of the sum. Without them, the sums of a layer exist until its backward.

    Args:
        request (MemoryRequest): What is planned.
        weights (sequence of `Weight`): Those of the device.
    """
    layers: dict[int | None, list[int]] = {}
    size = 2.0
    for weight in weights if adapts_experts(request) else ():
        if weight.part == "routed experts" and not is_quantized(weight, request.precision, request.unquantized_parts):
            layers.setdefault(weight.layer, []).append(weight.elements)
            if request.strategy not in ("fsdp2", "zero3"):  # which gather weights in 16 bits
                size = loaded_bytes(weight, request) / weight.elements
    if not layers:
        return 0
    share = 1 / request.devices if request.strategy in ("tensor_parallel", "expert_parallel") else 1
    if peft_keeps_factors():
        return share * max(size * max(of) for of in layers.values())
    # The sums of a layer's weights, and for one also the product in float32, its scaled copy, and its gradient.
    sums = [size * sum(of) for of in layers.values()]
    at_most = max(size * sum(of) + (8 + size) * max(of) for of in layers.values())
    # Checkpointing frees the sums of a layer behind its forward.
    return share * (at_most if request.gradient_checkpointing else at_most + sum(sums) - max(sums))


def peft_keeps_factors() -> bool:
    """Whether PEFT hands on the factors of an update."""
    try:
        return Version(importlib.metadata.version("peft")) >= Version("0.21")
    except importlib.metadata.PackageNotFoundError:
        return True


def kept_copies(model: Model, request: MemoryRequest, layer: int) -> int:
    """Channels of the copies of a token that adapters keep: one for each of its experts, if these are quantized.

    Over plain experts the backward copies the tokens again.
    """
    experts = (weight for weight in model.weights if weight.layer == layer and weight.part == "routed experts")
    if adapts_experts(request) and any(
        is_quantized(weight, request.precision, request.unquantized_parts) for weight in experts
    ):
        return model.text.num_experts_per_tok * model.text.hidden_size
    return 0
