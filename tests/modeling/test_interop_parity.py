"""Parity with stock Transformers over random small models: logits, selected blocks and chosen experts, in a table.

Two float32 computations of one score differ in the last bits, so a query whose k-th and (k+1)-th block (or expert)
score almost the same may choose differently. Such a token, and the tokens after it that may look at it, cannot be
compared; every disagreement is counted, and has to be such a near-tie.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from configuration_minimax_m3 import MiniMaxM3VLConfig, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM, msa

SEEDS = range(24)
LOGITS_TOLERANCE = 1e-5  # norm of the difference over norm, per token
TIE_TOLERANCE = 1e-5  # difference of two scores over the largest score of the row
TABLE_FILE = Path(__file__).resolve().parents[2] / "build" / "parity" / "model.md"


def random_config(seed: int) -> MiniMaxM3VLConfig:
    choose = random.Random(seed).choice
    num_layers = choose([2, 3, 4])
    num_kv_heads = choose([1, 2, 4])
    head_dim = choose([8, 16, 24, 32])
    partial_rotary_factor = choose([0.25, 0.5, 1.0])
    num_experts = choose([2, 4, 7, 16])
    topk_blocks = choose([1, 2, 3, 5])
    merge = choose([1, 2, 3])
    return tiny_config(
        text={
            "num_hidden_layers": num_layers,
            "hidden_size": choose([32, 48, 64]),
            "num_key_value_heads": num_kv_heads,
            "num_attention_heads": num_kv_heads * choose([1, 2, 4]),
            "head_dim": head_dim,
            "layer_types": ["full_attention"] * (num_layers - 2) + ["minimax_m3_sparse"] * 2,
            "mlp_layer_types": [choose(["dense", "sparse"]) for _ in range(num_layers - 1)] + ["sparse"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": choose([1, 2, min(4, num_experts)]),
            "routed_scaling_factor": choose([1.0, 2.0, 2.5]),
            "swiglu_limit": choose([0.5, 7.0]),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": choose([1e4, 5e6]),
                "partial_rotary_factor": partial_rotary_factor,
            },
            "index_n_heads": num_kv_heads,
            "index_head_dim": choose([head_dim, 2 * head_dim]),
            "index_block_size": choose([4, 8, 16, 32]),
            "index_topk_blocks": topk_blocks,
            "index_local_blocks": choose(range(min(3, topk_blocks) + 1)),
        },
        vision={
            "hidden_size": choose([32, 48]),
            "num_attention_heads": choose([2, 4]),
            "patch_size": choose([4, 7]),
            "temporal_patch_size": choose([1, 2]),
            "spatial_merge_size": merge,
        },
        projector_hidden_size=choose([32, 80]),
    )


@contextmanager
def recorded_choices(model: torch.nn.Module, is_stock: bool) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While a single row passes through `model`: for each layer the blocks (T, heads, topk) and experts (T, topk) that
    it chose; for our model also the scores (T, heads, blocks) and (T, experts) that they were chosen by."""
    record = {"blocks": [], "block_scores": [], "experts": [], "expert_scores": []}

    def on_router(module, args, output):
        logits, _, chosen = output
        record["experts"].append(chosen)
        record["expert_scores"].append(logits.float().sigmoid() + module.e_score_correction_bias)

    handles = [
        module.register_forward_hook(on_router)
        for module in model.modules()
        if type(module).__name__ == "MiniMaxM3VLTopKRouter"
    ]
    patch = pytest.MonkeyPatch()
    if is_stock:
        handles += [
            module.register_forward_hook(lambda _, args, output: record["blocks"].append(output[0].transpose(0, 1)))
            for module in model.modules()
            if type(module).__name__ == "MiniMaxM3VLIndexer"
        ]
    else:
        select_blocks = msa.select_blocks

        def on_selection(index_query, index_key, *, block_size, **kwargs):
            chosen = select_blocks(index_query, index_key, block_size=block_size, **kwargs)
            record["blocks"].append(chosen)
            record["block_scores"].append(block_scores(index_query, index_key, block_size))
            return chosen

        patch.setattr(msa, "select_blocks", on_selection)
    try:
        yield record
    finally:
        patch.undo()
        for handle in handles:
            handle.remove()


def block_scores(index_query: torch.Tensor, index_key: torch.Tensor, block_size: int) -> torch.Tensor:
    """(T, heads, blocks): the largest dot product of a query with a block's keys up to itself."""
    scores = torch.einsum("thd,sd->ths", index_query.double(), index_key.double())
    tokens = torch.arange(len(index_key))
    scores = scores.masked_fill(tokens[None, None, :] > tokens[:, None, None], -torch.inf)
    return torch.stack([part.amax(-1) for part in scores.split(block_size, dim=-1)], dim=-1)


def membership(chosen: torch.Tensor, size: int) -> torch.Tensor:
    """(..., k) ids, -1 for none, to (..., size) flags."""
    flags = torch.zeros(*chosen.shape[:-1], size + 1, dtype=torch.bool)
    return flags.scatter(-1, chosen.long() % (size + 1), True)[..., :size]


def tie_gaps(ours: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor) -> list[float]:
    """How far from a tie each differing row is: the largest difference between the scores of the ids that only one
    side chose, over the largest score of the row."""
    gaps = []
    for row in (ours != theirs).any(-1).nonzero().tolist():
        row = tuple(row)
        swapped = scores[row][ours[row] != theirs[row]]
        finite = scores[row][scores[row].isfinite()]
        gaps.append(((swapped.max() - swapped.min()) / finite.abs().max()).item())
    return gaps


