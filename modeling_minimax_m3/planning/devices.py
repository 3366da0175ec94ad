"""The memory of each device: weights by part, what is trained, and the largest moment of a pass.

Sizes are bytes until a `DevicePlan` is made.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..fused.few_tokens import MAX_TOKENS
from ..fused.quantized_products import DEQUANTIZED_BYTES
from . import passes
from .adapted_experts import adapts_experts, kept_copies, merged_bytes, peft_keeps_factors
from .holdings import Model, Trained, loaded_bytes, share_of, states_bytes, trained_of
from .host_experts import host_bytes, share_in_slots
from .request import GIB, MemoryRequest
from .weights import PARTS, Weight, is_quantized

# Outside of PyTorch's allocator: the CUDA context with the loaded kernels, and the buffers of NCCL.
CONTEXT_GIB, NCCL_GIB = 0.6, 0.8
# The parts beside the weights, in the order of a table.
OTHER_ROWS = (
    *("adapters", "float32 weights", "gathered weights", "dequantized weights", "merged experts"),
    *("autocast weights", "cache", "activations", "workspaces", "loss and logits", "gradients", "optimizer"),
    "CUDA context",
)


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


def device_plans(model: Model, request: MemoryRequest) -> tuple[DevicePlan, ...]:
    """A plan for each device, or a single one where all devices hold equally much."""
    trained = trained_of(model, request)
    if request.strategy != "device_map":
        name = "cuda:0" if request.devices == 1 else f"each of {request.devices} devices"
        return (_device(model, request, trained, name, lambda weight: True),)
    place = _split_over_devices(model, request, trained)

    def is_on(index: int) -> Callable[[Weight], bool]:
        return lambda weight: place(weight) == index

    return tuple(_device(model, request, trained, f"cuda:{index}", is_on(index)) for index in range(request.devices))


def bytes_on_host(model: Model, request: MemoryRequest) -> float:
    """What the host holds for one process: experts that are offloaded, and states of a paged optimizer."""
    return paged_bytes(model, request) + host_bytes(model, request)


def paged_bytes(model: Model, request: MemoryRequest) -> float:
    """States of a paged optimizer, which count as host memory, for one process."""
    if not request.optimizer.startswith("paged"):
        return 0
    trained = trained_of(model, request)
    return sum(states_bytes(weight, request, trained) for weight in trained.weights)


def _device(
    model: Model, request: MemoryRequest, trained: Trained, name: str, is_here: Callable[[Weight], bool]
) -> DevicePlan:
    """The plan of one device, which holds the weights that `is_here` accepts."""
    weights = [weight for weight in model.weights if is_here(weight)]
    own = replace(trained, weights=[weight for weight in trained.weights if is_here(weight)])
    layers = sorted({weight.layer for weight in weights if weight.layer is not None})
    rows: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for weight in weights:
        rows[weight.part] += loaded_bytes(weight, request) * share_of(weight, request)
    rows["routed experts"] *= share_in_slots(model, request)
    has_head = request.strategy != "device_map" or any(
        weight.part == "norms" and weight.layer is None for weight in weights
    )
    if request.training == "none":
        moments = _generation_moments(model, request, layers, has_head)
    else:
        rows |= _states_rows(request, own)
        moments = _training_moments(model, request, own, layers, has_head)
    passing = _passing_weights(request, weights, own)
    for row in ("dequantized weights", "merged experts"):  # which some moments have none of
        there = passing.pop(row)
        for parts in moments.values():
            parts.setdefault(row, there)
    rows |= passing
    rows["CUDA context"] = GIB * (CONTEXT_GIB + (NCCL_GIB if _has_processes(request) else 0))
    moment, largest = max(moments.items(), key=lambda item: sum(item[1].values()))
    gib = {row: size / GIB for row, size in (rows | largest).items() if size}
    return DevicePlan(name, gib, moment, tuple(layers))


def _has_processes(request: MemoryRequest) -> bool:
    return request.devices > 1 and request.strategy != "device_map"


def _compute_bytes(request: MemoryRequest) -> int:
    is_half = request.autocast or request.strategy in ("fsdp2", "zero3")
    return 4 if request.precision == "float32" and not is_half else 2


def _states_rows(request: MemoryRequest, trained: Trained) -> dict[str, float]:
    """Adapters, float32 copies of the weights, and the optimizer's states."""
    rows = {"adapters": 0.0, "float32 weights": 0.0, "optimizer": 0.0}
    for weight in trained.weights:
        share = share_of(weight, request)
        if trained.are_new:
            rows["adapters"] += trained.bytes_of(weight) * share
        elif request.strategy == "zero3":
            rows["float32 weights"] += 4 * weight.elements * share
        elif request.strategy == "fsdp2":  # in place of the loaded weight
            rows["float32 weights"] += (4 * weight.elements - loaded_bytes(weight, request)) * share
        if not request.optimizer.startswith("paged"):
            rows["optimizer"] += states_bytes(weight, request, trained)
    return rows


