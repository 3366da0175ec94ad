"""Decoding with experts on the host, on one GPU: `python -m benchmarks.host_experts [--output PATH]`.

Seven layers of the released geometry in bf16, one dense and six sparse: 87 GB of experts, in page-locked memory of the
host. The GPU has room for a quarter of them. The weights are random, so the routing is too: each router runs, and then
the choice of a trace takes the place of its own.

- `uniform`: each token draws its 4 experts of a layer uniformly.
- `skewed`: each token draws them, without repetition, from a distribution of each layer that is half popularity and
  half topic. Both give the expert of rank r a probability in proportion to 1 / r, over orders of the experts that are
  drawn at random: that of popularity once, that of the topic every 256 tokens.

Tokens are decoded in CUDA graphs, as by `generate`, but without its loop. A floor is the time of the missed experts'
bytes at the rate of copies that is measured first. Beside it stand passes without graphs, and Accelerate's offload of
the same page-locked weights, which moves all experts of a layer for each token.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from modeling_minimax_m3 import ExpertOffload, offload_experts
from modeling_minimax_m3.layers.moe import MiniMaxM3VLSparseMoeBlock
from modeling_minimax_m3.runtime.captured_decoding import CapturedDecoding
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

from . import model_step_workloads as workloads
from .gpu import Run, parse_arguments
from .implementations import OURS
from .report import as_table

SHARE = 0.25
TRACES = ("uniform", "skewed")
TOPIC_TOKENS = 256
WARM_UP, MEASURED = 300, 128  # tokens
PROMPT = 1024
PREFILLS = (8192, 32768)
ACCELERATE_TOKENS = 3
GUESSED = 0.9  # of the experts of the next layer, where prefetching is measured
WITHOUT = ", without graphs"


def make_trace(kind: str, tokens: int, layers: int, experts: int, choices: int, seed: int = 0) -> np.ndarray:
    """Expert ids (tokens, layers, choices), distinct within a token's choice of a layer."""
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return generator.random((tokens, layers, experts)).argsort(-1)[..., :choices]
    by_rank = 1 / np.arange(1, experts + 1)

    def shuffled() -> np.ndarray:
        return np.stack([generator.permutation(by_rank) for _ in range(layers)])

    popularity, parts = shuffled(), []
    for start in range(0, tokens, TOPIC_TOKENS):
        scores = np.log(popularity + shuffled())
        count = min(TOPIC_TOKENS, tokens - start)
        # The largest of logarithms plus Gumbel noise are a draw without repetition.
        parts.append((scores + generator.gumbel(size=(count, layers, experts))).argsort(-1)[..., -choices:])
    return np.concatenate(parts)


class TracedRouting:
    """Makes the routers of `model` choose what a trace says, for passes of one token.

    Args:
        model: A model with sparse blocks.
        trace ((tokens, layers, K)): What each token chooses.
    """

    def __init__(self, model: nn.Module, trace: np.ndarray):
        blocks = blocks_of(model)
        self._ids = torch.from_numpy(trace).to(blocks[0].gate.weight.device)
        self._guesses = self._ids
        # Those of the token that passes, in memory that a graph can read.
        self._chosen, self._guessed = self._ids[0].clone(), self._ids[0].clone()
        self._handles = [
            block.gate.register_forward_hook(self._hook(layer), prepend=True) for layer, block in enumerate(blocks)
        ]

    def _hook(self, layer: int) -> Callable:
        def choose(_module: nn.Module, _inputs: tuple, outputs: tuple) -> tuple:
            logits, weights, ids = outputs
            return (logits, weights, self._chosen[layer][None] if len(ids) == 1 else ids)

        return choose

    def begin(self, token: int) -> None:
        """Says which token passes next."""
        self._chosen.copy_(self._ids[token])
        self._guessed.copy_(self._guesses[token])

    def guess(self, blocks: list[Any], right: float, seed: int = 1) -> None:
        """Replaces predictions by the trace's choice, where each expert is right with this probability."""
        generator = np.random.default_rng(seed)
        is_right = torch.from_numpy(generator.random(self._ids.shape) < right).to(self._ids.device)
        others = torch.from_numpy(generator.integers(0, blocks[0].gate.num_experts, self._ids.shape))
        self._guesses = torch.where(is_right, self._ids, others.to(self._ids.device))
        for layer, block in enumerate(blocks):
            predict = type(block).predicted

            def guessed(tokens: torch.Tensor, block=block, layer=layer, predict=predict) -> torch.Tensor:
                predict(block, tokens)  # its time counts
                return self._guessed[layer][None]

            block.predicted = guessed

    def remove(self, blocks: list[Any]) -> None:
        for handle in self._handles:
            handle.remove()
        for block in blocks:
            vars(block).pop("predicted", None)


def blocks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, MiniMaxM3VLSparseMoeBlock)]


