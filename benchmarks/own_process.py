"""Measurements in processes of their own, so that each starts with an empty GPU and one that fails ends alone."""

import multiprocessing
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
