"""Which backends there are, what each supports, and the choice between them.

`reference` is the definition and is only taken by name: its memory is quadratic. `torch` is plain PyTorch at linear
memory on any device. `cuda` is the compiled extension. `auto` takes the best one that supports a call; one asked for
by name either runs or raises, naming why it cannot.
"""

from types import ModuleType

import torch

from . import portable, reference

BACKENDS = ("auto", "cuda", "torch", "reference")
_MODULES: dict[str, ModuleType] = {"torch": portable, "reference": reference}


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes on this machine besides "auto", best first."""
    return tuple(_MODULES)


def resolve_backend(backend: str) -> str:
    """The backend that runs a call made with `backend`.

    Raises:
        ValueError: `backend` is no backend's name.
        NotImplementedError: it is one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "torch"
    if backend not in _MODULES:
        raise NotImplementedError(
            f"`backend`={backend!r} cannot run: this version of the package has no compiled extension. "
            f"Available here: {', '.join(available_backends())}"
        )
    return backend


def run_on_backend(backend: str, function: str, *args):
    """Calls a resolved backend's `function`, named and used as in `reference`.

    Autocast is off inside: it would compute float32 scores and sums in half precision.
    """
    with torch.autocast(args[0].device.type, enabled=False):
        return getattr(_MODULES[backend], function)(*args)
