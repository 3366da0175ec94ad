"""Which part of the model a GPU kernel belongs to, from a trace of `torch.profiler`.

Ranges around modules and functions of the model name the part of what runs inside them (`model_ranges`). The profiler
links each kernel to the call that launched it, and with it to the operators and ranges around that call. The innermost
of them that says something decides: a name of `NAMES`, or a range. An operator of the backward belongs where the
operator of the forward does that made it. A replay of a CUDA graph has no such links: its kernels get the parts of an
eager run of the same pass, in order (`parts_by_order`).
"""

import importlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PARTS = (
    "dense attention",
    "block attention",
    "index and selection",
    "routed experts",
    "shared expert",
    "dense MLP",
    "projections",
    "norms and rotary",
    "router",
    "activation",
    "cache",
    "head",
    "rest",
)
RANGE = "part: "


def _patterns(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), part) for pattern, part in pairs)


# A kernel or operator whose name matches belongs to the part, wherever it is called. The first match counts.
NAMES = _patterns(
    (r"swiglu", "activation"),
    (r"rms_?norm|RmsNorm|norm_rotary|attention_input", "norms and rotary"),
    (r"route(?!d)", "router"),
    (r"select_blocks|structured_blocks|index_scores|block_scores|top_blocks|indexer_kl", "index and selection"),
)
# The same for what no range surrounds.
NAMES_WITHOUT_RANGE = _patterns(
    (r"few_token_experts|few_token_mlp|few_token_gate_up|few_token_down|list_experts|grouped_mm", "routed experts"),
    (r"block_sparse_attention|split_attention|one_group_attention|query_major_kernel", "block attention"),
    (r"packed_causal|scaled_dot_product|flash_attention|flash_fwd|flash_bwd|cudnn.*sdpa", "dense attention"),
)
# Module names, searched from the top. Each gets a range of that name around its forward.
MODULES = _patterns(
    (r"self_attn\.(indexer\.)?[qkvo]_proj$", "projections"),
    (r"norm$|rotary_emb$", "norms and rotary"),
    (r"self_attn(\.indexer)?$", "attention layer"),
    (r"mlp\.experts$", "routed experts"),
    (r"mlp\.shared_experts$", "shared expert"),
    (r"mlp\.gate$", "router"),
    (r"mlp$", "MLP"),
    (r"lm_head$", "head"),
    (r"layers\.\d+$", "norms and rotary"),  # a layer itself only adds to the residual stream
    (r"^$", "model"),
)
# Functions and methods of the model that get a range, where they exist: "module:name" or "module:class.name".
FUNCTIONS = (
    ("modeling_minimax_m3.layers.attention:dense_attention", "dense attention"),
    ("modeling_minimax_m3.layers.attention:MiniMaxM3VLAttention._block_attention", "block attention"),
    ("modeling_minimax_m3.layers.attention:apply_rotary", "norms and rotary"),
    ("modeling_minimax_m3.layers.indexer:apply_rotary", "norms and rotary"),
    ("modeling_minimax_m3.layers.block_selection:LearnedSelector.select", "index and selection"),
    ("modeling_minimax_m3.layers.moe:swiglu_oai", "activation"),
    ("modeling_minimax_m3.runtime.cache:MiniMaxM3VLSparseDynamicLayer.update_index", "cache"),
    ("modeling_minimax_m3.runtime.cache:MiniMaxM3VLSparseStaticLayer.update_index", "cache"),
    ("transformers.cache_utils:Cache.update", "cache"),
)
# Ranges that are no part. Operators inside that match get the part beside them, all others the part at the end.
_MATRIX = r"linear|matmul|::mm|::addmm|gemm"
SCOPES = {
    "attention layer": ((re.compile(_MATRIX), "projections"), "rest"),
    "MLP": ((re.compile(r"$^"), ""), "routed experts"),  # one kernel may compute the shared expert too
    "model": ((re.compile(_MATRIX + "|softmax|cross_entropy|nll_loss"), "head"), "rest"),
}


