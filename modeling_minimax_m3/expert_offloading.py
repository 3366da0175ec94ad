"""Experts on the host, for a model that is larger than the memory of its GPU: `offload_experts(model)`.

The routed experts are 97% of the released weights, and a token uses 4 of 128 in each layer. They stay in page-locked
memory of the host, and some of them on the GPU. docs/offloading.md explains what is copied when.
"""

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.distributed.utils import is_dtensor

from .layers.host_experts import (
    HostSparseMoeBlock,
    can_be_offloaded,
    expert_weights,
    put_on_host,
    take_from_host,
)
from .layers.moe import MiniMaxM3VLSparseMoeBlock
from .runtime.expert_cache import ExpertCache, OffloadStats

__all__ = ["ExpertOffload", "OffloadStats", "offload_experts"]

# Left free on the GPU for activations, the cache and CUDA itself, when memory is checked.
_LEFT_FREE = 2**30


class ExpertOffload:
    """A model's experts on the host, as `offload_experts` returns it.

    Attributes:
        device (`torch.device`): Where the model computes.
        num_slots (`int`): How many experts of all layers together the device holds.
        num_experts (`int`): How many there are.
        expert_bytes (`int`): Size of an expert.
    """

    def __init__(self, blocks: list[MiniMaxM3VLSparseMoeBlock], cache: ExpertCache):
        self._blocks, self._cache = blocks, cache
        self.device, self.num_slots, self.expert_bytes = cache.device, cache.num_slots, cache.expert_bytes
        self.num_experts = sum(block.experts.num_experts for block in blocks)

    @property
    def stats(self) -> OffloadStats:
        """Hits, misses and bytes copied since `stats.reset()`."""
        return self._cache.stats

    def remove(self) -> None:
        """Makes the model an ordinary one again. Its experts stay on the host: move it where it is to compute."""
        self._cache.synchronize()
        for block in self._blocks:
            take_from_host(block)
        self._blocks = []

    def __repr__(self) -> str:
        return (
            f"ExpertOffload({self.num_slots} of {self.num_experts} experts on {self.device}, "
            f"{self.num_slots * self.expert_bytes / 2**30:.1f} GiB)"
        )


def offload_experts(
    model: PreTrainedModel,
    device: str | int | torch.device = "cuda",
    experts_on_device: float | int | str = 0.25,
    prefetch: bool = False,
    show_progress: bool = True,
) -> ExpertOffload:
    """Keep the routed experts of a model on the host, and move everything else to `device`.

    Load the model on the host first, with `device_map="cpu"`. A model that is on the device already works too. Plain
    experts and those in MXFP8 are offloaded, without gradients.

    Args:
        model (`PreTrainedModel`): A model with routed experts. It is changed in place.
        device (`str`, `int` or `torch.device`): A CUDA device. `"cpu"` runs the same code without a GPU, for tests.
        experts_on_device (`float`, `int` or `str`): Room for experts on the device: a share of all of them (a `float`
            up to 1), or bytes (an `int`, or a text such as `"20GiB"`).
        prefetch (`bool`): Whether a layer with few tokens also starts to copy the experts that the next layer would
            choose for the same inputs. A wrong guess delays the copies that are needed.
        show_progress (`bool`): Show a bar while the memory of the layers is locked.

    Returns:
        `ExpertOffload`, with `stats` and `remove()`.

    Raises:
        ValueError: The model has no experts or holds them in another form, `experts_on_device` leaves too few or needs
            more memory than the device has, or `device` is of another kind.
        RuntimeError: The system refuses to lock the memory.
    """
    blocks = _blocks_of(model)
    device = _as_device(device)
    layers = [expert_weights(block.experts) for block in blocks]
    num_slots = _number_of_slots(blocks, layers, experts_on_device)
    _check_memory(model, layers, num_slots, device)

    for weights in layers:
        for parameter in weights.values():
            if parameter.device.type != "cpu" or not parameter.is_contiguous():
                parameter.data = parameter.data.to("cpu").contiguous()
    cache = ExpertCache([{name: weight.data for name, weight in layer.items()} for layer in layers], device, num_slots)
    offload = ExpertOffload(blocks, cache)
    try:
        for number, block in enumerate(tqdm(blocks, desc="locking experts", disable=not show_progress)):
            cache.pin(number)
            for name, parameter in layers[number].items():
                parameter.data = cache.host[number][name]
            put_on_host(block, cache, number, blocks[number + 1 : number + 2] if prefetch else [])
        nn.Module.to(model, device)
    except BaseException:
        for block in blocks:
            if type(block) is HostSparseMoeBlock:
                take_from_host(block)
        raise
    return offload


