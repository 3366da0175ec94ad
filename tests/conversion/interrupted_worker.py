"""Converts in child processes that are killed, and goes on afterwards. Prints a JSON line for each round.

    python interrupted_worker.py SOURCE FOLDER SEED

Rounds of the first kind are killed at one of their file operations. The last of these, which give the folder its name,
also replace an earlier folder. Rounds of the second kind are killed after random times, as often as it takes until the conversion is done.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from modeling_minimax_m3.conversion.convert import Conversion, convert

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
LAYOUT = "modules"


def run(source: Path, target: Path, overwrite: bool, die_at: int | None) -> None:
    """One conversion in this process, which kills itself at the given file operation inside of the parent folder."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in EVENTS and str(target.parent) in str(arguments[0]):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    conversion = Conversion(layout=LAYOUT, max_shard_size=300_000)
    convert(source, target, conversion, overwrite=overwrite, show_progress=False)
    (target.parent.parent / "operations").write_text(str(count))


def child(
    source: Path, target: Path, *, overwrite: bool = False, die_at: int | None = None, delay: float | None = None
):
    """Whether the conversion ended in a child process that was to be killed."""
    process = os.fork()
    if process == 0:
        try:
            run(source, target, overwrite, die_at)
            os._exit(0)
        except BaseException as error:
            print(json.dumps({"error": repr(error)}), flush=True)
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a conversion failed")
    return os.WIFEXITED(status)


def main() -> None:
    torch.set_num_threads(1)
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    choose = random.Random(int(sys.argv[3]))
    (folder / "whole").mkdir(parents=True)
    began = time.monotonic()
    assert child(source, folder / "whole" / "out")
    duration = time.monotonic() - began
    operations = int((folder / "operations").read_text())

    # The run ends with reading what it wrote, which is no part of these.
    last = range(operations - 14, operations)
    for die_at in [*sorted(choose.sample(range(1, operations - 14), 10)), *last]:
        place = folder / f"at-{die_at}"
        place.mkdir()
        overwrite = die_at in last
        if overwrite:
            assert child(source, place / "out")
            (place / "out" / "old").touch()
        ended = child(source, place / "out", overwrite=overwrite, die_at=die_at)
        is_whole = (place / "out").exists() and not (place / "out" / "old").exists()
        ended_again = child(source, place / "out", overwrite=True)
        print(json.dumps({"place": str(place), "killed": not ended, "whole_before": is_whole, "done": ended_again}))

    for number in range(3):
        place = folder / f"random-{number}"
        place.mkdir()
        kills = 0
        while [file.name for file in place.iterdir()] != ["out"] or any((place / "out").glob(".conv*")):
            kills += not child(source, place / "out", delay=choose.uniform(0, duration * (0.4 + kills / 8)))
        print(json.dumps({"place": str(place), "killed": kills > 0, "done": True}))


if __name__ == "__main__":
    main()