@dataclass
class Kernel:
    name: str
    start_us: float
    us: float
    around: list[str] = field(default_factory=list)  # operators and ranges, the innermost first

    @property
    def is_kernel(self) -> bool:
        return not self.name.startswith(("Memcpy", "Memset"))


def part_of(kernel: Kernel) -> str:
    seen: list[str] = []
    for name in (kernel.name, *kernel.around):
        if not name.startswith(RANGE):
            seen.append(name)
            found = _first_match(NAMES, [name])
            if found is not None:
                return found
            continue
        label = name.removeprefix(RANGE)
        if label not in SCOPES:
            return label
        (pattern, part), default = SCOPES[label]
        return part if any(pattern.search(other) for other in seen) else default
    return _first_match(NAMES_WITHOUT_RANGE, seen) or "rest"


def _first_match(patterns: tuple[tuple[re.Pattern, str], ...], names: list[str]) -> str | None:
    return next((part for name in names for pattern, part in patterns if pattern.search(name)), None)


def kernels_of(events: list[dict[str, Any]]) -> list[Kernel]:
    """The kernels, copies and fills of a trace in the order of their start, with what stands around their launch."""
    events = [event for event in events if event.get("ph") == "X"]
    on_host = [event for event in events if event.get("cat") in _HOST_CATEGORIES]
    parents = _parents(on_host)
    launches = {
        event["args"]["correlation"]: position
        for position, event in enumerate(on_host)
        if "correlation" in event.get("args", {})
    }
    made_by = _forward_operators(on_host)
    kernels = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(event["args"].get("correlation"))
            around = [] if launch is None else _names_around(launch, on_host, parents, made_by)
            kernels.append(Kernel(event["name"], event["ts"], event.get("dur", 0.0), around))
    return sorted(kernels, key=lambda kernel: kernel.start_us)


_HOST_CATEGORIES = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


def _parents(events: list[dict[str, Any]]) -> list[int | None]:
    """For each event, the position of the innermost event of the same thread around it."""
    parents: list[int | None] = [None] * len(events)
    open_events: dict[Any, list[int]] = defaultdict(list)
    for position in sorted(range(len(events)), key=lambda i: (events[i]["ts"], -events[i].get("dur", 0.0))):
        event = events[position]
        stack = open_events[event["tid"]]
        while stack and events[stack[-1]]["ts"] + events[stack[-1]].get("dur", 0.0) <= event["ts"]:
            stack.pop()
        parents[position] = stack[-1] if stack else None
        stack.append(position)
    return parents


def _is_backward(event: dict[str, Any]) -> bool:
    return event.get("args", {}).get("Fwd thread id", 0) > 0


def _forward_operators(events: list[dict[str, Any]]) -> dict[int, int]:
    """The operator of the forward with each sequence number, which the operator of its backward has too.

    Operators without a gradient share the number of the next that has one, so the last with a number counts. Backward
    runs in a thread of its own, which counts anew when it computes a forward again.
    """
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    if not annotations:
        return {}
    thread = min(annotations, key=lambda event: event["ts"])["tid"]
    found: dict[int, int] = {}
    for position in sorted(range(len(events)), key=lambda i: events[i]["ts"]):
        event = events[position]
        number = event.get("args", {}).get("Sequence number")
        if number is not None and event["tid"] == thread and not _is_backward(event):
            found[number] = position
    return found


def _names_around(
    position: int | None, events: list[dict[str, Any]], parents: list[int | None], made_by: dict[int, int]
) -> list[str]:
    names = []
    while position is not None:
        event = events[position]
        if event["cat"] in ("cpu_op", "user_annotation"):
            names.append(event["name"])
        forward = made_by.get(event["args"].get("Sequence number", -1)) if _is_backward(event) else None
        position = parents[position] if forward is None else forward
    return names


