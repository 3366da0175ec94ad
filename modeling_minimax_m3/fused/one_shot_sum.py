"""Sums of few numbers over the processes of one machine: each card reads the terms of all cards, in one kernel.

NCCL's sum of the 12 KB of a token is bound by its latency, and a decoding step waits for two sums in each layer. Here a
process copies its terms to a buffer that the other cards read over NVLink (PyTorch's symmetric memory), and
`one_shot_all_reduce` adds them up. Every process adds in the order of the ranks, so all have the same bits.

The buffer is set up by the first such sum that no CUDA graph is capturing. All processes make the same sums, so they
meet there. It keeps its address, as captured graphs need it. NCCL sums where it cannot be set up, and in all processes
if in one. MINIMAX_M3_ONE_SHOT_SUMS=0 switches these sums off.
"""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import is_torchdynamo_compiling, logging

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.get_logger(__name__)

MAX_PROCESSES = 8
# Of the terms of all processes, which each card reads: 256 KiB of each of 2 processes, 64 KiB of each of 8. The first is
# PyTorch's own bound of such sums (`intra_node_comm`). A ring moves at most twice the terms of one process, whatever
# their number, so larger sums are NCCL's.
MAX_BYTES_READ = 512 * 1024
_BUFFER_BYTES = MAX_BYTES_READ // 2
_VECTOR_BYTES = 16  # the kernel reads fewer at a time if the size is no multiple
_DTYPES = (torch.bfloat16, torch.float32)  # of the kernel

_P2P_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"

# By the processes. None where their buffer could not be set up.
_buffers: "WeakKeyDictionary[ProcessGroup, torch.Tensor | None]" = WeakKeyDictionary()

Place = tuple[str, str, int | None]


class _Unsuitable(Exception):
    """What a user knows or cannot change, so that there is no need to warn."""


def takes(states: torch.Tensor, count: int) -> bool:
    """Whether the kernel sums such tensors of `count` processes, and is expected to be faster than NCCL."""
    return (
        not is_torchdynamo_compiling()
        and states.is_cuda
        and states.dtype in _DTYPES
        and 1 < count <= MAX_PROCESSES
        and 0 < states.nbytes * count <= MAX_BYTES_READ
        and states.nbytes % _VECTOR_BYTES == 0
    )


def total(states: torch.Tensor, group: "ProcessGroup") -> torch.Tensor | None:
    """The sum of all processes' `states`, as a new tensor; None where NCCL has to make it.

    Args:
        states (any shape): What `takes` says yes to. Of the same shape and dtype in all processes.
        group (`ProcessGroup`): The processes. All of them call this, in the same order.
    """
    buffer = _buffer(group, states.device)
    if buffer is None:
        return None
    terms = buffer[: states.nbytes].view(states.dtype).view(states.shape)
    # A kernel copies, where `copy_` would make a node of another kind in a CUDA graph. PyTorch's sum with a copy inside
    # is not used: in it, threads tell the other cards to read while others of their block still write.
    torch.mul(states, 1, out=terms)
    # One buffer serves all sums: the kernel ends when all cards have read it.
    out: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(terms, "sum", group.group_name)
    return out


def _buffer(group: "ProcessGroup", device: torch.device) -> torch.Tensor | None:
    if group not in _buffers:
        if torch.cuda.is_current_stream_capturing():
            return None  # the set-up waits for the other processes on the host
        with torch.inference_mode(False), torch.cuda.device(device):
            _buffers[group] = _set_up(group, device)
    return _buffers[group]


def _set_up(group: "ProcessGroup", device: torch.device) -> torch.Tensor | None:
    """Memory that all processes of `group` can read, on each process's own device. None in all of them, or in none.

    Before each step that waits for the other processes, all of them tell whether they got there.
    """
    buffers: list[torch.Tensor] = []
    places = _gathered(group, _place(device))

    def reserve() -> None:
        from torch._C._distributed_c10d import _SymmetricMemory  # not there in every build of PyTorch

        _check_places(places, group.rank())
        # Memory of its own, where `empty` of `torch.distributed._symmetric_memory` takes it from a pool.
        buffers.append(_SymmetricMemory.empty_strided_p2p((_BUFFER_BYTES,), (1,), torch.uint8, device))

    def share() -> None:
        from torch._C._distributed_c10d import _SymmetricMemory

        with _without_multicast():
            if _SymmetricMemory.rendezvous(buffers[0], group.group_name) is None:
                raise RuntimeError("the memory is not known as symmetric")

    for step in (reserve, share):
        problem = None
        try:
            step()
        except _Unsuitable as error:
            problem = (False, str(error))
        except Exception as error:  # of the driver, or of a release of PyTorch with another interface
            problem = (True, f"{type(error).__name__}: {error}")
        problems = [found for found in _gathered(group, problem) if found is not None]
        if problems:
            needs_warning, reason = max(problems)
            if group.rank() == 0:
                log = logger.warning if needs_warning else logger.debug
                log(f"NCCL makes the small sums over processes, which take longer in decoding: {reason}")
            return None
    return buffers[0]


def _gathered(group: "ProcessGroup", answer: Any) -> list[Any]:
    answers: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(answers, answer, group=group)
    return answers


def _place(device: torch.device) -> Place:
    """Host and device of this process. Hosts of one name differ in the number that Linux gives each start."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot_id.read_text() if boot_id.exists() else "", device.index


def _check_places(places: list[Place], rank: int) -> None:
    """Raise `_Unsuitable` where the cards do not read each other's memory, or these sums are switched off."""
    if os.environ.get("MINIMAX_M3_ONE_SHOT_SUMS") == "0":
        raise _Unsuitable("MINIMAX_M3_ONE_SHOT_SUMS is 0")
    if len({place[:2] for place in places}) > 1:
        raise _Unsuitable("the processes are on several hosts")
    own = places[rank][2]
    for _, _, other in places[:rank] + places[rank + 1 :]:
        if own != other and not _has_atomics(own, other):
            raise _Unsuitable(f"no NVLink goes from device {own} to device {other}")


def _has_atomics(device: int | None, peer: int | None) -> bool:
    """Whether a device makes atomic operations in another's memory, with which the kernel waits. PCIe has none."""
    answer = ctypes.c_int(0)
    driver = ctypes.CDLL("libcuda.so.1")
    error = driver.cuDeviceGetP2PAttribute(ctypes.byref(answer), _P2P_NATIVE_ATOMICS, device, peer)
    return error == 0 and answer.value == 1


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Keep PyTorch from binding the buffer to NVLink's multicast, which it does unasked. No sum here uses it."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before
