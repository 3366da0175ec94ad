"""Write the tables of docs/hardware.md: which machine runs the released model, by the memory planner.

    python scripts/hardware_table.py            # print them
    python scripts/hardware_table.py --write    # put them into docs/hardware.md

The tables hold estimates of `modeling_minimax_m3.memory_plan`. A test checks that the page has them.
"""

import argparse
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modeling_minimax_m3.memory_plan import MemoryPlan, MemoryRequest, plan_memory

PAGE = Path(__file__).parents[1] / "docs" / "hardware.md"
START, END = "<!-- tables of scripts/hardware_table.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Machine:
    """`devices` GPUs with `gib` GiB each, which is a little less than what the vendor's name says."""

    name: str
    devices: int
    gib: float


MACHINES = (
    Machine("1 x H200, 141 GB", 1, 139.8),
    Machine("2 x H200, 141 GB", 2, 139.8),
    Machine("4 x H200, 141 GB", 4, 139.8),
    Machine("8 x H200, 141 GB", 8, 139.8),
    Machine("4 x H100 or A100, 80 GB", 4, 79.1),
    Machine("8 x H100 or A100, 80 GB", 8, 79.1),
    Machine("16 x H100 or A100, 80 GB", 16, 79.1),
    Machine("4 x 96 GB", 4, 94.9),
    Machine("8 x 96 GB", 8, 94.9),
    Machine("8 x 48 GB", 8, 47.4),
    Machine("16 x 48 GB", 16, 47.4),
    Machine("16 x 24 GB", 16, 23.5),
)
# Single GPUs, for experts on the host.
SINGLE_MACHINES = (
    Machine("1 x H200, 141 GB", 1, 139.8),
    Machine("1 x 96 GB", 1, 94.9),
    Machine("1 x H100 or A100, 80 GB", 1, 79.1),
    Machine("1 x 48 GB", 1, 47.4),
    Machine("1 x 32 GB", 1, 31.4),
    Machine("1 x 24 GB", 1, 23.5),
)
SHARES = (0.5, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01, 0.005)
CONTEXT_ON_HOST = 32768
CONTEXTS = (2048, 8192, 32768, 131072, 524288, 1048576)
PRECISIONS = ("bf16", "mxfp8", "nf4")
CHECKPOINTED = {"gradient_checkpointing": True}
# name: fields of the request
GENERATION = {precision: {"precision": precision} for precision in PRECISIONS}
# What `minimax-m3 train` shards while it loads: no weights in nf4, and no experts with adapters by expert parallelism.
TRAINING: dict[str, dict] = {
    "LoRA on attention, bf16": {"training": "lora", "strategy": "expert_parallel"},
    "LoRA on attention, mxfp8": {"training": "qlora", "precision": "mxfp8", "strategy": "expert_parallel"},
    "LoRA on attention and experts, mxfp8": {
        "training": "qlora",
        "precision": "mxfp8",
        "lora_experts": True,
        "strategy": "fsdp2",
    },
}


@cache
def released() -> MemoryPlan:
    return plan_memory("released", MemoryRequest())


def longest(machine: Machine, **fields) -> str:
    """The longest of `CONTEXTS` whose plan fits, in words."""
    fitting = ""
    for context in CONTEXTS:
        request = MemoryRequest(context=context, devices=machine.devices, device_gib=machine.gib, **fields)
        if not released().with_request(request).fits:
            break
        fitting = "1M" if context == 2**20 else f"{context // 1024}k"
    return fitting or "-"


def largest_share(machine: Machine, precision: str) -> str:
    """The largest of `SHARES` that leaves room for `CONTEXT_ON_HOST` tokens."""
    for share in SHARES:
        request = MemoryRequest(
            precision=precision, context=CONTEXT_ON_HOST, device_gib=machine.gib, experts_on_device=share
        )
        if released().with_request(request).fits:
            return f"{share}"
    return "-"


def host_gib(precision: str) -> float:
    """What the host needs for experts in `precision`."""
    return released().with_request(MemoryRequest(precision=precision, experts_on_device=SHARES[-1])).host_gib


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    generation = table(
        ["machine", *GENERATION],
        (
            [
                machine.name,
                *(
                    longest(machine, strategy="single" if machine.devices == 1 else "device_map", **fields)
                    for fields in GENERATION.values()
                ),
            ]
            for machine in MACHINES
        ),
    )
    training = table(
        ["machine", *TRAINING],
        (
            [machine.name, *lengths]
            for machine in MACHINES
            if set(lengths := [longest(machine, **CHECKPOINTED, **fields) for fields in TRAINING.values()]) != {"-"}
        ),
    )
    on_host = table(
        [
            "machine",
            *(f"{precision}, {host_gib(precision):.0f} GiB of host memory" for precision in ("bf16", "mxfp8")),
        ],
        (
            [machine.name, *(largest_share(machine, precision) for precision in ("bf16", "mxfp8"))]
            for machine in SINGLE_MACHINES
        ),
    )
    texts = (
        "Generation, one row, layers spread by `device_map`: the longest context that fits, of 2k, 8k, 32k, 128k, 512k "
        "and 1M tokens.",
        "Training with activation checkpointing, one row in each process: the longest row that fits, of the same "
        "lengths. The other machines above train none of these.",
        f"Generation with the experts in the memory of the host, one row of {CONTEXT_ON_HOST // 1024}k tokens: the "
        "largest `experts_on_device` that fits, of "
        f"{', '.join(map(str, SHARES))}. {SHARES[-1]} of the experts is "
        f"{int(SHARES[-1] * 57 * 128)} of them; a token uses 4 in each of 57 layers.",
    )
    parts = zip((textwrap.fill(text, 120) for text in texts), (generation, training, on_host), strict=True)
    return "\n\n".join(f"{text}\n\n{figures}" for text, figures in parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/hardware.md")
    if not parser.parse_args(argv).write:
        print(tables())
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