def _blocks_of(model: nn.Module) -> list[MiniMaxM3VLSparseMoeBlock]:
    """The sparse blocks of a model, in order.

    Raises:
        ValueError: There is none, or one cannot be offloaded.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MiniMaxM3VLSparseMoeBlock)}
    if not blocks:
        raise ValueError(f"`model` must have routed experts, got a {type(model).__name__} without any")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f'`model` must be loaded, but `{name}` is on the meta device. Load the model with `device_map="cpu"`.'
            )
        if is_dtensor(parameter):
            raise ValueError(f"`model` must be on one process, but `{name}` is spread over several")
    for name, block in blocks.items():
        if isinstance(block, HostSparseMoeBlock):
            raise ValueError("the experts of `model` are offloaded already; call `remove()` of that offload first")
        if not can_be_offloaded(block):
            raise ValueError(
                f"`model` must have plain experts or experts in MXFP8, without adapters or hooks, but `{name}.experts` "
                f'is a {type(block.experts).__name__} that does more. Load the model with `device_map="cpu"`, and add '
                "adapters to other modules only."
            )
        if any(type(parameter) is not nn.Parameter for parameter in expert_weights(block.experts).values()):
            raise ValueError(f"`model` must have plain experts or experts in MXFP8; `{name}` has other weights")
    forms = {
        tuple((key, weight.shape, weight.dtype) for key, weight in expert_weights(block.experts).items())
        for block in blocks.values()
    }
    if len(forms) > 1:
        raise ValueError("`model` must have experts of one shape and dtype in all layers")
    return list(blocks.values())


def _as_device(device: str | int | torch.device) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"`device` must be a CUDA device (or a CPU, for tests), got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"`device` is {device}, but PyTorch finds no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def _number_of_slots(
    blocks: list[MiniMaxM3VLSparseMoeBlock],
    layers: list[dict[str, nn.Parameter]],
    experts_on_device: float | int | str,
) -> int:
    count = sum(block.experts.num_experts for block in blocks)
    size = _bytes_of(layers) // count
    least = max(2, blocks[0].gate.top_k)
    if isinstance(experts_on_device, float):
        if not 0 < experts_on_device <= 1:
            raise ValueError(
                f"`experts_on_device` must be a share between 0 and 1 (a float), or bytes (an int or a text such as "
                f"'20GiB'), got {experts_on_device}"
            )
        num_slots = int(experts_on_device * count)
    else:
        num_slots = min(count, _as_bytes(experts_on_device) // size)
    if num_slots < least:
        raise ValueError(
            f"`experts_on_device` must leave room for {least} experts of {size:,} bytes, as many as a token uses in a "
            f"layer, got {experts_on_device!r}, room for {num_slots}"
        )
    return num_slots


def _as_bytes(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`experts_on_device` must be a size such as '20GiB', got {size!r}") from error


def _bytes_of(layers: list[dict[str, nn.Parameter]]) -> int:
    return sum(weight.nbytes for layer in layers for weight in layer.values())


def _check_memory(
    model: nn.Module, layers: list[dict[str, nn.Parameter]], num_slots: int, device: torch.device
) -> None:
    """Checks that slots and the rest of the model fit, before anything moves."""
    if device.type != "cuda":
        return
    of_experts = {id(weight) for layer in layers for weight in layer.values()}
    rest = sum(
        tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in of_experts and tensor.device != device
    )
    freed = sum(weight.nbytes for layer in layers for weight in layer.values() if weight.device == device)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    count = sum(len(next(iter(layer.values()))) for layer in layers)
    size = _bytes_of(layers) // count
    room = free + unused + freed - rest - _LEFT_FREE
    if num_slots * size > room:
        fitting = max(0, room // size)
        raise ValueError(
            f"`experts_on_device` asks for {num_slots * size / 2**30:.1f} GiB on {device}, which has "
            f"{max(0, room) / 2**30:.1f} GiB beside the other weights and 1 GiB for activations: room for {fitting} of "
            f"{count} experts, {fitting / count:.3f} of them"
        )
