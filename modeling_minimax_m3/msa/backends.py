"""Which backends there are, and the choice between them.

`reference` is the definition and only runs where a call names it, because its memory is quadratic. `torch` is plain
PyTorch at linear memory on any device. `cuda` is the compiled extension. `auto` stands for `cuda` where it supports a
call, and for `torch` otherwise. A backend that a call names either runs it or raises an error that says why it cannot.

An operator in `torch.library` has the caller's name of the backend as an argument. The choice is made when the call
runs, from its tensors' device, dtypes, shapes, strides and addresses, so that a graph traced by `torch.compile` holds
no choice.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from . import call_log, cuda, extension, portable
from .arguments import Arguments

BACKENDS = ("auto", "cuda", "torch", "reference")
_warned: set[str] = set()  # why `auto` did not take the extension; each warning appears once

Args = TypeVar("Args", bound=Arguments)
Result = TypeVar("Result")


def _nothing_missing() -> str | None:
    return None


@dataclass(frozen=True)
class Operator(Generic[Args, Result]):
    """One operator, and the function that computes it on each backend.

    Attributes:
        name (str): Name in messages.
        reference, portable, cuda (callable): The functions of the backends `reference`, `torch` and `cuda`.
        unsupported (callable): Why the kernels cannot run a call, or None where they can.
        kernels (tuple of str): Folders of its kernels for packed sequences, inside a folder such as `csrc/sm90`.
        missing (callable): Why the loaded binary has no kernel for the operator, or None where it has one.
    """

    name: str
    reference: Callable[[Args], Result]
    portable: Callable[[Args], Result]
    cuda: Callable[[Args], Result]
    unsupported: Callable[[Args], str | None]
    kernels: tuple[str, ...] = ()
    missing: Callable[[], str | None] = _nothing_missing


@dataclass(frozen=True)
class Explanation:
    """What runs a call, and why.

    Attributes:
        backend (str): "cuda", "torch" or "reference".
        kernel (str): The kernels' family and the form of the call, for example "sm90, packed". The family is a folder
            of `csrc`, "PyTorch" or "definition". The folder is "sm80", or that of the GPU's own architecture, whose
            calls run sm80's kernels for sizes that its own do not take. The forms are "packed", "decode" and "by
            position".
        reason (str): Why this backend runs the call.
    """

    backend: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class _Choice:
    """A backend, why it is taken, and whether the call would run on `cuda` if the machine had the binary."""

    backend: str
    reason: str
    lacks_binary: bool = False


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes on this machine besides "auto", best first. Loads and builds nothing."""
    named = tuple(name for name in BACKENDS if name != "auto")
    return named if extension.unavailable() is None else tuple(name for name in named if name != "cuda")


def check_backend(backend: str) -> str:
    """Returns `backend`.

    Raises:
        ValueError: `backend` is neither "auto" nor a backend's name.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def resolve_backend(backend: str, operator: Operator[Args, Result], args: Args) -> str:
    """The backend that runs a call, where `backend` is the name that the caller gave.

    "auto" becomes "cuda" where that supports the call and its binary is there. Where only the binary is missing, a
    warning says so once. "cuda" builds the binary where it is missing.

    Raises:
        NotImplementedError: The backend is "cuda" and cannot run the call.
    """
    choice = _choose(backend, operator, args, build=True)
    if choice.lacks_binary and choice.reason not in _warned and extension.mode() != "off":
        _warned.add(choice.reason)
        warnings.warn(f"MSA runs on the `torch` backend: {choice.reason}", stacklevel=2)
    if call_log.is_on():
        explanation, queries = _explanation(choice, operator, args), args.queries
        dtype = str(queries.dtype).removeprefix("torch.")
        call_log.log_once(
            f"{operator.name} ({dtype}, {queries.device}) runs on `{explanation.backend}` ({explanation.kernel}): "
            f"{explanation.reason}"
        )
    return choice.backend


def explain_choice(backend: str, operator: Operator[Args, Result], args: Args) -> Explanation:
    """What would run a call. Builds nothing, and raises as `resolve_backend` does."""
    return _explanation(_choose(backend, operator, args, build=False), operator, args)


def run_on_backend(backend: str, operator: Operator[Args, Result], args: Args) -> Result:
    """Runs a call on the backend that `backend`, the name that the caller gave, stands for."""
    return run_on_resolved(resolve_backend(backend, operator, args), operator, args)


def run_on_resolved(backend: str, operator: Operator[Args, Result], args: Args) -> Result:
    """Runs a call on what `resolve_backend` returned.

    Autocast is off inside: it would compute float32 scores and sums in half precision.
    """
    with torch.autocast(args.queries.device.type, enabled=False):
        if backend == "cuda":
            return cuda.run(operator.cuda, args, operator.name)
        return operator.portable(args) if backend == "torch" else operator.reference(args)


def _choose(backend: str, operator: Operator[Args, Result], args: Args, build: bool) -> _Choice:
    """As `resolve_backend`, without a warning; `build` says whether "cuda" may build the binary."""
    if backend not in ("auto", "cuda"):
        return _Choice(backend, f"the call names `backend`={backend!r}")
    unsupported = operator.unsupported(args)
    missing = None
    if unsupported is None:
        missing = extension.load(build=build and backend == "cuda") or operator.missing()
    reason = unsupported or missing
    if reason is None:
        return _Choice("cuda", "the kernels support the call")
    if backend == "cuda":
        raise NotImplementedError(
            f"`backend`='cuda' cannot run this call of `{operator.name}`: {reason}. "
            f"Available here: {', '.join(available_backends())}"
        )
    return _Choice("torch", reason, lacks_binary=missing is not None)


def _explanation(choice: _Choice, operator: Operator[Args, Result], args: Args) -> Explanation:
    if choice.backend == "reference":
        return Explanation(choice.backend, "definition", choice.reason)
    is_cuda = choice.backend == "cuda"
    form = args.form(cuda.MAX_DECODE_TOKENS if is_cuda else portable.MAX_DECODE_TOKENS)
    family = "PyTorch"
    if is_cuda:
        kinds = ("decode",) if form == "decode" else operator.kernels
        family = extension.kernel_family(args.queries.device, kinds)
    return Explanation(choice.backend, f"{family}, {form}", choice.reason)
