"""Which backends there are, and the choice between them.

`reference` is the definition and is only taken by name: its memory is quadratic. `torch` is plain PyTorch at linear
memory on any device. `cuda` is the compiled extension. `auto` takes the best one that supports a call; one asked for
by name either runs or raises, naming why it cannot.

The operators carry the name that the caller gave; it becomes a backend when a call runs, from its tensors' device,
dtypes, shapes and strides, so that a graph traced by `torch.compile` holds no choice.
"""

import warnings

import torch

from . import cuda, extension, portable, reference

BACKENDS = ("auto", "cuda", "torch", "reference")
_MODULES = {"cuda": cuda, "torch": portable, "reference": reference}
_told: set[str] = set()  # why `auto` passed the extension by, each reason said once


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes on this machine besides "auto", best first. Loads and builds nothing."""
    return tuple(name for name in _MODULES if name != "cuda" or extension.unavailable() is None)


def check_backend(backend: str) -> str:
    """Returns `backend`; raises ValueError unless it is a backend's name or "auto"."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def resolve_backend(backend: str, function: str, args: tuple) -> str:
    """The backend that runs `function` with the arguments `args`, named and ordered as in `reference`.

    "auto" takes the extension where it supports the call and its binary is there, and says once where only the binary
    is missing; "cuda" builds it where it is missing.

    Raises:
        NotImplementedError: the backend is "cuda" and cannot run the call.
    """
    if backend == "auto":
        if args[0].device.type != "cuda" or cuda.unsupported(function, args) is not None:
            return "torch"
        reason = extension.load(build=False) or cuda.missing_kernel(function)
        if reason is None:
            return "cuda"
        if reason not in _told and extension.mode() != "off":
            _told.add(reason)
            warnings.warn(f"MSA runs on the `torch` backend: {reason}", stacklevel=2)
        return "torch"
    if backend == "cuda":
        reason = cuda.unsupported(function, args) or extension.load(build=True) or cuda.missing_kernel(function)
        if reason is not None:
            raise NotImplementedError(
                f"`backend`='cuda' cannot run this call of `{function}`: {reason}. "
                f"Available here: {', '.join(available_backends())}"
            )
    return backend


def run_on_backend(backend: str, function: str, *args, cuda_only: tuple = ()):
    """Calls `function`, named and used as in `reference`, on the backend that `backend` means for these arguments.

    The extension gets the arguments `cuda_only` as well. Autocast is off inside: it would compute float32 scores and
    sums in half precision.
    """
    backend = resolve_backend(backend, function, args)
    with torch.autocast(args[0].device.type, enabled=False):
        if backend == "cuda":
            return cuda.run(function, (*args, *cuda_only))
        return getattr(_MODULES[backend], function)(*args)
