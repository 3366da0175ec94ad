"""docs/hardware.md has the tables that the planner gives."""

import pytest


@pytest.fixture
def hardware_table(load_script):
    return load_script("hardware_table")


def test_the_page_has_the_tables(hardware_table):
    assert hardware_table.tables() in hardware_table.PAGE.read_text(encoding="utf-8"), (
        "scripts/hardware_table.py --write"
    )


@pytest.mark.parametrize("gib, expected", [(60.0, "-"), (4000.0, "1M")])
def test_longest(hardware_table, gib, expected):
    machine = hardware_table.Machine("test", 1, gib)
    assert hardware_table.longest(machine, strategy="single", precision="mxfp8") == expected


def test_no_machine_of_the_page_trains_all_weights(hardware_table):
    """As the page says: not even with the optimizer that keeps nothing."""
    for machine in hardware_table.MACHINES:
        fields = {"strategy": "fsdp2", "training": "full", "optimizer": "sgd", **hardware_table.CHECKPOINTED}
        assert hardware_table.longest(machine, **fields) == "-", machine
