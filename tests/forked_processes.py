"""Scripts in several processes on a CPU, as `torchrun` starts them, but forked from one that has their imports.

The imports of a process take several seconds, and what most scripts check takes less than one. Python's fork server
imports once for all tests of a pytest process. It runs none of the code, so each script starts from a fresh state. It
sees no GPU; `torchrun` starts what runs on GPUs.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["peft", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.distributed"]
IMPORTED += ["transformers.trainer", "modeling_minimax_m3", "modeling_minimax_m3.run_monitor"]
# Of the server too, which imports torch.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
TIMEOUT = 300  # seconds; processes that wait for each other for ever fail the test


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServerContext]:
    """The context of multiprocessing in which processes start, and the settings of the server, which the first starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # processes find the functions that they run by the path
    with mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        yield context


def run_script(
    script: Path, *arguments: str, folder: Path, processes: int = 2, timeout: float = TIMEOUT, **environment: str
) -> list[str]:
    """Run a script as `__main__` in so many processes, whose output goes to files of `folder`.

    Several find each other by the variables that `torchrun` sets; a single one has none of them. Returns what each wrote
    to stdout and stderr.

    Raises:
        AssertionError: with the end of its output, if a process fails, and with that of the first, if they take longer
            than `timeout` seconds. The others are ended.
    """
    shared = {**os.environ, **ENVIRONMENT, **environment}
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    running, logs = [], []
    with fork_server() as context:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            logs.append(folder / f"{script.stem}-{rank}.log")
            process = context.Process(target=_run, args=(str(script), arguments, shared | own, str(logs[-1])))
            process.start()
            running.append(process)
    try:
        _wait(running, logs, time.monotonic() + timeout)
    finally:
        for process in running:
            process.kill()
            process.join()
    return [log.read_text(errors="replace") for log in logs]


def _wait(running: list, logs: list[Path], end: float) -> None:
    waiting = {process.sentinel: number for number, process in enumerate(running)}
    while waiting:
        ended = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        assert ended, f"the processes did not end in time: {_tail(logs[0])}"
        for number in [waiting.pop(sentinel) for sentinel in ended]:
            running[number].join()
            code = running[number].exitcode
            assert code == 0, f"process {number} ended with {code}: {_tail(logs[number])}"


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def _run(script: str, arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException as error:
        code = int(not isinstance(error, SystemExit) or bool(error.code))
        if code:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without clean-up, as the scripts do: gloo's threads may still run