def _passing_weights(request: MemoryRequest, weights: list[Weight], trained: Trained) -> dict[str, float]:
    """Weights that exist while a layer runs: gathered from other devices, dequantized, or summed with an update."""
    rows = dict.fromkeys(("gathered weights", "dequantized weights", "merged experts", "autocast weights"), 0.0)
    if request.autocast:  # autocast keeps its copies of trained weights to the end of a pass
        copied = 0 if trained.are_new else sum(w.elements * share_of(w, request) for w in trained.weights)
        rows["autocast weights"] = 2 * (copied or max((w.elements for w in weights), default=0))
    if request.devices > 1:
        rows["gathered weights"] = _gathered_bytes(request, weights, trained)
    quantized = [w for w in weights if is_quantized(w, request.precision, request.unquantized_parts)]
    if quantized:
        rows["dequantized weights"] = max(_dequantized_bytes(weight, request) for weight in quantized)
    rows["merged experts"] = merged_bytes(request, weights)
    return rows


def _dequantized_bytes(weight: Weight, request: MemoryRequest) -> int:
    """What of a weight exists in 16 bits at a time: of experts a group, or one where they come from the host."""
    if weight.part != "routed experts":
        return 2 * weight.elements
    of_one = 2 * weight.elements // weight.shape[0]
    if request.experts_on_device is not None:
        return of_one
    return of_one * min(weight.shape[0], max(1, DEQUANTIZED_BYTES // of_one))


def _gathered_bytes(request: MemoryRequest, weights: list[Weight], trained: Trained) -> float:
    """Weights, and gradients, that a sharding engine holds whole for a while."""
    trains = request.training != "none"
    if request.strategy not in ("fsdp2", "zero3") and not (request.strategy == "expert_parallel" and trains):
        return 0
    moved = [w for w in weights if request.strategy != "expert_parallel" or w.part != "routed experts"]
    size = {w.name: loaded_bytes(w, request) if request.is_quantized else 2 * w.elements for w in moved}
    gradients = {} if trained.are_new else {w.name: 2 * w.elements for w in trained.weights}
    layers: dict[int, float] = {}
    layer_gradients: dict[int, float] = {}
    root = 0.0
    for weight in moved:
        if weight.layer is not None:
            layers[weight.layer] = layers.get(weight.layer, 0) + size[weight.name]
            layer_gradients[weight.layer] = layer_gradients.get(weight.layer, 0) + gradients.get(weight.name, 0)
        elif request.strategy == "fsdp2" or ".vision_tower." not in weight.name:
            root += size[weight.name] + gradients.get(weight.name, 0)
    # FSDP2 gathers the next layer while one runs, and the root stays gathered. ZeRO-3 gathers module by module.
    ahead = 1 if request.strategy == "zero3" else 2
    return root + ahead * max(layers.values(), default=0) + max(layer_gradients.values(), default=0)


def _generation_moments(
    model: Model, request: MemoryRequest, layers: list[int], has_head: bool
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
    quantized_experts = any(
        is_quantized(weight, request.precision, request.unquantized_parts)
        for weight in model.weights
        if weight.part == "routed experts"
    )

    shares_heads = request.strategy in ("tensor_parallel", "expert_parallel")
    processes = request.devices if shares_heads else 1

    def cache_of(tokens: int) -> float:
        return float(sum(passes.cache_bytes(model.text, layer, rows * tokens, size, processes) for layer in layers))

    moments = {}
    for moment, tokens, keys, held in (
        ("prefill", new, prompt, of_prompt),
        ("decoding", 1, request.context, capacity),
    ):
        peaks = [
            passes.prefill_bytes(
                model.text,
                layer,
                rows,
                tokens,
                keys,
                element_bytes=size,
                layers_in_parts=request.devices == 1 and not is_static,
                mlps_in_parts=request.devices == 1,
                experts_one_by_one=request.experts_on_device is not None,
                quantized_experts=quantized_experts,
            )
            for layer in layers
        ]
        activations, workspace = max(peaks, key=sum, default=(0, 0))
        moments[moment] = {
            "cache": cache_of(held),
            "activations": activations,
            "workspaces": workspace,
            "loss and logits": logits,
        }
    if request.precision == "mxfp8" and rows <= MAX_TOKENS:  # kernels read its 8 bits
        moments["decoding"]["dequantized weights"] = 0.0
    return moments


def _training_moments(
    model: Model, request: MemoryRequest, trained: Trained, layers: list[int], has_head: bool
) -> dict[str, dict[str, float]]:
    """What the device holds in a training step, beside the weights and the optimizer's states."""
    tokens, size = request.batch_size * request.context, _compute_bytes(request)
    indexer_only = request.training == "indexers"
    sizes = {
        layer: passes.training_bytes(
            model.text,
            layer,
            tokens,
            request.context,
            element_bytes=size,
            residual_bytes=4 if request.prepared_for_kbit or request.autocast else size,
            attention_inputs=_kept_inputs(model, trained, layer, ("attention",)),
            mlp_inputs=_kept_inputs(model, trained, layer, ("dense MLPs", "routed experts", "shared experts"))
            + kept_copies(model, request, layer),
            adapted_experts=adapts_experts(request),
            trains_indexer=indexer_only or model.text.indexer_loss_coef > 0,
            indexer_only=indexer_only,
        )
        for layer in layers
    }
    saved = {layer: 0 if request.gradient_checkpointing else sizes[layer].saved for layer in layers}
    buckets = 2 if request.strategy == "ddp" and request.devices > 1 else 1  # DDP sums gradients in buckets of its own
    gradients: dict[int | None, float] = dict.fromkeys((None, *layers), 0.0)
    for weight in trained.weights:
        gradients[weight.layer] += buckets * trained.bytes_of(weight) * share_of(weight, request)
    all_gradients = sum(gradients.values())
    accumulates = request.gradient_accumulation_steps > 1 or buckets > 1
    kept = sum(sizes[layer].input + saved[layer] for layer in layers)
    moments = {}
    if has_head:
        moments["the loss"] = {
            "activations": kept,
            "loss and logits": passes.loss_bytes(model.text, tokens, request.loss_chunk, size),
            "gradients": all_gradients if accumulates else gradients[None],
        }
    there = gradients[None]
    registers = adapts_experts(request) and peft_keeps_factors()
    for layer in reversed(layers):
        if registers and model.text.mlp_layer_types[layer] == "sparse":  # in the forward, or once more in the backward
            moments[f"adapters of layer {layer}"] = {
                "activations": kept - saved[layer] + sizes[layer].saved,
                "gradients": all_gradients if accumulates else there,
            }
        there += gradients[layer]
        moments[f"backward of layer {layer}"] = {
            "activations": kept - saved[layer] + sizes[layer].backward - sizes[layer].workspace,
            "workspaces": sizes[layer].workspace,
            "gradients": all_gradients if accumulates else there,
        }
        kept -= sizes[layer].input + saved[layer]
    step = 0.0
    if request.optimizer == "adafactor":  # gradient, update and weight of a tensor in float32
        step = 12 * max((weight.elements * share_of(weight, request) for weight in trained.weights), default=0)
    moments["the optimizer's step"] = {"workspaces": step, "gradients": all_gradients, "dequantized weights": 0.0}
    if registers:
        for moment, parts in moments.items():
            if not moment.startswith("adapters"):
                parts["merged experts"] = 0.0
    return moments


def _kept_inputs(model: Model, trained: Trained, layer: int, parts: tuple[str, ...]) -> int:
    """Channels of the inputs that the trained weights of a layer keep, beside those that are kept anyway.

    Weights share the input of a layer; the inputs of the output projection and of the experts are kept anyway. Each
    adapter keeps a copy of its own, because its dtype is another one.
    """
    channels = 0
    for weight in trained.weights:
        if weight.layer != layer or weight.part not in parts or weight.name.endswith((".lora_B", ".copy")):
            continue
        is_down = ".down_proj" in weight.name
        if weight.part == "routed experts":
            channels += model.text.num_experts_per_tok * model.text.intermediate_size if is_down else 0
        elif trained.are_new or is_down or ".q_proj" in weight.name:
            channels += weight.shape[-1]
    return channels


# ---- layers over devices ----------------------------------------------------------------------------------------


def _split_over_devices(model: Model, request: MemoryRequest, trained: Trained) -> Callable[[Weight], int]:
    """Places neighbouring layers on each device so that the fullest holds as little as possible."""
    tokens = request.batch_size * request.context
    of_layer = {
        layer: float(passes.cache_bytes(model.text, layer, tokens, 2)) if request.training == "none" else 0.0
        for layer in model.layers
    }
    before = after = 0.0
    sizes = [(weight, loaded_bytes(weight, request)) for weight in model.weights]
    sizes += [
        (
            weight,
            trained.bytes_of(weight) * (2 if trained.are_new else 1)
            + (0 if request.optimizer.startswith("paged") else states_bytes(weight, request, trained)),
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


def device_map(model: Model, request: MemoryRequest) -> dict[str, int]:
    """Names of modules and their devices, as `from_pretrained` takes them."""
    place = _split_over_devices(model, request, trained_of(model, request))
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
