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


@dataclass
class Choice:
    """What one layer chose for each token: blocks (T, heads, topk) or experts (T, topk), -1 for none.

    The scores that it chose by, (T, heads, blocks) or (T, experts), come from our model only.
    """

    kind: str
    ids: torch.Tensor
    scores: torch.Tensor | None = None


@contextmanager
def recorded_choices(model: torch.nn.Module) -> Iterator[list[Choice]]:
    """The choices of every layer, in order, while a single row passes through `model`."""
    choices: list[Choice] = []

    def on_router(module, args, output):
        logits, _, chosen = output
        choices.append(Choice("experts", chosen, logits.float().sigmoid() + module.e_score_correction_bias))

    def on_stock_indexer(module, args, output):
        choices.append(Choice("blocks", output[0].transpose(0, 1)))

    def on_selection(index_query, index_key, *, block_size, **kwargs):
        chosen = select_blocks(index_query, index_key, block_size=block_size, **kwargs)
        choices.append(Choice("blocks", chosen, block_scores(index_query, index_key, block_size)))
        return chosen

    is_stock = type(model).__module__.startswith("transformers.")
    select_blocks = msa.select_blocks
    handles = []
    for module in model.modules():
        if type(module).__name__ == "MiniMaxM3VLTopKRouter":
            handles.append(module.register_forward_hook(on_router))
        elif type(module).__name__ == "MiniMaxM3VLIndexer" and is_stock:
            handles.append(module.register_forward_hook(on_stock_indexer))
    with pytest.MonkeyPatch.context() as patch:
        if not is_stock:
            patch.setattr(msa, "select_blocks", on_selection)
        yield choices
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


def tie_gap(ours: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor) -> float:
    """How far from a tie a row is where two sides chose differently.

    It is the largest difference between the scores of the ids that only one of them chose, over the largest score of
    the row.
    """
    swapped = scores[ours != theirs]
    return ((swapped.max() - swapped.min()) / scores[scores.isfinite()].abs().max()).item()


@dataclass
class ParityRow:
    seed: int
    model: str
    tokens: int
    rows: dict[str, int]  # of choices: tokens times layers (times heads)
    differing: dict[str, int]
    gaps: list[float]
    compared: int
    error: float

    def cells(self) -> list[str]:
        return [
            str(self.seed),
            self.model,
            f"{self.compared}/{self.tokens}",
            *(f"{self.differing[kind]}/{self.rows[kind]}" for kind in ("blocks", "experts")),
            f"{max(self.gaps):.1e}" if self.gaps else "-",
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
    with torch.no_grad(), recorded_choices(stock_model) as theirs:
        expected = stock_model(**inputs).logits[0]
    with torch.no_grad(), recorded_choices(our_model) as ours:
        logits = our_model(**inputs).logits[0]
    assert [choice.kind for choice in ours] == [choice.kind for choice in theirs]
    assert {choice.kind for choice in ours} == {"blocks", "experts"}

    rows, differing, gaps = {"blocks": 0, "experts": 0}, {"blocks": 0, "experts": 0}, []
    comparable = len(expected)  # tokens before the first that chose otherwise in a layer so far
    for our_choice, their_choice in zip(ours, theirs):
        num_ids = our_choice.scores.shape[-1]
        our_flags, their_flags = (membership(choice.ids, num_ids) for choice in (our_choice, their_choice))
        different = (our_flags != their_flags).any(-1)
        rows[our_choice.kind] += different.numel()
        differing[our_choice.kind] += int(different.sum())
        first = comparable
        for row in map(tuple, different.nonzero().tolist()):
            # Later tokens may differ because of what they see, and need not be ties.
            if row[0] < comparable:
                gaps.append(tie_gap(our_flags[row], their_flags[row], our_choice.scores[row]))
                first = min(first, row[0])
        comparable = first

    error = (logits - expected)[:comparable].norm(dim=-1) / expected[:comparable].norm(dim=-1)
    return ParityRow(
        seed=seed,
        model=description,
        tokens=len(expected),
        rows=rows,
        differing=differing,
        gaps=gaps,
        compared=comparable,
        error=error.max().item() if comparable else 0.0,
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
    assert max(row.gaps, default=0.0) < TIE_TOLERANCE
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


def test_disagreements_are_found_and_measured(make_pair, make_inputs):
    """With a negated router or indexer, choices differ, and not by near-ties."""
    config = random_config(0)
    inputs = make_inputs(config, length=150)
    for name, kind in (("mlp.gate.weight", "experts"), ("self_attn.indexer.q_proj.weight", "blocks")):
        stock_model, our_model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)
        our_model.get_parameter(f"model.language_model.layers.2.{name}").data *= -1
        row = compare(stock_model, our_model, inputs, 0, "changed")
        assert row.differing[kind] > 10
        assert max(row.gaps) > 100 * TIE_TOLERANCE
        assert row.compared < row.tokens


def test_tie_gap():
    """Ids 1 and 2 swapped, at scores 3 and 2.9, where the largest is 10."""
    ours, theirs = membership(torch.tensor([0, 1, -1]), 4), membership(torch.tensor([2, 0, -1]), 4)
    assert ours.tolist() == [True, True, False, False]
    assert tie_gap(ours, theirs, torch.tensor([10.0, 3.0, 2.9, -torch.inf])) == pytest.approx(0.01)
