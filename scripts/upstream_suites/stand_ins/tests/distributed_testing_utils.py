"""Replaces a file that the source distribution lacks: starts processes on the CPU that communicate by gloo."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    """Call `function(rank, *args)` in `nprocs` processes."""
    # the processes fork from one process that has imported everything, so that they need not import it again
    multiprocessing.set_forkserver_preload(["tests.minimax_m3.subjects", "torch.distributed.tensor"])
    mp.start_processes(_run_rank, args=(function, args), nprocs=nprocs, start_method="forkserver")


def _run_rank(rank: int, function: Callable[..., None], args: tuple) -> None:
    from .minimax_m3 import subjects  # noqa: F401 - registers the tested classes in this process too

    torch.set_num_threads(1)
    function(rank, *args)


def run_distributed(world_size: int) -> Callable:
    """A decorator that runs a call in `world_size` processes of one group, with the rank as the first argument."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = Path(folder, "rendezvous").as_uri()
                _start_rank_processes(_run_in_group, (function, args, world_size, rendezvous), world_size)

        return run

    return decorate


def _run_in_group(rank: int, function: Callable[..., None], args: tuple, world_size: int, rendezvous: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(_get_distributed_backend(), init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
