"""Two processes train as one does: data parallelism, and weights sharded over the devices, experts among them."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def in_one_process(train):
    return train("trainer", on_cpu=True)


def check(found, in_one_process):
    assert found["losses"] == pytest.approx(in_one_process["losses"], rel=0, abs=1e-4)
    # AdamW hardly sees a factor that all gradients of a weight have; their norm does
    assert found["norms"] == pytest.approx(in_one_process["norms"], rel=1e-4)


def check_monitored(found, in_one_process, processes=2):
    """`RunMonitor` counts the rows of all processes once, and the operations of one device."""
    assert len(found["monitored"]) == len(in_one_process["monitored"]) > 0
    for entry, expected in zip(found["monitored"], in_one_process["monitored"], strict=True):
        for name in ("expert_entropy", "expert_most_used", "expert_least_used"):
            assert entry[name] == pytest.approx(expected[name], abs=2e-3), name  # rounding moves single choices
        for name in ("language_loss", "indexer_loss"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3), name
        # each process balances its own tokens
        assert entry["balance_loss"] == pytest.approx(expected["balance_loss"], rel=0.05)
        per_token, of_one = (values["flops_per_second"] / values["tokens_per_second"] for values in (entry, expected))
        assert per_token * processes == pytest.approx(of_one, rel=1e-3)
        shares = [values["learned_tokens_per_second"] / values["tokens_per_second"] for values in (entry, expected)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-6)
        assert entry["mfu"] == pytest.approx(entry["flops_per_second"] / 1e12)


def test_data_parallelism(train, in_one_process):
    """`accelerate launch` starts them with our configuration. Router and indexer losses are on."""
    found = train("trainer", config="ddp", on_cpu=True)
    check(found, in_one_process)
    check_monitored(found, in_one_process)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_fully_sharded(train, in_one_process, engine):
    if engine == "zero3" and find_spec("deepspeed") is None:  # not imported here: it changes what other packages do
        pytest.skip("DeepSpeed is not installed")
    check(train(engine, processes=2, DS_ACCELERATOR="cpu", on_cpu=True), in_one_process)


@pytest.mark.parametrize("engine", ["expert_parallel", "expert_and_tensor_parallel", "tensor_parallel"])
def test_plans(train, in_one_process, engine):
    """Transformers' plans, by `from_pretrained(distributed_config=...)`.

    The worker also compares the weights (of the composite model too) and the logits with those of the whole model, and
    what was saved after the training.
    """
    found = train(engine, processes=2, on_cpu=True)
    check(found, in_one_process)
    check_monitored(found, in_one_process)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert str(config.distributed_type.value) == yaml.safe_load(path.read_text())["distributed_type"]
