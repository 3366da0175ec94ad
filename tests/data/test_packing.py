"""Packing of rows to a budget of tokens."""

import random
import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset

from processing_minimax_m3.data.packing import PackedRows, pack_lengths, pack_stream


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_pack_that_has_room(seed):
    chosen = random.Random(seed)
    budget = chosen.choice([7, 50, 1000])
    lengths = [chosen.randint(1, int(1.2 * budget)) for _ in range(chosen.randint(0, 300))]
    packing = pack_lengths(lengths, budget)
    packed = sorted(index for pack in packing.packs for index in pack)
    assert sorted([*packed, *packing.too_long]) == list(range(len(lengths)))
    assert all(lengths[index] > budget for index in packing.too_long)
    sums = [sum(lengths[index] for index in pack) for pack in packing.packs]
    assert all(0 < total <= budget for total in sums)
    assert packing.tokens == sum(sums)
    assert packing.fill == (sum(sums) / (budget * len(sums)) if sums else 0.0)
    # best fit leaves at most one pack less than half full
    assert sum(2 * total <= budget for total in sums) <= 1


def test_packs_are_as_few_as_there_can_be():
    assert len(pack_lengths([6, 4, 3, 3, 2, 2], 10).packs) == 2
    assert len(pack_lengths([10] * 5, 10).packs) == 5
    with pytest.raises(ValueError, match="`budget` must be at least 1 token, got 0"):
        pack_lengths([1], 0)


@pytest.mark.slow
def test_packs_of_the_standard_library_are_full(processor):
    """A real distribution of lengths: files from empty to far beyond the budget."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    lengths = list(map(len, processor.tokenizer(texts, verbose=False)["input_ids"]))
    packing = pack_lengths(lengths, 32768)
    assert len(packing.packs) > 20
    assert packing.too_long
    assert packing.fill >= 0.97


def rows_of(lengths):
    return [{"input_ids": [index] * length, "labels": [-100] * length} for index, length in enumerate(lengths)]


def test_packed_rows_hold_rows_whole():
    lengths = [5, 9, 1, 4, 4, 7]
    packed = PackedRows(Dataset.from_list(rows_of(lengths)), 10)
    found = [ids for index in range(len(packed)) for ids in packed[index]["input_ids"]]
    assert sorted(found) == sorted(row["input_ids"] for row in rows_of(lengths))
    assert packed.lengths == [sum(map(len, packed[index]["labels"])) for index in range(len(packed))]
    with pytest.raises(ValueError, match="at most 8 tokens, got 9 in row 1"):
        PackedRows(Dataset.from_list(rows_of(lengths)), 8)


def test_a_stream_is_packed_from_a_buffer():
    chosen = random.Random(0)
    lengths = [chosen.randint(1, 60) for _ in range(500)]
    packs = list(pack_stream(iter(rows_of(lengths)), 100, buffer_size=50))
    found = sorted(ids[0] for pack in packs for ids in pack["input_ids"])
    assert found == list(range(500))
    assert all(sum(map(len, pack["input_ids"])) <= 100 for pack in packs)
    assert sum(lengths) / (100 * len(packs)) > 0.95