def parts_by_order(replayed: Sequence[Kernel], eager: Sequence[Kernel]) -> list[str]:
    """The part of each kernel of a replay: that of the same kernel of the eager run.

    Both run the same kernels in the same order. Where some differ, the longest common runs are matched, and the names
    decide the others.
    """
    parts = [part_of(Kernel(kernel.name, 0.0, 0.0)) for kernel in replayed]
    names, other_names = ([kernel.name for kernel in kernels] for kernels in (replayed, eager))
    for run in SequenceMatcher(None, names, other_names, autojunk=False).get_matching_blocks():
        for offset in range(run.size):
            parts[run.a + offset] = part_of(eager[run.b + offset])
    return parts


def own_us(kernels: Sequence[Kernel]) -> list[float]:
    """Of each kernel, in the order of their starts, the time after the end of those that started before it.

    A kernel that is launched early only waits until then.
    """
    own, end = [], float("-inf")
    for kernel in kernels:
        stop = kernel.start_us + kernel.us
        own.append(max(0.0, stop - max(end, kernel.start_us)))
        end = max(end, stop)
    return own


def breakdown(kernels: Sequence[Kernel], parts: Sequence[str], wall_ms: float) -> dict[str, Any]:
    """Milliseconds by part, the gaps in which no kernel runs, and the kernels that take longest.

    Args:
        kernels (Sequence[Kernel]): Those of one pass, in the order of their starts.
        parts (Sequence[str]): The part of each kernel.
        wall_ms (float): How long the pass takes without a profiler.
    """
    by_part = dict.fromkeys(PARTS, 0.0)
    by_kernel: dict[tuple[str, str], list[float]] = defaultdict(list)
    times_us = own_us(kernels)
    for kernel, part, us in zip(kernels, parts, times_us, strict=True):
        by_part[part] += us / 1e3
        by_kernel[part, kernel.name].append(us / 1e3)
    longest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:20]
    return {
        "wall_ms": wall_ms,
        "parts_ms": {part: ms for part, ms in by_part.items() if ms},
        "gaps_ms": max(0.0, wall_ms - sum(times_us) / 1e3),
        "kernels": sum(kernel.is_kernel for kernel in kernels),
        "longest": [
            {"part": part, "kernel": name[:120], "ms": sum(times), "calls": len(times)}
            for (part, name), times in longest
        ],
    }


# --- on the GPU --------------------------------------------------------------------------------------------------


@contextmanager
def model_ranges(model: torch.nn.Module) -> Iterator[None]:
    """Puts a range around the modules of `MODULES` and the functions of `FUNCTIONS` while it is active.

    The model has no hooks meanwhile: fused operators take the place of plain modules only where these have none.
    """
    parts = {module: _part_of_module(name, module) for name, module in model.named_modules()}
    call = torch.nn.Module.__call__

    def call_in_range(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        part = parts.get(module)
        function = call if part is None else _in_range(call, part)
        return function(module, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Module, "__call__", call_in_range))
        for path, part in FUNCTIONS:
            owner, name = _owner(path)
            if owner is not None and hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, _in_range(getattr(owner, name), part)))
        yield


def _part_of_module(name: str, module: torch.nn.Module) -> str | None:
    part = _first_match(MODULES, [name])
    return "dense MLP" if part == "MLP" and not hasattr(module, "gate") else part


def _owner(path: str) -> tuple[Any, str]:
    module, _, name = path.partition(":")
    *classes, name = name.split(".")
    owner: Any = importlib.import_module(module)
    for class_name in classes:
        owner = getattr(owner, class_name, None)
    return owner, name


def _in_range(function: Callable, part: str) -> Callable:
    @wraps(function)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(RANGE + part):
            return function(*args, **kwargs)

    return in_range


def profile(function: Callable[[], Any]) -> list[Kernel]:
    """The kernels of one call of `function`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
