"""Bytes of the weights of a model, of its adapters and of the optimizer's states, counted without the weights."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

PARTS = (
    *("vision", "embeddings", "attention", "indexer", "dense MLPs", "routed experts", "shared experts", "router"),
    *("norms", "head"),
)
# Parts that a quantizer may take. Each has linear layers or stacked experts.
QUANTIZABLE_PARTS = ("vision", "attention", "indexer", "dense MLPs", "routed experts", "shared experts", "head")
# The parts that the released MXFP8 checkpoint keeps in bfloat16.
UNQUANTIZED_PARTS = ("vision", "head")


@dataclass(frozen=True)
class Precision:
    """How many bytes the elements of a weight take, and the scales beside them.

    Args:
        element_bytes (float): Bytes of an element.
        block (int or None): Elements that share a scale. 0: the elements of a row. None: there are no scales.
        scale_bytes (float): Bytes of a scale.
        block_in_row (bool): Whether a block ends with its row.
    """

    element_bytes: float
    block: int | None = None
    scale_bytes: float = 0
    block_in_row: bool = True

    @property
    def is_quantized(self) -> bool:
        """Whether some weights stay in bfloat16."""
        return self.block is not None

    def bytes_of(self, shape: Sequence[int]) -> float:
        """Bytes of a tensor of `shape`, the scales included."""
        elements = math.prod(shape)
        if self.block is None:
            return self.element_bytes * elements
        columns = shape[-1]
        if not self.block_in_row:
            scales = math.ceil(elements / self.block)
        else:
            scales = elements // columns * math.ceil(columns / (self.block or columns))
        return self.element_bytes * elements + self.scale_bytes * scales


# nf4: bitsandbytes. Its double quantization stores a scale in a byte, and a float32 for 256 scales.
# fp8, int8: torchao, weights only, a float32 scale for each row.
PRECISIONS = {
    "float32": Precision(4),
    "float16": Precision(2),
    "bf16": Precision(2),
    "mxfp8": Precision(1, 32, 1),
    "fp8": Precision(1, 0, 4),
    "int8": Precision(1, 0, 4),
    "nf4": Precision(0.5, 64, 4, block_in_row=False),
    "nf4-double": Precision(0.5, 64, 1 + 4 / 256, block_in_row=False),
}
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "adafactor", "sgd", "sgd-momentum")


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Args:
        name (str): Full name.
        shape (tuple[int, ...]): Shape.
        part (str): One of `PARTS`.
        layer (int or None): Decoder layer. None: outside the decoder layers.
        requires_grad (bool): Whether a full training of the language model trains it.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    layer: int | None
    requires_grad: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether the parameter is the weight of a linear layer."""
        return len(self.shape) == 2 and self.part not in ("embeddings", "router")


