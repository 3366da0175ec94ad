"""Whether `generate` captures its decoding step in a CUDA graph, for a part of a program."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def decoding_graphs(allowed: bool) -> Iterator[None]:
    """Lets `generate` capture its decoding step, or not. It stays off where the environment switches it off."""
    before = os.environ.get("MINIMAX_M3_CUDA_GRAPHS")
    if not allowed:
        os.environ["MINIMAX_M3_CUDA_GRAPHS"] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MINIMAX_M3_CUDA_GRAPHS", None)
        else:
            os.environ["MINIMAX_M3_CUDA_GRAPHS"] = before
