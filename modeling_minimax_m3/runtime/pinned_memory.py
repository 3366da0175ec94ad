"""Host memory that a GPU reads at full speed and while it computes: page-locked."""

import weakref

import torch

# PyTorch's allocator of pinned memory rounds a size up to a power of two, which would waste up to half of the host for
# experts of many GB, and a copy would need the memory twice. So the pages of large tensors are locked where they are.
# Small tensors may share pages with others, which may not be locked twice.
_SMALLEST_IN_PLACE = 2**26


class PinnedMemory:
    """The memory of a tensor, page-locked for as long as this object lives.

    Args:
        tensor (torch.Tensor): Contiguous, on the CPU.

    Attributes:
        tensor (torch.Tensor): The same tensor if it is large, else a copy.

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
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if error != runtime.cudaError.success:
            raise RuntimeError(
                f"CUDA cannot lock {tensor.nbytes:,} bytes of host memory: {runtime.cudaGetErrorString(error)}. "
                "`ulimit -l` limits how much memory a process may lock."
            )
        # The finalizer holds the tensor, so its memory is unlocked before it is freed.
        weakref.finalize(self, _unlock, tensor).atexit = False


def _unlock(tensor: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
