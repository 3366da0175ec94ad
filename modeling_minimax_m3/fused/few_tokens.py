"""Linear layers and MLPs of a few tokens, at the rate at which a GPU reads their weights. No gradients.

A decoding step reads each weight that it uses once, and takes hardly longer than that. Layers that read the same input
run as one kernel, without a copy of their weights. The chosen experts and the shared expert run as two.
"""

import weakref
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import is_torchdynamo_compiling

from ..mxfp8 import GROUP_SIZE, SCALE_DTYPE, VALUE_DTYPE, Mxfp8Tensors, dequantize_mxfp8, is_ordinary
from . import shards
from .support import HALF_DTYPES, as_vectors, is_vector_block, kernels_take
from .swiglu import swiglu_oai_reference

MAX_TOKENS = 16
MAX_TOKENS_OF_ONE_LAYER = 8  # beyond, cuBLAS is faster (benchmarks/results/few_tokens.txt)
_MAX_WEIGHTS = 5
_MAX_CHOICES = 256  # of all tokens
_MULTIPLE = 32  # of the channels that a kernel takes at a time
_MXFP8_MULTIPLE = 64


class _Look(NamedTuple):
    """At a weight in MXFP8: what memory values and scales had, their addresses and versions, and the answer.

    An address may belong to another tensor by now. The storage that was there is told from it, as a weak reference
    never comes back to life.
    """

    storages: tuple[weakref.ref, ...]
    state: list[tuple[int, int]]
    is_ordinary: bool


# By the values of the weight.
_looks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Weight: TypeAlias = torch.Tensor | Mxfp8Tensors


def weight_of(layer: nn.Module) -> Weight | None:
    """What `layer` multiplies by; None where it does more than that, or where something watches its calls.

    Of a layer that processes share, it is the part of this process (see `shards`). A class of layers with weights in
    another form has a method `few_token_weight` that answers this.
    """
    if shards.runs_as_planned(layer, nn.Linear):
        weight = layer.weight if layer.bias is None else None
        return shards.local_part(weight) if isinstance(weight, torch.Tensor) else None
    answer = getattr(type(layer), "few_token_weight", None)
    return None if answer is None else answer(layer)


