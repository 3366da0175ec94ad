"""Block selection for decoding where rows are long or scores leave no choice, against the definition in float64.

Queries and keys are small integers, so that scores are exact in every arithmetic and equal ones are frequent.
"""

import pytest
import torch

from modeling_minimax_m3.msa import select_blocks_with_kvcache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

CASES = {
    # More keys than the device works on at a time.
    "long rows": {"lengths": [300_000, 77_777, 0, 5], "topk": 16},
    "one long row": {"lengths": [1_100_001], "topk": 16},
    "more blocks than registers hold": {"lengths": [1_000_001], "block_size": 64, "topk": 8},
    # Too many candidates for a short list.
    "equal scores": {"lengths": [100_000], "values": 1, "topk": 16},
    "wide": {"lengths": [200_000, 40_000], "block_size": 64, "topk": 64},
}


def integers(generator, values, *shape):
    """Random integers of `values` different values; where there is only one, it is 1."""
    low = 1 if values == 1 else -(values // 2)
    return torch.randint(low, low + values, shape, generator=generator, device="cuda").to(torch.bfloat16)


@pytest.mark.parametrize("local_blocks, init_blocks", [(1, 0), (0, 2)])
@pytest.mark.parametrize("name", CASES)
def test_selection(name, local_blocks, init_blocks):
    case = {"block_size": 128, "values": 5, **CASES[name]}
    lengths, generator = case["lengths"], torch.Generator("cuda").manual_seed(0)
    index_query = integers(generator, case["values"], len(lengths), 2, 2, 64)
    index_key_cache = integers(generator, case["values"], len(lengths), max(lengths) + 100, 64)
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    options = {"block_size": case["block_size"], "topk": case["topk"]}
    options |= {"local_blocks": local_blocks, "init_blocks": init_blocks}

    selected = select_blocks_with_kvcache(
        index_query, index_key_cache, cache_seqlens=cache_seqlens, backend="cuda", **options
    )
    expected = select_blocks_with_kvcache(
        index_query.double(), index_key_cache.double(), cache_seqlens=cache_seqlens, backend="reference", **options
    )
    assert torch.equal(selected.sort(-1).values, expected.sort(-1).values)
