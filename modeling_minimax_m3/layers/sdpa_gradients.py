"""PyTorch's attention without cuDNN's kernel where its gradients may be NaN.

On Hopper, PyTorch gives calls of `scaled_dot_product_attention` to cuDNN. Its backward reads keys past the end of the
last tile of 128 as zeros, with the score 0 instead of -inf. In a row whose scores are all below -88.7, the weight of
such a key is exp(0 - lse) = inf, and the row's query gets the gradient inf * 0 = NaN. Causal calls without a mask are
not affected. Source: https://github.com/pytorch/pytorch/issues/196678 (torch 2.11 and newer).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils.import_utils import is_torchdynamo_compiling

_TILE = 128  # of cuDNN, in queries and in keys


@contextmanager
def finite_gradients(num_queries: int, num_keys: int, *states: torch.Tensor) -> Iterator[None]:
    """Keeps calls with a mask, or that are not causal, away from cuDNN where their gradients may be NaN.

    Args:
        num_queries (int): Queries of a sequence.
        num_keys (int): Keys of a sequence.
        *states (torch.Tensor): Queries, keys and values of the call.
    """
    if not (_needs_gradient(states) and has_partial_tile(num_queries, num_keys)):
        yield
        return
    with sdpa_kernel(_other_backends()):
        yield


def has_partial_tile(num_queries: int, num_keys: int) -> bool:
    """Whether the last tile of queries or of keys reaches past the end."""
    return num_queries % _TILE != 0 or num_keys % _TILE != 0


def _needs_gradient(states: tuple[torch.Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.is_cuda and tensor.requires_grad for tensor in states)


def _other_backends() -> list[SDPBackend]:
    """The kernels that the user allows, but for cuDNN's."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if is_torchdynamo_compiling():  # it knows the context, but none of the switches
        return backends
    switches = torch.backends.cuda
    allowed = (switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.math_sdp_enabled())
    # Where the user allows cuDNN alone, the definition takes its place.
    return [backend for backend, is_allowed in zip(backends, allowed) if is_allowed] or backends[-1:]
