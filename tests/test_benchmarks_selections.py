"""Recorded block lists: their file, the overlap of neighbours beside plain loops, and the script that records them."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks import cuda_selections, selections
from configuration_minimax_m3 import tiny_config

BLOCK, TOPK = 4, 3


def some_lists(tokens: int = 300, heads: int = 2) -> torch.Tensor:
    return torch.stack([selections.random_blocks(tokens, BLOCK, TOPK, seed) for seed in range(heads)])


def sets_of(lists: torch.Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in lists.tolist()]


def test_file_keeps_the_lists(tmp_path):
    lists = some_lists()
    selections.save_selections(tmp_path / "lists.npz", lists, BLOCK, {"lists": ["a", "b"]})
    found, block_size, about = selections.load_selections(tmp_path / "lists.npz")
    assert (block_size, about) == (BLOCK, {"lists": ["a", "b"]})
    assert found.dtype == torch.int32 and found.shape == lists.shape
    for one, other in zip(found, lists):
        assert sets_of(one) == sets_of(other)
        assert (one[:, 1:] <= one[:, :-1]).all()  # valid ids first


def test_heads_share_the_lists_in_turn(tmp_path):
    lists = some_lists()
    selections.save_selections(tmp_path / "lists.npz", lists, BLOCK, {})
    found = selections.recorded_blocks(3, tmp_path / "lists.npz", tokens=50)
    assert found.shape == (50, 3, TOPK) and found.is_contiguous()
    assert [sets_of(found[:, head]) for head in range(3)] == [sets_of(lists[head % 2, :50]) for head in range(3)]
    with pytest.raises(ValueError, match="`tokens` must be at most 300, .* got 301"):
        selections.recorded_blocks(3, tmp_path / "lists.npz", tokens=301)


def test_random_lists_hold_the_own_block_and_earlier_ones():
    for token, blocks in enumerate(sets_of(selections.random_blocks(100, BLOCK, TOPK))):
        own = token // BLOCK
        assert own in blocks and max(blocks) == own and len(blocks) == min(TOPK, own + 1)


def test_overlap_is_what_loops_count():
    lists = some_lists()[0]
    found = selections.overlap(lists, BLOCK)
    sets = sets_of(lists)[TOPK * BLOCK :]
    for distance in selections.DISTANCES:
        pairs = list(zip(sets, sets[distance:]))
        expected = sum(len(a & b) / len(a) for a, b in pairs) / len(pairs)
        assert found[f"same_after_{distance}"] == pytest.approx(expected, abs=1e-4)
    for tile in selections.TILES:
        tiles = [set().union(*sets[i : i + tile]) for i in range(0, len(sets) - tile + 1, tile)]
        assert found[f"tile_of_{tile}"] == pytest.approx(sum(map(len, tiles)) / len(tiles) / TOPK, abs=1e-4)
    most = max(sum(block in one for one in sets) for block in set().union(*sets))
    assert found["most_chosen"] == pytest.approx(most / len(sets), abs=1e-4)


def test_equal_lists_overlap_wholly():
    lists = torch.tensor([[0, 1, 2]] * 300)
    found = selections.overlap(lists, BLOCK)
    assert set(found.values()) == {1.0}
    with pytest.raises(ValueError, match="need 268 tokens, got 200"):
        selections.overlap(lists[:200], BLOCK)


def test_files_that_hold_no_lists_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="extract_selections.py"):
        selections.load_selections(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", shape=np.zeros(1))
    with pytest.raises(ValueError, match=r"must hold .* but \['changes', 'about'\] are missing"):
        selections.load_selections(tmp_path / "other.npz")
    selections.save_selections(tmp_path / "small.npz", some_lists(), BLOCK, {})
    with pytest.raises(ValueError, match="16 blocks of 128 keys, got 3 of 4"):
        cuda_selections.check_file(tmp_path / "small.npz")


@pytest.mark.parametrize("kind", cuda_selections.LISTS)
def test_benchmark_has_lists_of_each_kind(tmp_path, kind):
    tokens = 2400
    recorded = torch.stack([selections.random_blocks(tokens, 128, 16, seed) for seed in range(3)])
    selections.save_selections(tmp_path / "lists.npz", recorded, 128, {})
    assert cuda_selections.check_file(tmp_path / "lists.npz") == tokens
    lists = cuda_selections.make_lists(kind, tokens, tmp_path / "lists.npz")
    assert lists.shape == (tokens, 4, 16) and lists.dtype == torch.int32
    for token in (0, 700, tokens - 1):
        for blocks in sets_of(lists[token]):
            assert max(blocks) == token // 128 and len(blocks) == min(16, token // 128 + 1)
    overlap = cuda_selections.mean_overlap(lists)
    row = {"forward": 1.0, "both": 3.0, **overlap}
    table = cuda_selections.tables({"rows": {tokens: {kind: row}}})
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells[:5] == [str(tokens), kind, "1", "3", f"{overlap['same_after_1']:.3g}"]


def test_recorded_lists_are_those_of_the_model(load_script, tmp_path, capsys):
    script = load_script("extract_selections")
    config = tiny_config(text={"index_block_size": 8, "index_topk_blocks": 4})
    folder = load_script("make_tiny_checkpoint").make_tiny_checkpoint(tmp_path / "model", config=config)
    found = script.main([str(folder), str(tmp_path / "lists.npz"), "--tokens", "320"])
    lists, block_size, about = selections.load_selections(tmp_path / "lists.npz")
    assert block_size == 8 and lists.shape[1:] == (320, 4)
    assert about["lists"] == [name for name in found if name != "random"] and len(about["lists"]) == len(lists)
    assert about["overlap"] == {name: found[name] for name in about["lists"]}
    assert "same_after_1" in capsys.readouterr().out

    # a pass that returns its weights: the keys with weight are in the listed blocks
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ids = script.document(tokenizer, "code", 320, 0)
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions
    group = config.text_config.num_attention_heads // config.text_config.num_key_value_heads
    of_code = [(name, one) for name, one in zip(about["lists"], lists) if name.startswith("code")]
    assert len(of_code) == 2 * config.text_config.num_key_value_heads > 2
    for name, one in of_code:
        layer, head = (int(part.split()[-1]) for part in name.removeprefix("code, ").split(", "))
        for token in (0, 33, 200, 319):
            keys = weights[layer][0, head * group, token].nonzero().flatten() // 8
            assert set(keys.tolist()) == sets_of(one)[token]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lists.txt"], "`output` must end in .npz, got lists.txt"),
        (["lists.npz", "--tokens", "100"], "need .* tokens, got 100"),
    ],
)
def test_errors_end_the_script(load_script, tiny_checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"extract_selections: .*{message}"):
        load_script("extract_selections").main([str(tiny_checkpoint), *options])
    assert not list(tmp_path.glob("*.npz"))
