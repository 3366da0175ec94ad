"""Scenarios of one attention layer: forward, forward with backward, and forward with structured selection."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from . import measure
from .implementations import OURS, STOCK, classes, load_same_weights, text_config

GEOMETRY = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_block_size": 128,
    "index_topk_blocks": 8,
    "num_hidden_layers": 1,
    "layer_types": ["minimax_m3_sparse"],
    "mlp_layer_types": ["dense"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
}
WARM_UP_TOKENS = 256


def _build(implementation: str, layer_type: str = "minimax_m3_sparse") -> tuple[torch.nn.Module, torch.nn.Module]:
    """The attention layer and the rotary embedding."""
    config = text_config(implementation, MiniMaxM3VLTextConfig(**GEOMETRY | {"layer_types": [layer_type]}))
    module = classes(implementation)
    layer = module.MiniMaxM3VLAttention(config, 0)
    load_same_weights(layer)
    return layer.eval(), module.MiniMaxM3VLRotaryEmbedding(config)


def _inputs(implementation: str, rotary: torch.nn.Module, tokens: int) -> dict[str, Any]:
    hidden_states = torch.randn(1, tokens, GEOMETRY["hidden_size"], generator=torch.Generator().manual_seed(tokens))
    position_ids = torch.arange(tokens)[None]
    attention_mask = None  # stock's layer makes its own causal mask
    if implementation == OURS:
        from modeling_minimax_m3.runtime.layout_building import build_layout

        attention_mask = build_layout(None, None, None, 1, tokens, hidden_states.device)
    return {
        "hidden_states": hidden_states,
        "position_embeddings": rotary(hidden_states, position_ids),
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }


@contextmanager
def recorded_selection(implementation: str, layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the block ids (T, H_idx, topk) that the layer selects inside the block."""
    selections = []
    if implementation == STOCK:
        hook = layer.indexer.register_forward_hook(
            lambda _, __, block_indices: selections.append(block_indices[0].transpose(0, 1))
        )
        yield selections
        hook.remove()
    else:
        from modeling_minimax_m3 import msa

        select_blocks = msa.select_blocks

        def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
            selections.append(select_blocks(*args, **kwargs))
            return selections[-1]

        msa.select_blocks = recording
        yield selections
        msa.select_blocks = select_blocks


