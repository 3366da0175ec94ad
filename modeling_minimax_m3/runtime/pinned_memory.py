"""Host memory that a GPU reads at full speed and while it computes: page-locked."""

import contextlib
import weakref

import torch

# PyTorch's allocator of pinned memory rounds a size up to a power of two, which would waste up to half of the host for
# experts of many GB, and a copy would need the memory twice. So the pages of large tensors are locked where they are.
# Small tensors may share pages with others, which may not be locked twice.
_SMALLEST_IN_PLACE = 2**26
_ALIGNMENT = 64  # of what PyTorch allocates; a tensor elsewhere is part of a file, whose pages others share


class PinnedMemory:
    """The memory of a tensor, page-locked for as long as this object lives.

    Args:
        tensor (torch.Tensor): Contiguous, on the CPU.

    Attributes:
        tensor (torch.Tensor): The same tensor if it is large and in memory of its own, else a copy.

    Raises:
        RuntimeError: The system refuses, for example because `ulimit -l` is too low.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        if tensor.is_pinned():
            return
        if tensor.nbytes < _SMALLEST_IN_PLACE:
            self.tensor = tensor.pin_memory()
            return
        refusal = "its pages belong to a file" if tensor.data_ptr() % _ALIGNMENT else _lock(tensor)
        if refusal is not None:
            self.tensor = tensor.clone()
            refusal = _lock(self.tensor)
        if refusal is not None:
            raise RuntimeError(
                f"CUDA cannot lock {tensor.nbytes:,} bytes of host memory: {refusal}. `ulimit -l` limits how much memory "
                "a process may lock."
            )
        # The finalizer holds the tensor, so its memory is unlocked before it is freed.
        weakref.finalize(self, _unlock, self.tensor).atexit = False


def _lock(tensor: torch.Tensor) -> str | None:
    """Locks the pages of a tensor. Returns why the system refuses, or None."""
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if error == runtime.cudaError.success:
        return None
    with contextlib.suppress(RuntimeError):  # the next launch of a kernel reports the error once more
        torch.zeros(1, device="cuda")
    return runtime.cudaGetErrorString(error)


def _unlock(tensor: torch.Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still read it
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
