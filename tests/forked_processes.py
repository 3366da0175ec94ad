"""Programs in processes of their own on a CPU, forked from one that has imported PyTorch and Transformers.

These imports take several seconds, and what most programs check takes less than one. Python's fork server imports once
for all tests of a pytest process. It imports nothing of this repository and runs no other code, so each program starts
from a fresh state. It sees no GPU; `torchrun` starts what runs on GPUs.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["peft", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.distributed"]
IMPORTED += ["transformers.trainer", "transformers.integrations.finegrained_fp8", "torchvision.transforms.v2"]
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


def run_python(*arguments: str, folder: Path, timeout: float = TIMEOUT, **environment: str) -> CompletedProcess[str]:
    """What `python ARGUMENTS` in `folder` gives, as `subprocess.run` tells it: `-c CODE`, `-m MODULE`, or a script.

    Raises:
        AssertionError: if it takes longer than `timeout` seconds. It is ended.
    """
    with tempfile.TemporaryDirectory() as logs:
        outputs = [Path(logs) / name for name in ("stdout", "stderr")]
        (code,) = _finish([start_python(arguments, environment, outputs, folder)], outputs[1:], timeout)
        stdout, stderr = (output.read_text(errors="replace") for output in outputs)
    return CompletedProcess(arguments, code, stdout, stderr)


def run_script(
    script: Path, *arguments: str, folder: Path, processes: int = 2, timeout: float = TIMEOUT, **environment: str
) -> list[str]:
    """Run a script as `__main__` in so many processes, as `torchrun` does. Their output goes to files of `folder`.

    Several find each other by the variables that `torchrun` sets; a single one has none of them. Returns what each wrote
    to stdout and stderr.

    Raises:
        AssertionError: with the end of its output, if a process fails, and with that of the first, if they take longer
            than `timeout` seconds. The others are ended.
    """
    shared = environment
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    running, logs = [], []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        logs.append(folder / f"{script.stem}-{rank}.log")
        running.append(start_python([str(script), *arguments], shared | own, [logs[-1]] * 2))
    _finish(running, logs, timeout, must_succeed=True)
    return [log.read_text(errors="replace") for log in logs]


def start_python(
    arguments: Sequence[str], environment: dict, outputs: list[Path], folder: Path | None = None
) -> Process:
    """Starts `python ARGUMENTS`, with the files of its stdout and stderr."""
    environment = {**os.environ, **ENVIRONMENT, **environment}
    with fork_server() as context:
        process = context.Process(target=_run, args=(arguments, environment, [str(o) for o in outputs], folder))
        process.start()
    return process


def _finish(running: list[Process], logs: list[Path], timeout: float, must_succeed: bool = False) -> list[int]:
    """Waits for the processes, and returns their exit codes."""
    end = time.monotonic() + timeout
    waiting = {process.sentinel: number for number, process in enumerate(running)}
    try:
        while waiting:
            ended = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            assert ended, f"the processes did not end in time: {_tail(logs[0])}"
            for number in [waiting.pop(sentinel) for sentinel in ended]:
                running[number].join()
                code = running[number].exitcode
                assert code == 0 or not must_succeed, f"process {number} ended with {code}: {_tail(logs[number])}"
    finally:
        for process in running:
            process.kill()
            process.join()
    return [process.exitcode for process in running]


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def _run(arguments: Sequence[str], environment: dict[str, str], outputs: list[str], folder: Path | None) -> None:
    gc.freeze()  # a collection leaves out what the server has imported
    for descriptor, output in enumerate(outputs, start=1):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    try:
        _interpret(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without clean-up, as the scripts do: gloo's threads may still run


def _interpret(first: str, *others: str) -> None:
    """What `python FIRST OTHERS` runs."""
    if first == "-m":
        sys.argv = list(others)
        sys.path.insert(0, "")
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *others]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
