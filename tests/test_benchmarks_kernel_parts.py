"""Which part of the model a kernel belongs to, from traces made up and from a trace of a model on a CPU."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused.support import runs_as_written
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM


@pytest.fixture
def kernel_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    return importlib.import_module("benchmarks.kernel_parts")


class Trace:
    """Events as the profiler exports them. Calls nest by their times; kernels run one after the other."""

    def __init__(self):
        self.events, self.launches = [], 0

    def call(self, name, start, stop, category="cpu_op", thread=1, **args):
        event = {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": start, "dur": stop - start}
        self.events.append(event | {"args": {key.replace("_", " "): value for key, value in args.items()}})

    def range(self, part, start, stop, thread=1):
        self.call(f"part: {part}", start, stop, "user_annotation", thread)

    def kernel(self, name, at, us=1.0, thread=1):
        self.launches += 1
        self.events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": thread, "ts": at, "dur": 0.1}
            | {"args": {"correlation": self.launches}}
        )
        self.events.append(
            {"ph": "X", "cat": "kernel", "name": name, "tid": 99, "ts": 1000 + 2 * self.launches, "dur": us}
            | {"args": {"correlation": self.launches}}
        )


def parts_of(kernel_parts, trace):
    return [kernel_parts.part_of(kernel) for kernel in kernel_parts.kernels_of(trace.events)]


def test_the_innermost_range_or_name_decides(kernel_parts):
    trace = Trace()
    trace.range("model", 0, 100)
    trace.range("attention layer", 10, 50)
    trace.range("projections", 11, 15)
    trace.kernel("nvjet_gemm", 12)
    trace.kernel("elementwise_kernel", 20)
    trace.call("minimax_m3_msa::select_blocks", 25, 30)
    trace.kernel("a_kernel", 26)
    trace.range("block attention", 31, 35)
    trace.kernel("a_kernel", 32)
    trace.range("shared expert", 60, 70)
    trace.kernel("few_token_linear_kernel", 61)
    trace.kernel("swiglu_kernel", 62)
    trace.range("routed experts", 71, 75)
    trace.kernel("few_token_experts_kernel", 72)
    trace.kernel("elementwise_kernel", 80)
    assert parts_of(kernel_parts, trace) == [
        "projections",
        "rest",
        "index and selection",
        "block attention",
        "shared expert",
        "activation",
        "routed experts",
        "rest",
    ]


def test_one_product_for_several_projections_is_a_projection(kernel_parts):
    trace = Trace()
    trace.range("attention layer", 0, 10)
    trace.call("aten::linear", 1, 5)
    trace.call("aten::mm", 2, 4)
    trace.kernel("nvjet_gemm", 3)
    trace.range("model", 20, 30)
    trace.call("aten::mm", 21, 24)
    trace.kernel("nvjet_gemm", 22)
    assert parts_of(kernel_parts, trace) == ["projections", "head"]


def test_names_of_fused_operators(kernel_parts):
    names = {
        "void rms_norm_kernel<bf16>": "norms and rotary",
        "norm_rotary_kernel": "norms and rotary",
        "swiglu_kernel": "activation",
        "route_kernel": "router",
        "few_token_experts_kernel": "routed experts",
        "few_token_gate_up_kernel": "routed experts",
        "attention_input_kernel": "norms and rotary",
        "pytorch_flash::flash_fwd_splitkv_kernel": "dense attention",
        "split_attention_kernel": "block attention",
        "index_scores_kernel": "index and selection",
        "elementwise_kernel": "rest",
    }
    found = {name: kernel_parts.part_of(kernel_parts.Kernel(name, 0, 1)) for name in names}
    assert found == names


def test_backward_belongs_to_the_part_of_its_forward(kernel_parts):
    trace = Trace()
    trace.range("head", 0, 10)
    trace.call("aten::detach", 1, 2, Sequence_number=7)  # has no gradient, and sees the number of the next operator
    trace.range("projections", 20, 30)
    trace.call("aten::mm", 21, 25, Sequence_number=7, Fwd_thread_id=0)
    trace.call(
        "autograd::engine::evaluate_function: MmBackward0", 40, 60, thread=2, Sequence_number=7, Fwd_thread_id=1
    )
    trace.call("aten::mm", 41, 45, thread=2)
    trace.kernel("nvjet_gemm", 42, thread=2)
    # the forward that checkpointing computes again, which counts from the start in its own thread
    trace.range("router", 50, 55, thread=2)
    trace.call("aten::topk", 51, 54, thread=2, Sequence_number=7, Fwd_thread_id=0)
    trace.kernel("topk_kernel", 52, thread=2)
    assert parts_of(kernel_parts, trace) == ["projections", "router"]


def test_a_replay_has_the_parts_of_the_eager_run_in_order(kernel_parts):
    def kernels(*names, around=()):
        return [
            kernel_parts.Kernel(name, 2.0 * i, 1.0, [f"part: {around[i]}"] if around else [])
            for i, name in enumerate(names)
        ]

    eager = kernels("gemm", "add", "gemm", "add", around=("projections", "cache", "head", "rest"))
    assert kernel_parts.parts_by_order(kernels("gemm", "add", "gemm", "add"), eager) == [
        "projections",
        "cache",
        "head",
        "rest",
    ]
    # a kernel that the eager run lacks gets its part by its name
    replayed = kernels("gemm", "swiglu_kernel", "add", "gemm", "add")
    assert kernel_parts.parts_by_order(replayed, eager) == ["projections", "activation", "cache", "head", "rest"]


def test_gaps_are_what_no_kernel_fills(kernel_parts):
    kernels = [
        kernel_parts.Kernel("a", 0, 1000),
        kernel_parts.Kernel("b", 500, 1000),
        kernel_parts.Kernel("c", 3000, 500),
    ]
    kernels.append(kernel_parts.Kernel("Memcpy DtoD", 3400, 50))
    assert kernel_parts.own_us(kernels) == [1000, 500, 500, 0]
    found = kernel_parts.breakdown(kernels, ["head", "cache", "head", "rest"], 3.5)
    assert found["gaps_ms"] == 1.5 and found["kernels"] == 3
    assert found["parts_ms"] == {"head": 1.5, "cache": 0.5}
    assert found["longest"][0] == {"part": "head", "kernel": "a", "ms": 1.0, "calls": 1}


def test_ranges_of_a_real_trace(kernel_parts, tmp_path):
    """Each operator of a tiny model on a CPU counts as a kernel, in a training step that computes its forward again."""
    model = MiniMaxM3VLForCausalLM(tiny_config().text_config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, model.config.vocab_size, (1, 100))
    call = torch.nn.Module.__call__
    with kernel_parts.model_ranges(model), torch.profiler.profile() as profiler:
        assert runs_as_written(model.lm_head, torch.nn.Linear), "fused operators run as without the ranges"
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert torch.nn.Module.__call__ is call
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    trace = Trace()
    trace.events = list(events)
    names = {"aten::mm", "aten::topk", "aten::sigmoid", "aten::rsqrt"}
    for event in events:
        if event.get("cat") == "cpu_op" and event["name"] in names:
            trace.kernel(event["name"], event["ts"] + event["dur"] / 2, thread=event["tid"])
    found = {(kernel.name, kernel_parts.part_of(kernel)) for kernel in kernel_parts.kernels_of(trace.events)}
    matrices = {"projections", "dense MLP", "shared expert", "routed experts", "router", "head"}
    attention = {"block attention", "index and selection"}  # on a CPU they use the same products
    assert {part for name, part in found if name == "aten::mm"} == matrices | attention
    assert {part for name, part in found if name == "aten::rsqrt"} == {"norms and rotary"}
    assert {part for name, part in found if name == "aten::sigmoid"} == {"router", "activation"}
    assert {part for name, part in found if name == "aten::topk"} == {"router", "index and selection"}
