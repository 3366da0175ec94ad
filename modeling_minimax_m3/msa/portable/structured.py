"""`structured_blocks_of` in PyTorch: the integers of `reference.structured_block_list`, by tensor operations."""

import torch

from ..reference import StructuredBlocksArgs
from ..reference.structured import PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS

_WORD = 0xFFFFFFFF


def structured_blocks_of(args: StructuredBlocksArgs) -> torch.Tensor:
    """As `reference.structured_blocks_of`.

    A list is computed once per block where that is less work than once per query.
    """
    own_block, num_blocks = args.own_block, args.num_blocks
    if num_blocks is None and own_block.device.type == "cpu" and own_block.numel() > 0:
        num_blocks = int(own_block.max()) + 1
    if num_blocks is None or num_blocks >= own_block.numel():
        return _lists(own_block, args)
    lists = _lists(torch.arange(num_blocks, device=own_block.device), args)
    return lists[own_block.clamp(min=0)].masked_fill(own_block[..., None, None] < 0, -1)


def _lists(own_block: torch.Tensor, args: StructuredBlocksArgs) -> torch.Tensor:
    """The lists of queries in the blocks `own_block` (...): int32 (..., H_kv, width)."""
    block = own_block.unsqueeze(-1).expand(*own_block.shape, args.num_kv_heads)
    device, width = block.device, args.width
    ids = torch.arange(width, device=device)
    all_blocks = torch.where(ids <= block[..., None], ids, -1)  # what queries with few visible blocks list

    # The lists that follow need more than `width` blocks. Queries with fewer compute the list of block `width`, which
    # the last line replaces.
    last = block.clamp(min=width)
    listed = [last - i for i in range(args.local_blocks)]
    is_new = [torch.ones_like(last, dtype=torch.bool)] * args.local_blocks
    if args.anchor_blocks > 0:
        stride = _anchor_stride(last, args)
        for i in range(args.anchor_blocks):
            anchor = i * stride
            listed.append(anchor)
            is_new.append(anchor <= last - args.local_blocks)
    # One past the last block stands for a place that is not taken; it sorts to the end.
    fixed = torch.where(torch.stack(is_new, dim=-1), torch.stack(listed, dim=-1), last[..., None] + 1)
    fixed = fixed.sort(dim=-1).values
    num_fixed = torch.stack(is_new, dim=-1).sum(-1)

    places = width - num_fixed  # random blocks to draw, at least `random_blocks`
    unlisted = last + 1 - num_fixed
    drawn = _draw(unlisted, places, last, args)
    # The r-th unlisted block: step over each listed one that is not above it.
    for listed_block in fixed.unbind(-1):
        drawn = torch.where(drawn >= listed_block[..., None], drawn + 1, drawn)
    is_drawn = torch.arange(drawn.shape[-1], device=device) < places[..., None]
    drawn = torch.where(is_drawn, drawn, last[..., None] + 1)
    chosen = torch.cat((fixed, drawn), dim=-1).sort(dim=-1).values[..., :width]
    return torch.where(block[..., None] < width, all_blocks, chosen).to(torch.int32)


def _anchor_stride(block: torch.Tensor, args: StructuredBlocksArgs) -> torch.Tensor:
    """The smallest `anchor_stride` * 2**k with at most `anchor_blocks` multiples in [0, block]."""
    stride = torch.full_like(block, args.anchor_stride)
    for _ in range(32):  # block ids are int32
        stride = torch.where(block // stride + 1 <= args.anchor_blocks, stride, 2 * stride)
    return stride


def _draw(
    unlisted: torch.Tensor, places: torch.Tensor, block: torch.Tensor, args: StructuredBlocksArgs
) -> torch.Tensor:
    """Floyd's sampling of `places` different numbers below `unlisted` (..., H_kv): int64 (..., H_kv, most places).

    Column d is meaningful where d < places. Draw d is uniform below unlisted - places + d + 1. Where an earlier draw
    took that number, draw d is unlisted - places + d instead.
    """
    most = args.width - args.local_blocks
    draw = torch.arange(most, device=block.device)
    head = torch.arange(block.shape[-1], device=block.device)[:, None]
    words = _philox_first_word(args.layer_idx, head, block[..., None], draw, args.seed % 2**64)
    bound = (unlisted - places)[..., None] + draw + 1
    candidate = (words * bound) >> 32
    taken: list[torch.Tensor] = []
    for d in range(most):
        number = candidate[..., d]
        if taken:
            is_taken = (torch.stack(taken, dim=-1) == number[..., None]).any(-1)
            number = torch.where(is_taken, bound[..., d] - 1, number)
        taken.append(number)
    return torch.stack(taken, dim=-1) if taken else block.new_zeros((*block.shape, 0))


def _philox_first_word(
    layer_idx: int, head: torch.Tensor, block: torch.Tensor, draw: torch.Tensor, seed: int
) -> torch.Tensor:
    """First 32-bit word of Philox-4x32-10 with key `seed` and counter (layer, head, block, draw), in int64."""
    head, block, draw = torch.broadcast_tensors(head, block, draw)
    words = [torch.full_like(block, layer_idx), head, block, draw]
    keys = [seed & _WORD, seed >> 32]
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, but keep the bits of the unsigned ones.
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, PHILOX_KEY_STEPS)]
    return words[0]
