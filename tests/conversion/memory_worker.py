"""Converts SOURCE and prints by how many bytes the resident memory of this process grew at most, by kind of conversion.

    python memory_worker.py TINY_SOURCE SOURCE ADAPTER MAX_SHARD_SIZE

A conversion of the tiny source first loads what PyTorch loads once. Each kind runs in a process of its own, so that it
cannot use memory that another one left.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from modeling_minimax_m3.conversion.convert import Conversion, convert

KINDS = {"layout": {"layout": "modules"}, "quantization": {"precision": "mxfp8"}, "adapter": {}}


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def grow(source: Path, size: int, options: dict) -> int:
    with tempfile.TemporaryDirectory(dir=source.parent) as place:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        convert(source, Path(place) / "out", Conversion(max_shard_size=size, **options), show_progress=False)
        return status("VmHWM") - before


def main() -> None:
    torch.set_num_threads(1)
    tiny, source, adapter, size = (*map(Path, sys.argv[1:4]), int(sys.argv[4]))
    for kind, options in KINDS.items():
        process = os.fork()
        if process == 0:
            grow(tiny, size, options)
            torch.ones(1024, 8) @ torch.ones(8, 512)  # products have buffers of their own
            if kind == "adapter":
                options = {"adapters": (adapter,)}
            print(json.dumps({kind: grow(source, size, options)}), flush=True)
            os._exit(0)
        _, exit_status = os.waitpid(process, 0)
        if exit_status:
            sys.exit(1)


if __name__ == "__main__":
    main()
