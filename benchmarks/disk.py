"""Files and the page cache: dropping them, how much of them is there, and the time of a plain read."""

import ctypes
import math
import mmap
import os
import time
from pathlib import Path

import numpy as np

_READ_BYTES = 2**23


def drop_from_cache(files: list[Path]) -> float | None:
    """Drops files from the page cache. Returns the share of their pages that is still there, None where unknown."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return cached_share(files)


def cached_share(files: list[Path]) -> float | None:
    """The share of the pages of files that is in the page cache. None where the system does not tell."""
    found = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            resident = np.zeros(math.ceil(len(mapped) / mmap.PAGESIZE), dtype=np.uint8)
            content = np.frombuffer(mapped, dtype=np.uint8)
            address, into = (ctypes.c_void_p(array.ctypes.data) for array in (content, resident))
            failed = libc.mincore(address, ctypes.c_size_t(len(mapped)), into)
            del content  # a mapping that is still looked at cannot be closed
            if failed:
                return None
            found += int((resident & 1).sum())
            total += len(resident)
    return found / total


def read_seconds(files: list[Path]) -> float:
    """Seconds of one thread that reads the files from beginning to end."""
    buffer = memoryview(bytearray(_READ_BYTES))
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started
