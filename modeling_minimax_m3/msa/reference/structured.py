"""`structured_blocks_of` by definition: Philox-4x32-10, and the list of one query in plain integers."""

from dataclasses import dataclass

import torch

from ..arguments import Arguments


@dataclass(frozen=True, eq=False)
class StructuredBlocksArgs(Arguments):
    """`structured_blocks_of`.

    Attributes:
        own_block (...): int64, the block of each query; negative for padding.
        num_kv_heads (int): H_kv.
        layer_idx (int): Index of the layer, which the random blocks depend on.
        local_blocks, anchor_blocks, anchor_stride, random_blocks (int): As in `StructuredPattern`.
        seed (int): The 64 bits of the seed as a signed integer, which `torch.library` needs.
        num_blocks (int or None): A number that all of `own_block` are below, if known; for the `torch` backend.
    """

    own_block: torch.Tensor
    num_kv_heads: int
    layer_idx: int
    local_blocks: int
    anchor_blocks: int
    anchor_stride: int
    random_blocks: int
    seed: int
    num_blocks: int | None = None

    @property
    def width(self) -> int:
        """Places of a list."""
        return self.local_blocks + self.anchor_blocks + self.random_blocks

    def form(self, most_decode_tokens: int) -> str:
        """Returns "by position"."""
        return "by position"


# Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words, a function of the counter's four words and the key's two."""
    words, mask = counter, 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = (
            (second >> 32) ^ words[1] ^ key[0],
            second & mask,
            (first >> 32) ^ words[3] ^ key[1],
            first & mask,
        )
        key = ((key[0] + PHILOX_KEY_STEPS[0]) & mask, (key[1] + PHILOX_KEY_STEPS[1]) & mask)
    return words


def structured_block_list(
    block: int,
    head: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
) -> list[int]:
    """The key blocks of every query in `block`, for one key/value head of one layer, ascending."""
    width = local_blocks + anchor_blocks + random_blocks
    if block + 1 <= width:
        return list(range(block + 1))
    listed = {max(block - i, 0) for i in range(local_blocks)}
    if anchor_blocks > 0:
        stride = anchor_stride
        while block // stride + 1 > anchor_blocks:
            stride *= 2
        listed |= set(range(0, block + 1, stride))

    # Floyd's sampling fills the remaining places from the n blocks that are not listed, in id order. Draw d takes a
    # number below n - places + d + 1. If an earlier draw took that number, draw d takes n - places + d instead. A
    # 32-bit word w becomes a number below m as the upper half of w * m.
    unlisted = [other for other in range(block + 1) if other not in listed]
    places = width - len(listed)
    drawn: set[int] = set()
    for draw in range(places):
        bound = len(unlisted) - places + draw + 1
        word = philox((layer_idx, head, block, draw), (seed & 0xFFFFFFFF, seed >> 32))[0]
        number = (word * bound) >> 32
        drawn.add(bound - 1 if number in drawn else number)
    return sorted(listed | {unlisted[number] for number in drawn})


def structured_blocks_of(args: StructuredBlocksArgs) -> torch.Tensor:
    """Key blocks chosen by position alone: int32 (..., H_kv, width), ascending ids, -1 after the last."""
    own_block, num_kv_heads = args.own_block, args.num_kv_heads
    rows = []
    for block in own_block.flatten().tolist():
        for head in range(num_kv_heads):
            listed = structured_block_list(
                block, head, args.layer_idx, args.local_blocks, args.anchor_blocks, args.anchor_stride,
                args.random_blocks, args.seed % 2**64,
            )  # fmt: skip
            rows.append(listed + [-1] * (args.width - len(listed)))
    lists = torch.tensor(rows, dtype=torch.int32, device=own_block.device)
    return lists.view(*own_block.shape, num_kv_heads, args.width)
