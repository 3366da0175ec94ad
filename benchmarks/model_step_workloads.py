"""What `model_step` measures on a model: each function takes a model and a case, and returns figures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from modeling_minimax_m3 import msa
from modeling_minimax_m3.runtime.captured_decoding import CapturedDecoding
from modeling_minimax_m3.runtime.graph_pieces import GraphPieces
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

from . import kernel_parts
from .gpu import BLOCK, DIM, HEADS, KV_HEADS, clustered_blocks, time_ms
from .implementations import OURS, STOCK, classes, text_config
from .model_step_floors import layers_config

# dense layers, sparse layers, experts (None: the released number)
MODELS: dict[str, tuple[int, int, int | None]] = {
    "4 layers": (1, 3, None),
    "7 layers": (1, 6, None),
    "training": (1, 2, 64),
    "small": (1, 1, 8),
}
CHUNK = 32768  # tokens in which a long prompt is read
PIECE = 2048  # tokens of a row in which a batch is read


@dataclass(frozen=True)
class Case:
    """A row of the record.

    Args:
        group (str): Name in `--cases`.
        model (str): Key of `MODELS`.
        work (str): What is measured, for readers.
        measure (Callable): Takes the model and this case, and returns the figures.
        new (int): Tokens of a row that a pass reads.
        past (int): Tokens of a row that the cache holds before.
        batch (int): Rows.
        stock (bool): Whether stock can do it in the time and memory that there is.
    """

    group: str
    model: str
    work: str
    measure: Callable[[Any, "Case"], dict[str, Any]]
    new: int = 1
    past: int = 0
    batch: int = 1
    stock: bool = False

    def key(self) -> dict[str, Any]:
        names = ("group", "model", "work", "new", "past", "batch")
        return {name: getattr(self, name) for name in names}


def build(implementation: str, model: str) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        config = text_config(implementation, layers_config(*MODELS[model]))
        built = classes(implementation).MiniMaxM3VLForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    # Stock's module enters its cache layers into the table that ours are in. Ours also replace those of stock in use.
    if implementation == STOCK and type(DynamicCache(config=config).layers[-1]).__module__.startswith("modeling_"):
        raise RuntimeError("stock's model would run with our cache: import it after ours")
    return built.eval()


def measured(implementation: str, model: Any, case: Case) -> dict[str, Any]:
    """The figures of a case. Stock gets the better of two settings.

    PyTorch prefers cuDNN's attention on Hopper, which prepares a plan for each new length. In stock's `generate` every
    token has a new length. So stock is measured with cuDNN's attention on (PyTorch's default) and off.
    """
    # A static cache has one length, and compiling for it takes long.
    if implementation == OURS or "static" in case.work or case.group == "batch" or case.measure is head:
        return case.measure(model, case)
    found = {}
    for setting, is_on in (("cuDNN", True), ("no cuDNN", False)):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        found[setting] = case.measure(model, case)
    torch.backends.cuda.enable_cudnn_sdp(True)
    best = min(found.values(), key=lambda figures: figures["ms"])
    return best | {"ms_by_setting": {setting: figures["ms"] for setting, figures in found.items()}}


# --- decoding ----------------------------------------------------------------------------------------------------


def tokens_of(model: Any, *shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, model.config.vocab_size, shape, device=model.device)


def states_of(model: Any, *shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, model.config.hidden_size, device=model.device, dtype=model.dtype)


@torch.no_grad()
def read(model: Any, tokens: torch.Tensor, cache: Cache | None = None, chunk: int = CHUNK) -> Cache:
    """A cache that holds `tokens` (B, S)."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    for piece in tokens.split(chunk, dim=1):
        model(piece, logits_to_keep=1, **{CACHE_NAME: cache})
    return cache


def captured_step(model: Any, case: Case) -> tuple[CapturedDecoding, dict[str, Any]]:
    """What `generate` calls for a token, and the arguments of that call."""
    cache = read(model, tokens_of(model, case.batch, case.past), chunk=PIECE if case.batch > 1 else CHUNK)
    inputs = {
        "input_ids": tokens_of(model, case.batch, 1),
        "use_cache": True,
        "logits_to_keep": 1,
        "return_dict": True,
    }
    return CapturedDecoding(model), inputs | {"cache": cache}


def graph_of(captured: CapturedDecoding) -> GraphPieces:
    step = captured._pass
    if step is None or step._graph is None:
        raise RuntimeError(f"the step was not captured: {captured._told}")
    return step._graph


@torch.no_grad()
def graph_step(model: Any, case: Case) -> dict[str, Any]:
    """A replay of the captured step, without the loop of `generate`."""
    captured, inputs = captured_step(model, case)
    with model._optimize_model_for_decode():
        for _ in range(2):  # the first prepares, the second captures
            captured(**inputs)
    graph = graph_of(captured)
    ms = time_ms(graph.replay)
    return {"ms": ms, "kernels": sum(kernel.is_kernel for kernel in kernel_parts.profile(graph.replay))}


