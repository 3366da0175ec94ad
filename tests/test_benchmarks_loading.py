"""The benchmark of loading, on a CPU with a small checkpoint: its checkpoint, its figures, and what loading holds."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import released_config, tiny_config
from modeling_minimax_m3.checkpoint_conversion import make_synthetic_checkpoint

MIB = 2**20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
# About 270 MB, nearly all of it in 40 experts of two layers, in shards of 50 MB. Python itself takes some 50 MB.
TEXT = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "hidden_size": 1024,
    "intermediate_size": 512,
    "shared_intermediate_size": 512,
    "num_local_experts": 40,
}
SHARD = 50 * 10**6


@pytest.fixture(scope="module")
def loading():
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks import loading

    yield loading
    sys.path.pop(0)


@pytest.fixture
def disk(loading):
    from benchmarks import disk

    return disk


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    tiny_config(text=TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def record(loading, geometry, tmp_path_factory):
    """A run of three cases, as the command makes it."""
    folder = tmp_path_factory.mktemp("loading")
    command = ["loading", "--device", "cpu", "--geometry", str(geometry), "--max_shard_size", str(SHARD)]
    command += ["--folder", str(folder / "checkpoint"), "--output", str(folder / "found"), "--case_seconds", "200"]
    command += ["--cases", "one device", "FSDP2", "expert parallelism"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        loading.main()
    assert not (folder / "checkpoint").exists(), "removed at the end"
    assert "| load / read |" in (folder / "found.md").read_text()
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@needs_proc
def test_record_of_a_run(record):
    assert record["state"] == "complete" and not record["failed"]
    assert {"commit", "command", "torch", "transformers", "cpu"} <= set(record["machine"])
    assert len(record["checkpoint"]["files"]) > 5
    for found in record["cases"].values():
        assert found["bytes"] == sum(record["checkpoint"]["files"])
        assert found["load_over_read"] == pytest.approx(found["load_seconds"] / found["read_seconds"])
        assert found["largest_shard_bytes"] == max(record["checkpoint"]["files"]) < 1.1 * SHARD


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("case", ["FSDP2", "expert parallelism"])
def test_two_processes_share_the_weights(record, case):
    first, second = record["cases"][case]["processes"]
    whole = record["cases"]["one device"]["processes"][0]["weights_on_host_bytes"]
    for found in (first, second):
        assert whole / 2 <= found["weights_on_host_bytes"] < 0.56 * whole


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("case", ["one device", "FSDP2", "expert parallelism"])
def test_host_memory_stays_below_two_shards(record, case):
    """Beside the weights that a process keeps. Python's own memory for the model's classes counts too."""
    found = record["cases"][case]
    if not all(process["anonymous_source"] in ("RssAnon", "smaps_rollup") for process in found["processes"]):
        pytest.skip("this system does not tell anonymous memory from mapped files")
    assert found["host_shards"] <= 2, f"{found['host_bytes'] / MIB:.0f} MiB"


@needs_proc
def test_sampler_sees_memory_that_is_freed_again(loading):
    with loading.MemorySampler() as memory:
        block = torch.ones(512 * MIB, dtype=torch.uint8)
        loading.time.sleep(0.1)
        del block
    if memory.source == "RssAnon":  # less than the block: what earlier tests left may be freed meanwhile
        assert memory.peak - memory.start > 256 * MIB
    assert memory.peak >= memory.end


def test_dropped_files_are_read_from_the_disk(disk, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 * MIB))
    share = disk.cached_share([file])
    if share is None or disk.drop_from_cache([file]) == share:
        pytest.skip("this file system does not tell, or does not drop files")
    assert share == 1.0 and disk.cached_share([file]) < 0.1
    assert disk.read_seconds([file]) > 0 and disk.cached_share([file]) == 1.0


def test_host_bytes_leave_out_what_was_there_and_what_stays(loading):
    found = {"anonymous_start_bytes": 100, "anonymous_peak_bytes": 190, "weights_on_host_bytes": 60}
    assert loading.host_bytes(found | {"pinned_peak_bytes": 5}) == 35
    assert loading.host_bytes(found | {"pinned_peak_bytes": 5, "weights_on_host_bytes": 500}) == 5


@pytest.mark.parametrize("gigabytes", [14.0, 40.0, 60.0, 400.0])
def test_layers_and_experts_give_the_size(loading, gigabytes):
    layers, experts = loading.layers_and_experts(gigabytes)
    config = released_config()
    assert loading.size_of(config, layers, experts) == pytest.approx(gigabytes, rel=0.03)
    assert 4 <= layers <= 60 and 8 <= experts <= 128


def test_size_is_that_of_the_model(loading):
    from modeling_minimax_m3.memory_plan import MemoryRequest, plan_memory, read_config

    config = read_config("released", layers=5)
    parameters = plan_memory(config, MemoryRequest()).parameters
    assert loading.size_of(config, 5, 128) * 1e9 == pytest.approx(2 * sum(parameters.values()), rel=0.01)


def test_errors_come_before_anything_is_written(loading, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--gigabytes must be at least .* got 1.0"):
        loading.layers_and_experts(1.0)
    usage = loading.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: usage)
    arguments = loading.argparse.Namespace(geometry=None, gigabytes=40.0, max_shard_size=SHARD)
    with pytest.raises(SystemExit, match="42.0 GB are needed, and 1.0 GB are free"):
        loading.make_checkpoint(tmp_path / "new", arguments)
    assert not (tmp_path / "new").exists()


def test_cases_that_need_more_devices_are_skipped(loading, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = loading.argparse.Namespace(device="cuda")
    with pytest.raises(loading.Skipped, match="needs 2 GPUs, and this machine has 1"):
        loading.run_case("FSDP2", None, arguments)


def test_a_process_that_fails_is_told(loading, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    checkpoint = make_synthetic_checkpoint(tmp_path / "tiny", tiny_config(), repeated=True, show_progress=False)
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"cut off")
    arguments = loading.argparse.Namespace(device="cpu", case_seconds=100)
    with pytest.raises(RuntimeError, match="a process ended with exit code 1"):
        loading.run_case("one device", checkpoint, arguments)
