"""One sparse attention layer beside stock's on a GPU: `python -m benchmarks.cuda_layer [--output NAME]`.

Released geometry with projections, bf16, batch 1, the same weights in both layers. Stock runs with sdpa. Our layer
then runs at growing lengths until it needs more memory than the card has.
"""

from collections.abc import Callable

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from modeling_minimax_m3.runtime.layout_building import build_layout

from .gpu import Run, parse_arguments, time_ms
from .implementations import OURS, STOCK, classes, load_same_weights, text_config
from .measure import relative_error
from .report import as_table

HIDDEN = 6144
GEOMETRY = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_block_size": 128,
    "index_topk_blocks": 16,
    "num_hidden_layers": 1,
    "layer_types": ["minimax_m3_sparse"],
    "mlp_layer_types": ["dense"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
}
BOTH_LENGTHS = (8192, 12288)  # stock's memory grows with their square
OUR_LENGTHS = (131072, 262144, 524288, 1048576)
PASSES = ("forward", "forward + backward")
MAX_ERROR = 2e-2  # rounding to bf16


def build(implementation: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The attention layer and the rotary embedding, on the GPU."""
    config = text_config(implementation, MiniMaxM3VLTextConfig(**GEOMETRY))
    module = classes(implementation)
    layer = module.MiniMaxM3VLAttention(config, 0)
    load_same_weights(layer)
    return layer.to("cuda", torch.bfloat16), module.MiniMaxM3VLRotaryEmbedding(config).cuda()


def step(implementation: str, layer: torch.nn.Module, rotary: torch.nn.Module, tokens: int, name: str) -> Callable:
    """A call of one pass over `tokens` tokens."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden_states = torch.randn(1, tokens, HIDDEN, generator=generator, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(tokens, device="cuda")[None]
    inputs = {
        "position_embeddings": rotary(hidden_states, positions),
        "attention_mask": build_layout(None, None, None, 1, tokens, "cuda") if implementation == OURS else None,
        "position_ids": positions,
    }

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(hidden_states, **inputs)[0]

    def forward_backward() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = hidden_states.detach().requires_grad_()
        out = layer(leaf, **inputs)[0]
        out.backward(out.detach())

    return forward if name == PASSES[0] else forward_backward


def measure(implementation: str, layer: torch.nn.Module, rotary: torch.nn.Module, tokens: int, name: str) -> dict:
    """Milliseconds and peak extra GiB of one pass; both are None where the card has too little memory."""
    try:
        run = step(implementation, layer, rotary, tokens, name)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        milliseconds = time_ms(run, seconds=0.3)
        return {"ms": milliseconds, "gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "gib": None}
    finally:
        layer.zero_grad(set_to_none=True)


def check_agreement(layers: dict) -> float:
    """The relative error of our layer against stock's, at a length where every token attends to all earlier blocks.

    No token chooses among blocks there, so ties between block scores change nothing.

    Raises:
        SystemExit: The error is larger than rounding explains.
    """
    tokens = GEOMETRY["index_topk_blocks"] * GEOMETRY["index_block_size"]
    outs = {name: step(name, *layers[name], tokens, PASSES[0])() for name in layers}
    error = relative_error(outs[OURS], outs[STOCK])
    if not error < MAX_ERROR:
        raise SystemExit(f"the outputs of our layer and stock's differ by {error:.1e}, the limit is {MAX_ERROR:.0e}")
    return error


def tables(record: dict) -> str:
    rows, lines = record["rows"], []
    for name in PASSES:
        for tokens in (*BOTH_LENGTHS, *OUR_LENGTHS):
            stock, ours = (rows.get(f"{which}, {name}, {tokens}") for which in (STOCK, OURS))
            if stock or ours:
                ratio = f"{stock['ms'] / ours['ms']:.1f}" if stock and ours and stock["ms"] and ours["ms"] else "-"
                lines.append([str(tokens), name, _cell(stock), _cell(ours), ratio])
    return (
        f"The relative error against stock is {record['machine']['relative_error']:.1e}. Figures are milliseconds / "
        "peak extra GiB.\n\n" + as_table(["tokens", "pass", "stock", "ours", "times faster"], lines)
    )


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    return "out of memory" if row["ms"] is None else f"{row['ms']:.4g} / {row['gib']:.3g}"


def main() -> None:
    run = Run("cuda_layer", parse_arguments("cuda_layer", "Time a sparse attention layer beside stock's."), tables)
    layers = {implementation: build(implementation) for implementation in (STOCK, OURS)}
    run.record["machine"]["relative_error"] = check_agreement(layers)
    rows = run.record["rows"] = {}
    ended = set()  # passes that ran out of memory at a shorter length

    def case(implementation: str, name: str, tokens: int) -> None:
        if (implementation, name) not in ended:
            row = measure(implementation, *layers[implementation], tokens, name)
            rows[f"{implementation}, {name}, {tokens}"] = row
            if row["ms"] is None:
                ended.add((implementation, name))

    both = [(which, name, tokens) for tokens in BOTH_LENGTHS for name in PASSES for which in (OURS, STOCK)]
    run.cases(both + [(OURS, name, tokens) for tokens in OUR_LENGTHS for name in PASSES], case)
    run.finish()


if __name__ == "__main__":
    main()
