"""Measurements in processes of their own: an empty GPU for each, one that fails ends alone, several make a group."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .gpu import require_gpu


def in_own_process(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
    """What a function of a module returns, in a process forked from one that has the imports and no CUDA context.

    Args:
        function (Callable): At the top level of its module.
        arguments (tuple): Its arguments, which can be pickled, like the result.
        seconds (float): After which the process is killed.

    Raises:
        RuntimeError: The function failed, ended its process, or took too long.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([function.__module__])
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send_result, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"took more than {seconds:.0f} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.join(timeout=10)  # its GPU memory is free once it has ended
        process.kill()
        process.join()
    if error is not None:
        raise RuntimeError(error)
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Sends the result and None, or None and the error as text."""
    try:
        require_gpu()
        sender.send((function(*arguments), None))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sender.send((None, f"{type(error).__name__}: {error}"))


def start_group(arguments: list[str], count: int) -> list[subprocess.Popen]:
    """Processes `python -m ARGUMENTS` that torch.distributed knows as the ranks of one machine.

    Their standard input and output are pipes.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def result_of(process: subprocess.Popen, seconds: float) -> Any:
    """The JSON that a process of a group prints last.

    Raises:
        RuntimeError: It failed or took too long.
    """
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a process took more than {seconds:.0f} s") from None
    if process.returncode != 0:
        raise RuntimeError(f"a process ended with exit code {process.returncode}; its error is above")
    return json.loads(out.splitlines()[-1])