@dataclass
class ParityRow:
    seed: int
    model: str
    tokens: int
    block_rows: int
    block_gaps: list[float]
    expert_rows: int
    expert_gaps: list[float]
    compared: int
    error: float

    def cells(self) -> list[str]:
        gaps = self.block_gaps + self.expert_gaps
        return [
            str(self.seed),
            self.model,
            f"{self.compared}/{self.tokens}",
            f"{len(self.block_gaps)}/{self.block_rows}",
            f"{len(self.expert_gaps)}/{self.expert_rows}",
            f"{max(gaps):.1e}" if gaps else "-",
            f"{self.error:.1e}",
        ]


HEADER = [
    "seed",
    "model",
    "tokens compared",
    "blocks differ",
    "experts differ",
    "largest tie gap",
    "logits rel. error",
]


def format_table(rows: list[ParityRow]) -> str:
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def compare(stock_model, our_model, inputs, seed: int, description: str) -> ParityRow:
    with torch.no_grad(), recorded_choices(stock_model, True) as theirs, recorded_choices(our_model, False) as ours:
        expected, logits = stock_model(**inputs).logits[0], our_model(**inputs).logits[0]
    assert len(ours["blocks"]) == len(theirs["blocks"]) == 2
    assert len(ours["experts"]) == len(theirs["experts"]) > 0

    num_tokens = len(expected)
    differs = torch.zeros(num_tokens, dtype=torch.bool)
    gaps, row_counts = {}, {}
    for kind, score_name in (("blocks", "block_scores"), ("experts", "expert_scores")):
        gaps[kind], row_counts[kind] = [], 0
        for our_ids, their_ids, scores in zip(ours[kind], theirs[kind], ours[score_name]):
            our_flags, their_flags = (membership(ids, scores.shape[-1]) for ids in (our_ids, their_ids))
            layer_differs = (our_flags != their_flags).flatten(1).any(1)
            # Only the first disagreement is a matter of rounding: what comes after it has other inputs.
            if not differs.any():
                gaps[kind] += tie_gaps(our_flags, their_flags, scores)
            differs |= layer_differs
            row_counts[kind] += our_flags[..., 0].numel()

    compared = num_tokens if not differs.any() else int(differs.nonzero()[0])
    error = (logits - expected)[:compared].norm(dim=-1) / expected[:compared].norm(dim=-1)
    return ParityRow(
        seed=seed,
        model=description,
        tokens=num_tokens,
        block_rows=row_counts["blocks"],
        block_gaps=gaps["blocks"],
        expert_rows=row_counts["experts"],
        expert_gaps=gaps["experts"],
        compared=compared,
        error=error.max().item() if compared else 0.0,
    )


def describe(config: MiniMaxM3VLConfig, kind: str) -> str:
    text = config.text_config
    return (
        f"{kind}, {text.num_hidden_layers} layers, heads {text.num_attention_heads}/{text.num_key_value_heads} of "
        f"{text.head_dim}, block {text.index_block_size} top {text.index_topk_blocks}, "
        f"experts {text.num_experts_per_tok}/{text.num_local_experts}"
    )


@pytest.fixture(scope="module")
def parity_row(make_pair, make_inputs) -> Callable[[int], ParityRow]:
    """The comparison of one seed, made once."""

    @cache
    def run(seed: int) -> ParityRow:
        config = random_config(seed)
        merge = config.vision_config.spatial_merge_size
        if seed % 2:
            model_class, part, kind = MiniMaxM3VLForCausalLM, config.text_config, "text"
            inputs = make_inputs(config, length=150, seed=seed)
        else:
            model_class, part, kind = MiniMaxM3SparseForConditionalGeneration, config, "image + video"
            inputs = make_inputs(
                config,
                images=[[1, 2 * merge, 3 * merge], [1, merge, 2 * merge]],
                videos=[[2, 2 * merge, 2 * merge]],
                length=150,
                seed=seed,
            )
        part._attn_implementation = ("eager", "sdpa")[seed // 2 % 2]
        stock_model, our_model = make_pair(model_class, part, seed=seed)
        return compare(stock_model, our_model, inputs, seed, describe(config, kind))

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_stock(parity_row, seed):
    row = parity_row(seed)
    assert max(row.block_gaps + row.expert_gaps, default=0.0) < TIE_TOLERANCE
    assert row.error < LOGITS_TOLERANCE


def test_table(parity_row, record_property):
    """Writes the table of all seeds, and checks that it says something: most tokens could be compared."""
    rows = [parity_row(seed) for seed in SEEDS]
    table = format_table(rows)
    TABLE_FILE.parent.mkdir(parents=True, exist_ok=True)
    TABLE_FILE.write_text(table + "\n")
    record_property("table", f"Parity of the models with stock Transformers, float32, unpadded\n{table}")
    print(table)
    assert sum(row.compared for row in rows) > 0.9 * sum(row.tokens for row in rows)


def test_a_tie_gap_is_measured():
    """Blocks 1 and 2 swapped, at scores 3 and 2.9, where the largest is 10; the row of equal choices has no gap."""
    ours = membership(torch.tensor([[0, 1, -1], [0, 1, 2]]), 4)
    theirs = membership(torch.tensor([[2, 0, -1], [2, 1, 0]]), 4)
    scores = torch.tensor([[10.0, 3.0, 2.9, -torch.inf]]).repeat(2, 1)
    assert tie_gaps(ours, theirs, scores) == pytest.approx([0.01])
