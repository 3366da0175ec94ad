"""Decoding with a cache: seconds per token after a short and a long prompt, and the share of each part."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

from . import measure
from .implementations import OURS, classes, load_same_weights, text_config

NEW_TOKENS = 256
# Stock's masks grow with the square of the prefill, so both prefill in chunks. The prefill is not measured.
PREFILL_CHUNK = 512


class _Stopwatch:
    """Sums the seconds spent in watched functions, by part.

    When one watched function calls another, all of the time counts for the caller.

    Args:
        functions (list of (owner, attribute, part)): Each function to watch, and the part for which its time counts.
    """

    def __init__(self, functions: list[tuple[Any, str, str]]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._functions = functions
        self._originals: list[Callable] = []
        self._running = False

    def __enter__(self) -> "_Stopwatch":
        self._originals = [getattr(owner, attribute) for owner, attribute, _ in self._functions]
        for (owner, attribute, part), function in zip(self._functions, self._originals):
            setattr(owner, attribute, self._watched(function, part))
        return self

    def __exit__(self, *exception: object) -> None:
        for (owner, attribute, _), function in zip(self._functions, self._originals):
            setattr(owner, attribute, function)

    def _watched(self, function: Callable, part: str) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start
                self._running = False

        return watched


def _parts(implementation: str, model: torch.nn.Module) -> list[tuple[Any, str, str]]:
    """The functions to watch, each with its part of a decoding step."""
    layers = model.model.layers
    mlps = [(layer.mlp, "forward", "MLP and MoE") for layer in layers]
    if implementation == OURS:
        from modeling_minimax_m3 import msa
        from modeling_minimax_m3.layers import attention

        return [
            (msa, "select_blocks_with_kvcache", "index scoring"),
            (msa, "block_sparse_attention_with_kvcache", "sparse attention"),
            (attention, "dense_attention", "dense attention"),
            *mlps,
        ]
    # Stock's sparse layers call the general attention function, so their attention counts as "everything else".
    indexers = [layer.self_attn.indexer for layer in layers if layer.self_attn.indexer is not None]
    dense = [layer.self_attn for layer in layers if layer.self_attn.indexer is None]
    return [
        *((indexer, "forward", "index scoring") for indexer in indexers),
        *((attention, "forward", "dense layers, projections included") for attention in dense),
        *mlps,
    ]


@torch.no_grad()
def decode(implementation: str, prompt: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Feeds `prompt` and then `NEW_TOKENS` random tokens, one by one, through the tiny model.

    The tokens do not depend on the model, so both implementations read the same ones.
    """
    config = text_config(implementation, tiny_config().text_config)
    model = classes(implementation).MiniMaxM3VLForCausalLM(config).eval()
    load_same_weights(model, std=0.05)
    generator = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(0, config.vocab_size, (1, prompt + NEW_TOKENS), generator=generator)
    cache = DynamicCache(config=config)

    def feed(start: int, stop: int) -> torch.Tensor:
        return model(tokens[:, start:stop], use_cache=True, **{CACHE_NAME: cache}, logits_to_keep=1).logits[0, -1]

    for start in range(0, prompt, PREFILL_CHUNK):
        feed(start, min(start + PREFILL_CHUNK, prompt))

    def decode_all(step: Callable[[int, int], torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
        logits, seconds = [], []
        for position in range(prompt, prompt + NEW_TOKENS):
            row, elapsed = measure.timed(lambda position=position: step(position, position + 1))
            logits.append(row)
            seconds.append(elapsed)
        return logits, seconds

    logits, seconds = decode_all(feed)
    # A second pass over the same tokens measures the parts, so that stopwatches do not slow the first pass.
    cache.crop(-NEW_TOKENS)
    with _Stopwatch(_parts(implementation, model)) as stopwatch:
        again, watched_seconds = decode_all(feed)
    parts = {name: total / NEW_TOKENS for name, total in stopwatch.seconds.items()}
    parts["everything else"] = sum(watched_seconds) / NEW_TOKENS - sum(parts.values())
    result = {"logits": torch.stack(logits)}
    if measure.relative_error(torch.stack(again), result["logits"]) > 1e-4:
        raise RuntimeError("decoding the same tokens again after cropping the cache gave different logits")
    return result, {
        "seconds": statistics.median(seconds),
        "seconds_mean": statistics.mean(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": NEW_TOKENS,
        "parts": parts,
    }


def disagreement(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    difference = (ours["logits"].double() - stock["logits"].double()).norm(dim=-1)
    errors = difference / stock["logits"].double().norm(dim=-1)
    return {"median_error": errors.median().item(), "largest_error": errors.max().item()}


def refusal(report: dict[str, Any]) -> str | None:
    """The reason not to report figures, or None.

    Rounding may decide a near-tie between blocks or experts differently, which changes every later token a little.
    So there is a bound on the median and a wider one on the worst token.
    """
    if not report["median_error"] < 1e-4:
        return f"logits differ by {report['median_error']:.1e} in the median, the limit is 1e-4"
    if not report["largest_error"] < 1e-2:
        return f"logits differ by {report['largest_error']:.1e} at worst, the limit is 1e-2"
    return None
