"""The picture of structured lists: groups of blocks, kinds of listed blocks, and recording the lists of a model."""

import pytest
import torch
from PIL import Image

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, msa

PATTERN = msa.StructuredPattern(local_blocks=2, anchor_blocks=3, anchor_stride=4, random_blocks=3, seed=0)


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("plot_pattern")


def test_groups_are_named_once(script):
    lists = torch.tensor([[[0, 1, 5, 7, 9, -1], [3, -1, -1, -1, -1, -1]]], dtype=torch.int32)
    merged = script.merge_blocks(lists, 4)
    assert [[i for i in row if i >= 0] for row in merged[0].tolist()] == [[0, 1, 2], [0]]
    assert torch.equal(script.merge_blocks(lists, 1), lists.sort(dim=-1).values)


def test_kinds_of_a_list(script):
    block = 40  # stride 16: anchors 0, 16, 32
    row = msa.structured_blocks_of(torch.tensor(block), 1, 0, PATTERN)[0].tolist()
    named = dict(zip(row, script.kinds(row, block, PATTERN)))
    assert {i for i, kind in named.items() if kind == "local"} == {39, 40}
    assert {i for i, kind in named.items() if kind == "anchor"} == {0, 16, 32}
    assert sum(kind == "random" for kind in named.values()) == 3


def test_picture(script, tmp_path):
    path = script.plot_pattern(tmp_path / "pattern.png", PATTERN, [64, 100000], block_size=16, heads=2, layer_idx=1)
    with Image.open(path) as picture:
        width, height = picture.size
    assert width / height == pytest.approx(8.4 / 5.8, rel=0.02)


def test_lists_of_structured_layers_are_recorded(load_script):
    plot_selection = load_script("plot_selection")
    layer_types = ["full_attention", "minimax_m3_structured", "minimax_m3_sparse", "minimax_m3_structured"]
    config = tiny_config(text={"layer_types": layer_types, "structured_random_blocks": 2}).text_config
    with torch.no_grad(), plot_selection.SelectionRecorder() as recorder:
        MiniMaxM3VLForCausalLM(config).eval()(torch.arange(300)[None] % 400)
    recorded = dict(zip(plot_selection.sparse_layers(config), recorder.selections, strict=True))
    assert list(recorded) == [1, 2, 3]
    assert [selection.shape for selection in recorded.values()] == [(300, 2, 10), (300, 2, 4), (300, 2, 10)]
