"""Small sums in two processes: started by a test, not by pytest.

`one_shot_sum_worker.py set_up` runs on CPUs, where gloo stands for NCCL and a class for PyTorch's symmetric memory. It
checks that both processes come to the same answer, whatever fails in one of them. `one_shot_sum_worker.py kernel` runs
on two GPUs and compares the kernel with NCCL.
"""

import os
import sys
from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
from torch import distributed
from torch._C import _distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from modeling_minimax_m3.fused import one_shot_sum
from modeling_minimax_m3.fused.shards import Processes

RANK = int(os.environ["RANK"])
HIDDEN = 6144
REPLAYS = 50
LAYERS = 5


class FakeMemory:
    """Memory of this process alone. `fails` names what fails in the second process."""

    def __init__(self, fails: str | None):
        self.fails, self.calls = fails, []

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails and RANK == 1:
            raise RuntimeError(f"{name} failed")

    def empty_strided_p2p(self, size, stride, dtype, device) -> torch.Tensor:
        self._note("reserve")
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def rendezvous(self, tensor, name) -> object | None:
        assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
        self._note("share")
        return None if self.fails == "lost" and RANK == 1 else object()


def check_case(processes, fails=None, calls=(), warning=None, place=None, atomics=True, switch="1") -> None:
    """One set-up, and two sums behind it. Without a failure the kernel makes them, and otherwise gloo does."""
    group = processes.mesh.get_group()
    memory, used = FakeMemory(fails), []

    def kernel(terms, operation, name):
        used.append(name)
        result = terms.clone()
        distributed.all_reduce(result, group=group)
        return result

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(_distributed_c10d, "_SymmetricMemory", memory),
            mock.patch.object(one_shot_sum, "takes", lambda states, count: True),
            mock.patch.object(one_shot_sum, "_has_atomics", lambda device, peer: atomics or RANK == 0),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
            mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
            mock.patch.object(torch.ops.symm_mem, "one_shot_all_reduce", kernel),
            mock.patch.dict(os.environ, {"MINIMAX_M3_ONE_SHOT_SUMS": switch}),
            mock.patch.object(one_shot_sum, "_place", place or one_shot_sum._place),
        ):
            stack.enter_context(patch)
        log = stack.enter_context(mock.patch.object(one_shot_sum.logger, "warning"))
        one_shot_sum._buffers.clear()
        for step in range(2):
            states = torch.arange(8.0) + 10 * RANK + step
            expected = 2 * torch.arange(8.0) + 10 + 2 * step
            assert torch.equal(processes.total(states), expected)
    succeeds = warning is None and calls == ("reserve", "share")
    assert (one_shot_sum._buffers[group] is not None) == succeeds
    assert len(used) == (2 if succeeds else 0)
    assert tuple(memory.calls) == calls, memory.calls
    messages = [call.args[0] for call in log.call_args_list]
    assert len(messages) == (0 if warning is None or RANK else 1), messages
    assert all(warning in message for message in messages), messages