def takes_linear(x: torch.Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether `linear` runs these layers as one kernel, or as two where only some weights are in MXFP8.

    Args:
        x (..., channels): What all layers read.
        layers (sequence of modules): One or more.
    """
    return _are_few(x) and len(layers) <= _MAX_WEIGHTS and _weights_for(x, layers) is not None


def takes_weights(x: torch.Tensor, weights: Sequence[Weight]) -> bool:
    """Whether the kernels read these weights, and no gradient is needed.

    Args:
        x (..., channels): Inputs.
        weights (sequence of (..., channels or a width)): Weights of projections.
    """
    tensors = [tensor for weight in weights for tensor in (weight if isinstance(weight, Mxfp8Tensors) else (weight,))]
    return (
        _are_few(x)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)))
        and kernels_take(x, *tensors)
        and not _autocast_changes(x)
        and all(_is_read(x, weight) for weight in weights)
    )


def _is_read(x: torch.Tensor, weight: Weight) -> bool:
    """Whether the kernels read the weight in its form, dtype and place."""
    if not isinstance(weight, Mxfp8Tensors):
        is_form = weight.dtype == x.dtype and weight.shape[-1] % _MULTIPLE == 0
        return is_form and is_vector_block(weight) and weight.numel() > 0
    values, scales = weight
    return (
        x.dtype == torch.bfloat16
        and (values.dtype, scales.dtype) == (VALUE_DTYPE, SCALE_DTYPE)
        and values.shape[-1] % _MXFP8_MULTIPLE == 0
        and scales.shape == (*values.shape[:-1], values.shape[-1] // GROUP_SIZE)
        and is_vector_block(values)
        and scales.is_contiguous()
        and values.numel() > 0
        and _is_known_as_ordinary(weight)
    )


def _is_known_as_ordinary(weight: Mxfp8Tensors) -> bool:
    """`is_ordinary`, whose answer is kept until the weight changes. False where a capture keeps it from looking."""
    state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in weight]
    storages = tuple(tensor.untyped_storage() for tensor in weight)
    look: _Look | None = _looks.get(weight.values)
    if look is None or look.state != state or any(a() is not b for a, b in zip(look.storages, storages, strict=True)):
        if weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        answer = shards.agreed(is_ordinary(weight), weight.values)
        look = _looks[weight.values] = _Look(tuple(map(weakref.ref, storages)), state, answer)
    return look.is_ordinary


def _is_faster(x: torch.Tensor, weights: Sequence[Weight]) -> bool:
    """Whether the kernels are faster than cuBLAS, which reads no MXFP8: those weights would first be dequantized."""
    return len(weights) > 1 or isinstance(weights[0], Mxfp8Tensors) or _are_few(x, MAX_TOKENS_OF_ONE_LAYER)


def linear(x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
    """Outputs of linear layers side by side.

    Args:
        x (..., channels): What all layers read.
        layers (sequence of modules): One or more: `torch.nn.Linear`, or what stands in its place.

    Returns:
        (..., outputs of all layers).
    """
    weights = _weights_for(x, layers) if _are_few(x) and len(layers) <= _MAX_WEIGHTS else None
    if weights is None:
        return linear_reference(x, layers)
    outputs = [_product(x, list(group)) for _, group in groupby(weights, key=lambda w: isinstance(w, Mxfp8Tensors))]
    return shards.summed(torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0], layers[0])


def linear_reference(x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
    """The definition of `linear`."""
    outputs = [layer(x) for layer in layers]
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def _weights_for(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[Weight] | None:
    """The weights of all layers; None where the kernels do not take one, or are slower."""
    weights: list[Weight] = []
    for layer in layers:
        weight = weight_of(layer)
        if weight is None or not shards.gives_output(layer, is_alone=len(layers) == 1):
            return None
        weights.append(weight)
    return weights if _is_faster(x, weights) and takes_weights(x, weights) else None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear`, which is its definition.

    Args:
        x (..., channels): Inputs.
        weight (outputs, channels): A weight.

    Returns:
        (..., outputs).
    """
    if not (_is_faster(x, [weight]) and takes_weights(x, [weight])):
        return nn.functional.linear(x, weight)
    return _product(x, [weight])


def _product(x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    """The product with weights that are all of one form."""
    values, scales = _values_and_scales(weights)
    padding = [None] * (_MAX_WEIGHTS - len(weights))
    arguments = (*values, *padding, *scales, *padding, are_constant(values))
    return torch.ops.minimax_m3_msa_cuda.few_token_linear(_rows(x), *arguments).view(*x.shape[:-1], -1)


def _values_and_scales(
    weights: Sequence[Weight | None],
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Tensors of numbers or of MXFP8 values, and the scales of the latter."""
    pairs = [weight if isinstance(weight, Mxfp8Tensors) else (weight, None) for weight in weights]
    return [values for values, _ in pairs], [scales for _, scales in pairs]


def are_constant(weights: Sequence[torch.Tensor | None]) -> bool:
    """Whether kernels may read these weights before the kernels in front of them have ended.

    That holds in a captured decoding step, whose weights are parameters that no kernel of the step writes. Elsewhere a
    kernel in front may make a weight, as adapters do, or gather it, as FSDP does.
    """
    are_parameters = all(
        weight.is_cuda and isinstance(weight, nn.Parameter) for weight in weights if weight is not None
    )
    return are_parameters and torch.cuda.is_current_stream_capturing()


def takes_mlp(
    x: torch.Tensor,
    weights: Sequence[Weight],
    expert_ids: torch.Tensor | None = None,
    expert_weights: torch.Tensor | None = None,
) -> bool:
    """Whether `mlp` takes these tensors, and no gradient is needed.

    Args:
        x (..., hidden): Inputs.
        weights (sequence of (..., hidden or a width)): Weights of all projections, all in one form.
        expert_ids ((tokens, K) or None): The chosen experts.
        expert_weights ((tokens, K) or None): Their weights. A router's gradient passes through them alone where the
            experts are frozen.
    """
    return (
        len({isinstance(weight, Mxfp8Tensors) for weight in weights}) == 1
        and (expert_ids is not None or _is_faster(x, weights[:1]))
        and takes_weights(x, weights)
        and (expert_ids is None or _are_choices(x, expert_ids, expert_weights))
        and not (expert_weights is not None and expert_weights.requires_grad and torch.is_grad_enabled())
    )


def _are_choices(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor | None) -> bool:
    return (
        expert_weights is not None
        and expert_ids.dtype == torch.int64
        and expert_ids.dim() == 2
        and expert_ids.shape[0] == x.shape[:-1].numel()
        and expert_ids.numel() <= _MAX_CHOICES
        and expert_weights.shape == expert_ids.shape
        and expert_ids.device == expert_weights.device == x.device
    )


def mlp(
    x: torch.Tensor,
    gate_up: Weight | None,
    down: Weight | None,
    alpha: float,
    limit: float,
    expert_gate_up: Weight | None = None,
    expert_down: Weight | None = None,
    expert_ids: torch.Tensor | None = None,
    expert_weights: torch.Tensor | None = None,
    expert_scale: float = 1.0,
) -> torch.Tensor:
    """One MLP for every token plus the weighted sum of each token's experts, which SwiGLU-OAI gates.

    The caller has asked `takes_mlp`.

    Args:
        x (..., hidden): Inputs.
        gate_up ((2 * F, hidden) or None), down ((hidden, F) or None): The MLP of every token.
        alpha, limit (float): Constants of the activation.
        expert_gate_up ((E, 2 * F, hidden) or None), expert_down ((E, hidden, F) or None): The experts.
        expert_ids ((tokens, K) or None): int64, distinct within a token. Ids outside of 0 to E - 1 add nothing.
        expert_weights ((tokens, K) or None): float32.
        expert_scale (float): Factor of the weights.

    Returns:
        (..., hidden).
    """
    if expert_ids is not None and expert_weights is not None:
        expert_ids, expert_weights = expert_ids.contiguous(), expert_weights.float().contiguous()
    values, scales = _values_and_scales([gate_up, down, expert_gate_up, expert_down])
    return torch.ops.minimax_m3_msa_cuda.few_token_mlp(
        _rows(x), *values, *scales, expert_ids, expert_weights, expert_scale, alpha, limit, are_constant(values)
    ).view(x.shape)


def mlp_reference(
    x: torch.Tensor,
    gate_up: Weight | None,
    down: Weight | None,
    alpha: float,
    limit: float,
    expert_gate_up: Weight | None = None,
    expert_down: Weight | None = None,
    expert_ids: torch.Tensor | None = None,
    expert_weights: torch.Tensor | None = None,
    expert_scale: float = 1.0,
) -> torch.Tensor:
    """The definition of `mlp`, which rounds as the layers' own code does: after every operation."""
    tokens = x.reshape(-1, x.shape[-1])
    gate_up, down = _numbers(gate_up, x.dtype), _numbers(down, x.dtype)
    expert_gate_up, expert_down = _numbers(expert_gate_up, x.dtype), _numbers(expert_down, x.dtype)
    shared = routed = None
    if gate_up is not None and down is not None:
        shared = _one_mlp(tokens, gate_up, down, alpha, limit)
    if expert_gate_up is not None and expert_down is not None:
        assert expert_ids is not None and expert_weights is not None
        routed = torch.zeros_like(tokens)
        for expert in torch.unique(expert_ids).tolist():
            if 0 <= expert < len(expert_gate_up):
                token, choice = torch.nonzero(expert_ids == expert, as_tuple=True)
                out = _one_mlp(tokens[token], expert_gate_up[expert], expert_down[expert], alpha, limit)
                routed.index_add_(0, token, (out * expert_weights[token, choice, None]).to(routed.dtype))
        routed = routed * expert_scale
    parts = [part for part in (routed, shared) if part is not None]
    return sum(parts[1:], parts[0]).view(x.shape)


def _numbers(weight: Weight | None, dtype: torch.dtype) -> torch.Tensor | None:
    return dequantize_mxfp8(*weight, dtype) if isinstance(weight, Mxfp8Tensors) else weight


def _one_mlp(
    tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    return nn.functional.linear(swiglu_oai_reference(nn.functional.linear(tokens, gate_up), alpha, limit), down)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(tokens, channels) as the kernels read them: contiguous, from a multiple of 16 bytes on."""
    return as_vectors(x.reshape(-1, x.shape[-1]).contiguous())


def _are_few(x: torch.Tensor, most: int = MAX_TOKENS) -> bool:
    # While a compiler traces, it must not see a comparison with the number of tokens.
    return x.dtype in HALF_DTYPES and not is_torchdynamo_compiling() and 0 < x.numel() <= most * x.shape[-1]


def _autocast_changes(x: torch.Tensor) -> bool:
    """Whether a product of `x` gives another dtype, because autocast is on."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype
