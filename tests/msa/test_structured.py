"""Structured selection: the definition in Python integers, the tensor version, and what the pattern promises."""

import random
from collections import Counter
from functools import partial

import pytest
import torch

from modeling_minimax_m3 import msa
from modeling_minimax_m3.msa import extension, reference
from modeling_minimax_m3.msa.reference import StructuredBlocksArgs
from modeling_minimax_m3.msa.structured import STRUCTURED_BLOCKS_OF

from .pretended_gpu import on_device

DEFAULT = {"local_blocks": 2, "anchor_blocks": 6, "anchor_stride": 8, "random_blocks": 8, "seed": 0}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def test_philox_known_answers():
    """The test vectors that come with Random123, for all-zero and all-one words."""
    ones = 0xFFFFFFFF
    assert reference.philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_definition(seed):
    choose = random.Random(seed).choice
    pattern = {
        "local_blocks": choose([1, 2, 3]),
        "anchor_blocks": choose([0, 1, 2, 6]),
        "anchor_stride": choose([1, 2, 8]),
        "random_blocks": choose([0, 1, 8]),
        "seed": choose([0, 1, 12345, 2**63 + 5, 2**64 - 1]),
    }
    options = {"num_kv_heads": choose([1, 2, 4]), "block_size": choose([1, 2, 5]), "layer_idx": choose([0, 3, 59])}
    lengths_k = [choose(range(130)) for _ in range(3)]
    lengths_q = [choose(range(length + 1)) for length in lengths_k]
    positions = [range(k - q, k) for q, k in zip(lengths_q, lengths_k)]
    own_block = torch.tensor([t // options["block_size"] for p in positions for t in p])
    heads, layer_idx = options["num_kv_heads"], options["layer_idx"]
    expected = reference.structured_blocks_of(StructuredBlocksArgs(own_block, heads, layer_idx, **pattern))

    cu_seqlens = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    for backend in ("auto", "torch", "reference"):
        choose = partial(msa.structured_blocks, **cu_seqlens, **options, **pattern, backend=backend)
        assert torch.equal(choose(), expected)
        assert torch.equal(choose(total_q=sum(lengths_q)), expected)
    lists = msa.structured_blocks_of(own_block, heads, layer_idx, msa.StructuredPattern(**pattern), num_blocks=130)
    assert torch.equal(lists, expected)


def lists(num_blocks: int, heads: int = 1, layer_idx: int = 0, **pattern) -> torch.Tensor:
    """(num_blocks, heads, W) lists of every block."""
    pattern = msa.StructuredPattern(**{**DEFAULT, **pattern})
    return msa.structured_blocks_of(torch.arange(num_blocks), heads, layer_idx, pattern)


def test_pattern_of_every_block():
    """Local blocks, evenly spaced anchors and enough others, all visible, none twice, as many as fit."""
    table = lists(300, heads=2, layer_idx=5)
    for block in range(300):
        for head in range(2):
            ids = table[block, head].tolist()
            listed = [i for i in ids if i >= 0]
            assert ids == sorted(listed) + [-1] * (16 - len(listed))
            assert len(set(listed)) == len(listed) == min(16, block + 1)
            assert all(0 <= i <= block for i in listed)
            assert {block, max(block - 1, 0)} <= set(listed)
            stride = 8
            while block // stride >= 6:
                stride *= 2
            if block >= 16:
                assert set(range(0, block + 1, stride)) <= set(listed)


def test_lists_do_not_depend_on_the_form_of_the_call():
    pattern = msa.StructuredPattern(**DEFAULT)
    own = torch.tensor([[7, 250, -1], [0, 99, 250]])
    whole = msa.structured_blocks_of(torch.arange(251), 3, 4, pattern)
    expected = whole[own.clamp(min=0)].masked_fill(own[..., None, None] < 0, -1)
    assert torch.equal(msa.structured_blocks_of(own, 3, 4, pattern), expected)
    many = own.repeat(200, 1)
    assert torch.equal(msa.structured_blocks_of(many, 3, 4, pattern, num_blocks=251), expected.repeat(200, 1, 1, 1))


def random_part(block: int, ids: torch.Tensor, local_blocks: int, stride: int) -> list[int]:
    fixed = set(range(block - local_blocks + 1, block + 1)) | set(range(0, block + 1, stride))
    return [i for i in ids.tolist() if i not in fixed]


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def test_random_blocks_are_uniform_over_the_rest():
    """Chi-square over 2000 seeds: each unlisted block is drawn equally often."""
    block, seeds = 40, 2000
    counts = Counter()
    for seed in range(seeds):
        ids = msa.structured_blocks_of(torch.tensor(block), 1, 0, msa.StructuredPattern(**{**DEFAULT, "seed": seed}))
        counts.update(random_part(block, ids[0], local_blocks=2, stride=8))
    rest = [i for i in range(block + 1) if i % 8 and i < block - 1]
    assert set(counts) == set(rest)
    drawn = sum(counts.values()) / seeds
    assert drawn == 16 - len({39, 40} | {0, 8, 16, 24, 32})
    # Without replacement, a count's variance is n p (1 - p), and len(rest) - 1 of the counts are free.
    probability = drawn / len(rest)
    statistic = chi_square([counts[i] for i in rest], seeds * probability) / (1 - probability)
    free = len(rest) - 1
    assert abs(statistic - free) < 4 * (2 * free) ** 0.5


@pytest.mark.parametrize("across", ["heads", "layers", "neighbouring blocks", "seeds"])
def test_random_blocks_are_independent(across):
    """Two lists of random blocks share as many as two independent draws do."""
    blocks = list(range(600, 1100))
    if across == "heads":
        table = lists(1100, heads=2)
        pairs = [(table[b, 0], table[b, 1], b) for b in blocks]
    elif across == "neighbouring blocks":
        table = lists(1101)
        pairs = [(table[b, 0], table[b + 1, 0], b) for b in blocks]
    else:
        a, b_ = (lists(1100), lists(1100, layer_idx=1)) if across == "layers" else (lists(1100), lists(1100, seed=1))
        pairs = [(a[b, 0], b_[b, 0], b) for b in blocks]
    shared = expected = 0.0
    for first, second, block in pairs:
        stride = 8
        while block // stride >= 6:
            stride *= 2
        first, second = (set(random_part(block, ids, 2, stride)) for ids in (first, second))
        shared += len(first & second)
        expected += len(first) * len(second) / (block + 1)
    assert abs(shared - expected) < 4 * expected**0.5


def test_every_earlier_token_is_reachable(record_property):
    """Graph reachability over the actual lists of a 64k context, default pattern, released number of heads."""
    num_blocks, heads = 65536 // 128, 4
    reached = torch.eye(num_blocks, dtype=torch.bool)  # reached[b, j]: block b knows of block j
    shares = []
    while not torch.equal(reached, torch.ones_like(reached).tril()):
        table = lists(num_blocks, heads=heads, layer_idx=len(shares)).flatten(1).long()
        edges = torch.zeros(num_blocks, num_blocks + 1).scatter_(1, table.masked_fill(table < 0, num_blocks), 1.0)
        reached = edges[:, :num_blocks] @ reached.float() > 0
        shares.append(reached.sum().item() / (num_blocks * (num_blocks + 1) / 2))
        assert len(shares) <= 57, "a model with the released number of layers must reach every token"
    rows = [f"| {layer} | {share:.2%} |" for layer, share in enumerate(shares, start=1)]
    table = "\n".join(["| layers | reached pairs of blocks |", "| --- | --- |", *rows])
    record_property("table", f"structured selection: who reaches whom in a 64k context\n{table}")
    assert shares[0] < 0.5, "one layer must not do, or the pattern is not sparse"


BAD = {
    "local_blocks": (0, "`local_blocks` must be at least 1, got 0"),
    "anchor_blocks": (-1, "`anchor_blocks` must be at least 0, got -1"),
    "anchor_stride": (0, "`anchor_stride` must be at least 1, got 0"),
    "random_blocks": (-2, "`random_blocks` must be at least 0, got -2"),
    "seed": (2**64, f"`seed` must be at most {2**64 - 1}, got {2**64}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_patterns_are_named(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        msa.StructuredPattern(**{**DEFAULT, name: value})


def test_arguments_are_checked():
    pattern = msa.StructuredPattern(**DEFAULT)
    with pytest.raises(TypeError, match="`own_block` must be a tensor of integers, got torch.float32"):
        msa.structured_blocks_of(torch.zeros(3), 2, 0, pattern)
    with pytest.raises(ValueError, match="`num_kv_heads` must be at least 1, got 0"):
        msa.structured_blocks_of(torch.arange(3), 0, 0, pattern)
    with pytest.raises(ValueError, match="`layer_idx` must be at least 0, got -1"):
        msa.structured_blocks_of(torch.arange(3), 1, -1, pattern)
    with pytest.raises(ValueError, match="`backend` must be one of"):
        msa.structured_blocks_of(torch.arange(3), 1, 0, pattern, backend="triton")
    with pytest.raises(NotImplementedError, match="tensors must be on a CUDA device, they are on cpu"):
        msa.structured_blocks_of(torch.arange(3), 1, 0, pattern, backend="cuda")


def test_operator_is_registered_whole():
    args = (torch.tensor([[3, -1], [40, 7]]), 2, 1, 2, 6, 8, 8, -(2**63), None)
    for backend in ("torch", "reference"):
        torch.library.opcheck(torch.ops.minimax_m3_msa.structured_blocks_of.default, (*args, backend))


def test_what_the_kernel_supports(monkeypatch):
    monkeypatch.setattr(extension, "device_reason", lambda index: None)

    def reason(heads=4, random_blocks=8):
        pattern = DEFAULT | {"random_blocks": random_blocks}
        args = StructuredBlocksArgs(on_device(3, dtype=torch.int64), heads, 0, **pattern)
        return STRUCTURED_BLOCKS_OF.unsupported(args)

    assert reason() is None
    assert reason(random_blocks=56) is None
    assert reason(random_blocks=57) == "there must be at most 64 blocks per query, there are 65"
    assert reason(heads=65) == "there must be at most 64 key/value heads, there are 65"


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    cu_seqlens = offsets([40, 0, 300])

    def choose(cu_seqlens):
        return msa.structured_blocks(
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, num_kv_heads=2, block_size=4, layer_idx=1, total_q=340,
            **DEFAULT,
        )  # fmt: skip

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cu_seqlens), choose(cu_seqlens))