def copy_rate(offload: ExpertOffload, experts: int = 64) -> float:
    """Bytes per second of copies of whole experts from the host into slots, as a layer makes them."""
    cache = offload._cache
    slots = range(min(experts, cache.num_slots))
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for slot in slots:
            layer = cache.host[slot % len(cache.host)]
            for name, rows in cache.slots.items():
                rows[slot].copy_(layer[name][slot % len(layer[name])], non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return len(slots) * cache.expert_bytes / best


@torch.no_grad()
def decode(
    model: Any,
    routing: TracedRouting,
    warm_up: int,
    measured: int,
    reset: Callable[[], None] = lambda: None,
    in_graphs: bool = True,
) -> float:
    """Seconds of a token, without the loop of `generate`. `reset` is called when the measurement begins."""
    cache = DynamicCache(config=model.config)
    step_of = CapturedDecoding(model) if in_graphs else model
    model(workloads.tokens_of(model, 1, PROMPT), logits_to_keep=1, **{CACHE_NAME: cache})
    token = workloads.tokens_of(model, 1, 1)
    started = 0.0
    for step in range(warm_up + measured):
        if step == warm_up:
            if isinstance(step_of, CapturedDecoding):
                workloads.graph_of(step_of)  # raises an error if the step was not captured
            torch.cuda.synchronize()
            reset()
            started = time.perf_counter()
        routing.begin(step)
        logits = step_of(input_ids=token, logits_to_keep=1, **{CACHE_NAME: cache}).logits
        logits.argmax(-1).item()  # as a loop reads the token
    return (time.perf_counter() - started) / measured


@torch.no_grad()
def prefill(model: Any, tokens: int) -> float:
    """Seconds of a prompt, the second time that it is read."""
    ids, seconds = workloads.tokens_of(model, 1, tokens), 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(ids, logits_to_keep=1, **{CACHE_NAME: DynamicCache(config=model.config)})
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def offload_by_accelerate(model: Any) -> None:
    """Lets Accelerate move the experts of each layer, and nothing else."""
    from accelerate.big_modeling import dispatch_model

    holders = {name for name, module in model.named_modules() for _ in module._parameters or module._buffers}
    device_map = {name: "cpu" if name.endswith("mlp.experts") else 0 for name in holders}
    dispatch_model(model, device_map, main_device=0)


def tables(record: dict) -> str:
    rows = []
    for row in record["rows"]:
        floor = row["missed_bytes"] / record["copy_bytes_per_second"]
        ratio = f"{row['seconds'] / floor:.2f}" if floor else "-"
        hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.2f}"
        gigabytes = f"{row['missed_bytes'] / 1e9:.2f}"
        rows.append(
            [row["work"], row["by"], f"{1e3 * row['seconds']:.1f}", hits, gigabytes, f"{1e3 * floor:.1f}", ratio]
        )
    head = ["", "offloaded by", "ms", "hit rate", "copied, GB", "floor, ms", "ms / floor"]
    rate = record.get("copy_bytes_per_second", 0) / 1e9
    return f"Experts are copied at {rate:.1f} GB/s.\n\n" + as_table(head, rows)


def main() -> None:
    run = Run("host_experts", parse_arguments("host_experts", "Time decoding with experts on the host."), tables)
    rows = run.record["rows"] = []
    model = workloads.build(OURS, "7 layers")
    blocks = blocks_of(model)
    config = model.config
    sizes = (len(blocks), config.num_local_experts, config.num_experts_per_tok)
    offload = offload_experts(model, experts_on_device=SHARE)
    torch.cuda.empty_cache()
    print(offload, flush=True)
    run.record["copy_bytes_per_second"] = copy_rate(offload)

    def add(work: str, by: str, seconds: float, tokens: int, copied: int | None = None) -> None:
        stats = offload.stats
        missed = stats.bytes_copied if copied is None else copied
        rows.append(
            {
                "work": work,
                "by": by,
                "seconds": seconds,
                "missed_bytes": missed / tokens,
                "hit_rate": stats.hit_rate if copied is None else None,
                "prefetched": stats.prefetched,
                "waits": stats.waits / tokens,
            }
        )

    def case(work: str, kind: str) -> None:
        if kind == "prefill":
            offload.stats.reset()
            seconds = prefill(model, int(work.split()[0]))
            return add(work, "this project", seconds, 2)
        if kind == "accelerate":
            offload.remove()  # the memory stays locked, as `offload` still holds it
            offload_by_accelerate(model)
            routing = TracedRouting(model, make_trace("uniform", 8, *sizes))
            seconds = decode(model, routing, 1, ACCELERATE_TOKENS, in_graphs=False)
            routing.remove(blocks)
            return add(work, "Accelerate", seconds, 1, offload.num_experts * offload.expert_bytes)
        trace = make_trace("uniform" if kind == "hits" else kind, WARM_UP + MEASURED, *sizes)
        if kind == "hits":
            trace[:] = trace[0]
        routing = TracedRouting(model, trace)
        prefetches = "guessed" in work
        for block, following in zip(blocks, [*blocks[1:], None]):
            block.next_block = [following] if prefetches and following is not None else []
        if prefetches:
            routing.guess(blocks, GUESSED)
        seconds = decode(
            model, routing, 8 if kind == "hits" else WARM_UP, MEASURED, offload.stats.reset, WITHOUT not in work
        )
        routing.remove(blocks)
        return add(work, "this project", seconds, MEASURED)

    cases = [(f"a token, all experts on the GPU{graphs}", "hits") for graphs in ("", WITHOUT)]
    cases += [(f"a token, {kind} routing{graphs}", kind) for kind in TRACES for graphs in ("", WITHOUT)]
    cases += [(f"a token, {kind} routing, {GUESSED:.0%} of the next layer guessed", kind) for kind in TRACES]
    cases += [(f"{tokens} tokens of a prompt", "prefill") for tokens in PREFILLS]
    cases += [("a token, uniform routing", "accelerate")]
    run.cases(cases, case)
    run.finish()


if __name__ == "__main__":
    main()