def part_of(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter of this full name belongs to."""
    rules = (
        ("vision", ("vision_tower.", "multi_modal_projector.")),
        ("head", ("lm_head.",)),
        ("embeddings", ("embed_tokens.",)),
        ("indexer", (".indexer.",)),
        ("attention", (".self_attn.",)),
        ("shared experts", (".shared_experts.",)),
        ("routed experts", (".experts.",)),
        ("router", (".mlp.gate.",)),
        ("dense MLPs", (".mlp.",)),
    )
    for part, marks in rules:
        if any(mark in name for mark in marks):
            return part
    return "norms"


def meta_model(config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig) -> PreTrainedModel:
    """The model with a head that `config` describes, without memory for its weights."""
    auto_class = AutoModelForImageTextToText if isinstance(config, MiniMaxM3VLConfig) else AutoModelForCausalLM
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return auto_class.from_config(copy.deepcopy(config))


def list_weights(config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig) -> list[Weight]:
    """All parameters of the model with a head that `config` describes, in the order of a pass.

    That takes a second for the released geometry.
    """
    weights = []
    for name, parameter in meta_model(config).named_parameters():
        part = part_of(name)
        layer = None if part == "vision" or ".layers." not in name else int(name.split(".layers.")[1].split(".")[0])
        weights.append(Weight(name, tuple(parameter.shape), part, layer, parameter.requires_grad))
    return weights


def stored_bytes(
    weight: Weight, precision: str, unquantized_parts: Sequence[str], unquantized_bytes: int = 2
) -> float:
    """Bytes of a loaded weight, scales included.

    Args:
        weight (Weight): The weight.
        precision (str): Key of `PRECISIONS`.
        unquantized_parts (Sequence[str]): Parts that a quantized precision leaves alone.
        unquantized_bytes (int): Bytes of an element that a quantized precision leaves alone.
    """
    kind = PRECISIONS[precision]
    if kind.is_quantized and not is_quantized(weight, precision, unquantized_parts):
        return unquantized_bytes * weight.elements
    return kind.bytes_of(weight.shape)


def is_quantized(weight: Weight, precision: str, unquantized_parts: Sequence[str]) -> bool:
    """Whether a quantizer takes the weight. It leaves convolutions, biases, norms, embeddings and the router alone."""
    return (
        PRECISIONS[precision].is_quantized
        and weight.part in QUANTIZABLE_PARTS
        and weight.part not in unquantized_parts
        and (weight.is_linear or weight.part == "routed experts")
    )


def adapters(weights: Sequence[Weight], targets: Sequence[str], rank: int, on_experts: bool) -> list[Weight]:
    """The parameters that LoRA adds: two matrices for a linear layer, and for each expert.

    Args:
        weights (Sequence[Weight]): The weights of the model.
        targets (Sequence[str]): Ends of the names of linear layers. Those of the vision tower never count, and those
            of frozen indexers neither.
        rank (int): Rank of the adapters.
        on_experts (bool): Whether the routed experts get adapters too.

    Raises:
        ValueError: A target matches no linear layer.
    """
    possible = [weight for weight in weights if weight.is_linear and weight.part != "vision" and weight.requires_grad]
    endings = {target: [w for w in possible if f".{w.module}".endswith(f".{target}")] for target in targets}
    if missing := [target for target, found in endings.items() if not found]:
        there = sorted({weight.module.rpartition(".")[2] for weight in possible})
        raise ValueError(
            f"`lora_targets` must be ends of names of linear layers that are trained, such as {', '.join(there)}, got "
            f"{missing[0]!r}"
        )
    chosen = {weight.name for found in endings.values() for weight in found}
    added = []
    for weight in weights:
        if weight.name in chosen or (on_experts and weight.part == "routed experts"):
            *experts, outputs, inputs = weight.shape
            ranks = math.prod(experts) * rank
            for suffix, shape in (("lora_A", (ranks, inputs)), ("lora_B", (outputs, ranks))):
                added.append(Weight(f"{weight.name}.{suffix}", shape, weight.part, weight.layer, True))
    return added


def is_adapter(weight: Weight) -> bool:
    """Whether the weight is one that `adapters` returned."""
    return weight.name.endswith((".lora_A", ".lora_B"))


def copies(weights: Sequence[Weight], modules: Sequence[str]) -> list[Weight]:
    """Copies of all weights in the modules whose name has one of these ends.

    Raises:
        ValueError: There is no such module.
    """
    found = []
    for module in modules:
        inside = [weight for weight in weights if f".{module}." in f".{weight.name}"]
        if not inside:
            raise ValueError(f"`lora_save` must be ends of names of modules, got {module!r}")
        found += [replace(weight, name=f"{weight.name}.copy", requires_grad=True) for weight in inside]
    return found


def optimizer_bytes(shape: Sequence[int], optimizer: str, element_bytes: int) -> float:
    """Bytes of the states that an optimizer keeps for a trained tensor, those in host memory included.

    Args:
        shape (Sequence[int]): Shape of the tensor.
        optimizer (str): One of `OPTIMIZERS`. The adamw of PyTorch keeps its states in the dtype of the tensor, those
            of bitsandbytes in float32 or in a byte, with a float32 for 256 of them.
        element_bytes (int): Bytes of an element of the tensor.
    """
    elements = math.prod(shape)
    if optimizer == "sgd":
        return 0
    if optimizer == "sgd-momentum":
        return element_bytes * elements
    if optimizer == "adafactor":  # sums over rows and over columns
        return 4 * (elements if len(shape) < 2 else elements // shape[-1] + elements // shape[-2])
    if optimizer.endswith("8bit"):
        return 2 * (1 + 4 / 256) * elements
    return 2 * elements * (4 if optimizer == "paged-adamw" else element_bytes)
