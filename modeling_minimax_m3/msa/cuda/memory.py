"""Calls into the extension, and the error that they raise where the GPU's memory does not suffice."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..arguments import Arguments

Args = TypeVar("Args", bound=Arguments)
Result = TypeVar("Result")


def run(function: Callable[[Args], Result], args: Args, name: str) -> Result:
    """Calls `function`, which calls the extension; `name` is the operator's in messages.

    PyTorch's stable ABI hands the extension's errors on as plain RuntimeErrors, while callers that free memory or take
    a smaller batch catch OutOfMemoryError. So a call that failed is made again, which is safe because no call reads
    what it writes. If it fails again, the allocator's count of failures says whether memory was the reason.

    Raises:
        torch.OutOfMemoryError: The GPU's memory does not suffice.
    """
    device = args.queries.device
    try:
        return function(args)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass  # the second call is outside of this block, because the exception holds what the first one had allocated
    failures = _allocation_failures(device)
    try:
        return function(args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _allocation_failures(device) == failures:
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory in `{name}` of the compiled extension") from error


def _allocation_failures(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_ooms", 0)