def _measure(implementation: str, layer: torch.nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Measures the memory of a first run, whose result and selection it returns, and the time of further runs."""
    with recorded_selection(implementation, layer) as selections:
        (result, memory), first_seconds = measure.timed(lambda: measure.peak_extra_memory(run))
    repeated = measure.repeat(run, first_seconds)
    measured = {**measure.summarise(repeated), "seconds_first": first_seconds, "extra_bytes": memory}
    return {"selected": selections[0], **result}, measured


def forward(implementation: str, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Forward without gradients. Returns the tensors to compare, and the measured figures."""
    layer, rotary = _build(implementation)
    with torch.no_grad():
        layer(**_inputs(implementation, rotary, WARM_UP_TOKENS))
        inputs = _inputs(implementation, rotary, tokens)
        result, measured = _measure(implementation, layer, lambda: {"out": layer(**inputs)[0][0]})
    return result, {**measured, "flops": _flops(tokens)}


def structured_forward(implementation: str, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Forward without gradients of a layer with structured selection, in its default pattern of 16 blocks."""
    from modeling_minimax_m3.flops import forward_flops

    layer, rotary = _build(implementation, "minimax_m3_structured")

    def run() -> torch.Tensor:
        return layer(**inputs)[0]

    with torch.no_grad():
        layer(**_inputs(implementation, rotary, WARM_UP_TOKENS))
        inputs = _inputs(implementation, rotary, tokens)
        (_, memory), first_seconds = measure.timed(lambda: measure.peak_extra_memory(run))
        measured = measure.summarise(measure.repeat(run, first_seconds))
    counted = forward_flops(layer.config, tokens)
    flops = counted["attention projections"] + counted["attention"]
    return {}, {**measured, "seconds_first": first_seconds, "extra_bytes": memory, "flops": flops}


def forward_backward(implementation: str, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Forward and backward to every weight that has a gradient and to the layer's input."""
    layer, rotary = _build(implementation)

    def step(inputs: dict[str, Any], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
        layer.zero_grad(set_to_none=True)
        hidden_states = inputs["hidden_states"].detach().requires_grad_()
        out = layer(**{**inputs, "hidden_states": hidden_states})[0]
        out.backward(upstream)
        grads = {f"grad of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        return {"out": out[0].detach(), "grad of hidden_states": hidden_states.grad[0], **grads}

    def upstream(count: int) -> torch.Tensor:
        return torch.randn(1, count, GEOMETRY["hidden_size"], generator=torch.Generator().manual_seed(1))

    step(_inputs(implementation, rotary, WARM_UP_TOKENS), upstream(WARM_UP_TOKENS))
    layer.zero_grad(set_to_none=True)
    inputs, grad_out = _inputs(implementation, rotary, tokens), upstream(tokens)
    result, measured = _measure(implementation, layer, lambda: step(inputs, grad_out))
    return result, {**measured, "flops": _flops(tokens, backward=True)}


def _flops(tokens: int, backward: bool = False) -> int:
    """Floating-point operations of the layer's matrix products, with each needed key counted once.

    The backward counts two products for each product of the forward. It counts none for the indexer, which gets no
    gradient.
    """
    heads, kv_heads, head_dim = (GEOMETRY[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    index_heads, index_dim = GEOMETRY["index_n_heads"], GEOMETRY["index_head_dim"]
    block_size, topk = GEOMETRY["index_block_size"], GEOMETRY["index_topk_blocks"]
    projections = 2 * tokens * GEOMETRY["hidden_size"] * head_dim * (2 * heads + 2 * kv_heads)
    index_projections = 2 * tokens * GEOMETRY["hidden_size"] * index_dim * (index_heads + 1)
    scores = 2 * index_heads * index_dim * tokens * (tokens + 1) // 2
    # A token attends to its own block up to itself, and to at most topk - 1 whole blocks before it.
    attended = sum(t % block_size + 1 + min(t // block_size, topk - 1) * block_size for t in range(tokens))
    attention = 2 * 2 * heads * head_dim * attended
    return (3 if backward else 1) * (projections + attention) + index_projections + scores


def disagreement(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measures how much two results of one scenario differ.

    Rounding decides near-ties between blocks. So outputs are compared only at tokens for which both implementations
    selected the same blocks, and the other tokens are counted.
    """
    same = _as_sets(stock["selected"]) == _as_sets(ours["selected"])
    same = same.flatten(1).all(1)
    errors = {"out": measure.relative_error(ours["out"][same], stock["out"][same])}
    for name in stock:
        if name.startswith("grad of "):
            errors[name] = measure.relative_error(ours[name], stock[name])
    return {"tokens": len(same), "tokens_selecting_otherwise": int((~same).sum()), "relative_errors": errors}


def _as_sets(selected: torch.Tensor) -> torch.Tensor:
    """Sorted ids, padded to the width that both implementations share."""
    topk = GEOMETRY["index_topk_blocks"]
    padded = torch.nn.functional.pad(selected.long(), (0, topk - selected.shape[-1]), value=-1)
    return padded.sort(dim=-1).values


def refusal(report: dict[str, Any]) -> str | None:
    """The reason not to report figures, or None."""
    if report["tokens_selecting_otherwise"] > report["tokens"] / 1000:
        return f"{report['tokens_selecting_otherwise']} of {report['tokens']} tokens select different blocks"
    # A weight gradient sums over all tokens, so one token that selects another block of equal score changes it.
    bound = 1e-5 if report["tokens_selecting_otherwise"] == 0 else 1e-3
    for name, error in report["relative_errors"].items():
        limit = 1e-5 if name == "out" else bound
        if not error < limit:
            return f"{name} differs by {error:.1e}, the limit is {limit:.0e}"
    return None