def check_set_up() -> None:
    distributed.init_process_group("gloo")
    processes = Processes(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"])
    assert torch.equal(processes.total(torch.full((8,), 1.0 + RANK)), torch.full((8,), 3.0))
    assert not one_shot_sum._buffers  # on a CPU nothing is set up
    with torch.no_grad():
        both = ("reserve", "share")
        check_case(processes, calls=both)
        check_case(processes, calls=both, place=lambda device: ("host", "boot", RANK))
        # A process of which the first step fails has not reserved memory; then none shares any.
        check_case(processes, "reserve", ("reserve",), "reserve failed")
        check_case(processes, "share", both, "share failed")
        check_case(processes, "lost", both, "not known as symmetric")
        check_case(processes, place=lambda device: (f"host {RANK}", "boot", 0))
        check_case(processes, place=lambda device: ("host", f"boot {RANK}", 0))
        calls = () if RANK else ("reserve",)
        check_case(processes, calls=calls, place=lambda device: ("host", "boot", RANK), atomics=False)
        check_case(processes, calls=calls, switch="0" if RANK else "1")


def sums_of(states: torch.Tensor, weights: torch.Tensor, total) -> torch.Tensor:
    """Sums back to back, each of what the one before gave."""
    for weight in weights:
        states = total(states * weight).tanh()
    return states


def captured(function) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph, result


def check_replays(processes, by_nccl, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Replays with new inputs, in which now one process is late and now the other, have the bits of NCCL."""
    generator = torch.Generator("cuda").manual_seed(1 + RANK)
    inputs = torch.randn(REPLAYS, *shape, generator=generator, device="cuda").to(dtype)
    weights = torch.randn(LAYERS, *shape, generator=generator, device="cuda").to(dtype)
    states = inputs[0].clone()
    with mock.patch.object(one_shot_sum, "total", side_effect=one_shot_sum.total) as total:
        graph, result = captured(lambda: sums_of(states, weights, processes.total))
    assert total.call_count == 2 * LAYERS
    found = []
    for step in range(REPLAYS):
        states.copy_(inputs[step])
        if step % 2 == RANK:
            torch.cuda._sleep(200_000)
        graph.replay()
        found.append(result.clone())
        if step % 10 == 0:  # outside of the graph, in the same buffer
            found.append(sums_of(states, weights, processes.total))
    expected = []
    for step in range(REPLAYS):
        expected.append(sums_of(inputs[step], weights, by_nccl))
        if step % 10 == 0:
            expected.append(expected[-1])
    found, expected = torch.stack(found), torch.stack(expected)
    assert torch.equal(found, expected), (shape, dtype, (found != expected).sum())
    assert (found[1:] != found[:-1]).flatten(1).any(1).sum() == REPLAYS - 1  # the inputs came through
    of_both = [torch.empty_like(found) for _ in range(2)]
    distributed.all_gather(of_both, found)
    assert torch.equal(*of_both)


def microseconds(total, shape: tuple[int, ...]) -> float:
    """Of one sum in a graph of 20."""
    states = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")

    def repeat() -> torch.Tensor:
        result = states
        for _ in range(20):
            result = total(result)
        return result

    graph, _ = captured(repeat)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for count in range(11):
        if count == 1:
            start.record()
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / 200


def check_kernel() -> None:
    torch.cuda.set_device(RANK)
    distributed.init_process_group("nccl")
    processes = Processes(init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))["tp"])
    group = processes.mesh.get_group()

    def by_nccl(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        distributed.all_reduce(states, group=group)
        return states

    with torch.no_grad():
        for shape, dtype in (
            ((8,), torch.bfloat16),
            ((1, 1, HIDDEN), torch.bfloat16),
            ((1, HIDDEN), torch.float32),
            ((16, HIDDEN), torch.bfloat16),
            ((128 * 1024,), torch.bfloat16),  # the most
        ):
            states = torch.randn(shape, device="cuda").to(dtype)
            assert one_shot_sum.takes(states, 2)
            assert torch.equal(processes.total(states.clone()), by_nccl(states))
            assert one_shot_sum._buffers[group] is not None, "no buffer was set up"
            check_replays(processes, by_nccl, shape, dtype)
        lines = [
            "us of one sum of bf16 over two GPUs in a CUDA graph",
            "| KB | one-shot | NCCL, in place |",
            "| --- | --- | --- |",
        ]
        for tokens in (1, 4, 16, 21):
            own = microseconds(processes.total, (tokens, HIDDEN))
            nccl = microseconds(lambda states: distributed.all_reduce(states, group=group) or states, (tokens, HIDDEN))
            lines.append(f"| {tokens * HIDDEN * 2 / 1000:.0f} | {own:.1f} | {nccl:.1f} |")
    if RANK == 0:
        print("\n".join(lines))
    torch.cuda.synchronize()
    distributed.barrier()


if __name__ == "__main__":
    {"set_up": check_set_up, "kernel": check_kernel}[sys.argv[1]]()
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is
    # done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
