"""`explain`: which backend and which kernels would run a call, and why, without running it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import attention, derivatives, indexer_loss, selection, structured
from .arguments import Arguments
from .backends import Explanation, Operator, explain_choice


@dataclass(frozen=True)
class _Function:
    """A public function: what checks its arguments, and the operator that it calls with them."""

    public: Callable[..., Any]
    arguments: Callable[..., Arguments]
    operator: Operator[Any, Any]


_FUNCTIONS = (
    _Function(selection.select_blocks, selection.select_blocks_args, selection.SELECT_BLOCKS),
    _Function(
        selection.select_blocks_with_kvcache,
        selection.select_blocks_with_kvcache_args,
        selection.SELECT_BLOCKS_WITH_KVCACHE,
    ),
    _Function(
        attention.block_sparse_attention, attention.block_sparse_attention_args, attention.BLOCK_SPARSE_ATTENTION
    ),
    _Function(
        attention.block_sparse_attention_with_kvcache,
        attention.block_sparse_attention_with_kvcache_args,
        attention.BLOCK_SPARSE_ATTENTION_WITH_KVCACHE,
    ),
    _Function(indexer_loss.indexer_kl_loss, indexer_loss.indexer_kl_loss_args, indexer_loss.INDEXER_KL_LOSS),
    _Function(structured.structured_blocks, structured.structured_blocks_args, structured.STRUCTURED_BLOCKS_OF),
    _Function(structured.structured_blocks_of, structured.structured_blocks_of_args, structured.STRUCTURED_BLOCKS_OF),
)


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """What would run a call of an operator, and why. Runs and builds nothing.

    A gradient runs on the backend of its value. Calls that `torch.compile` compiles run on the backend that an eager
    call with the same tensors runs on.

    Args:
        function (callable or str): A function of `msa.__all__` that takes `backend`, or its name.
        *args, **kwargs: What the function would be called with.

    Returns:
        The backend, the kernels and the reason, see `Explanation`.

    Raises:
        ValueError, TypeError: `function` is no such function, or the call would raise the same error.
        NotImplementedError: The call names a backend that cannot run it, or that would have to be built first.
    """
    return _explain(function, args, kwargs)


@torch.compiler.disable  # a graph break: addresses and environment are read, which a graph does not hold
def _explain(function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    operator, arguments, backend = checked_call(function, *args, **kwargs)
    if arguments.differentiable and derivatives.are_beyond_backward(*arguments.differentiable):
        derivatives.check_has_definition(operator.name, backend)
        reason = "forward mode and `torch.func` differentiate the definition"
        return Explanation("reference", "definition", reason)
    return explain_choice(backend, operator, arguments)


def checked_call(
    function: Callable[..., Any] | str, *args: Any, **kwargs: Any
) -> tuple[Operator[Any, Any], Arguments, str]:
    """The operator that a call of `function` runs, the arguments that it gets, and the backend that the call names.

    Raises:
        ValueError, TypeError, NotImplementedError: As the call, or `function` is none that `explain` knows.
    """
    found = _find(function)
    try:
        bound = inspect.signature(found.public).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"`{found.public.__name__}`: {error}") from None
    bound.apply_defaults()
    return found.operator, found.arguments(**bound.arguments), bound.arguments["backend"]


def _find(function: Callable[..., Any] | str) -> _Function:
    for known in _FUNCTIONS:
        if function is known.public or function == known.public.__name__:
            return known
    names = ", ".join(known.public.__name__ for known in _FUNCTIONS)
    raise ValueError(f"`function` must be one of {names}, got {function!r}")
