"""Structured selection on a GPU: the kernel lists what the `torch` backend lists, to the bit."""

import random

import pytest
import torch

from modeling_minimax_m3 import msa
from modeling_minimax_m3.runtime.layout_building import build_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

DEFAULT = {"local_blocks": 2, "anchor_blocks": 6, "anchor_stride": 8, "random_blocks": 8, "seed": 0}


def assert_same(own_block, heads=4, layer_idx=3, num_blocks=None, **pattern):
    pattern = msa.StructuredPattern(**{**DEFAULT, **pattern})
    torch.empty((*own_block.shape, heads, pattern.width), dtype=torch.int32, device="cuda").fill_(987654321)
    args = (own_block.cuda(), heads, layer_idx, pattern, num_blocks)
    lists = msa.structured_blocks_of(*args, backend="cuda")
    assert torch.equal(lists, msa.structured_blocks_of(*args, backend="torch"))
    assert torch.equal(lists, msa.structured_blocks_of(*args))
    return lists


@pytest.mark.parametrize("seed", range(40))
def test_patterns(seed):
    choose = random.Random(seed).choice
    pattern = {
        "local_blocks": choose([1, 2, 3, 20]),
        "anchor_blocks": choose([0, 1, 2, 6, 24]),
        "anchor_stride": choose([1, 2, 8, 10**12]),
        "random_blocks": choose([0, 1, 8, 20]),
        "seed": choose([0, 1, 12345, 2**63 + 5, 2**64 - 1]),
    }
    count, highest = choose([1, 37, 3000]), choose([5, 300, 9000])
    own_block = torch.randint(-1, highest, (count,), generator=torch.Generator().manual_seed(seed))
    if choose([False, True]):
        own_block = own_block.sort().values
    assert_same(own_block, choose([1, 3, 4, 64]), choose([0, 59]), **pattern)


def test_ends_of_the_range():
    own_block = torch.tensor([-(2**40), -1, 0, 15, 16, 17, 8191, 2**24, 2**30])
    lists = assert_same(own_block, local_blocks=3)
    assert (lists[:2] == -1).all()
    assert msa.structured_blocks_of(own_block[:0].cuda(), 4, 0, msa.StructuredPattern(**DEFAULT)).shape == (0, 4, 16)


def test_a_million_tokens():
    own_block = torch.arange(2**20, device="cuda") // 128
    assert_same(own_block, num_blocks=2**13)
    assert_same(own_block + 37, num_blocks=2**13 + 37)
    assert_same(own_block[::3], num_blocks=2**13)


def test_packed_sequences():
    lengths_q, lengths_k = torch.tensor([129, 1, 0, 5000, 77]), torch.tensor([129, 1, 40, 6007, 300])
    offsets = {
        f"cu_seqlens_{name}": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
        for name, lengths in (("q", lengths_q), ("k", lengths_k))
    }
    options = {**DEFAULT, "num_kv_heads": 4, "block_size": 64, "layer_idx": 1, "total_q": 5207}
    lists = msa.structured_blocks(**offsets, **options, backend="cuda")
    assert torch.equal(lists, msa.structured_blocks(**offsets, **options, backend="torch"))
    on_cpu = {name: tensor.cpu() for name, tensor in offsets.items()}
    assert torch.equal(lists.cpu(), msa.structured_blocks(**on_cpu, **options))


LENGTH = 3001
LAYOUTS = {
    "left padding": {"attention_mask": torch.arange(LENGTH).ge(470).long().expand(2, -1)},
    "holes": {"attention_mask": torch.arange(LENGTH).remainder(5).gt(0).long().expand(2, -1)},
    "packed": {"position_ids": torch.cat([torch.arange(1100), torch.arange(LENGTH - 1100)]).expand(2, -1)},
}


@pytest.mark.parametrize("cross_document", [False, True], ids=["own patterns", "cross-document"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, cross_document):
    """The lists of a layout on the GPU are those of the same layout on a CPU."""
    lists = []
    for device in ("cpu", "cuda"):
        given = {"attention_mask": None, "position_ids": None} | LAYOUTS[name]
        given = {key: value if value is None else value.to(device) for key, value in given.items()}
        layout = build_layout(**given, cache=None, batch=2, num_new=LENGTH, device=torch.device(device))
        if cross_document:
            layout = layout.as_one_document()
        own_block = torch.div(layout.working_positions(), 64, rounding_mode="floor")
        lists.append(msa.structured_blocks_of(own_block, 2, 5, msa.StructuredPattern(**DEFAULT)))
    assert lists[1].device.type == "cuda"
    assert torch.equal(lists[0], lists[1].cpu())


def test_captured_in_a_graph_and_repeated():
    pattern = msa.StructuredPattern(**DEFAULT)
    own_block = torch.randint(-1, 9000, (256, 1), device="cuda")
    first = msa.structured_blocks_of(own_block, 4, 7, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = msa.structured_blocks_of(own_block, 4, 7, pattern)
    graph.replay()
    assert torch.equal(captured, first)
    own_block.copy_(torch.randint(-1, 9000, (256, 1), device="cuda"))
    graph.replay()
    assert torch.equal(captured, msa.structured_blocks_of(own_block, 4, 7, pattern, backend="torch"))


def test_opcheck():
    own_block = torch.randint(-1, 300, (70, 1), device="cuda")
    args = (own_block, 3, 5, *list(DEFAULT.values())[:4], 12345, None, "cuda")
    torch.library.opcheck(torch.ops.minimax_m3_msa.structured_blocks_of.default, args)


def test_whole_graph():
    torch._dynamo.reset()
    pattern = msa.StructuredPattern(**DEFAULT)

    def lists(own_block):
        return msa.structured_blocks_of(own_block + 1, 4, 7, pattern, backend="cuda") * 2

    own_block = torch.randint(-2, 9000, (256,), device="cuda")
    assert torch.equal(torch.compile(lists, fullgraph=True, backend="aot_eager")(own_block), lists(own_block))