class Clock:
    """A logits processor that takes the time between two tokens, each after the GPU has finished it."""

    def __init__(self, first: int, last: int):
        self._first, self._last = first, last
        self._count = 0
        self._times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._count += 1
        if self._count in (self._first, self._last):
            torch.cuda.synchronize()
            self._times.append(time.perf_counter())
        return scores

    def ms(self) -> float:
        start, stop = self._times
        return 1e3 * (stop - start) / (self._last - self._first)


def generate(model: Any, case: Case) -> dict[str, Any]:
    """Milliseconds of a token of `generate`, the better of two runs, and how long the first run took in all."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 96}
    if "static" in case.work:
        options |= {"cache_implementation": "static"}
    tokens = tokens_of(model, case.batch, case.past)
    clocks = [Clock(32, 96) for _ in range(2)]
    seconds = [
        synchronized_ms(partial(model.generate, tokens, logits_processor=[clock], **options)) / 1e3 for clock in clocks
    ]
    return {"ms": min(clock.ms() for clock in clocks), "first_run_s": seconds[0], "second_run_s": seconds[1]}


@torch.no_grad()
def experts_of_a_layer(model: Any, case: Case) -> dict[str, Any]:
    """Router, routed experts and shared expert of one layer for one token of each row, in a CUDA graph."""
    block = model.model.layers[-1].mlp
    states = states_of(model, case.batch)
    _, _, top_index = block.gate(states)
    with model._optimize_model_for_decode():
        graph = in_graph(lambda: block(states[:, None]))
    return {"ms": time_ms(graph.replay), "experts_hit": int(top_index.unique().numel())}


def in_graph(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@torch.no_grad()
def head(model: Any, case: Case) -> dict[str, Any]:
    states = states_of(model, 1, 1)
    return {"ms": time_ms(lambda: model.lm_head(states))}


# --- passes over many tokens -------------------------------------------------------------------------------------


def synchronized_ms(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def pass_over(model: Any, case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass of `new` tokens behind `past` ones, and what forgets those tokens again."""
    tokens = tokens_of(model, 1, case.past + case.new)
    cache = DynamicCache(config=model.config)
    if case.past:
        read(model, tokens[:, : case.past], cache)

    @torch.no_grad()
    def run() -> None:
        model(tokens[:, case.past :], logits_to_keep=1, **{CACHE_NAME: cache})

    return run, lambda: cache.crop(-case.new)


def one_pass(model: Any, case: Case) -> dict[str, Any]:
    """The median of three passes after one."""
    run, forget = pass_over(model, case)
    times = []
    for _ in range(4):
        times.append(synchronized_ms(run))
        forget()
    return {"ms": sorted(times[1:])[1]}


@torch.no_grad()
def prefill_memory(model: Any, case: Case) -> dict[str, Any]:
    """Time of one call that reads a whole prompt, and the most memory that it holds beyond the weights."""
    tokens = tokens_of(model, 1, case.new)
    model(tokens[:, :256], logits_to_keep=1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = synchronized_ms(lambda: model(tokens, logits_to_keep=1, use_cache=True))
    return {"ms": ms, "extra_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}


@torch.no_grad()
def chunked_prefill(model: Any, case: Case, limit_s: float = 240.0) -> dict[str, Any]:
    """A prompt in chunks into a static cache, as `prefill_chunk_size` reads it. Ends early after `limit_s` seconds."""
    cache = StaticCache(config=model.config, max_cache_len=case.new)
    tokens = tokens_of(model, 1, case.new)
    read(model, tokens[:, :CHUNK], StaticCache(config=model.config, max_cache_len=CHUNK))  # prepares libraries
    times: list[float] = []
    for piece in tokens.split(CHUNK, dim=1):
        times.append(synchronized_ms(partial(model, piece, logits_to_keep=1, **{CACHE_NAME: cache})))
        if sum(times) > 1e3 * limit_s:
            break
    return {"ms": sum(times), "chunks": len(times), "ms_of_chunks": [round(ms, 1) for ms in times]}


# --- block attention alone ---------------------------------------------------------------------------------------


@torch.no_grad()
def shared_lists(model: Any, case: Case, queries: int = 1) -> dict[str, Any]:
    """Block attention at the released head geometry, with lists that `queries` neighbouring queries share."""
    torch.manual_seed(1)
    shape = {"device": model.device, "dtype": model.dtype}
    query, key, value = (torch.randn(case.new, heads, DIM, **shape) for heads in (HEADS, KV_HEADS, KV_HEADS))
    blocks = clustered_blocks(case.new, queries, device=model.device)
    offsets = torch.tensor([0, case.new], dtype=torch.int32, device=model.device)
    attend = partial(msa.block_sparse_attention, cu_seqlens_q=offsets, cu_seqlens_k=offsets, block_size=BLOCK)
    return {"ms": time_ms(lambda: attend(query, key, value, blocks))}


# --- training ----------------------------------------------------------------------------------------------------


def training_step(model: Any, tokens: int) -> Callable[[], None]:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens_of(model, 1, tokens)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def training(model: Any, case: Case) -> dict[str, Any]:
    """The median of three steps of forward and backward after one."""
    run = training_step(model, case.new)
    run()
    torch.cuda.reset_peak_memory_stats()
    times = sorted(synchronized_ms(run) for _ in range(3))
    return {"ms": times[1], "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
